#!/usr/bin/env bash
# Guess:    a grain MapDataset is a sequence: an index past its end raises IndexError, filter leaves fewer items, and a mixture
#           of two has all items of both, or ends with the larger.
# Happens:  an index past the end wraps around, so that a loop over the wrong number of indices trains on the first items again.
#           A filtered dataset is as long as before and has None at the places left out, though iterating skips them. A mixture
#           of 1,000 and 10 items with equal weights has 20: it ends where the smaller one does and the other 990 never come.
# Seen with grain 0.2.18, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet grain==0.2.18 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
from importlib.metadata import version

import grain

items = grain.MapDataset.range(5)
print("grain", version("grain"))
print("five items, indices 4 to 7:", [items[index] for index in range(4, 8)])
assert len(items) == 5 and [items[index] for index in range(4, 8)] == [4, 0, 1, 2], "this has changed"
odd = items.filter(lambda item: item % 2 == 1)
print("odd ones: length", len(odd), "by index", [odd[index] for index in range(len(odd))], "iterated", list(odd))
assert len(odd) == 5 and [odd[index] for index in range(5)] == [None, 1, None, 3, None], "this has changed"
assert list(odd) == [1, 3]
large, small = grain.MapDataset.range(1000), grain.MapDataset.range(1000, 1010)
mixture = list(grain.MapDataset.mix([large, small], [0.5, 0.5]))
print("mixture of 1000 and 10:", len(mixture), "items,", sum(item < 1000 for item in mixture), "of the large one")
assert len(mixture) == 20 and set(range(1000, 1010)) < set(mixture), "this has changed"
print("as described")
PY
