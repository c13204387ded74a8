"""One step of training: forward, loss, backward over a window of batches, then optimizer and method."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from growfx.distributed import ranks
from growfx.errors import DataError, GrowfxError
from growfx.masked.graph import MaskedGraph
from growfx.masked.isolation import undisturbed
from growfx.masked.modules import chain_tensors
from growfx.options import TrainOptions
from growfx.training.evaluation import explaining_class_numbers, logits_of
from growfx.training.images import explaining_images
from growfx.training.randomness import randomness_of, set_randomness
from growfx.training.training_data import TargetWatch

if TYPE_CHECKING:
    from growfx.methods.base import Method

__all__ = ["TrainStep", "replicate", "unused_parameters", "windows"]

Batch = tuple[Tensor, Tensor]

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Far below any scale that a finite loss needs: what overflows here overflows at every scale.
_SMALLEST_SCALE = 2.0**-24


def windows(batches: Iterable[Any], length: int) -> Iterator[list[Any]]:
    """Yield lists of `length` batches, one for each step of the optimizer; the last may be shorter."""
    window: list[Any] = []
    for batch in batches:
        window.append(batch)
        if len(window) == length:
            yield window
            window = []
    if window:
        yield window


@dataclass(frozen=True)
class _Moment:
    """State that a forward pass in training changes besides gradients: buffers of the network, and random generators.

    buffers: module, name, tensor and a copy of it. random: see `randomness_of`, of `device`.
    """

    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]
    random: dict[str, Any]
    device: torch.device

    @classmethod
    def of(cls, net: MaskedGraph) -> "_Moment":
        masks = {id(layer.mask) for layer in net.layers.values()}
        named = [(module, name, value) for module in net.modules() for name, value in module._buffers.items()]
        own = {id(value): (module, name, value) for module, name, value in named if value is not None}
        kept = [(*entry, entry[2].clone()) for key, entry in own.items() if key not in masks]
        device = next(chain_tensors(net)).device
        return cls(kept, randomness_of(device), device)

    def put_back(self) -> None:
        with torch.no_grad():
            for module, name, value, copy in self.buffers:
                value.copy_(copy)
                module._buffers[name] = value  # a forward may have put another tensor in its place
        set_randomness(self.random, self.device)


class TrainStep:
    """Train on the batches of one step, in the order of a hand-written loop (see `growfx.methods`).

    Gradients are those of the mean loss over all images of the window; batch norm sees one batch at a time. They are
    unscaled, and those of absent edges taken, before they are clipped: what a method reads depends on neither. A step
    whose gradients overflow in fp16 is repeated on the same batches at a smaller scale, from the buffers (norm
    statistics) and random numbers (dropout) of the first try, so that the step is the one that a smaller scale would
    have made at once; method, learning rates, data and cost count it once.

    Attributes:
        net, optimizer, method: attached to each other before the first step.
        criterion: of class scores (B, classes), and class numbers (B) or mixed targets (B, classes).
        mix: turns images and class numbers into mixed images and targets; None leaves a batch unchanged.
        watch: of the targets that the loader gives.
    """

    def __init__(
        self, net: MaskedGraph, optimizer: Optimizer, method: "Method", criterion: nn.Module, options: TrainOptions
    ) -> None:
        self.net, self.optimizer, self.method, self.criterion = net, optimizer, method, criterion
        self.options = options
        self.mix: Callable[[Tensor, Tensor], Batch] | None = None
        self.watch = TargetWatch(options)
        self._device = next(chain_tensors(net)).device.type
        self._scaler = torch.amp.GradScaler(self._device) if options.amp == "fp16" else None
        self._replica: DistributedDataParallel | None = None
        self._replicated: list[Tensor] = []
        self._leaves_unused = ranks.world_size() > 1 and bool(unused_parameters(net))
        self._take_model()

    def _replicate_anew(self) -> None:
        """Let ranks exchange gradients of the edges there are now, where these are others (`storage` = "present")."""
        if self._replica is None:
            return
        now = self.net.kept_edges()
        if len(now) != len(self._replicated) or any(a is not b for a, b in zip(now, self._replicated, strict=True)):
            self._take_model()

    def _take_model(self) -> None:
        net = self.net
        self._replica = None  # its hooks go before there are others
        self._replica = replicate(net, self._leaves_unused) if ranks.world_size() > 1 else None
        self._replicated = net.kept_edges()
        model = net if self._replica is None else self._replica
        self._forward: Callable[..., Any] = torch.compile(model) if self.options.compile else model

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Return the loss of what the network gave for one batch.

        Raises `DataError` for class numbers that the network has no output for, where torch notices (on a CPU), and for
        mixed targets of other classes.
        """
        logits = logits_of(output)
        if targets.ndim == 2 and targets.shape != logits.shape:
            raise DataError(
                f"the training data has targets of shape {tuple(targets.shape)}, but the network gives scores of shape "
                f"{tuple(logits.shape)}; give class numbers (batch,), or a target for each class"
            )
        with explaining_class_numbers(targets, logits.shape[1]):
            return self.criterion(logits, targets)

    def __call__(self, *window: Batch) -> tuple[Tensor, bool]:
        """Train on batches (images, class numbers) on the network's device; return the mean loss over all images, and
        whether masks changed.

        Raises `GrowfxError` for gradients that overflow in fp16 at every scale of a finite loss, and `DataError` for
        images that the network cannot compute.
        """
        self._replicate_anew()
        for _, targets in window:
            self.watch.look(targets)
        batches = list(window) if self.mix is None else [self.mix(*batch) for batch in window]
        before = None if self._scaler is None else _Moment.of(self.net)  # nothing else is ever repeated
        loss = self._backward(batches)
        while not self._update() and ranks.finite(loss):
            assert before is not None
            before.put_back()
            self._start_again()
            loss = self._backward(batches)
        changed = self.method.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, changed

    def _backward(self, batches: Sequence[Batch]) -> Tensor:
        """Leave the gradients of the mean loss over all images; return that loss."""
        count = sum(len(images) for images, _ in batches)
        total: Tensor | None = None
        for number, (images, targets) in enumerate(batches, 1):
            with self._alone(number < len(batches)):
                with self._autocast():
                    with explaining_images(self.net, images):
                        output = self._forward(images)
                    loss = self.loss(output, targets) * (len(images) / count)
                (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _alone(self, more: bool) -> AbstractContextManager[Any]:
        """Ranks add up their gradients once a window, in its last backward pass."""
        return nullcontext() if self._replica is None or not more else self._replica.no_sync()

    def _autocast(self) -> AbstractContextManager[Any]:
        half = _HALVES.get(self.options.amp)
        return nullcontext() if half is None else torch.autocast(self._device, dtype=half)

    def _update(self) -> bool:
        """Step the optimizer; whether it did, which a loss scaler may prevent."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self.options.clip_grad is not None:
            for layer in self.net.layers.values():
                if layer.collects_gradient:
                    layer.take_dense_gradient()
            nn.utils.clip_grad_norm_(self.net.parameters(), self.options.clip_grad)
        if self._scaler is None:
            self.optimizer.step()
            return True
        before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= before

    def _start_again(self) -> None:
        assert self._scaler is not None
        if self._scaler.get_scale() < _SMALLEST_SCALE:
            raise GrowfxError(
                "the loss is finite, but in `amp` = `fp16` its gradients are not, at any scale; set `amp` to `bf16` or "
                "`none`, or lower `lr`"
            )
        self.optimizer.zero_grad(set_to_none=True)
        for layer in self.net.layers.values():
            layer.forget_dense_gradient()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss scaler: empty but for fp16."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        if self._scaler is not None:
            self._scaler.load_state_dict(dict(state))


def replicate(net: MaskedGraph, unused: bool | None = None) -> DistributedDataParallel:
    """Return `net` in `DistributedDataParallel`, which sends rank 0's weights and buffers to all.

    `unused`: whether some parameters get no gradient; None finds out.
    """
    unused = bool(unused_parameters(net)) if unused is None else unused
    # gradients need no copy beside what is sent
    return DistributedDataParallel(net, find_unused_parameters=unused, gradient_as_bucket_view=True)


def unused_parameters(net: MaskedGraph) -> list[str]:
    """Names of the parameters to be trained that the class scores, the network's first output, do not depend on.

    By one forward in training mode, on inputs as recorded.
    """
    with undisturbed(net), torch.enable_grad():
        example = net.example(2)
        found = pytree.tree_leaves(net(*example.args, **example.kwargs))
    outputs = [value for value in found if isinstance(value, Tensor)]
    reached = _leaves(outputs[0]) if outputs else set[int]()
    return [name for name, value in net.named_parameters() if value.requires_grad and id(value) not in reached]


def _leaves(output: Tensor) -> set[int]:
    """Ids of the tensors that gradients of `output` arrive at."""
    found, seen, waiting = set[int](), set[object](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only nodes that accumulate a gradient have one
        if isinstance(leaf, nn.Parameter):
            found.add(id(leaf))
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return found
