"""Size of a pruned ResNet-50 on disk: the artifact and what others do, written and read back in one run.

The 54 convolution and linear weights of timm's resnet50 (float32, 102.0 MB) at their initial values under random
ERK masks. The bound is nnz * 32 bits + the entropy of the masks, sum of N * H(d) over the layers: values taken as
incompressible, masks as random within a layer. Every format gives the weights back bit by bit, which is checked.

The norms have no parameters here, so that each format stores the same tensors; the artifact also holds the last
bias (4 kB). "with norms" is the artifact of the ordinary resnet50, whose norms take 0.4 MB at any density. Sizes in
MB of 10^6 bytes, everything included. Seconds are CPU time, the best of `--repeats`; the artifact's are those of
all of `save` and `load_state`, checks and checksums included.

    python benchmarks/storage.py [--densities 0.01 0.1] [--repeats 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import scipy.sparse
import torch
import zstandard
from machine import describe
from tabulate import tabulate
from torch import Tensor, nn

import growfx
from growfx.artifact.writer import load_state

WITH_NORMS = "growfx artifact, with norms"
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Format:
    """One way to store weights: to bytes, and back."""

    encode: Callable[[Weights], Any]
    decode: Callable[[Any], Weights]
    size: Callable[[Any], int] = len


@dataclass(frozen=True)
class Row:
    """One format at one density."""

    format: str
    density: float
    bytes: int
    over_bound: float
    encode_seconds: float
    decode_seconds: float


def _dense(weights: Weights) -> bytes:
    return safetensors.torch.save(dict(weights))


def _from_dense(data: bytes) -> Weights:
    return safetensors.torch.load(data)


def _to_npz(weights: Weights) -> dict[str, tuple[torch.Size, bytes]]:
    files: dict[str, tuple[torch.Size, bytes]] = {}
    for name, weight in weights.items():
        file = io.BytesIO()
        scipy.sparse.save_npz(file, scipy.sparse.csr_matrix(weight.flatten(1).numpy()), compressed=True)
        files[name] = (weight.shape, file.getvalue())
    return files


def _from_npz(files: Mapping[str, tuple[torch.Size, bytes]]) -> Weights:
    load = scipy.sparse.load_npz
    return {
        name: torch.from_numpy(load(io.BytesIO(data)).toarray()).reshape(shape) for name, (shape, data) in files.items()
    }


def _to_csr(weights: Weights) -> bytes:
    tensors: dict[str, tuple[torch.Size, Tensor]] = {}
    for name, weight in weights.items():
        csr = weight.flatten(1).to_sparse_csr()
        parts = (csr.crow_indices().int(), csr.col_indices().int(), csr.values())
        tensors[name] = (weight.shape, torch.sparse_csr_tensor(*parts, csr.shape))
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def _from_csr(data: bytes) -> Weights:
    tensors = torch.load(io.BytesIO(data), weights_only=True)
    return {name: csr.to_dense().reshape(shape) for name, (shape, csr) in tensors.items()}


def _to_bitmask(weights: Weights) -> dict[str, tuple[torch.Size, bytes, bytes]]:
    packed: dict[str, tuple[torch.Size, bytes, bytes]] = {}
    for name, weight in weights.items():
        flat = weight.flatten().numpy()
        packed[name] = (weight.shape, np.packbits(flat != 0).tobytes(), flat[flat != 0].tobytes())
    return packed


def _from_bitmask(packed: Mapping[str, tuple[torch.Size, bytes, bytes]]) -> Weights:
    weights: dict[str, Tensor] = {}
    for name, (shape, bits, values) in packed.items():
        flat = np.zeros(math.prod(shape), dtype=np.float32)
        flat[np.unpackbits(np.frombuffer(bits, np.uint8), count=flat.size).astype(bool)] = np.frombuffer(
            values, np.float32
        )
        weights[name] = torch.from_numpy(flat).reshape(shape)
    return weights


def _parts(packed: Mapping[str, tuple[Any, ...]]) -> int:
    return sum(len(part) for _, *parts in packed.values() for part in parts)


PEERS = {
    "dense safetensors": Format(_dense, _from_dense),
    "dense + zstd -3": Format(
        lambda w: zstandard.compress(_dense(w), 3), lambda d: _from_dense(zstandard.decompress(d))
    ),
    "dense + deflate -6 (gzip)": Format(
        lambda w: zlib.compress(_dense(w), 6), lambda d: _from_dense(zlib.decompress(d))
    ),
    "scipy npz, deflate": Format(_to_npz, _from_npz, _parts),
    "torch CSR, int32": Format(_to_csr, _from_csr),
    "bitmask + values": Format(_to_bitmask, _from_bitmask, _parts),
}


def _artifact(net: growfx.MaskedGraph, folder: Path) -> Format:
    def encode(_: Weights) -> Path:
        growfx.save(net, folder)
        return folder / "sparse.safetensors"

    return Format(encode, load_state, lambda file: file.stat().st_size)


def _timed(work: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    best, result = math.inf, None
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    return result, best


def _bound(net: growfx.MaskedGraph) -> float:
    bits = 0.0
    for layer in net.layers.values():
        d = layer.density
        bits += layer.nnz * 32
        if 0 < d < 1:
            bits -= layer.numel * (d * math.log2(d) + (1 - d) * math.log2(1 - d))
    return bits / 8


def _resnet50(density: float, **options: Any) -> growfx.MaskedGraph:
    torch.manual_seed(0)
    return growfx.wrap(growfx.create_model("resnet50", **options), torch.rand(1, 3, 64, 64), density=density)


def measure(density: float, repeats: int) -> list[Row]:
    bare_norm = functools.partial(nn.BatchNorm2d, affine=False, track_running_stats=False)
    net = _resnet50(density, norm_layer=bare_norm)
    weights = {f"{name}.weight": layer.effective_weight.detach() for name, layer in net.layers.items()}
    bound = _bound(net)
    rows = [Row("bound", density, round(bound), 1.0, 0.0, 0.0)]
    with tempfile.TemporaryDirectory() as folder:
        formats = {"growfx artifact": _artifact(net, Path(folder) / "net"), **PEERS}
        for name, form in formats.items():
            stored, encode_seconds = _timed(lambda form=form: form.encode(weights), repeats)
            decoded, decode_seconds = _timed(lambda form=form, stored=stored: form.decode(stored), repeats)
            for key, weight in weights.items():
                if not torch.equal(decoded[key].view(torch.int32), weight.view(torch.int32)):
                    raise AssertionError(f"{name} does not give `{key}` back")
            size = form.size(stored)
            rows.append(Row(name, density, size, size / bound, encode_seconds, decode_seconds))
        full = growfx.save(_resnet50(density), Path(folder) / "full").bytes
    # Its norms and biases are not part of the bound.
    return [*rows[:2], Row(WITH_NORMS, density, full, full / bound, 0.0, 0.0), *rows[2:]]


def _table(rows: list[Row], cell: Callable[[Row], str]) -> str:
    densities = sorted({row.density for row in rows})
    names = list(dict.fromkeys(row.format for row in rows))
    found = {(row.format, row.density): cell(row) for row in rows}
    body = [[name, *(found[name, d] for d in densities)] for name in names]
    return tabulate(body, headers=["", *(f"{d:.0%}" for d in densities)], disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # torch announces on every run that CSR tensors are in beta, unchecked when made and checked when loaded.
    warnings.filterwarnings("ignore", "Sparse CSR|Sparse invariant|Validating sparse")
    rows = [row for density in options.densities for row in measure(density, options.repeats)]
    timed = [row for row in rows if row.format not in ("bound", WITH_NORMS)]
    print("size in MB (x bound)\n")
    print(_table(rows, lambda row: f"{row.bytes / 1e6:.2f} ({row.over_bound:.3f})"))
    print("\nCPU seconds to write / to read\n")
    print(_table(timed, lambda row: f"{row.encode_seconds:.2f} / {row.decode_seconds:.2f}"))
    if options.json:
        facts = {"machine": describe(), "zstandard": zstandard.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
