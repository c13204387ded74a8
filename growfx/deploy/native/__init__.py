"""Networks that leave Python: a file, and the sources of the runtime that runs it."""

from growfx.deploy.native.export import NativeExport, export_native

__all__ = ["NativeExport", "export_native"]
