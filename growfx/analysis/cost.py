"""What a network costs: multiply-accumulates per layer, and training cost in dense-equivalent epochs.

Counting follows the sparse-training literature (Evci et al., RigL, ICML 2020, app. H; Sundar & Dwaraknath,
ReScience C 2021): a layer's cost is its dense cost times its density, a training step is one forward pass and
a backward pass of twice that, f_S + 2 f_S, or f_S + f_S + f_D where absent edges get a gradient too.
Deviations: what no mask touches (unmasked layers, products of activations as in attention) is counted too, at
full cost; biases, norms, activations and pooling are not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from growfx.analysis.flop_formulas import flop_formulas
from growfx.errors import CheckpointError
from growfx.masked.layers import MaskedLayer
from growfx.masked.twins import is_maskable, weight_name_of
from growfx.recorded.inputs import Inputs

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = [
    "ONE_AT_A_TIME",
    "CostMeter",
    "ForwardCost",
    "forward_cost",
    "forward_flops",
    "layer_flops",
    "step_cost",
    "training_cost",
]

_WEIGHT_SUFFIX = ".effective_weight"


@dataclass(frozen=True)
class ForwardCost:
    """Dense multiply-accumulates of one sample's forward pass.

    `layers`: by masked layer, 0 for layers that evaluation never uses. `rest`: of everything no mask touches.
    `uncounted`: by layer whose weight is used but by nothing that is counted, the operator.
    """

    layers: Mapping[str, float]
    rest: float
    uncounted: Mapping[str, str] = field(default_factory=dict)

    @property
    def dense(self) -> float:
        """MACs of the whole network with every weight active."""
        return sum(self.layers.values()) + self.rest

    def sparse(self, densities: Mapping[str, float]) -> float:
        """MACs of the whole network at the given layer densities."""
        return sum(macs * densities[name] for name, macs in self.layers.items()) + self.rest


# Modes of a network and torch's switch for fused attention are changed while counting.
ONE_AT_A_TIME = threading.RLock()


def forward_cost(net: MaskedGraph, example_inputs: Tensor | Sequence[Tensor] | None = None) -> ForwardCost:
    """Count one evaluation forward pass over the recorded graph.

    `example_inputs`: as the network takes them, any batch size; default: those it was recorded with. Weights
    used functionally (`F.linear(x, weight)`, attention) count for their layer. A network whose recording is
    not faithful is counted by running its modules; weights it uses outside their module then count as `rest`.
    """
    inputs = net.example(batch=1) if example_inputs is None else net.inputs_like(example_inputs)
    batch = next((value.shape[0] for value in inputs.values if isinstance(value, Tensor) and value.ndim), 1)
    if inputs.batch is not None and not net.batch_is_free:
        batch = 1  # the first dimension is no batch, so the inputs are one sample
    macs = dict.fromkeys(net.layers, 0.0)
    users: dict[str, str] = {}
    # recording runs the model, which is not to be counted
    graph = net.graph_for(inputs) if net.trace_report.faithful else None
    with _counting(net) as counter:
        if graph is not None:
            counting = _GraphCounter(net, graph, counter, macs)
            counting.run(*inputs.values)
            users = counting.users
        else:
            _run_modules(net, inputs, counter, macs)
        total = counter.get_total_flops() / 2
    rest = max(total - sum(macs.values()), 0.0)
    uncounted = {name: user for name, user in users.items() if not macs[name]}
    return ForwardCost({name: value / batch for name, value in macs.items()}, rest / batch, uncounted)


def layer_flops(net: MaskedGraph, example_inputs: Tensor | Sequence[Tensor] | None = None) -> dict[str, float]:
    """Return the dense MACs of each masked layer for one sample; arguments as `forward_cost`."""
    return dict(forward_cost(net, example_inputs).layers)


def forward_flops(net: MaskedGraph, example_inputs: Tensor | Sequence[Tensor] | None = None) -> tuple[float, float]:
    """Return (sparse, dense) MACs of one sample's forward pass under the masks of the moment."""
    cost = forward_cost(net, example_inputs)
    return cost.sparse(_densities(net)), cost.dense


def step_cost(sparse: float, dense: float, *, dense_gradient: bool = False) -> float:
    """Return the MACs of one sample's training step, given those of its sparse and dense forward pass, f_S and f_D.

    Forward, gradient of the activations and gradient of the weights: 3 f_S; 2 f_S + f_D where the gradient of absent
    edges is computed too.
    """
    return 2 * sparse + (dense if dense_gradient else sparse)


def training_cost(sparse: float, dense: float, *, gradient_every: int | None = None) -> float:
    """Return the MACs of an average training step (one sample) by the formulas of the literature.

    Static masks, SET, pruning (over the mean of f_S): 3 f_S. With `gradient_every` = 1, SNFS: 2 f_S + f_D. With
    `gradient_every` = dT, RigL: (3 dT f_S + 2 f_S + f_D) / (dT + 1), where a step with a dense gradient comes on top of
    dT others (Evci et al., ICML 2020, app. H).
    """
    if gradient_every is None:
        return step_cost(sparse, dense)
    with_gradient = step_cost(sparse, dense, dense_gradient=True)
    if gradient_every == 1:
        return with_gradient
    return (gradient_every * step_cost(sparse, dense) + with_gradient) / (gradient_every + 1)


class CostMeter:
    """Adds up the cost of a training, in units of one dense epoch.

    A step under masks with forward cost f_S counts `step_cost` over 3 f_D. The masks are read when the meter is made
    and by `read_masks`; call that whenever they have changed.
    """

    def __init__(self, net: MaskedGraph, example_inputs: Tensor | Sequence[Tensor] | None = None) -> None:
        self._net = net
        self.cost = forward_cost(net, example_inputs)
        self.dense_equivalent_epochs = 0.0
        self.epochs = 0.0
        self.read_masks()

    def read_masks(self) -> None:
        """Count what follows under the masks of the moment."""
        self._share = self.cost.sparse(_densities(self._net)) / self.cost.dense if self.cost.dense else 1.0

    def add_steps(self, steps: int, steps_per_epoch: int, *, dense_gradient: bool = False) -> float:
        """Count steps of an epoch that has `steps_per_epoch`; return what was added."""
        epochs = steps / steps_per_epoch
        added = epochs * step_cost(self._share, 1.0, dense_gradient=dense_gradient) / 3
        self.epochs += epochs
        self.dense_equivalent_epochs += added
        return added

    def state_dict(self) -> dict[str, float]:
        """Return both sums."""
        return {"epochs": self.epochs, "dense_equivalent_epochs": self.dense_equivalent_epochs}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from `state_dict()`; anything else is a `CheckpointError`."""
        if set(state) != set(self.state_dict()):
            raise CheckpointError(f"a cost meter's state has {sorted(self.state_dict())}, not {sorted(state)}")
        self.epochs = float(state["epochs"])
        self.dense_equivalent_epochs = float(state["dense_equivalent_epochs"])


def _densities(net: MaskedGraph) -> dict[str, float]:
    return {name: layer.density for name, layer in net.layers.items()}


class _NoModules:
    """In the place of what tells torch's counter which modules run: that fails on a module whose input is a view of a
    parameter (learned queries) where no gradients are taken, and totals do not need it.
    """

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _counting(net: MaskedGraph) -> Generator[FlopCounterMode]:
    """Evaluation mode without gradients, in operators that torch's counter knows; modes are put back."""
    with ONE_AT_A_TIME:  # another thread would take what holds meanwhile for what was there before
        before = [(module, module.training) for module in net.shell.modules()]
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder operators are not counted
        net.shell.eval()
        try:
            counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
            counter.mod_tracker = _NoModules()  # pyright: ignore[reportAttributeAccessIssue]
            with torch.no_grad(), counter:
                yield counter
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training in before:
                module.training = training


class _GraphCounter(fx.Interpreter):
    """Runs a recorded graph and books what each node costs on the layer whose weight it contracts."""

    def __init__(self, net: MaskedGraph, graph: fx.Graph, counter: FlopCounterMode, macs: dict[str, float]) -> None:
        super().__init__(net.shell, graph=graph)
        self._counter, self._macs = counter, macs
        self._names = {id(layer): name for name, layer in net.layers.items()}
        self._parameters = {id(layer.parameter): name for name, layer in net.layers.items()}
        self.users: dict[str, str] = {}  # by layer, the last operator on its weight that nothing is counted of
        self._weight_of: dict[fx.Node, str] = {}  # nodes that are a layer's weight, or computed from it alone

    def run_node(self, n: fx.Node) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(n)
        macs = (self._counter.get_total_flops() - before) / 2
        owner = self._owner(n)
        if n.op == "get_attr" or (owner is not None and macs == 0):
            if owner is not None:
                if n.op != "call_module":  # what a layer returns is no weight, though nothing is counted of it
                    self._weight_of[n] = owner  # a view, a transposition or a standardisation is still the weight
                if n.op != "get_attr":
                    self.users[owner] = self._operator(n)
        elif n.op == "call_module" and isinstance(module := self.fetch_attr(str(n.target)), nn.MultiheadAttention):
            self._add_attention(module, n)
        elif owner is not None:
            self._macs[owner] += macs
        return result

    def _operator(self, n: fx.Node) -> str:
        if n.op == "call_module":
            return f"`{type(self.fetch_attr(str(n.target))).__name__}`"
        return f"`{n.target if isinstance(n.target, str) else getattr(n.target, '__name__', str(n.target))}`"

    def _owner(self, n: fx.Node) -> str | None:
        if n.op == "get_attr":
            target = str(n.target)
            if target.endswith(_WEIGHT_SUFFIX):
                return self._names.get(id(self.fetch_attr(target.removesuffix(_WEIGHT_SUFFIX))))
            return self._parameters.get(id(self.fetch_attr(target)))
        if n.op == "call_module":
            return self._layer_of(self.fetch_attr(str(n.target)))
        owners = [self._weight_of[arg] for arg in n.all_input_nodes if arg in self._weight_of]
        return owners[0] if owners else None

    def _layer_of(self, module: nn.Module) -> str | None:
        """The masked layer that a module is, or whose weight it holds, too."""
        name = self._names.get(id(module))
        if name is not None or not is_maskable(module):
            return name
        return self._parameters.get(id(module._parameters.get(weight_name_of(module))))

    def _add_attention(self, module: nn.MultiheadAttention, n: fx.Node) -> None:
        """Book the two projections of an attention layer; its products of activations stay in the rest."""
        arguments = [*n.args, *(n.kwargs[key] for key in ("query", "key", "value") if key in n.kwargs)]
        tokens = [self.env[arg].numel() // self.env[arg].shape[-1] for arg in arguments[:3] if isinstance(arg, fx.Node)]
        width = module.embed_dim
        for part, macs in (
            (module, width * width * sum(tokens)),
            (module.out_proj, width * width * tokens[0]),
        ):
            if (owner := self._layer_of(part)) is not None:
                self._macs[owner] += macs


def _run_modules(net: MaskedGraph, inputs: Inputs, counter: FlopCounterMode, macs: dict[str, float]) -> None:
    """Run the model itself and book what happens inside each masked module."""
    started: list[int] = []

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            macs[name] += (counter.get_total_flops() - started.pop()) / 2

        return hook

    handles = []
    for name, layer in net.layers.items():
        assert isinstance(layer, MaskedLayer)
        handles.append(layer.register_forward_pre_hook(lambda *_: started.append(counter.get_total_flops())))
        handles.append(layer.register_forward_hook(leave(name)))
    try:
        net(*inputs.args, **inputs.kwargs)
    finally:
        for handle in handles:
            handle.remove()
