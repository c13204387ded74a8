"""Pruning at initialisation: one score of every edge before training, masks that never change after it.

SNIP and GraSP look at the data, SynFlow does not. All of them rank the edges of all layers together.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from growfx.distributed import ranks
from growfx.errors import ConfigError, DataError
from growfx.masked.isolation import undisturbed
from growfx.masked.optimizers import GROUP_STEP, optimizers_together
from growfx.masked.shared import is_shared
from growfx.methods.masks import dense_gradients
from growfx.methods.session import Session
from growfx.methods.stepwise.course import Course
from growfx.methods.stepwise.sparse_start import SparseInit, StaticMasks
from growfx.options import Unused, option
from growfx.passes.path_products.products import path_gradients
from growfx.selection.choose import top
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["SNIP", "GraSP", "SynFlow"]

_BEFORE = "before the first step"


@dataclass(frozen=True)
class SNIP(SparseInit):
    """Keep the edges whose removal would change the loss most: largest ``|g * w|`` (Lee et al., SNIP, ICLR 2019).

    In `growfx.train` g is the gradient of the loss summed over the first `score_batches` batches, in training mode; of
    the look at the data nothing remains but the masks. In the user's own loop there are no data yet when the method is
    attached. There the network stays dense for one step, g is the gradient of that step, and the step is taken back:
    weights, buffers and optimizer state are again what they were at `attach` (load weights before it), and then the
    masks apply. Where that gradient is not finite, as in the first steps of a loss scaler, the next one is taken.

    Deviations: 1. the weights are not drawn anew after the choice; 2. biases are never removed; 3. in a loop of one's
    own the learning rate schedule has moved on by the step taken back.

    Attributes:
        density: of all masked layers together that are trained.
        score_batches: batches to take the gradient of, all of one epoch at most; the paper takes one.
    """

    name: ClassVar[str] = "snip"
    warns_of_loss: ClassVar[bool] = False
    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            ("score_batches",),
            lambda use: "in your own loop, where the first step is scored" if use.own_loop else "",
        ),
    )

    density: float = option(0.1, low=0, high=1, open_low=True)
    score_batches: int = option(1, low=1)

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        course.edges_at(self.density)
        if course.session is None:
            course.memory[_BEFORE] = _snapshot(course)
            return {}
        with undisturbed(course.net):
            batches = _first_batches(course.session, self.score_batches)
            return self._chosen(course, _summed_gradients(course, course.session, batches))

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        if _BEFORE not in course.memory:
            return None
        gradients = dense_gradients(course.net, course.layers)
        with course.net.whole_weights():
            return self._chosen_before(course, gradients)

    def _chosen_before(self, course: Course, gradients: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the masks chosen by the step just made, after taking it back; None where its gradients are no use."""
        _put_back(course, course.memory[_BEFORE])
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            return None
        del course.memory[_BEFORE]
        # a step taken back explored nothing
        course.ever_active = {name: torch.zeros_like(mask) for name, mask in course.ever_active.items()}
        return self._chosen(course, gradients)

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return _BEFORE in course.memory

    def _chosen(self, course: Course, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores = {name: (gradients[name] * layer.parameter.detach()).abs() for name, layer in course.layers.items()}
        _require_signal(scores, self.name)
        kept = top(scores, course.edges_at(self.density), EdgeKeys(self.seed, "snip"))
        return self._initialised(course, kept.masks)


@dataclass(frozen=True)
class GraSP(StaticMasks):
    """Remove the edges whose removal keeps the gradient flow: largest ``-w * (H g)`` (Wang et al., GraSP, ICLR 2020).

    g is the gradient and H the Hessian of the loss over the first `score_batches` batches, in training mode, with
    class scores divided by `temperature`. Dropout draws the same numbers for both, so H is the Hessian of the very loss
    that g is the gradient of. It needs data and second derivatives, so it runs in `growfx.train` only.

    Deviations: 1. the batches are those of the run, not so many images of each class; 2. the last layer is not drawn
    anew first.

    Attributes:
        score_batches: batches to differentiate over, all of one epoch at most. The authors take 10 images a class, so
            that CIFAR-100 wants 8 batches of 128.
        temperature: what the class scores are divided by.
    """

    name: ClassVar[str] = "grasp"
    warns_of_loss: ClassVar[bool] = False
    score_batches: int = option(1, low=1)
    temperature: float = option(200.0, low=0, open_low=True)

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        if course.session is None:
            raise ConfigError("method `grasp` takes second derivatives at the start: run it through growfx.train")
        edges = course.edges_at(self.density)
        with undisturbed(course.net):
            batches = _first_batches(course.session, self.score_batches)
        flow = _hessian_gradients(course, course.session, batches, self.temperature)
        scores = {name: -layer.parameter.detach() * flow[name] for name, layer in course.layers.items()}
        _require_signal(scores, self.name)
        kept = top(scores, edges, EdgeKeys(self.seed, "grasp"), largest=False)
        return self._initialised(course, kept.masks)


@dataclass(frozen=True)
class SynFlow(StaticMasks):
    """Keep the edges that carry most of the flow of magnitudes (Tanaka et al., SynFlow, NeurIPS 2020); no data needed.

    The score of an edge is ``|w| dR/d|w|``: the products of all magnitudes along all paths through it, by the path
    rules of the graph in float64 (`growfx.path_products`). It is computed anew in each of `rounds` rounds, under the
    masks of the round before, and ``density ** (round / rounds)`` of the edges are kept.

    Deviations: 1. products of activations, gates and attention count as the path rules say, where the released code
    multiplies what it finds; 2. a weight that its layer standardises counts by its own magnitude; 3. a layer whose
    weights are all zero, as some heads start, counts as if they were one: nothing would flow otherwise.

    Attributes:
        rounds: how often the scores are computed; with 1 whole layers may vanish.
        norm: "identity" counts norms and learned scales (and weights without a mask) as one: the paper's network of
            magnitudes in evaluation mode, for a freshly built batch norm. "fold" counts present values: norms that
            start at zero, as in the residual branches of timm's ResNets, then leave their branch without flow.
    """

    name: ClassVar[str] = "synflow"
    warns_of_loss: ClassVar[bool] = False
    off_path: ClassVar[str] = "left"
    rounds: int = option(100, low=1, high=10_000)
    norm: str = option("identity", choices=("identity", "fold"))

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        edges, keys = course.edges_at(self.density), EdgeKeys(self.seed, "synflow")
        share = edges / course.numel
        sizes = {name: size if bool(size.any()) else torch.ones_like(size) for name, size in course.magnitudes.items()}
        masks = course.masks
        for number in range(1, self.rounds + 1):
            kept = edges if number == self.rounds else round(course.numel * share ** (number / self.rounds))
            masks = top(_flow(course, sizes, masks, self.norm), kept, keys, masks).masks
        missing = edges - sum(int(mask.sum()) for mask in masks.values())
        if missing > 0:  # the network had fewer edges than asked for
            absent = {name: ~mask for name, mask in masks.items()}
            more = top(sizes, missing, keys, absent).masks
            masks = {name: mask | more[name] for name, mask in masks.items()}
        return self._initialised(course, masks)


def _flow(course: Course, sizes: Mapping[str, Tensor], masks: Mapping[str, Tensor], norm: str) -> dict[str, Tensor]:
    """``|w| dR/d|w|`` up to one factor, float64, zero outside `masks`."""
    active = {name: sizes[name].double() * mask for name, mask in masks.items()}
    zero = {
        name: layer.mask.double()
        for name, layer in course.net.layers.items()
        if name not in active and not bool(layer.parameter.detach().any())
    }
    paths = path_gradients(course.net, {**active, **zero}, norm=norm, unit_scales=norm == "identity")
    return {name: paths.scores[name].mul_(size) for name, size in active.items()}


# -- gradients of a few batches -----------------------------------------------------------------------------------


def _first_batches(session: Session, count: int) -> list[tuple[Tensor, Tensor]]:
    batches = list(itertools.islice(session.batches(), count))
    if not batches:
        raise DataError("the training loader gives no batches to score edges by")
    return batches


def _require_signal(scores: Mapping[str, Tensor], method: str) -> None:
    """Scores that are all equal would be a random choice under another name."""
    if not any(bool(score.any()) for score in scores.values()):
        raise ConfigError(
            f"method `{method}` finds a score of zero for every edge: no gradient passes a layer whose weights are all "
            "zero, as some heads start; give it other initial weights"
        )


def _zeros(course: Course) -> dict[str, Tensor]:
    return {name: torch.zeros_like(layer.parameter.detach()) for name, layer in course.layers.items()}


def _summed_gradients(
    course: Course, session: Session, batches: list[tuple[Tensor, Tensor]], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Return the gradient of the loss summed over `batches`, per layer of the course; `.grad` is not changed.

    The mean over ranks, each with its own batches.
    """
    total = _zeros(course)
    for images, targets in batches:
        loss = session.loss(_cooled(course.net(images), temperature), targets)
        for name, gradient in zip(total, _derivatives(loss, course), strict=True):
            if gradient is not None:
                total[name] += gradient
    _average(course, total)
    return total


def _average(course: Course, gradients: Mapping[str, Tensor]) -> None:
    if is_shared(course.net):
        ranks.average(gradients.values())


def _derivatives(value: Tensor, course: Course, *, differentiable: bool = False) -> Sequence[Tensor | None]:
    """Return the gradient of `value` for every layer of the course; None where it does not depend on the layer."""
    parameters = [layer.parameter for layer in course.layers.values()]
    return torch.autograd.grad(value, parameters, create_graph=differentiable, allow_unused=True)


def _hessian_gradients(
    course: Course, session: Session, batches: list[tuple[Tensor, Tensor]], temperature: float
) -> dict[str, Tensor]:
    """Return H g per layer of the course: the Hessian of the summed loss times its gradient."""
    twice = torch.backends.cudnn.flags(enabled=False) if _is_recurrent(course.net) else nullcontext()
    # attention has a second derivative only where it is written out
    with sdpa_kernel(SDPBackend.MATH), twice:
        with undisturbed(course.net):
            flow = _summed_gradients(course, session, batches, temperature)
        total = _zeros(course)
        with undisturbed(course.net):
            for images, targets in batches:
                loss = session.loss(_cooled(course.net(images), temperature), targets)
                _add_second_derivative(course, loss, flow, total)
    _average(course, total)
    return total


def _add_second_derivative(
    course: Course, loss: Tensor, flow: Mapping[str, Tensor], total: Mapping[str, Tensor]
) -> None:
    try:
        parts = zip(flow.values(), _derivatives(loss, course, differentiable=True), strict=True)
        products = [(part * along).sum() for along, part in parts if part is not None and part.requires_grad]
        if not products:
            return
        found = _derivatives(torch.stack(products).sum(), course)
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        if "derivative" not in text and "differentiate twice" not in text:
            raise
        raise ConfigError(
            f"method `grasp` needs second derivatives, and an operator of this network or its loss has none ({text})"
        ) from error
    for name, part in zip(total, found, strict=True):
        if part is not None:
            total[name].add_(part)


def _is_recurrent(net: MaskedGraph) -> bool:
    return any(isinstance(module, nn.RNNBase) for module in net.modules())


def _cooled(output: Any, temperature: float) -> Any:
    """A network's output (any nest of containers) with every tensor divided by `temperature`."""
    return pytree.tree_map(lambda value: value / temperature if isinstance(value, Tensor) else value, output)


# -- leaving no trace ---------------------------------------------------------------------------------------------


def _snapshot(course: Course) -> dict[str, Any]:
    """Copies of all parameters, buffers and optimizer state; masks aside.

    The state of further optimizers, which a method cannot find again by name, is kept in `course.tools`.
    """
    others = optimizers_together(course.optimizer, course.layers.values())[1:]
    course.tools[_BEFORE] = [(other, _state_of(other)) for other in others]
    return {
        "tensors": {name: value.detach().clone() for name, value in _tensors(course.net).items()},
        **_state_of(course.optimizer),
    }


def _put_back(course: Course, snapshot: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for name, value in _tensors(course.net).items():
            value.copy_(snapshot["tensors"][name])
    _restore(course.optimizer, snapshot)
    before = {id(other): state for other, state in course.tools.get(_BEFORE, [])}
    for other in optimizers_together(course.optimizer, course.layers.values())[1:]:
        _restore(other, before.get(id(other), {}))  # one unknown then had not stepped


def _state_of(optimizer: Optimizer) -> dict[str, Any]:
    return {
        "optimizer": copy.deepcopy(optimizer.state_dict()["state"]),
        "group_steps": [copy.deepcopy(group.get(GROUP_STEP)) for group in optimizer.param_groups],
    }


def _restore(optimizer: Optimizer, before: Mapping[str, Any]) -> None:
    """Give an optimizer the state it had; rates and the like belong to whoever schedules them."""
    groups = optimizer.state_dict()["param_groups"]
    steps = before.get("group_steps", [])
    for group, step in itertools.zip_longest(groups, steps[: len(groups)]):
        group.pop(GROUP_STEP, None)
        if step is not None:
            group[GROUP_STEP] = copy.deepcopy(step)
    optimizer.load_state_dict({"state": copy.deepcopy(dict(before.get("optimizer", {}))), "param_groups": groups})


def _tensors(net: MaskedGraph) -> dict[str, Tensor]:
    masks = {id(layer.mask) for layer in net.layers.values()}
    named = itertools.chain(net.named_parameters(), net.named_buffers())
    return {name: value for name, value in named if id(value) not in masks}
