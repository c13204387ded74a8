#!/usr/bin/env bash
# Guess:    load_svmlight_file reads what dump_svmlight_file of the same scikit-learn wrote: the same features in the same
#           columns, save perhaps empty ones at the end.
# Happens:  it is written with columns counted from zero, and read by looking whether a column 0 occurs; where none does, columns
#           are taken to be counted from one. Of a matrix whose first column is empty, a pruned feature for instance, all
#           features move one column to the left, and nothing is said. n_features=4 does not help; zero_based=True does.
# Seen with scikit-learn 1.9.1, scipy 1.17.1, numpy 2.4.6, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import warnings

import numpy as np
import sklearn
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

warnings.simplefilter("error")  # a warning would end the script
kept = np.array([[1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 4.0, 5.0]])
pruned = kept * [0, 1, 1, 1]
print("scikit-learn", sklearn.__version__)


def read(features, **options):
    dump_svmlight_file(features, [0, 1], "features.svm")
    return load_svmlight_file("features.svm", **options)[0].toarray()


print("first column there:", read(kept).tolist())
print("first column empty:", read(pruned).tolist(), "and with n_features=4:", read(pruned, n_features=4).tolist())
assert (read(kept) == kept).all() and (read(pruned, zero_based=True) == pruned).all()
assert (read(pruned) == pruned[:, 1:]).all(), "this has changed"
assert (read(pruned, n_features=4) == np.roll(pruned, -1, axis=1)).all(), "this has changed"
print("as described")
PY
