"""What leaves training: `growfx.save`, `growfx.load` and ONNX files."""

from growfx.deploy.loading import load
from growfx.deploy.onnx import export_onnx
from growfx.deploy.plain import unwrap
from growfx.deploy.saving import save

__all__ = ["export_onnx", "load", "save", "unwrap"]
