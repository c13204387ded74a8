#!/usr/bin/env bash
# Guess:    numexpr's sum(w) and max(w) are numpy's, faster: float32 is added pairwise or in float64, integers in int64, and a NaN
#           in a weight shows in its largest value.
# Happens:  a float32 sum is kept in float32 and added one by one: of 20 million ones it is 16,777,216, where numpy has 20 million;
#           of ten million times 0.1, 9 % too much. int32 is added in 32 bits and wraps around: ten times 2^30 are -2147483648.
#           int8 and int16, computed in int32, do so too: the squares of 300,000 int8 weights of 100 add up to less than zero,
#           where numpy's int64 sum fits. max and min pass over NaN. Nothing is said. float64 and int64 are right.
# Seen with numexpr 2.14.2 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numexpr==2.14.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numexpr
import numpy as np

numexpr.set_num_threads(1)


def both(name, expression, w, expected):
    result = numexpr.evaluate(expression, {"w": w})
    print(f"{name}: {expression} is {result.item()!r}, numpy has {expected!r}")
    return result.item()


print("numexpr", numexpr.__version__, "numpy", np.__version__)
ones, tenths = np.ones(20_000_000, np.float32), np.full(10_000_000, 0.1, np.float32)
assert both("20 million ones, float32", "sum(w)", ones, float(ones.sum())) == 2**24, "this has changed"
assert both("10 million 0.1, float32", "sum(w)", tenths, float(tenths.sum())) > 1_080_000, "this has changed"
large = np.full(10, 2**30, np.int32)
assert both("10 times 2^30, int32", "sum(w)", large, int(large.sum())) == -(2**31), "this has changed"
small = np.full(300_000, 100, np.int8)
assert both("300,000 times 100, int8", "sum(w * w)", small, int((small.astype(int) ** 2).sum())) < 0, "this has changed"
unknown = np.array([1.0, np.nan, 3.0])
assert both("with a NaN", "max(w)", unknown, float(unknown.max())) == 3, "this has changed"
assert both("with a NaN", "min(w)", unknown, float(unknown.min())) == 1, "this has changed"
wide = ones.astype(np.float64)
assert both("20 million ones, float64", "sum(w)", wide, float(wide.sum())) == 20_000_000, "this has changed"
assert both("10 times 2^30, int64", "sum(w)", large.astype(np.int64), int(large.sum())) == 10 * 2**30, "this has changed"
print("as described")
PY
