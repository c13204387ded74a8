"""growfx: a torch.fx graph-transformation compiler for sparse training.

``wrap`` records a model into a masked graph, ``path_products`` scores every edge by the paths through it,
``train`` grows the network until accuracy stops paying for density, ``save`` and ``load`` store what has grown.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growfx import methods as methods
    from growfx import passes as passes
    from growfx.artifact.arrays import to_numpy as to_numpy
    from growfx.artifact.arrays import to_scipy as to_scipy
    from growfx.artifact.reader import inspect as inspect
    from growfx.deploy.loading import load as load
    from growfx.deploy.onnx import export_onnx as export_onnx
    from growfx.deploy.saving import save as save
    from growfx.errors import ArtifactError as ArtifactError
    from growfx.errors import CheckpointError as CheckpointError
    from growfx.errors import ConfigError as ConfigError
    from growfx.errors import DataError as DataError
    from growfx.errors import GrowfxError as GrowfxError
    from growfx.errors import GrowfxWarning as GrowfxWarning
    from growfx.errors import MaskError as MaskError
    from growfx.errors import TraceError as TraceError
    from growfx.errors import UnsupportedOperatorError as UnsupportedOperatorError
    from growfx.masked.graph import MaskedGraph as MaskedGraph
    from growfx.models.build import create_model as create_model
    from growfx.passes.mask.swap import unwrap as unwrap
    from growfx.passes.mask.swap import wrap as wrap
    from growfx.passes.path_products.products import path_products as path_products
    from growfx.training.start import train as train

__version__ = "0.1.0"

_HOME = {
    "ArtifactError": "growfx.errors",
    "CheckpointError": "growfx.errors",
    "ConfigError": "growfx.errors",
    "DataError": "growfx.errors",
    "GrowfxError": "growfx.errors",
    "GrowfxWarning": "growfx.errors",
    "MaskError": "growfx.errors",
    "MaskedGraph": "growfx.masked.graph",
    "TraceError": "growfx.errors",
    "UnsupportedOperatorError": "growfx.errors",
    "create_model": "growfx.models.build",
    "export_onnx": "growfx.deploy.onnx",
    "inspect": "growfx.artifact.reader",
    "load": "growfx.deploy.loading",
    "path_products": "growfx.passes.path_products.products",
    "save": "growfx.deploy.saving",
    "to_numpy": "growfx.artifact.arrays",
    "to_scipy": "growfx.artifact.arrays",
    "train": "growfx.training.start",
    "unwrap": "growfx.passes.mask.swap",
    "wrap": "growfx.passes.mask.swap",
}
_MODULES = ("methods", "passes")

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GrowfxError",
    "GrowfxWarning",
    "MaskError",
    "MaskedGraph",
    "TraceError",
    "UnsupportedOperatorError",
    "create_model",
    "export_onnx",
    "inspect",
    "load",
    "methods",
    "passes",
    "path_products",
    "save",
    "to_numpy",
    "to_scipy",
    "train",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # Names are fetched when first used: `import growfx` and `growfx --help` do not pay for torch and timm.
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"growfx.{name}")
    else:
        raise AttributeError(f"module 'growfx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
