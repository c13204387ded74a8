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
    from growfx.artifact import inspect as inspect
    from growfx.errors import ArtifactError as ArtifactError
    from growfx.errors import CheckpointError as CheckpointError
    from growfx.errors import ConfigError as ConfigError
    from growfx.errors import DataError as DataError
    from growfx.errors import GrowfxError as GrowfxError
    from growfx.errors import GrowfxWarning as GrowfxWarning
    from growfx.errors import MaskError as MaskError
    from growfx.errors import TraceError as TraceError
    from growfx.errors import UnsupportedOperatorError as UnsupportedOperatorError
    from growfx.export import save as save
    from growfx.graph import MaskedGraph as MaskedGraph
    from growfx.models import create_model as create_model
    from growfx.onnx_file import export_onnx as export_onnx
    from growfx.passes.mask import unwrap as unwrap
    from growfx.passes.mask import wrap as wrap
    from growfx.passes.path_products import path_products as path_products
    from growfx.runtime import load as load
    from growfx.sparse_arrays import to_numpy as to_numpy
    from growfx.sparse_arrays import to_scipy as to_scipy
    from growfx.training import train as train

__version__ = "0.1.0"

_HOME = {
    "ArtifactError": "growfx.errors",
    "CheckpointError": "growfx.errors",
    "ConfigError": "growfx.errors",
    "DataError": "growfx.errors",
    "GrowfxError": "growfx.errors",
    "GrowfxWarning": "growfx.errors",
    "MaskError": "growfx.errors",
    "MaskedGraph": "growfx.graph",
    "TraceError": "growfx.errors",
    "UnsupportedOperatorError": "growfx.errors",
    "create_model": "growfx.models",
    "export_onnx": "growfx.onnx_file",
    "inspect": "growfx.artifact",
    "load": "growfx.runtime",
    "path_products": "growfx.passes.path_products",
    "save": "growfx.export",
    "to_numpy": "growfx.sparse_arrays",
    "to_scipy": "growfx.sparse_arrays",
    "train": "growfx.training",
    "unwrap": "growfx.passes.mask",
    "wrap": "growfx.passes.mask",
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
