#!/usr/bin/env bash
# Guess:    study.best_params of optuna has the values that the best trial was run with: those of a suggest_categorical are the
#           choices that were given, and 0 and False, 1 and True, or 1 and 1.0 are different choices, as the objective sees.
# Happens:  the objective is given each of them, and what is recorded is the first choice that is equal: a trial run with 1.0 is
#           kept as 1. For scikit-learn's forests 1 is one feature and 1.0 is all of them, as it is one weight and all for the
#           amount of torch.nn.utils.prune: run again with best_params, the best model is another one with a lower score, and
#           good and bad results are filed under one value. It is so with every sampler. Nothing is said.
# Seen with optuna 5.0.0, scikit-learn 1.9.1, scipy 1.17.1 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet optuna==5.0.0 scikit-learn==1.9.1 scipy==1.17.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import warnings

import numpy as np
import optuna
import sklearn
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

warnings.simplefilter("error")  # a warning would end the script
optuna.logging.set_verbosity(optuna.logging.WARNING)
print("optuna", optuna.__version__, "scikit-learn", sklearn.__version__)
samplers = {
    "random": lambda choices: optuna.samplers.RandomSampler(seed=0),
    "tree of Parzen estimators": lambda choices: optuna.samplers.TPESampler(seed=0),
    "grid": lambda choices: optuna.samplers.GridSampler({"value": choices}, seed=0),
}
for choices in ([0, False, "x"], [True, 1, 2], [1, 1.0, "sqrt"]):
    for name, make in samplers.items():
        study, given = optuna.create_study(sampler=make(choices)), []

        def objective(trial):
            given.append(trial.suggest_categorical("value", choices))
            return 0.0

        study.optimize(objective, n_trials=30)
        recorded = [trial.params["value"] for trial in study.trials]
        print(
            f"{choices}, {name}: given {sorted({repr(v) for v in given})}, recorded {sorted({repr(v) for v in recorded})}"
        )
        assert {repr(value) for value in given} == {repr(value) for value in choices}, "this has changed"
        assert {repr(value) for value in recorded} == {repr(choices[0]), repr(choices[2])}, "this has changed"
generator = np.random.default_rng(0)
features = generator.standard_normal((300, 30))
labels = features[:, 0] > 0  # one feature tells, so that trees that look at all of them are better


def score(max_features):
    forest = RandomForestClassifier(10, max_features=max_features, random_state=0)
    return float(cross_val_score(forest, features, labels, cv=3).mean())


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
study.optimize(lambda trial: score(trial.suggest_categorical("max_features", [1, 1.0])), n_trials=6)
again = score(**study.best_params)
filed = {trial.params["max_features"]: set() for trial in study.trials}
for trial in study.trials:
    filed[trial.params["max_features"]].add(round(trial.value, 3))
print(
    f"forest: best score {study.best_value:.3f} with {study.best_params}, run again {again:.3f}; scores by value {filed}"
)
assert repr(study.best_params) == "{'max_features': 1}" and study.best_value > again + 0.1, "this has changed"
assert [len(scores) for scores in filed.values()] == [2], "this has changed"
print("as described")
PY
