"""What `config.json` says of a run: enough to make it again, and to refuse continuing another one."""

import dataclasses
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from growfx.distributed import ranks
from growfx.masked.graph import MaskedGraph
from growfx.options import TrainOptions, as_json
from growfx.version import __version__

if TYPE_CHECKING:
    from growfx.methods.base import Method

__all__ = ["default_options", "describe_run", "model_name"]


def describe_run(net: MaskedGraph, method: "Method | None", options: TrainOptions) -> dict[str, Any]:
    """Versions, model, masks, method and options as JSON values, for `config.json`."""
    import timm

    versions = {
        "growfx": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    identity = net.identity
    model = {"name": model_name(net), "kwargs": dict(identity.kwargs) if identity else {}}
    # A dense control and a static mask differ in nothing but these.
    masks = {"numel": net.numel, "digest": net.mask_digest()} if method is None else {"numel": net.numel}
    described = {"name": method.name, **as_json(method)} if method else None
    return {
        "versions": versions,
        "model": model,
        "masks": masks,
        "method": described,
        "train": as_json(options),
        "seed": options.seed,
        "ranks": ranks.world_size(),
    }


def default_options(method: "Method | None") -> dict[str, Any]:
    """The defaults of the method's options, where they stand in `describe_run`: nothing of an option without one."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    made = {f.name: f.default_factory() for f in fields if f.init and f.default_factory is not dataclasses.MISSING}
    given = {f.name: f.default for f in fields if f.init and f.default is not dataclasses.MISSING}
    return {"method": made | given} if fields else {}


def model_name(net: MaskedGraph) -> str:
    """The spec the model was made from, else its class."""
    return net.identity.spec if net.identity else type(net.shell).__name__
