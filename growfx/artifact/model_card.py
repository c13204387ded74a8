"""The README of an artifact, for people and for model hubs."""

from collections.abc import Mapping
from typing import Any

from growfx.artifact.info import ArtifactInfo

__all__ = ["model_card"]

_CARD = """---
library_name: growfx
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
        own=own,
        layers=layers if rows else "",
    )
