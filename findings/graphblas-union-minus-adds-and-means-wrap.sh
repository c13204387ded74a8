#!/usr/bin/env bash
# Guess:    A.ewise_add(B, binary.minus) of two graphblas matrices is A - B, an absent entry counting as zero, as with plus; and
#           sums and means of small integers, weights or masks in int8, are kept in a larger type, as numpy keeps them.
# Happens:  where only B has an entry, the result has that entry itself: B, not -B. In the difference of two sparse weights all
#           the edges that are new in B have the wrong sign. `A - B` is right, and so is ewise_union(B, binary.minus, 0, 0). A
#           sum is kept in the entries' type and wraps around: of 300 ones in int8 it is 44. The mean is taken from that sum: of
#           300 values of 100 it is 0.16. Nothing is said.
# Seen with python-graphblas 2025.2.0, suitesparse-graphblas 9.4.5.0, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet python-graphblas==2025.2.0 suitesparse-graphblas==9.4.5.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import graphblas
import numpy as np
from graphblas import Matrix, Vector, agg, binary, monoid

first, second = np.array([[1.0, 2.0, 0.0]]), np.array([[0.0, 5.0, 7.0]])
a, b = (Matrix.from_dense(dense, missing_value=0) for dense in (first, second))
seen = {
    "ewise_add with minus": a.ewise_add(b, binary.minus).new(),
    "A - B": (a - b).new(),
    "ewise_union with minus": a.ewise_union(b, binary.minus, 0, 0).new(),
}
print("python-graphblas", graphblas.__version__)
for name, result in seen.items():
    print(f"{name}: {result.to_dense(0).tolist()}")
wrong = seen.pop("ewise_add with minus").to_dense(0)
assert all((result.to_dense(0) == first - second).all() for result in seen.values())
assert wrong.tolist() == [[1, -3, 7]], "this has changed"
ones, hundreds = np.ones(300, np.int8), np.full(300, 100, np.int8)
total = Vector.from_dense(ones).reduce(monoid.plus).new().value
mean = Vector.from_dense(hundreds).reduce(agg.mean).new().value
print(f"300 ones in int8: sum {total}; 300 hundreds: mean {mean}; numpy has {ones.sum()} and {hundreds.mean()}")
assert total == 300 - 256 and abs(mean - 48 / 300) < 1e-6, "this has changed"
print("as described")
PY
