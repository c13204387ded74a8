"""The README of an artifact, for people and for model hubs."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from growfx.artifact.info import ArtifactInfo

__all__ = ["model_card"]

_CARD = """---
library_name: growfx{license}
tags:
- growfx
- sparse
- pruned
---

# {title}

A sparsely trained network, stored by [growfx](https://pypi.org/project/growfx/).

| | |
|---|---|
| density of the masked layers | {density:.4%} ({nnz:,} of {numel:,} weights) |
| size of `sparse.safetensors` | {bytes:,} bytes ({dense_bytes:,} when dense) |
| format | growfx.sparse {version} |
{origin}
## Load

```python
import growfx

model = growfx.load("path/to/this/folder"{own})  # a plain torch.nn.Module in eval mode
```

`growfx inspect path/to/this/folder` prints every layer. The masks are stored, not inferred: an active weight
may be zero. Checksums find damage; they do not tell who made the file.
{layers}"""


def model_card(info: ArtifactInfo, config: Mapping[str, Any]) -> str:
    """Markdown with the metadata block that model hubs read. The same artifact gives the same text."""
    own = ", model=my_model" if info.model is None or info.model["library"] == "python" else ""
    rows = [f"| `{x.name}` | {'x'.join(map(str, x.shape))} | {x.nnz:,} | {x.density:.4f} |" for x in info.layers]
    layers = "\n".join(["\n## Layers\n", "| layer | shape | nnz | density |", "|---|---|---|---|", *rows, ""])
    return _CARD.format(
        title=config.get("architecture") or "A network of a custom class",
        density=info.density,
        nnz=info.nnz,
        numel=info.numel,
        bytes=info.bytes,
        dense_bytes=info.dense_bytes,
        version=info.version,
        license=_license(info.provenance),
        origin="".join(f"| {name} | {value} |\n" for name, value in _origin(info.provenance)),
        own=own,
        layers=layers if rows else "",
    )


def _origin(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How the network was made, as far as its provenance says so in the way of `growfx.train`; it may hold anything."""
    data, method, result, weights = (
        part if isinstance(part := provenance.get(key), Mapping) else {}
        for key in ("data", "method", "result", "weights_from")
    )
    if isinstance(data.get("spec"), str):
        yield "data", _code(data["spec"])
    if isinstance(method.get("name"), str):
        yield "method", _code(method["name"])
    if isinstance(weights.get("name"), str) and isinstance(weights.get("sha256"), str):
        yield "started from", f"{_code(weights['name'])}, sha256 {_code(weights['sha256'])}"
    for key, title in (("test_accuracy", "test accuracy"), ("val_accuracy", "validation accuracy")):
        if isinstance(result.get(key), float):
            yield title, f"{result[key]:.2%}"
    if isinstance(result.get("dense_equivalent_epochs"), float):
        yield "cost of training", f"{result['dense_equivalent_epochs']:.2f} dense-equivalent epochs"


def _code(text: str) -> str:
    """Text as code in one cell of a table, whatever it holds."""
    plain = re.sub(r"[|`\s]+", " ", text).strip()
    return f"`{plain[:200]}`"


def _license(provenance: Mapping[str, Any]) -> str:
    name = provenance.get("license")
    return f"\nlicense: {name}" if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9.+-]{1,40}", name) else ""
