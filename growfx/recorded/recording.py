"""A recording in use: the graph, its compiled function, and the graph module that users get."""

from __future__ import annotations

import copy
import functools
import hashlib
import linecache
import sys
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from growfx.errors import TraceError
from growfx.recorded import graph_ops
from growfx.recorded.inputs import Inputs

__all__ = [
    "RECORDED_CONSTANT",
    "RecordFunction",
    "RecordedGraph",
    "compiled",
    "plain_graph_module",
    "without_compiler",
]

# What the names of buffers begin with that hold tensors from outside the model; they belong to its graphs alone.
RECORDED_CONSTANT = "_recorded_constant_"


@dataclass(frozen=True)
class RecordedGraph:
    """A recording in use.

    Attributes:
        graph: what was recorded.
        called: the modules it calls, in order.
        faithful: whether it computes what the model computes.
        run: its compiled function.
        code: the function's source, as fx prints it.
        batch_is_free: whether it holds for any batch size.
        holds_for_values: whether it holds for the values it was made with only.
        own_gradient: whether the model does something whose gradient the operators do not tell.
        used: the parameters it reads that no mask, embedding or norm accounts for, in order.
        holds: where the graph holds for some values that the model reads from its data alone: whether these inputs
            give them, in the given shell (None: it fails on them). None where it holds for all.
    """

    graph: fx.Graph
    called: list[str]
    faithful: bool
    run: Callable[..., Any]
    code: Any
    batch_is_free: bool = True
    holds_for_values: bool = False
    own_gradient: bool = False
    used: tuple[str, ...] = ()
    holds: Callable[[nn.Module, Inputs], bool | None] | None = None


# Records the net's shell for these inputs in a mode and checks the graph against the model; with `holds_for_values` on
# these very values only.
RecordFunction = Callable[..., RecordedGraph]


def plain_graph_module(
    shell: nn.Module, graph: fx.Graph, training: bool, shapes_are_fixed: bool = False
) -> fx.GraphModule:
    """A `torch.fx.GraphModule` that runs `graph` over the modules of `shell`."""
    taken = sorted(name for name in shell._modules if hasattr(fx.GraphModule, name))
    if taken:
        raise TraceError(
            f"the model has a submodule `{taken[0]}`, a name that torch.fx.GraphModule takes for itself; rename it to "
            "have a graph module"
        )
    root: dict[str, Any] = {}
    copied = copy.deepcopy(graph)
    for node in copied.nodes:
        target = str(node.target)
        if node.op == "get_attr" and target.endswith(".effective_weight"):
            layer = target.removesuffix(".effective_weight")
            node.op, node.target = "call_module", f"effective_weights.{layer.replace('.', '_')}"
            root[node.target] = EffectiveWeight(shell.get_submodule(layer))
        elif node.op == "call_module":
            root[target] = shell.get_submodule(target)
        elif node.op == "get_attr":
            root[target] = functools.reduce(getattr, target.split("."), shell)
    inputs = [node for node in copied.nodes if node.op == "placeholder"] if shapes_are_fixed else []
    for node in inputs:
        if node.meta.get("shape") is not None:
            with copied.inserting_after(inputs[-1]):
                copied.call_function(graph_ops.require_shape, (node, tuple(node.meta["shape"])))
    module = fx.GraphModule(root, copied, type(shell).__name__)
    module.training = training
    return module


class EffectiveWeight(nn.Module):
    """Gives the effective weight of a masked layer that a recorded program reads without calling the layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, or it would be registered as a submodule

    def forward(self) -> Tensor:
        return self.layer[0].effective_weight


def compiled(graph: fx.Graph) -> tuple[Callable[..., Any], Any]:
    """The Python function of a graph; its source can be read in a traceback for as long as the function lives."""
    code = graph.python_code("self")
    file = f"<growfx graph {hashlib.sha256(code.src.encode()).hexdigest()[:12]}>"
    scope = dict(code.globals)
    exec(compile(code.src, file, "exec"), scope)
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    weakref.finalize(scope["forward"], linecache.cache.pop, file, None)
    return scope["forward"], code


@contextmanager
def without_compiler() -> Generator[None]:
    """A recording started from compiled code runs as plain Python.

    The compiler's stance is one for the process: threads that change it at once would not leave it as it was.
    """
    # The stance comes second: it takes effect when it is made.
    with _ONE_AT_A_TIME, torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


_ONE_AT_A_TIME = threading.RLock()
