"""Option dataclasses: frozen, with values checked in the constructor.

The same names are keyword arguments in Python, `--set key=value` on the command line, and keys of
`config.json`.
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from growfx.errors import ConfigError, did_you_mean

__all__ = [
    "DataOptions",
    "DefaultFloat",
    "TrainOptions",
    "Unused",
    "as_count",
    "as_json",
    "describe_default",
    "describe_range",
    "given_options",
    "option",
    "parse_assignments",
    "unused_options",
]


_LONGEST = 80  # characters of a value in a message


class DefaultFloat(float):
    """A float default that differs in type from the same value given; `check_ranges` makes it a plain float."""


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
    choices: tuple[str, ...] = (),
    unset: str = "",
) -> Any:
    """A dataclass field whose value `check_ranges` holds between `low` and `high`, or to `choices`.

    `unset` is what a default of None or "" stands for, in words; help prints it as the default.
    """
    limits = {"low": low, "high": high, "open_low": open_low, "open_high": open_high, "choices": choices}
    return field(default=default, metadata={**limits, "unset": unset})


@dataclass(frozen=True)
class Unused:
    """A row of a table that says in which runs options have no effect.

    Attributes:
        options: their names.
        reason: takes what is known of a run, and returns why they have no effect in it; "" where they have one.
        says: what is said of one of them, and of several, before the reason.
    """

    options: tuple[str, ...]
    reason: Callable[[Any], str]
    says: tuple[str, str] = ("has no effect", "have no effect")


def given_options(options: Any) -> dict[str, Any]:
    """Return the init fields of a dataclass of options whose values are not the defaults."""
    fields = [f for f in dataclasses.fields(options) if f.init]
    return {f.name: getattr(options, f.name) for f in fields if not _is_default(getattr(options, f.name), f)}


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    same = value == default
    return same if isinstance(same, bool) else False  # arrays and tensors are compared number by number


def unused_options(given: Mapping[str, Any], table: Iterable[Unused], run: Any) -> dict[str, str]:
    """Return, for each of the options `given` that has no effect in `run`, a message that names all of one reason."""
    groups: dict[tuple[str, tuple[str, str]], list[str]] = {}
    told: set[str] = set()
    for row in table:
        names = [name for name in row.options if name in given and name not in told]
        reason = row.reason(run) if names else ""
        if reason:
            groups.setdefault((reason, row.says), []).extend(names)
            told.update(names)
    found: dict[str, str] = {}
    for (reason, (one, several)), names in groups.items():
        listed = ", ".join(f"`{name}` = {_shortened(given[name])}" for name in names)
        found |= dict.fromkeys(names, f"{listed} {one if len(names) == 1 else several} {reason}")
    return found


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def as_count(name: str, value: Any) -> int:
    """Return a whole number from 1 up, numpy's among them, as an int; anything else is a `ConfigError`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"`{name}` is {value!r}; allowed are whole numbers from 1 up")
    return int(value)


def check_ranges(options: Any) -> None:
    """Check every field of a dataclass of `option`s: its type, then its range; None passes where allowed.

    Raises:
        ConfigError: names the option, the value given and the values allowed.
    """
    hints = typing.get_type_hints(type(options))
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        kinds = _kinds(hints[f.name])
        if value is None and type(None) in kinds:
            continue
        plain = _plain(value, kinds)
        if type(plain) not in kinds:
            wanted = " or ".join(k.__name__.replace("NoneType", "none") for k in kinds)
            raise ConfigError(f"`{f.name}` = {value!r} is not of type {wanted}")
        if plain is not value:
            object.__setattr__(options, f.name, plain)
        _check_range(f.name, getattr(options, f.name), f.metadata)


def _plain(value: Any, kinds: tuple[type, ...]) -> Any:
    """Return a number or text of another library (numpy's scalars, say) as Python's own of the kinds allowed."""
    if isinstance(value, bool):
        return value
    if int in kinds and isinstance(value, numbers.Integral):
        return int(value)
    if float in kinds and isinstance(value, numbers.Real):
        return float(value)
    if bool in kinds and type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    return str(value) if str in kinds and isinstance(value, str) else value


def _check_range(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    choices = limits.get("choices")
    if choices:
        if value not in choices:
            allowed = ", ".join(f"`{c}`" for c in choices)
            raise ConfigError(f"`{name}` = {value!r} is unknown; allowed: {allowed}{did_you_mean(value, choices)}")
        return
    low, high = limits.get("low"), limits.get("high")
    if isinstance(value, str) or (low is None and high is None):
        return
    inside = math.isfinite(value)
    if low is not None:
        inside &= value > low if limits["open_low"] else value >= low
    if high is not None:
        inside &= value < high if limits["open_high"] else value <= high
    if not inside:
        raise ConfigError(f"`{name}` = {value!r} is out of range; allowed: {_interval(limits)}")


def describe_range(limits: Mapping[str, Any]) -> str:
    """The values that a field made by `option` allows, as text; "" where there is no limit."""
    if limits.get("choices"):
        return ", ".join(limits["choices"])
    return "" if limits.get("low") is None and limits.get("high") is None else _interval(limits)


def describe_default(field: dataclasses.Field[Any]) -> str:
    """The default of a field of options, as text; what it stands for where it is None or ""."""
    if field.metadata.get("unset"):
        return field.metadata["unset"]
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return "none" if field.default in (None, "") else str(field.default)


def _interval(limits: Mapping[str, Any]) -> str:
    low, high = limits["low"], limits["high"]
    left = "(-inf" if low is None else f"{'(' if limits['open_low'] else '['}{low}"
    right = "inf)" if high is None else f"{high}{')' if limits['open_high'] else ']'}"
    return f"{left}, {right}"


@dataclass(frozen=True)
class TrainOptions:
    """Options of training. Learning rates are per optimizer step; lengths are in epochs.

    Attributes:
        epochs: length of the (final) training; growth rounds come on top.
        optimizer: a name that `timm.optim.create_optimizer_v2` knows.
        lr: peak learning rate of the final training.
        momentum: for optimizers that have one.
        weight_decay: on tensors of two or more dimensions.
        warmup_epochs: linear warmup of the final training, at most half of it is used.
        schedule: of the final training, by timm: "cosine", "linear", "step" (`lr` times `decay_rate` after every
            `decay_epochs`) or "constant", each after the warmup. All other stages keep their own, but the base of
            `sup-tickets`, which has this one.
        decay_epochs: of "step"; None is a third of the training.
        decay_rate: of "step".
        min_lr: learning rate at the end of a cosine or line, as a fraction of its peak.
        round_lr: peak learning rate of a growth round, as a fraction of `lr`.
        round_warmup: linear warmup of a growth round, as a fraction of the round.
        loss: "cross-entropy", or "bce", a binary cross-entropy of every class.
        label_smoothing: of the classes that the loss compares with.
        mixup: alpha of timm's mixup of every training batch with itself reversed; 0 for none. Batches must be even.
        cutmix: alpha of timm's cutmix; with `mixup` too, a batch gets the one or the other, at even chances.
        clip_grad: largest norm of the gradient; None leaves it alone.
        accumulate: batches for each step of the optimizer; an epoch's last step takes what is left. The gradient is
            that of the mean loss over all their images; epochs, schedules and methods count steps of the optimizer.
        amp: precision of forward and loss in training: "none" (the weights' own), "bf16", or "fp16" with a loss scale.
            Weights, gradients and validation keep the weights' own.
        channels_last: memory format of weights and images.
        compile: run the training steps through `torch.compile`.
        kernels: on a CPU, "auto" lets each masked layer take the fastest of dense and sparse kernels (see
            `growfx.use_kernels`), "sparse" takes sparse ones wherever there are some, "dense" none.
        storage: "dense" keeps whole weights; "present" keeps values, gradients and optimizer state of present edges
            only (see `growfx.use_kernels`), with optimizers that step each edge by itself (SGD, Adam, AdamW, ...).
        deterministic: let "auto" choose kernels by density alone, not by their times on this machine; two runs of one
            seed are then equal bit for bit, as they are with `kernels` = "dense". Ranks always choose so.
        ema_decay: of the averaged weights that score a growth round, at most; their memory is otherwise a tenth
            of the round.
        seed: of the data order and of everything drawn in training.
        device: "auto" (an accelerator when there is one), or a torch device.
        tensorboard: also write loss, accuracy, density, rate, cost and the fit of growth to `tensorboard/` in the run
            folder; needs the package `tensorboard`.
        checkpoint_minutes: a checkpoint is written at the end of every epoch, and within one when the last is this old
            (0 writes one after every step, None at the ends of epochs only). Outcomes do not depend on it.
        keep_checkpoints: how many are kept, beside the best.
    """

    epochs: int = option(30, low=1)
    optimizer: str = "sgd"
    lr: float = option(0.1, low=0, open_low=True)
    momentum: float = option(0.9, low=0, high=1, open_high=True)
    weight_decay: float = option(5e-4, low=0)
    warmup_epochs: float = option(1.0, low=0)
    schedule: str = option("cosine", choices=("cosine", "linear", "step", "constant"))
    decay_epochs: float | None = option(None, low=0, open_low=True, unset="a third of the training")
    decay_rate: float = option(0.1, low=0, high=1, open_low=True)
    min_lr: float = option(1e-3, low=0, high=1)
    round_lr: float = option(1.0, low=0, high=10, open_low=True)
    round_warmup: float = option(0.1, low=0, high=0.9)
    loss: str = option("cross-entropy", choices=("cross-entropy", "bce"))
    label_smoothing: float = option(0.0, low=0, high=1, open_high=True)
    mixup: float = option(0.0, low=0)
    cutmix: float = option(0.0, low=0)
    clip_grad: float | None = option(None, low=0, open_low=True, unset="none")
    accumulate: int = option(1, low=1)
    amp: str = option("none", choices=("none", "bf16", "fp16"))
    channels_last: bool = False
    compile: bool = False
    kernels: str = option("auto", choices=("auto", "dense", "sparse"))
    storage: str = option("dense", choices=("dense", "present"))
    deterministic: bool = False
    ema_decay: float = option(0.999, low=0, high=1, open_high=True)
    seed: int = option(0, low=0, high=2**63 - 1)
    device: str = "auto"
    tensorboard: bool = False
    checkpoint_minutes: float | None = option(10.0, low=0)
    keep_checkpoints: int = option(2, low=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.decay_epochs is not None and self.schedule != "step":
            raise ConfigError(
                f"`decay_epochs` = {self.decay_epochs} is of `schedule` = `step`, which here is `{self.schedule}`; "
                "set `schedule` to `step`, or leave `decay_epochs` out"
            )


@dataclass(frozen=True)
class DataOptions:
    """Options of reading a data set.

    Attributes:
        batch_size: images a training step, on each rank; a smaller training set gives smaller batches.
        img_size: height and width in pixels; None fits data and model (see `growfx.data.loaders.fit_size`).
        workers: loading processes; 0 loads in the training process.
        cache_mb: decoded images of a folder that the training process keeps in memory, in MB; 0 decodes every image in
            every epoch, as loading processes do.
        augment: "crop" (random resized crop and flip), "none", or "auto": "none" for `digits`, else "crop".
        crop_scale: smallest area of a random crop, as a fraction of the image.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation jitter.
        auto_augment: a timm policy such as `rand-m9-mstd0.5`; None for none.
        random_erase: probability of erasing a random rectangle.
        val_fraction: part of the training images held out for validation where there is no `val` split.
        split_seed: of that hold-out, and of the splits of `digits`.
        data_dir: where data sets given by a timm spec lie.
        download: allow fetching such a data set when it is not there.
    """

    batch_size: int = option(128, low=1)
    img_size: int | None = option(None, low=1, unset="fits data and model")
    workers: int = option(0, low=0, high=1024)
    cache_mb: int = option(512, low=0)
    augment: str = option("auto", choices=("auto", "crop", "none"))
    crop_scale: float = option(0.5, low=0, high=1, open_low=True)
    hflip: float = option(0.5, low=0, high=1)
    color_jitter: float = option(0.0, low=0, high=1)
    auto_augment: str | None = option(None, unset="none")
    random_erase: float = option(0.0, low=0, high=1)
    val_fraction: float = option(0.1, low=0, high=0.5, open_low=True)
    split_seed: int = option(0, low=0, high=2**63 - 1)
    data_dir: str = "data"
    download: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)


def as_json(options: Any) -> dict[str, Any]:
    """The init fields of a dataclass of options as a dictionary that JSON can hold."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.init}


def parse_assignments(assignments: Iterable[str], kinds: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """Sort `key=value` texts into the option classes that have the key.

    Args:
        assignments: texts as after `--set`. `model.KEY=VALUE` goes to "model", with VALUE a Python literal
            or else a text.
        kinds: dataclass of options by name. A key that several classes have goes to each of them.

    Returns:
        the values, typed as the fields are, by class name; "model" is always among them.

    Raises:
        ConfigError: no `=`, an unknown key (close keys are given), a value of another type.
    """
    found: dict[str, dict[str, Any]] = {"model": {}, **{name: {} for name in kinds}}
    fields = {name: _init_hints(kind) for name, kind in kinds.items()}
    limits = {name: {f.name: f.metadata for f in dataclasses.fields(kind)} for name, kind in kinds.items()}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"`--set {text}` has no value; write `--set key=value`")
        if key.startswith("model."):
            found["model"][key.removeprefix("model.")] = _literal(value)
            continue
        owners = [name for name, hints in fields.items() if key in hints]
        if not owners:
            known = sorted({k for hints in fields.values() for k in hints})
            close = difflib.get_close_matches(key, known, n=3) or known or ["model.KEY"]
            raise ConfigError(f"option `{key}` is unknown; allowed: {', '.join(f'`{k}`' for k in close)}")
        for name in owners:
            found[name][key] = _parse(key, value, _kinds(fields[name][key]), limits[name][key])
    return found


def _init_hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def _kinds(hint: Any) -> tuple[type, ...]:
    """The plain types of an annotation: `float | None` gives (float, NoneType), a Literal gives (str,)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(k for part in typing.get_args(hint) for k in _kinds(part))
    if typing.get_origin(hint) is typing.Literal:
        return tuple({type(value) for value in typing.get_args(hint)})
    return (typing.get_origin(hint) or hint,)


def _parse(key: str, text: str, kinds: tuple[type, ...], limits: Mapping[str, Any]) -> Any:
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    if any(kind in (tuple, list) for kind in kinds):
        return _literal(text)
    wanted = " or ".join(k.__name__.replace("NoneType", "none") for k in kinds)
    allowed = describe_range(limits) or ("true, false" if bool in kinds else "")
    raise ConfigError(f"`{key}` = `{text}` is not of type {wanted}{f'; allowed: {allowed}' if allowed else ''}")


def _literal(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
