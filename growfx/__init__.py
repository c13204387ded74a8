"""growfx: a torch.fx graph-transformation compiler for sparse training.

``wrap`` records a model into a masked graph, ``path_products`` scores every edge by the paths through it,
``train`` grows the network until accuracy stops paying for density, ``save`` and ``load`` store what has grown.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from growfx.version import __version__ as __version__

if TYPE_CHECKING:
    from growfx import methods as methods
    from growfx import passes as passes
    from growfx.analysis.network_cost import cost as cost
    from growfx.artifact import inspect as inspect
    from growfx.artifact import to_numpy as to_numpy
    from growfx.artifact import to_scipy as to_scipy
    from growfx.deploy import export_native as export_native
    from growfx.deploy import export_onnx as export_onnx
    from growfx.deploy import export_web as export_web
    from growfx.deploy import load as load
    from growfx.deploy import save as save
    from growfx.deploy import unwrap as unwrap
    from growfx.errors import ArtifactError as ArtifactError
    from growfx.errors import CheckpointError as CheckpointError
    from growfx.errors import ConfigError as ConfigError
    from growfx.errors import DataError as DataError
    from growfx.errors import GrowfxError as GrowfxError
    from growfx.errors import GrowfxWarning as GrowfxWarning
    from growfx.errors import MaskError as MaskError
    from growfx.errors import TraceError as TraceError
    from growfx.errors import UnsupportedOperatorError as UnsupportedOperatorError
    from growfx.masked import MaskedGraph as MaskedGraph
    from growfx.models import create_model as create_model
    from growfx.passes.mask import wrap as wrap
    from growfx.passes.path_products import path_products as path_products
    from growfx.passes.plan_channels import plan_channels as plan_channels
    from growfx.reporting.html import report as report
    from growfx.runtime.train import use_kernels as use_kernels
    from growfx.training import train as train

# Where each public name is found: the one table that `__all__`, `dir` and the lazy lookup are made from. Type checkers
# read the block above.
_HOMES = {
    "analysis.network_cost": ("cost",),
    "artifact": ("inspect", "to_numpy", "to_scipy"),
    "deploy": ("export_native", "export_onnx", "export_web", "load", "save", "unwrap"),
    "errors": (
        "ArtifactError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "GrowfxError",
        "GrowfxWarning",
        "MaskError",
        "TraceError",
        "UnsupportedOperatorError",
    ),
    "masked": ("MaskedGraph",),
    "models": ("create_model",),
    "passes.mask": ("wrap",),
    "passes.path_products": ("path_products",),
    "passes.plan_channels": ("plan_channels",),
    "reporting.html": ("report",),
    "runtime.train": ("use_kernels",),
    "training": ("train",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("methods", "passes")

__all__ = sorted([*_HOME, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Names are fetched when first used: `import growfx` and `growfx --help` do not pay for torch and timm.
    if name in _HOME:
        value = getattr(importlib.import_module(f"growfx.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"growfx.{name}")
    else:
        raise AttributeError(f"module 'growfx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
