#!/usr/bin/env bash
# Guess:    dask.array.percentile of a chunked array is near enough to the exact one to prune by: with weights in a few chunks, a
#           layer or a file each, about half are above the 50th percentile and one in a hundred above the 99th.
# Happens:  it takes the percentile of each chunk, the one that was asked for and the two ends, and mixes those. Where chunks are
#           alike that is nearly right; where they differ in size of values, as layers do, the 50th of ten equal chunks has a
#           quarter of the values above it, the 90th 3 % and the 99th 0.2 %; with three layers of different widths one value in a
#           hundred is above the median. A network pruned to half keeps that. Nothing is said; method="nearest" or "lower" does the
#           same. Asking for many percentiles at once makes each of them better. da.median(axis=0), which puts all in one chunk, is
#           right.
# Seen with dask 2026.8.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'dask[array]==2026.8.0' numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import dask
import dask.array as da
import numpy as np

warnings.simplefilter("error")  # a warning would end the script
generator = np.random.default_rng(0)


def layers(sizes, scales):
    parts = [np.abs(generator.standard_normal(size) * scale) for size, scale in zip(sizes, scales, strict=True)]
    values = np.concatenate(parts)
    return values, da.from_array(values, chunks=(tuple(sizes),))


def share_above(values, array, q, **options):
    return float((values > float(np.ravel(da.percentile(array, [q], **options).compute())[0])).mean())


cases = {
    "ten equal chunks, alike": layers([1000] * 10, [1] * 10),
    "ten equal chunks, four of them larger": layers([1000] * 10, [0.01, 0.1, 1, 3] + [0.02] * 6),
    "three layers": layers([64 * 27, 64 * 64 * 9, 512 * 512 * 9], [0.1, 0.05, 0.01]),
}
print("dask", dask.__version__)
seen = {}
for name, (values, array) in cases.items():
    seen[name] = [round(share_above(values, array, q), 4) for q in (50, 90, 99)]
    near = [round(share_above(values, array, q, method="nearest"), 4) for q in (50, 90, 99)]
    print(f"{name}: above the 50th, 90th and 99th percentile: {seen[name]}; with nearest {near}")
    median = float((values > float(da.median(array, axis=0).compute())).mean())
    many = np.ravel(da.percentile(array, list(range(101))).compute())[50]
    print(f"    above da.median(axis=0) {median:.4f}, above the 50th of all 101 percentiles {(values > many).mean():.4f}")
    assert abs(median - 0.5) < 0.001 and abs((values > many).mean() - 0.5) < 0.05, "this has changed"
alike, mixed, three = seen.values()
assert abs(alike[0] - 0.5) < 0.04 and abs(alike[1] - 0.1) < 0.02, "this has changed"
assert mixed[0] < 0.3 and mixed[1] < 0.05 and mixed[2] < 0.003 and three[0] < 0.05, "this has changed"
print("as described")
PY
