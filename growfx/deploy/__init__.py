"""What leaves training: `growfx.save`, `growfx.load`, ONNX files, and folders that need no Python."""

from growfx.deploy.loading import load
from growfx.deploy.native import export_native
from growfx.deploy.onnx import export_onnx
from growfx.deploy.plain import unwrap
from growfx.deploy.saving import save
from growfx.deploy.web import export_web

__all__ = ["export_native", "export_onnx", "export_web", "load", "save", "unwrap"]
