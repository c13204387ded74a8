"""Build a model by name, and remember the name on it.

A spec is a timm name (`resnet18`, `resnet18.a1_in1k`), `torchvision/NAME`, or `package.module:callable`.
The name and the arguments are remembered on the model as a plain attribute: it is not in the state dict
and survives `copy.deepcopy`, so that an artifact can say how to build the model again.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from growfx.errors import ConfigError, DataError
from growfx.models.budget import BudgetExceeded
from growfx.quiet import ignored_warnings

__all__ = [
    "INPUTS_ATTRIBUTE",
    "WEIGHT_SOURCES",
    "ModelIdentity",
    "blueprint",
    "build_unfilled",
    "create_model",
    "default_image_shape",
    "default_input_shape",
    "has_builder",
    "identity_of",
    "likely_identity",
    "remember",
]

Library = Literal["timm", "torchvision", "python"]

_ATTRIBUTE = "_growfx_identity"
# Where a model that was loaded keeps what it is called with, see `growfx.remembered_inputs`.
INPUTS_ATTRIBUTE = "_growfx_inputs"
_TORCHVISION = "torchvision/"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Arguments that say where weights come from. They do not shape the model; an artifact brings its own weights.
WEIGHT_SOURCES = {
    "timm": frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}),
    "torchvision": frozenset({"weights", "weights_backbone", "progress"}),
    "python": frozenset(),
}


@dataclass(frozen=True)
class ModelIdentity:
    """How a model is built: `library` ("timm", "torchvision" or "python"), `name` there, keyword arguments.

    For "python" the name is `package.module:callable`.
    """

    library: Library
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.library not in get_args(Library):
            allowed = ", ".join(get_args(Library))
            raise ConfigError(f"model library `{self.library}` is unknown; allowed: {allowed}")

    @property
    def spec(self) -> str:
        """The string that `create_model` takes."""
        return _TORCHVISION + self.name if self.library == "torchvision" else self.name


def create_model(spec: str, **kwargs: Any) -> nn.Module:
    """Build a model and remember its name.

    Args:
        spec: a timm name, `torchvision/NAME`, or `package.module:callable` (called with `kwargs`).
        kwargs: passed on, for example `num_classes`, and for timm `in_chans`, `img_size`, `pretrained`.

    Raises:
        ConfigError: the name is unknown (close names are given), or its builder refuses the arguments.

    Example:
        >>> model = growfx.create_model("torchvision/squeezenet1_1", num_classes=10)
        >>> growfx.create_model("torch.nn:Linear", in_features=4, out_features=2)
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(spec, str):
        raise ConfigError(
            f"growfx.create_model expects a model's name, got `{type(spec).__name__}`; allowed: a timm name, "
            "`torchvision/NAME`, or `package.module:callable`. A module needs no name: pass it to growfx.wrap"
        )
    identity = _parse(spec, kwargs)
    builders = {"timm": _build_timm, "torchvision": _build_torchvision, "python": _build_python}
    model = builders[identity.library](identity.name, kwargs)
    shaping = {k: v for k, v in kwargs.items() if k not in WEIGHT_SOURCES[identity.library]}
    return remember(model, ModelIdentity(identity.library, identity.name, shaping))


def remember(model: nn.Module, identity: ModelIdentity | None) -> nn.Module:
    """Remember on `model` how it was built; None forgets. Returns the model."""
    model.__dict__[_ATTRIBUTE] = identity
    return model


def identity_of(model: nn.Module) -> ModelIdentity | None:
    """Return how `model` was built: as remembered, else read back from a timm or torchvision model, else None.

    timm models carry their name; class count, channels and image size are read from the model itself. A
    torchvision model is recognised when exactly one builder of its library gives the same modules with the
    same settings.
    """
    known = model.__dict__.get(_ATTRIBUTE)
    if known is not None:
        return _with_current_classes(known, model)
    return _read_timm(model) or _read_torchvision(model)


def likely_identity(model: nn.Module) -> ModelIdentity | None:
    """The torchvision builder whose model `model` was before its settings were changed; None where none is known.

    It is the only one that gives a model of the same class with tensors of the same names and shapes.
    """
    found = [identity for identity, candidate in _torchvision_builds(model) if _shapes(candidate) == _shapes(model)]
    return found[0] if len(found) == 1 else None


def blueprint(identity: ModelIdentity) -> nn.Module:
    """The model `identity` builds, without memory for its weights (meta device) where its builder allows.

    Raises:
        ConfigError: it cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"), _WithoutInitialisation():
                return create_model(identity.spec, **identity.kwargs)
        except BudgetExceeded:
            raise
        except ConfigError:
            # Some builders compute with values of tensors; these can only be built for real.
            return create_model(identity.spec, **identity.kwargs)


def build_unfilled(identity: ModelIdentity, plan: nn.Module) -> nn.Module:
    """The model `identity` builds, for a caller who then sets every tensor of its state dict.

    Where nothing can come of their initial values, parameters are left as the memory was: when `plan`, the
    model's blueprint, is wholly on the meta device (so no number was read from a tensor) and every tensor it has
    is in its state dict (so none was computed from a parameter and stays).

    Raises:
        ConfigError: it cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        if not _is_all_stored_on_meta(plan):
            return create_model(identity.spec, **identity.kwargs)
        with _WithoutInitialisation(parameters=True):
            return create_model(identity.spec, **identity.kwargs)


def _is_all_stored_on_meta(model: nn.Module) -> bool:
    stored = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    held: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for value in vars(module).values():
            inner = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            )
            held += [item for item in inner if isinstance(item, Tensor)]
    return all(tensor.is_meta and id(tensor) in stored for tensor in held)


# What initialisers do in place; on a tensor without values it changes nothing.
_FILLING = {
    "add_", "clamp_", "constant_", "copy_", "div_", "erfinv_", "exponential_", "fill_", "kaiming_normal_",
    "kaiming_uniform_", "log_", "mul_", "normal_", "ones_", "sub_", "trunc_normal_", "uniform_", "xavier_normal_",
    "xavier_uniform_", "zero_", "zeros_",
}  # fmt: skip


class _WithoutInitialisation(TorchFunctionMode):
    """Skips initialisation on the meta device, or of all parameters, which takes most of a build's time."""

    def __init__(self, *, parameters: bool = False) -> None:
        super().__init__()
        self._parameters = parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLING:
            target = args[0] if args else kwargs.get("tensor")
            skipped = isinstance(target, nn.Parameter) if self._parameters else False
            if skipped or (isinstance(target, Tensor) and target.is_meta):
                return target
        return func(*args, **kwargs)


def default_input_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one input: what its artifact tells, a timm model's own (1, C, H, W), else (1, 3, 224, 224)."""
    known = model.__dict__.get(INPUTS_ATTRIBUTE) or ()
    if len(known) == 1 and known[0].keyword is None and known[0].dtype in _FLOATS and known[0].shape:
        return known[0].shape
    config = _timm_config(model)
    size = tuple(config.get("input_size") or (3, 224, 224))
    channels = getattr(model, "in_chans", None)
    channels = channels if config and isinstance(channels, int) else size[0]
    return (1, channels, *(_timm_image_size(model) or size[1:]))


def default_image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of one image.

    Raises:
        DataError: the model's artifact tells that it takes other inputs than images.
    """
    shape = default_input_shape(model)
    if len(shape) != 4:
        raise DataError(f"the network takes inputs of shape {shape}; expected images, of shape (1, C, H, W)")
    return shape[1], shape[2], shape[3]


def _with_current_classes(identity: ModelIdentity, model: nn.Module) -> ModelIdentity:
    """timm's `reset_classifier` changes the number of classes after the model was made."""
    classes = getattr(model, "num_classes", None)
    known = identity.kwargs.get("num_classes", _timm_config(model).get("num_classes"))
    if identity.library != "timm" or not isinstance(classes, int) or classes == known:
        return identity
    return ModelIdentity(identity.library, identity.name, {**identity.kwargs, "num_classes": classes})


def _parse(spec: str, kwargs: Mapping[str, Any]) -> ModelIdentity:
    if spec.startswith(_TORCHVISION):
        return ModelIdentity("torchvision", spec.removeprefix(_TORCHVISION), dict(kwargs))
    source, colon, _ = spec.partition(":")
    # timm's own prefixes, `hf-hub:` and `local-dir:`, are not importable module names.
    if colon and all(part.isidentifier() for part in source.split(".")):
        return ModelIdentity("python", spec, dict(kwargs))
    return ModelIdentity("timm", spec, dict(kwargs))


def _build_timm(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise _unknown(name)
    path = kwargs.get("checkpoint_path")
    if path and not Path(path).is_file():  # of which timm says nothing but FileNotFoundError
        raise ConfigError(f"model `{name}`: `checkpoint_path` = `{path}` was not found; expected a file of weights")
    return _call(lambda: timm.create_model(name, **kwargs), name)


def _build_torchvision(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    from torchvision.models import get_model_builder, list_models

    if name not in list_models():
        raise _unknown(_TORCHVISION + name)
    # torchvision's weights change settings of the model (transform_input) that its name does not tell.
    given = sorted(WEIGHT_SOURCES["torchvision"] & kwargs.keys())
    if given:
        raise ConfigError(
            f"`{given[0]}` is not an argument for `{_TORCHVISION}{name}`: build a model with pretrained "
            "weights through torchvision itself and pass it to growfx.wrap"
        )
    builder = get_model_builder(name)
    # googlenet and inception_v3 announce a change of their initial weights: nothing to act on here.
    with ignored_warnings(FutureWarning):
        return _call(lambda: builder(**_no_weights(builder), **kwargs), _TORCHVISION + name)


def _build_python(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"model `{name}`: module `{module_name}` cannot be imported ({error}); it must be on the Python path"
        ) from error
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        raise ConfigError(f"model `{name}`: module `{module_name}` has no callable `{attribute}`")
    model = _call(lambda: target(**kwargs), name)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ConfigError(f"model `{name}` returned a `{kind}`; it must return a torch.nn.Module")
    return model


def _call(build: Callable[[], Any], name: str) -> Any:
    """Call a builder; any error it raises on bad arguments becomes a `ConfigError`."""
    try:
        return build()
    except BudgetExceeded:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ConfigError(f"model `{name}` cannot be built with these arguments ({reason})") from error


def _unknown(name: str) -> ConfigError:
    import timm
    from torchvision.models import list_models

    known = [*timm.list_models(), *(_TORCHVISION + n for n in list_models())]
    close = difflib.get_close_matches(name, known, n=4)
    hint = f"did you mean {' or '.join(f'`{n}`' for n in close)}?" if close else "no known name is close."
    return ConfigError(
        f"model `{name}` is unknown; {hint} Allowed: a timm name, `torchvision/NAME`, or `package.module:callable`"
    )


def _no_weights(builder: Callable[..., Any]) -> dict[str, None]:
    parameters = inspect.signature(builder).parameters
    return {name: None for name in ("weights", "weights_backbone") if name in parameters}


def _timm_config(model: nn.Module) -> dict[str, Any]:
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if config:
            return dict(config if isinstance(config, Mapping) else config.to_dict())
    return {}


def _timm_image_size(model: nn.Module) -> tuple[int, int] | None:
    """The (H, W) a model was built for, where it holds one (patch embedding, or traits recorded by timm)."""
    traits = getattr(model, "_traits", None)
    size = traits.get("img_size") if isinstance(traits, Mapping) else None
    size = size or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) and len(size) == 2 else None


def _read_timm(model: nn.Module) -> ModelIdentity | None:
    config = _timm_config(model)
    architecture = config.get("architecture")
    if not architecture or not type(model).__module__.startswith("timm."):
        return None
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(architecture):
        return None
    # Recorded by newer timm releases only; what matters most is read from the model itself below.
    recorded = getattr(model, "_model_args", {})
    kwargs = {k: v for k, v in recorded.items() if k not in WEIGHT_SOURCES["timm"]}
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        kwargs["num_classes"] = classes
    source = tuple(config.get("input_size") or ())
    channels = getattr(model, "in_chans", None)
    if isinstance(channels, int) and source and channels != source[0]:
        kwargs["in_chans"] = channels
    size = _timm_image_size(model)
    if size is not None and size != source[1:]:
        kwargs["img_size"] = list(size)
    tag = config.get("tag") or ""
    default = get_pretrained_cfg(architecture)
    plain = not tag or (default is not None and default.tag == tag)
    return ModelIdentity("timm", architecture if plain else f"{architecture}.{tag}", kwargs)


def _read_torchvision(model: nn.Module) -> ModelIdentity | None:
    wanted = _settings(model)
    found = [identity for identity, candidate in _torchvision_builds(model) if _settings(candidate) == wanted]
    return found[0] if len(found) == 1 else None


def has_builder(model: nn.Module) -> bool:
    """Whether torchvision has builders of models of this class."""
    if not type(model).__module__.startswith("torchvision.models."):
        return False
    from torchvision.models import get_model_builder, list_models

    return any(inspect.signature(get_model_builder(n)).return_annotation is type(model) for n in list_models())


def _torchvision_builds(model: nn.Module) -> Iterator[tuple[ModelIdentity, nn.Module]]:
    """What torchvision's builders of the class of `model` give for as many classes, without values."""
    if not type(model).__module__.startswith("torchvision.models."):
        return
    from torchvision.models import get_model_builder, list_models

    heads = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    kwargs = {"num_classes": heads[-1]} if heads else {}
    for name in list_models():
        builder = get_model_builder(name)
        if inspect.signature(builder).return_annotation is not type(model):
            continue
        candidate = _on_meta(builder, kwargs)
        if candidate is not None:
            yield ModelIdentity("torchvision", name, kwargs), candidate


def _on_meta(builder: Callable[..., nn.Module], kwargs: Mapping[str, Any]) -> nn.Module | None:
    try:
        with ignored_warnings(FutureWarning), torch.device("meta"):
            return builder(**_no_weights(builder), **kwargs)
    except Exception:  # whatever a foreign builder raises, it is not the builder of this model
        return None


def _settings(model: nn.Module) -> list[Any]:
    """All that is visible of a model but its weights: classes, sizes, plain attributes, in module order."""
    facts: list[Any] = _shapes(model)
    for name, module in model.named_modules():
        plain = {
            k: v
            for k, v in vars(module).items()
            if not k.startswith("_") and k != "training" and isinstance(v, bool | int | float | str | tuple)
        }
        facts.append((name, type(module), cast(object, plain)))
    return facts


def _shapes(model: nn.Module) -> list[Any]:
    return [(name, tuple(t.shape)) for name, t in model.state_dict().items() if isinstance(t, Tensor)]
