"""The parts of a training recipe, made by timm's factories: optimizer, schedule, loss, mixing, weight averaging.

And the randomness of an epoch.
"""

import math
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset

from growfx.data.loaders import sampler_of
from growfx.distributed import ranks
from growfx.errors import ConfigError, DataError, did_you_mean
from growfx.methods.session import Stage
from growfx.options import TrainOptions
from growfx.runs.checkpoint import content_digest
from growfx.training.evaluation import explaining_class_numbers

__all__ = [
    "make_average",
    "make_loss",
    "make_mixup",
    "make_optimizer",
    "pick_device",
    "private_randomness",
    "schedule_of",
    "seed_globally",
    "steps_of",
]


def pick_device(name: str) -> torch.device:
    """The device of that name, or with "auto" an accelerator if there is one; ConfigError if not usable."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"`device` = `{name}` cannot be used ({reason}); `auto` takes what there is") from error


def steps_of(loader: Any) -> int:
    """Batches of an epoch, on the rank that has the fewest; DataError when the loader does not know, or has none.

    Raises `ConfigError` for a loader that gives every rank the same images.
    """
    try:
        steps = len(loader)
    except TypeError as error:
        raise DataError("the training loader has no length; growfx needs to know the steps of an epoch") from error
    if steps == 0:
        raise DataError("the training loader gives no batches: there are fewer images than one batch")
    if ranks.world_size() > 1 and not _shares_out(loader):
        raise ConfigError(
            f"the training loader gives each of the {ranks.world_size()} ranks all images; share them out with "
            "`sampler=torch.utils.data.DistributedSampler(dataset)`, or give each rank its own `Subset`"
        )
    (most,) = ranks.largest(-steps)
    return -most


def _shares_out(loader: Any) -> bool:
    """Whether ranks may have different images; not where all have as many, by a sampler that shares nothing out."""
    sampler = sampler_of(loader)
    known = isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler)
    if not isinstance(loader, DataLoader) or not known or type(loader.batch_sampler) not in (BatchSampler, type(None)):
        own = True
    elif isinstance(sampler, DistributedSampler):
        own = sampler.num_replicas > 1
    elif isinstance(loader.dataset, Subset):
        own = content_digest([int(index) for index in loader.dataset.indices])
    else:
        own = len(loader.dataset)  # pyright: ignore[reportArgumentType] - its sampler counts it
    found = ranks.everyone(own)
    return own is True or len(set(found)) > 1


def make_optimizer(net: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """By timm's name; tensors of one dimension are not decayed.

    Raises:
        ConfigError: timm does not have it, or no parameter is trained.
    """
    from timm import optim

    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ConfigError("no parameter of the network is trained; set `requires_grad` of those that are to be")
    try:
        return optim.create_optimizer_v2(  # pyright: ignore[reportPrivateImportUsage]
            net,
            opt=options.optimizer,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        )
    except (ValueError, AssertionError, ImportError, KeyError) as error:
        names = map(str, optim.list_optimizers())  # pyright: ignore[reportPrivateImportUsage]
        hint = did_you_mean(options.optimizer, names)
        raise ConfigError(f"`optimizer` = `{options.optimizer}` cannot be used ({error}){hint}") from error


def make_loss(options: TrainOptions) -> nn.Module:
    """timm's loss of class scores (B, classes), given class numbers (B) or mixed targets (B, classes)."""
    from timm.loss.binary_cross_entropy import BinaryCrossEntropy

    if options.loss == "bce":
        return BinaryCrossEntropy(options.label_smoothing)
    return _CrossEntropy(options.label_smoothing)


class _CrossEntropy(nn.Module):
    """Cross-entropy of class numbers, smoothed; of mixed targets as they are, since mixing has smoothed them."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        self.hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
        self.soft = SoftTargetCrossEntropy()

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        return self.soft(scores, targets) if targets.ndim == scores.ndim else self.hard(scores, targets)


def make_mixup(options: TrainOptions, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix of images (B, C, H, W) and class numbers (B) into targets (B, classes), drawn from
    numpy's global generator; None where the options ask for neither.

    What it returns raises `ConfigError` for a batch of an odd number of images, and where cutmix is not allowed, and
    `DataError` for targets that are mixed already, or class numbers that are not there.
    """
    from timm.data.mixup import Mixup

    if not options.mixup and not options.cutmix:
        return None
    mix = Mixup(options.mixup, options.cutmix, label_smoothing=options.label_smoothing, num_classes=classes)

    def mixed(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:
            raise ConfigError(
                f"`mixup` and `cutmix` pair the images of a batch, and one has {len(images)}; choose an even batch "
                "size, and leave an odd rest out (`drop_last=True`)"
            )
        if options.cutmix and images.ndim != 4:
            raise ConfigError(
                f"`cutmix` cuts rectangles out of images (B, C, H, W), and a batch has shape {tuple(images.shape)}; "
                "`mixup` alone takes any shape"
            )
        rounds = bool(options.mixup) and not images.is_floating_point()  # cutmix alone only moves what there is
        if rounds and (images.dtype == torch.bool or images.ndim != 4):
            raise ConfigError(
                f"`mixup` blends numbers, and a batch is {images.dtype} of shape {tuple(images.shape)}; "
                "give floating-point inputs, or images (B, C, H, W) of whole numbers, whose blends are rounded"
            )
        if targets.ndim != 1:
            raise DataError(
                f"`mixup` and `cutmix` mix class numbers (batch,), and the training loader gives targets of shape "
                f"{tuple(targets.shape)}; mix in the loader or by these options, not both"
            )
        with explaining_class_numbers(targets, classes):
            # timm mixes in place, and the images may be the caller's own.
            blended, soft = mix(images.float() if rounds else images.clone(), targets)
            return blended.round().to(images.dtype) if rounds else blended, soft

    return mixed


def make_average(net: nn.Module, options: TrainOptions, steps: int) -> Any:
    """timm's ModelEmaV3 over a copy of `net` for rounds of `steps` steps; `update(net, step=0)` starts it anew.

    It remembers a tenth of the round, where the rate is near zero: a longer memory would mix in weights of the
    high rate. Norm statistics are averages already and are copied, as are the masks.
    """
    from timm.utils.model_ema import ModelEmaV3

    decay = min(options.ema_decay, 1 - 1 / max(1.0, 0.1 * steps))
    return ModelEmaV3(net, decay=decay, exclude_buffers=True)


def seed_globally(seed: int, epoch: int, loader: Any = None) -> None:
    """Seed every global generator, and a loader's own, from the run's seed and the epoch's number.

    Ranks draw their own numbers, but a sampler that shares the images out among them is seeded alike.
    """
    from timm.utils.random import random_seed

    state = np.random.SeedSequence([seed, epoch + 1]).generate_state(1)
    sampler = sampler_of(loader)
    if isinstance(sampler, DistributedSampler):
        sampler.set_epoch(int(state[0]))
    elif callable(set_epoch := getattr(sampler, "set_epoch", None)):  # torch's convention: else each epoch is the same
        set_epoch(max(0, epoch))
    if ranks.rank() and epoch >= 0:
        state = np.random.SeedSequence([seed, epoch + 1, ranks.rank()]).generate_state(1)
    random_seed(int(state[0]) >> 1)
    generator = getattr(loader, "generator", None)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(int(state[0]))


@contextmanager
def private_randomness() -> Generator[None]:
    """Leave the global generators as they were found."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm's transforms draw from it
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def schedule_of(optimizer: torch.optim.Optimizer, options: TrainOptions, stage: Stage, steps: int) -> Any:
    """The learning rates of a stage of epochs of `steps` steps: `step_update(n)` sets the rate of its step n.

    It needs no state to be continued.
    """
    peak = options.lr * stage.peak
    if stage.low is not None:
        return Triangle(optimizer, options.lr * stage.low, peak, stage.epochs * steps)
    warmup = min(options.warmup_epochs, stage.epochs / 2) if stage.warmup is None else stage.warmup
    kind: dict[str, Any] = {"sched": "cosine"}
    if stage.kind in ("final", "base"):
        kind = {
            "cosine": kind,
            "linear": {"sched": "poly", "decay_rate": 1.0},  # timm hands the power over as `decay_rate`
            "step": {"sched": "step", "decay_epochs": options.decay_epochs or stage.epochs / 3}
            | {"decay_rate": options.decay_rate},
            "constant": {"sched": "step", "decay_rate": 1.0},
        }[options.schedule]
    return _timm_schedule(optimizer, peak, peak * options.min_lr, stage.epochs, warmup, steps, **kind)


class Triangle:
    """A rate that climbs in a straight line from `low` to `peak` at half of `total` steps, and falls back."""

    def __init__(self, optimizer: torch.optim.Optimizer, low: float, peak: float, total: int) -> None:
        self.optimizer, self.low, self.peak, self.total = optimizer, low, peak, total

    def step_update(self, step: int) -> None:
        """Set the rate of step `step`, counted from 0."""
        # the middle of the step, so that both ends of a cycle are alike
        height = 1 - abs(2 * (step + 0.5) / self.total - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.low + (self.peak - self.low) * height


def _timm_schedule(
    optimizer: torch.optim.Optimizer, peak: float, low: float, epochs: int, warmup: float, steps: int, **kind: Any
) -> Any:
    """timm's schedule of a kind from `peak` to `low` over `epochs` of `steps` steps, after a linear warmup (epochs)."""
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    for group in optimizer.param_groups:
        # timm's schedulers take their peak from here and would keep that of the stage before.
        group["lr"] = group["initial_lr"] = peak
    schedule, _ = create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        warmup_epochs=math.floor(warmup * steps) / steps,  # type: ignore[arg-type]
        warmup_lr=peak * 0.1,
        min_lr=low,
        step_on_epochs=False,
        updates_per_epoch=steps,
        **kind,
    )
    return schedule
