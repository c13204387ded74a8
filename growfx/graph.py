"""`MaskedGraph`: a model as a torch.fx graph over masked layers."""

from __future__ import annotations

import copy
import hashlib
import linecache
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from growfx import ranks
from growfx.errors import MaskError, TraceError
from growfx.inputs import Inputs
from growfx.layers import MaskedLayer, check_mask
from growfx.masked_uses import MaskedUses
from growfx.shards import check_recordable, fsdp_modules, own_part, part_of
from growfx.trace_report import TraceReport

__all__ = ["MaskedGraph", "RecordFunction", "RecordedGraph"]


@dataclass(frozen=True)
class RecordedGraph:
    """A recording in use.

    Attributes:
        graph: what was recorded.
        called: the modules it calls, in order.
        faithful: whether it computes what the model computes.
        run: its compiled function.
        code: the function's source, as fx prints it.
    """

    graph: fx.Graph
    called: list[str]
    faithful: bool
    run: Callable[..., Any]
    code: Any


# Graphs kept per mode: inputs that never have the same shape twice run the model's own forward from then on.
_MOST_RECORDINGS = 32

# Records the net's shell in its current mode for these inputs and checks the graph against the model; with
# `holds_for_values` on these very values only.
RecordFunction = Callable[..., RecordedGraph]


class MaskedGraph(fx.GraphModule):
    """A model rewritten into a torch.fx graph over masked layers; made by `growfx.wrap`.

    It behaves as the model in train and eval mode and has the model's parameters, buffers and submodules under
    their own names, with a bool buffer `<layer>.mask` beside each masked weight. A recorded graph holds for one mode
    and one input signature (shapes without the batch size, dtypes, devices); others are recorded when they first
    occur, and kept.

    Attributes:
        trace_report: what was recorded and what was left out.
        replicated: whether `DistributedDataParallel` holds it, so that all ranks must have the same masks.
    """

    trace_report: TraceReport

    def __init__(
        self,
        shell: nn.Module,
        example: Inputs,
        recorder: RecordFunction,
        report: TraceReport,
        find_identity: Callable[[], Any] = lambda: None,
    ):
        nn.Module.__init__(self)
        self._adopt(shell)
        self._example, self._recorder = example, recorder
        self._recordings: dict[tuple[bool, Any], RecordedGraph] = {}
        # Recordings that hold for the values they were made with, to work on where the model takes values out of data.
        self._looks_inside: dict[tuple[bool, Any], RecordedGraph] = {}
        self._graph = fx.Graph()
        self._code = ""
        self.meta: dict[str, Any] = {}
        self.training = shell.training
        self.trace_report = report
        # Telling where a model came from may need building others to compare: only done when asked for.
        self._identity: tuple[Callable[[], Any]] | Any = (find_identity,)
        self.replicated, self._compared = False, False
        self._searched_as: type | None = None  # `fully_shard` gives what it is called on another class
        self._gathers_inside = False
        # In a plain dict the layers would become submodules of their own.
        self._named_layers: tuple[dict[str, MaskedLayer]] = ({},)
        self._tied: tuple[list[list[MaskedLayer]]] = ([],)

    def _adopt(self, shell: nn.Module) -> None:
        """Be the shell's root: share its very registries, so that whatever changes one changes the other."""
        self._shell = (shell,)  # in a tuple, or it would be registered as a submodule
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = shell.__dict__[registry]

    @property
    def identity(self) -> Any:
        """Where the model came from, for `growfx.save`; None when unknown."""
        if isinstance(self._identity, tuple):
            self._identity = self._identity[0]()
        return self._identity

    # -- masks --------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, MaskedLayer]:
        """Masked layers by name, in data-flow order; layers with tied weights appear once."""
        return self._named_layers[0]

    @property
    def nnz(self) -> int:
        """Active weights of all masked layers."""
        return sum(layer.nnz for layer in self.layers.values())

    @property
    def numel(self) -> int:
        """Weights of all masked layers, active or not."""
        return sum(layer.numel for layer in self.layers.values())

    @property
    def density(self) -> float:
        """Active weights over all weights of the masked layers."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def sharded(self) -> bool:
        """Whether each rank has a part of the weights (`fully_shard`)."""
        return any(layer.sharded for layer in self.layers.values())

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks of the named layers; weights outside the new masks become +0.0.

        Args:
            masks: layer name -> bool tensor of the weight's shape. Nothing is changed unless all of them fit.

        Raises:
            MaskError: unknown layer, wrong shape or dtype.
        """
        for name, mask in masks.items():
            if name not in self.layers:
                raise MaskError(f"`{name}` is no masked layer; {_names(self.layers)}")
            check_mask(name, self.layers[name].mask, mask)
        for name, mask in masks.items():
            layer = self.layers[name]
            layer.mask.copy_(mask)
            layer.settle()

    def mask_digest(self) -> str:
        """SHA-256, in hex, over the names, shapes and packed masks of all masked layers, in order of their names."""
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            mask = self.layers[name].mask
            digest.update(f"{name}:{','.join(map(str, mask.shape))};".encode())
            digest.update(np.packbits(mask.cpu().numpy()).tobytes())
        return digest.hexdigest()

    def settle(self) -> None:
        """Make every stored parameter +0.0 outside its mask."""
        for layer in self.layers.values():
            layer.settle()

    def verify(self) -> None:
        """Check that every stored parameter is exactly +0.0 outside its mask.

        Raises:
            MaskError: names the layers where it is not.
        """
        wrong = []
        for name, layer in self.layers.items():
            outside = own_part(layer.parameter)[~part_of(layer.mask, layer.parameter)]
            if bool((outside != 0).any() | torch.signbit(outside).any()):
                wrong.append(name)
        if wrong:
            raise MaskError(f"stored weights outside the mask are not +0.0 in {', '.join(f'`{n}`' for n in wrong)}")

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Buffers that `DistributedDataParallel` need not send before each step; it asks this of what it wraps.

        Masks are chosen alike on every rank and compared; being asked is how the network learns of it.
        """
        self.replicated = True
        return [f"{name}.mask" for name in self._mask_owners()]

    def _compare_ranks(self) -> None:
        """Compare the masks once, in the first forward that all ranks make together."""
        if ranks.within_ddp():
            # also where something around this network was wrapped
            self.replicated = self._compared = True
            ranks.require_same_masks(self)
        elif self.sharded:
            self._compared = True
            ranks.require_same_masks(self)

    def find_shards(self) -> None:
        """Find out what `fully_shard` was called on: this network, or modules inside that gather their own weights.

        The first forward after a change of the mode or of this class looks, and a method when it is attached.
        """
        found = fsdp_modules(self)
        self._searched_as, self._gathers_inside = type(self), any(module is not self for module in found)
        for layer in self.layers.values() if found else ():
            layer.sharded = True

    # -- graphs -------------------------------------------------------------------------------------------------------

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Inputs the model accepts: those given to `growfx.wrap`, with `batch` rows, on the net's device."""
        device = next(chain_tensors(self), torch.empty(0)).device
        move = lambda v: v.to(device) if isinstance(v, Tensor) else v  # noqa: E731
        return pytree.tree_map(move, self._example.with_batch(batch).args)

    def graph_at(self, *inputs: Any, training: bool = False) -> fx.Graph:
        """The recorded graph for inputs like these in the given mode; targets of its nodes are names in this net.

        Where the model takes values out of its data the graph holds for the values of these inputs only, and looks
        into the modules that `trace_report.opaque` lists: a graph to work on, not to run on others.

        Raises:
            TraceError: the model cannot be recorded faithfully for these inputs.
        """
        given = Inputs(inputs, {})
        recording = self._recording(given, training)
        if self.trace_report.opaque or not recording.faithful:
            key = (training, given.signature)
            if key not in self._looks_inside:
                with _without_compiler(), in_mode(self.shell, training):
                    self._looks_inside[key] = self._recorder(self, given, holds_for_values=True)
            recording = self._looks_inside[key]
        if not recording.faithful:
            raise TraceError(
                "the recording is not faithful, so there is no graph to work on: "
                f"{self.trace_report.opaque.get('', '')} {' '.join(self.trace_report.notes)}"
            )
        return recording.graph

    def _recording(self, inputs: Inputs, training: bool) -> RecordedGraph:
        key = (training, inputs.signature)
        found = self._recordings.get(key)
        return found if found is not None else self._record(key, inputs)

    def _record(self, key: tuple[bool, Any], inputs: Inputs) -> RecordedGraph:
        check_recordable(self.shell)
        with _without_compiler(), in_mode(self.shell, key[0]):
            self._recordings[key] = self._recorder(self, inputs)
        if len(self._recordings) == 1 or key == (self.training, self._example.signature):
            self._show(self._recordings[key])
        return self._recordings[key]

    # What `torch.compiler.disable` sets; calling that here would import the whole compiler with growfx.
    _record._torchdynamo_disable = True  # type: ignore[attr-defined]

    def recorded(self, inputs: Inputs, training: bool) -> RecordedGraph | None:
        """The recording for inputs like these in the given mode, if there is one already."""
        return self._recordings.get((training, inputs.signature))

    def _show(self, recording: RecordedGraph) -> None:
        self._graph, code = recording.graph, recording.code
        # torch.compile reads these of every GraphModule.
        self._code, self._lineno_map, self._prologue_start = code.src, code._lineno_map, code._prologue_start

    def recompile(self) -> Any:
        """Compile the shown graph again after it was edited."""
        run, code = compiled(self._graph)
        for key, recording in self._recordings.items():
            if recording.graph is self._graph:
                self._recordings[key] = replace(recording, run=run, code=code)
                self._show(self._recordings[key])
        return code

    @property
    def shell(self) -> nn.Module:
        """The model's own class over the same masked modules and parameters."""
        return self._shell[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with its masked weights."""
        if not torch.compiler.is_compiling():
            if self._searched_as is not type(self):
                self.find_shards()
            if not self._compared and self.training:
                self._compare_ranks()
        if self._gathers_inside:  # before the forward of a module that a graph may pass by
            with MaskedUses(self.layers.values()):
                return self.shell(*args, **kwargs)
        inputs = Inputs(args, kwargs)
        recording = self.recorded(inputs, self.training)
        if recording is None and self._worth_recording(inputs):
            recording = self._recording(inputs, self.training)
        if recording is not None and recording.faithful:
            # On the shell, not on the net: a submodule of the model may be called `layers` or `graph`.
            return recording.run(self.shell, *args, **kwargs)
        with MaskedUses(self.layers.values()) if self.layers else nullcontext():
            return self.shell(*args, **kwargs)

    def _worth_recording(self, inputs: Inputs) -> bool:
        """Whether a graph for these inputs will be used again; else the model's own forward runs."""
        known = sum(training == self.training for training, _ in self._recordings)
        return not inputs.structural and known < _MOST_RECORDINGS

    def get_submodule(self, target: str) -> nn.Module:
        """The submodule of that name, also where the model calls one `layers` or `graph`."""
        return self.shell.get_submodule(target) if target else self

    def __getattr__(self, name: str) -> Any:
        # Called where the net itself has nothing of that name: `no_weight_decay()`, `pretrained_cfg`, ... of the model.
        shell = self.__dict__.get("_shell")
        if shell is None:
            raise AttributeError(name)
        return getattr(shell[0], name)

    # -- what an nn.Module does, with masks in mind -------------------------------------------------------------------

    def train(self, mode: bool = True) -> MaskedGraph:
        """Switch the mode, show its graph, and make stored weights obey their masks."""
        self.shell.train(mode)
        self.training, self._searched_as = mode, None
        self.settle()
        recording = self.recorded(self._example, mode)
        if recording is not None:
            self._show(recording)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state dict with one `<layer>.mask` per masked layer; weights are +0.0 outside their masks."""
        self.settle()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the net's own state dict, or the plain model's: then the masks stay as they are.

        Raises:
            MaskError: some masks are missing, or have another shape or dtype; names them.
        """
        names = [f"{layer}.mask" for layer in self._mask_owners()]
        given = [name for name in names if name in state_dict]
        if given and len(given) < len(names):
            missing = [f"`{n}`" for n in names if n not in state_dict]
            raise MaskError(f"the state dict has {len(given)} of {len(names)} masks; missing: {', '.join(missing)}")
        for name in given:
            layer = name.removesuffix(".mask")
            check_mask(layer, self.get_buffer(name), state_dict[name])
        if not given:
            own = {name: self.get_buffer(name) for name in names}
            state_dict = {**state_dict, **own}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._tie_masks()
        self.settle()
        return result

    def _mask_owners(self) -> Iterator[str]:
        return (name for name, module in self.named_modules(remove_duplicate=False) if isinstance(module, MaskedLayer))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MaskedGraph:
        super()._apply(fn, recurse)
        self._tie_masks()
        return self

    def _tie_masks(self) -> None:
        for first, *others in self._tied[0]:
            for other in others:
                other._buffers["mask"] = first.mask

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedGraph:
        clone = fx.GraphModule.__new__(MaskedGraph)
        memo[id(self)] = clone
        self.settle()
        recordings = self.__dict__["_recordings"]
        anew = ("_recordings", "_looks_inside", "_graph", "_recorder", "_identity", "meta")
        state = {k: v for k, v in self.__dict__.items() if k not in anew}
        clone.__dict__.update(copy.deepcopy(state, memo))
        clone.__dict__.update(
            _recorder=self._recorder, _looks_inside={}, _identity=self._identity, meta=dict(self.meta)
        )
        # A graph is never changed by running it; only one who edits a copy's graph needs a copy of the graph.
        clone.__dict__["_recordings"] = {key: replace(r, graph=copy.deepcopy(r.graph)) for key, r in recordings.items()}
        shown = next((key for key, r in recordings.items() if r.graph is self._graph), None)
        clone.__dict__["_graph"] = fx.Graph() if shown is None else clone._recordings[shown].graph
        return clone

    def __copy__(self) -> MaskedGraph:
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a MaskedGraph is not pickled: save `net.state_dict()`, or the network with `growfx.save(net, path)`"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __str__(self) -> str:
        kind = type(self.shell).__name__
        return f"MaskedGraph of {kind}: {len(self.layers)} masked layers, density {self.density:.4g}\n{self._code}"


def chain_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, then buffers."""
    yield from module.parameters()
    yield from module.buffers()


def _names(layers: Mapping[str, Any], limit: int = 6) -> str:
    shown = ", ".join(f"`{name}`" for name in list(layers)[:limit])
    return f"the masked layers are {shown}{f' and {len(layers) - limit} more' if len(layers) > limit else ''}"


def compiled(graph: fx.Graph) -> tuple[Callable[..., Any], Any]:
    """The Python function of a graph; its source can be read in a traceback."""
    code = graph.python_code("self")
    file = f"<growfx graph {hashlib.sha256(code.src.encode()).hexdigest()[:12]}>"
    scope = dict(code.globals)
    exec(compile(code.src, file, "exec"), scope)
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    return scope["forward"], code


def _without_compiler() -> AbstractContextManager[Any]:
    """A recording started from compiled code runs as plain Python."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Generator[None]:
    """`module` in train or eval mode; afterwards every submodule is in the mode it was in."""
    before = [(m, m.training) for m in module.modules()]
    if module.training != training:
        module.train(training)
    try:
        yield
    finally:
        for m, flag in before:
            m.training = flag
