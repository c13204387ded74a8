"""Train a masked network: growth rounds while the method asks for them, then one full schedule.

A growth round is a short cosine that anneals to near zero, so that rounds can be compared; what is scored on
the validation split are the averaged (EMA) weights under the masks of the moment. When the method stops, the
final training starts from the masks and weights it has put back.

Optimizer, schedule, loss and averaging are timm's. Everything random in an epoch is drawn from the global
generators, seeded at its start from the run's seed and the epoch's number; so a run that is continued from
the checkpoint of an epoch ends bit for bit as one that was never interrupted (same machine and threads).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growfx.distributed import ranks
from growfx.distributed.sharded import require_whole
from growfx.errors import ConfigError
from growfx.masked.doors import as_masked_graph
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.methods.starting import resuming
from growfx.methods.stepwise.fixed import Fixed
from growfx.options import TrainOptions
from growfx.runs.folder import RunFolder, refuse_existing
from growfx.runs.result import Result
from growfx.training.config import default_options, describe_run
from growfx.training.recipe import private_randomness
from growfx.training.run import Run
from growfx.training.scalars import Scalars
from growfx.training.unused import warn_of_unused

if TYPE_CHECKING:
    from growfx.methods.base import Method

__all__ = ["Result", "train"]


def train(
    net: MaskedGraph,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    method: "Method | None" = None,
    test_loader: Iterable[Any] | None = None,
    options: TrainOptions | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Result:
    """Train `net` in place; with `out`, write config, log, checkpoints and result to a run folder.

    Under an initialised process group of `torch.distributed` the ranks train one network together, in
    `DistributedDataParallel`: every rank calls this with the same arguments and its own part of the images, rank 0
    alone writes, and the result is the same on all. Without one this process trains alone.

    Args:
        net: from `growfx.wrap`. It is moved to `options.device`.
        train_loader: gives (images (B, ...), class numbers (B)), or targets (B, classes) that it has mixed itself; its
            length must be known. Its order follows torch's global generator, or the loader's `generator`, seeded every
            epoch. Batches beyond the length and class numbers -100 are left out, as torch's loss does, with a warning.
        val_loader: scores growth rounds and epochs, always in the same order.
        method: from `growfx.methods.create`, not yet attached; None trains under the current masks.
        test_loader: scored once, at the end.
        options: see `TrainOptions`; `changes` are single fields of it (`epochs=10`). Options without effect warn.
        out: run folder. `resume` continues the run in it (or starts one), `overwrite` replaces it.
        about: further facts for `config.json` and the artifact, which a continued run must share.

    Raises:
        ConfigError: an option out of its range, an unknown optimizer, a network without class scores, or one whose
            weights are spread over processes (`fully_shard`).
        CheckpointError: the run folder exists, is of another run, is damaged, or cannot be written.
        DataError: an empty loader, targets that are not class numbers of the network's outputs, or images that it
            cannot compute: of another type or shape, or one alone where its norms need two.
        GrowfxError: the loss is not finite.

    Example:
        >>> images, classes = torch.randn(64, 1, 4, 4), torch.arange(64) % 2
        >>> data = torch.utils.data.TensorDataset(images, classes)
        >>> loader = torch.utils.data.DataLoader(data, batch_size=32)
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)), images[:1])
        >>> method = growfx.methods.create("static", density=0.5)
        >>> result = growfx.train(net, loader, loader, method=method, epochs=1, device="cpu", progress=False)
        >>> result.epochs, result.steps, result.density
        (1, 2, 0.5)
    """
    net = as_masked_graph(net, "growfx.train")
    _check_method(method)
    if options is not None and not isinstance(options, TrainOptions):
        raise ConfigError(f"`options` expects a growfx.options.TrainOptions, got {type(options).__name__}")
    options = _changed(options or TrainOptions(), changes)
    chosen = Fixed() if method is None else method
    _check_weights(net, options, chosen)
    run = Run(net, train_loader, val_loader, test_loader, chosen, options, progress)
    _check_folder(out, resume, options)
    warn_of_unused(run, saved=out is not None, beside={"overwrite": overwrite, "about": about})
    config = describe_run(net, method, options) | dict(about or {})
    with private_randomness():
        if out is not None:
            ranks.on_first(lambda: refuse_existing(Path(out), resume=resume, overwrite=overwrite))
        try:
            # what a method refuses must leave no folder behind, and no run in it be replaced
            with resuming() if resume and out is not None and _has_checkpoint(Path(out)) else nullcontext():
                run.set_up()
            if out is not None:
                start = partial(RunFolder.start, Path(out), config, defaults=default_options(method))
                run.folder = ranks.on_first(partial(start, resume=resume, overwrite=overwrite))
            with run.interrupts if out is not None else nullcontext():
                return run.all()
        except BaseException:
            _release(net)
            raise
        finally:
            if run.folder is not None:
                run.folder.close()


def _check_weights(net: MaskedGraph, options: TrainOptions, method: Any) -> None:
    for parameter in net.parameters():
        require_whole(
            parameter,
            "growfx.train keeps networks whole, in `DistributedDataParallel`; call it with the network as it was "
            "before, or write the loop: `method.attach(net, optimizer, ...)`, then `method.step()` after each step",
        )
    why = getattr(method, "trains_absent", "") if options.storage == "present" else ""
    if why:
        raise ConfigError(
            f'`storage` = "present" keeps values of present edges only, and method `{method.name}` {why}; use another '
            'method, or `storage` = "dense"'
        )


def _check_folder(out: str | Path | None, resume: bool, options: TrainOptions) -> None:
    if out is None and resume:
        raise ConfigError("`resume` needs `out`, the folder of the run to continue")
    if options.tensorboard:
        Scalars.require()
        if out is None:
            raise ConfigError("`tensorboard` writes into the run folder; give `out`, or leave `tensorboard` out")


def _check_method(method: object) -> None:
    """Raise `ConfigError` unless it is a method, or None."""
    from growfx.methods import Method, names

    # Methods of others need not be subclasses, but they are begun.
    if method is None or (not isinstance(method, type) and callable(getattr(method, "begin", None))):
        return
    if isinstance(method, str) and method in names():
        hint = f'write `method=growfx.methods.create("{method}", ...)`'
    elif isinstance(method, type) and issubclass(method, Method):
        hint = f'its options are missing: write `method=growfx.methods.create("{method.name}", ...)`'
    else:
        hint = "make one with growfx.methods.create(name, ...); growfx.methods.names() lists them"
    raise ConfigError(f"`method` expects a method of growfx.methods, got {method!r}"[:200] + f"; {hint}")


def _has_checkpoint(out: Path) -> bool:
    """Whether masks are about to be loaded, so that nobody has to be told which ones the method replaced."""
    return (out / "checkpoint").is_dir() and any((out / "checkpoint").iterdir())


def _release(net: MaskedGraph) -> None:
    """Take soft masks and the collection of gradients off the layers: their method will not come back to them."""
    for layer in net.shell.modules():
        if isinstance(layer, MaskedLayer):
            layer.gate, layer.collects_gradient = None, False
            layer.forget_dense_gradient()


def _changed(options: TrainOptions, changes: Mapping[str, Any]) -> TrainOptions:
    known = [f.name for f in dataclasses.fields(options)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ConfigError(f"option `{unknown[0]}` is unknown; allowed: {', '.join(f'`{k}`' for k in known)}")
    return dataclasses.replace(options, **changes)
