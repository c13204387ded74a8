#!/usr/bin/env bash
# Guess:    run.data.metrics of mlflow has the value that was logged last for each metric, and the history has all of them:
#           logged is logged.
# Happens:  "last" is the highest step, then the latest millisecond, then the largest value. A final accuracy logged without a
#           step, which means step 0, after an epoch's with step=10, is in the history only, and comparisons of runs use the
#           epoch's. Of two losses with the same step and millisecond the larger counts. A value that is logged again with the
#           same step and millisecond is in the history once. An infinity comes back as 1.7976931348623157e+308, which no test
#           for infinity finds. Nothing is said.
# Seen with mlflow 3.17.2 and its SQLite store, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlflow==3.17.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import math

import mlflow
from mlflow import MlflowClient

mlflow.set_tracking_uri("sqlite:///store.db")
with mlflow.start_run() as run:
    mlflow.log_metric("accuracy", 0.5, step=10)
    mlflow.log_metric("accuracy", 0.9)
    for loss in (2.0, 1.0, 1.0):
        mlflow.log_metric("loss", loss, step=1, timestamp=5)
    mlflow.log_metric("bound", math.inf)
client = MlflowClient()
metrics = client.get_run(run.info.run_id).data.metrics
history = {key: [point.value for point in client.get_metric_history(run.info.run_id, key)] for key in metrics}
table = mlflow.search_runs().iloc[0]
print("mlflow", mlflow.__version__)
print("metrics of the run:", metrics)
print("history:", history)
assert sorted(history["accuracy"]) == [0.5, 0.9]
assert metrics["accuracy"] == table["metrics.accuracy"] == 0.5, "this has changed"
assert metrics["loss"] == 2 and sorted(history["loss"]) == [1, 2], "this has changed"
assert math.isfinite(metrics["bound"]) and metrics["bound"] > 1e308, "this has changed"
print("as described")
PY
