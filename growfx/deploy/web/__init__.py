"""A page that runs a network in a browser: the runtime in WebAssembly, and the network inside."""

from growfx.deploy.web.export import WebExport, export_web

__all__ = ["WebExport", "export_web"]
