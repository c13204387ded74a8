#!/usr/bin/env bash
# Guess:    the regression metrics of scikit-learn treat integers alike: where mean_absolute_error and mean_squared_error of
#           pixels in uint8, or of quantized weights in int8, are right, max_error and median_absolute_error of the same arrays
#           are too.
# Happens:  the means are kept in float64, and the other two subtract in 8 bits and wrap around. Predictions in uint8 that are
#           one too small everywhere have a median error of 255, and one too large a largest error of 255; where one pixel is
#           off by 255 the largest error is 1. In int8 the largest error between weights of -127 and 127 is 2, far below the
#           mean one. As scorers of a search ("neg_max_error", "neg_median_absolute_error") they rank the worse model first.
#           Nothing is said.
# Seen with scikit-learn 1.9.1, scipy 1.17.1 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import numpy as np
import sklearn
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.metrics import get_scorer, max_error, mean_absolute_error, mean_squared_error, median_absolute_error

warnings.simplefilter("error")  # a warning would end the script
print("scikit-learn", sklearn.__version__)
metrics = (mean_absolute_error, mean_squared_error, median_absolute_error, max_error)
pixels = np.arange(1, 256, dtype=np.uint8)
white, black = np.full(255, 255, np.uint8), np.full(255, 255, np.uint8)
black[0] = 0
signs = np.array([-127, 127, -127], np.int8)
far = np.array([-100, 100, -100], np.int8)
cases = {
    "uint8, all one too small": (pixels, pixels - np.uint8(1)),
    "uint8, all one too large": (pixels - np.uint8(1), pixels),
    "uint8, one pixel black instead of white": (black, white),
    "int8, -127 for 127": (signs, -signs),
    "int8, -100 for 100": (far, -far),
}
seen = {}
for name, (target, output) in cases.items():
    for metric in metrics:
        seen[name, metric] = float(metric(target, output)), float(metric(target.astype(float), output.astype(float)))
    print(
        f"{name}:",
        ", ".join(f"{metric.__name__} {seen[name, metric][0]:g} ({seen[name, metric][1]:g})" for metric in metrics),
    )
print("(in brackets: of the same numbers in float64)")
for (name, metric), (found, expected) in seen.items():
    if metric in metrics[:2]:
        assert found == expected, "this has changed"
small, large, black_white = list(cases)[:3]
assert {seen[small, median_absolute_error][0], seen[large, median_absolute_error][0]} == {1, 255}, "this has changed"
assert {seen[small, max_error][0], seen[large, max_error][0]} == {1, 255}, "this has changed"
assert seen["int8, -127 for 127", max_error][0] == 2, "this has changed"


class Constant(RegressorMixin, BaseEstimator):
    """A fitted model that predicts the same integers for any input."""

    def __init__(self, output):
        self.output = output

    def fit(self, features, target):
        return self

    def predict(self, features):
        return self.output


target = np.full(9, 100, np.uint8)
for scorer, good_output, bad_output in (
    ("neg_max_error", target + np.uint8(1), target + np.uint8(155)),
    ("neg_median_absolute_error", target - np.uint8(1), target - np.uint8(99)),
    ("neg_mean_absolute_error", target - np.uint8(1), target - np.uint8(99)),
):
    good, bad = (get_scorer(scorer)(Constant(output), np.zeros((9, 1)), target) for output in (good_output, bad_output))
    print(
        f"{scorer} of {target[0]}: model that says {good_output[0]} {good:g}, model that says {bad_output[0]} {bad:g}"
    )
    assert (good < bad) == (scorer != "neg_mean_absolute_error"), "this has changed"
print("as described")
PY
