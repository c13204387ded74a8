"""Put the page of a network together: template, style, scripts, runtime and network in one document."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

__all__ = ["PAGE", "RUNTIME", "page_text", "runtime_bytes"]

PAGE, RUNTIME = "index.html", "runtime.wasm"
_SCRIPTS = ("network.js", "picture.js", "page.js")
_DRAW = "Draw a digit here, or drop an image."
_DROP = "Drop an image here, or choose one."


def page_text(title: str, about: str, facts: Mapping[str, Any], network: bytes) -> str:
    """The document, which loads nothing: a browser opens it from a disk or a server.

    Args:
        title, about: shown above; any text.
        facts: what page.js reads; JSON values.
        network: the bytes of `network.gfx`.
    """
    hint = _DRAW if facts["draw"] else _DROP
    parts = {
        "title": html.escape(title),
        "about": html.escape(about),
        "hint": hint,
        "label": "Picture that the network is given",
        "style": _resource("page.css").decode(),
        "script": "\n".join(_resource(name).decode() for name in _SCRIPTS),
        # A `<` inside could end the element that holds it.
        "facts": json.dumps(facts, ensure_ascii=True).replace("<", "\\u003c"),
        "runtime": base64.b64encode(runtime_bytes()).decode(),
        "network": base64.b64encode(network).decode(),
    }
    # In one go, so that nothing in a part is taken for a place of another one.
    return re.sub(r"\{(\w+)\}", lambda found: parts[found[1]], _resource("page.html").decode())


def runtime_bytes() -> bytes:
    """The runtime in WebAssembly, as it was built for this version of growfx."""
    return _resource(RUNTIME)


def _resource(name: str) -> bytes:
    return files("growfx.deploy.web").joinpath(name).read_bytes()
