#!/usr/bin/env bash
# Guess:    mutual_info_classif and mutual_info_regression of scikit-learn, scores to select features by, are the same for a sparse
#           matrix as for the array that it stands for, as f_classif's, chi2's and every other selection score's are.
# Happens:  a sparse matrix's features are taken for discrete, each value a class of its own, an array's for continuous. Of a
#           sparse matrix noise scores far above zero, the more the fuller its column is, and a full column of noise beats the
#           sparse one that the label was made from. In regression, where the target is continuous, all scores are zero to 15
#           digits. Selecting the best features of the two forms gives other features. A warning says that clustering metrics
#           expect discrete values. discrete_features=False raises for sparse matrices.
# Seen with scikit-learn 1.9.1, scipy 1.17.1 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import numpy as np
import sklearn
from scipy import sparse
from sklearn.feature_selection import f_classif, mutual_info_classif, mutual_info_regression

generator = np.random.default_rng(0)
features = generator.standard_normal((500, 5)) * (generator.random((500, 5)) < [0.3, 0.3, 0.6, 0.8, 0.9])
target = features[:, 0] + 0.2 * generator.standard_normal(500)  # made from the first feature alone
labels = target > 0.2
matrix = sparse.csr_array(features)
print("scikit-learn", sklearn.__version__)
seen = {}
for form, given in {"array": features, "sparse": matrix}.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen[form, "classes"] = mutual_info_classif(given, labels, random_state=0)
        seen[form, "numbers"] = mutual_info_regression(given, target, random_state=0)
    for kind in ("classes", "numbers"):
        print(f"{form}, {kind}: {seen[form, kind].round(4).tolist()}")
    print(f"{form}: warnings {sorted({str(warning.message)[:48] for warning in caught})}")
assert np.allclose(f_classif(features, labels)[0], f_classif(matrix, labels)[0]), "this has changed"
assert all(seen["array", kind].argmax() == 0 for kind in ("classes", "numbers")), "this has changed"
assert seen["sparse", "classes"].argmax() == 4 and seen["sparse", "classes"][1:].min() > 0.05, "this has changed"
assert abs(seen["sparse", "numbers"]).max() < 1e-12, "this has changed"
try:
    mutual_info_classif(matrix, labels, discrete_features=False)
except ValueError as error:
    print("discrete_features=False:", error)
else:
    raise AssertionError("this has changed")
print("as described")
PY
