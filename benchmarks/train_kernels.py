"""The three products of each layer with sparse kernels, and with torch's dense ones: milliseconds and GF/s.

    python benchmarks/train_kernels.py [--case MODEL:BATCH:PIXELS] [--density 0.2] [--seconds 0.1] [--json FILE]

Masks are random ERK masks of exactly the density, seed 0. Layers of one geometry and number of entries are measured
once and counted. Products by entries ("spa") and by panels ("pan") run between tensors whose batch is innermost, dense
ones ("den") between contiguous and between channels_last tensors, of which the faster counts. GF/s are of useful
operations by the faster of entries and panels: two for each active entry and each place where it does not meet padding.
CPU time of one thread, minima of interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from train_speed import build

import growfx
from growfx.runtime.timing import interleaved_minima
from growfx.runtime.train.entries import Entries, Geometry, geometry_of
from growfx.runtime.train.library import training_status

PRODUCTS = ("forward", "input", "weight")


@dataclass(frozen=True)
class Shape:
    """What the speed of a layer depends on."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    entries: int


def shapes_of(net: growfx.MaskedGraph, images: Tensor) -> tuple[Counter[Shape], dict[Shape, tuple[str, Tensor]]]:
    """The distinct layers of `net`, with their number, and the name and mask of one of each."""
    counted: Counter[Shape] = Counter()
    examples: dict[Shape, tuple[str, Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            geometry = geometry_of(layer)
            if isinstance(geometry, Geometry):
                x = inputs[0] if geometry.kernel else inputs[0].flatten(0, -2)
                shape = Shape(tuple(x.shape), tuple(layer.parameter.shape), geometry, int(layer.mask.sum()))
                counted[shape] += 1
                examples.setdefault(shape, (name, layer.mask))

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in net.layers.items()]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return counted, examples


def useful(mask: Tensor, shape: Shape, out_size: list[int]) -> float:
    """Operations of one product: two for each entry, image and place that reads a value that is there."""
    g, size = shape.geometry, shape.input[2:]
    places = torch.ones(())
    for axis, kernel in enumerate(g.kernel):
        read = torch.arange(out_size[axis])[:, None] * g.stride[axis] - g.front[axis]
        read = read + torch.arange(kernel) * g.dilation[axis]
        places = places[..., None] * ((read >= 0) & (read < size[axis])).sum(0)
    return 2.0 * shape.input[0] * float((mask.sum((0, 1)) * places).sum())


def inner_calls(shape: Shape, mask: Tensor, out_size: list[int], *, panels: bool) -> dict[str, Callable[[], Any]]:
    """The products of a layer between tensors whose batch is innermost: by entries, or by panels of dense rows."""
    ops, g = torch.ops.growfx, shape.geometry
    e = Entries.of(mask, mask.stride(), g, out_size)
    out_sizes = [shape.input[0], shape.weight[0], *out_size]
    x, dy = (ops.batch_inner(torch.randn(sizes)) for sizes in (shape.input, out_sizes))
    values = torch.randn(e.nnz)
    tables = (e.start, e.source, e.back_start, e.back_source, e.back_order, g.kernel, g.stride, g.front, g.dilation)
    return {
        "forward": lambda: ops.sparse_product(x, values, None, *tables, out_sizes, panels),
        "input": lambda: ops.sparse_product_backward(dy, x, values, *tables, [True, False, False], panels),
        "weight": lambda: ops.sparse_product_backward(dy, x, values, *tables, [False, True, False], panels),
    }


def dense_calls(shape: Shape, *, last: bool) -> dict[str, Callable[[], Any]]:
    """The dense products of a layer."""
    g = shape.geometry
    x, weight = torch.randn(shape.input), torch.randn(shape.weight)
    if not g.kernel:
        dy = torch.randn(shape.input[0], shape.weight[0])
        return {"forward": lambda: F.linear(x, weight), "input": lambda: dy @ weight, "weight": lambda: dy.t() @ x}
    if last and len(g.kernel) == 2:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    rest = (g.stride, g.front, g.dilation, False, [0] * len(g.kernel), 1)
    y = torch.convolution(x, weight, None, *rest)
    dy = torch.randn_like(y)

    def backward(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *rest, [*wanted, False])

    return {
        "forward": lambda: torch.convolution(x, weight, None, *rest),
        "input": lambda: backward(True, False),
        "weight": lambda: backward(False, True),
    }


def measure(shape: Shape, mask: Tensor, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds and GF/s of each product; by product."""
    out_size = shape.geometry.out_size(shape.input[2:])
    kinds = {
        "sparse": inner_calls(shape, mask, out_size, panels=False),
        "panels": inner_calls(shape, mask, out_size, panels=True),
        "dense": dense_calls(shape, last=False),
        "channels_last": dense_calls(shape, last=True),
    }
    operations, found = useful(mask, shape, out_size), {}
    for product in PRODUCTS:
        calls = {kind: of[product] for kind, of in kinds.items()}
        ms = interleaved_minima(calls, least_rounds=4, seconds=seconds / 3, clock=time.thread_time)
        ms = {kind: time / 1e3 for kind, time in ms.items()}
        best = min(ms["sparse"], ms["panels"])
        times = {"sparse_ms": ms["sparse"], "panels_ms": ms["panels"], "best_ms": best}
        times |= {"dense_ms": min(ms["dense"], ms["channels_last"]), "useful_gflops": operations / best / 1e6}
        found[product] = times
    return found


def main() -> None:
    """Measure the layers of one network and print their table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", default="resnet18:128:32")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if reason := training_status():
        parser.error(f"there are no training kernels: {reason}")
    name, batch, pixels = options.case.split(":")
    torch.manual_seed(0)
    images = torch.randn(int(batch), 3, int(pixels), int(pixels))
    net = growfx.wrap(build(name, int(pixels)), images[:2], density=options.density, seed=0)
    counted, examples = shapes_of(net, images)
    rows, results = [], []
    totals: dict[str, float] = {}
    for shape, count in counted.items():
        layer, mask = examples[shape]
        found = measure(shape, mask, options.seconds)
        density = shape.entries / mask.numel()
        results.append({"layer": layer, "count": count, "density": density, "products": found} | _plain(shape))
        row: list[Any] = [layer, count, "x".join(map(str, shape.input)), "x".join(map(str, shape.weight)), density]
        for product in PRODUCTS:
            of = found[product]
            row += [of["sparse_ms"], of["panels_ms"], of["dense_ms"], of["useful_gflops"]]
            for kind in ("sparse_ms", "best_ms", "dense_ms"):
                totals[f"{product} {kind}"] = totals.get(f"{product} {kind}", 0.0) + count * of[kind]
        rows.append(row)
    heads = ["layer", "n", "input", "weight", "density"] + [
        f"{p[:3]} {h}" for p in PRODUCTS for h in ("spa", "pan", "den", "GF")
    ]
    print(tabulate(rows, heads, floatfmt=".2f"))
    print({key: round(value, 1) for key, value in totals.items()})
    if options.json:
        what = {"case": options.case, "density": options.density, "machine": describe(), "totals": totals}
        options.json.write_text(json.dumps(what | {"layers": results}, indent=1) + "\n")


def _plain(shape: Shape) -> dict[str, Any]:
    sizes, weight, geometry, entries = astuple(shape)
    return {"input": sizes, "weight": weight, "geometry": geometry, "entries": entries}


if __name__ == "__main__":
    main()
