#!/usr/bin/env bash
# Guess:    tensorboard's EventAccumulator, the usual way to read a run's scalars in Python, returns what was logged: all steps of
#           a run of 40,000 with a loss at each, and counts of parameters and kept edges as the integers they were.
# Happens:  it keeps 10,000 values of each tag, drawn at random, and the last one. The best accuracy of the run is missing three
#           times out of four, and so is the step at which the density changed; the steps that are left look like a regular log.
#           Histograms, of weights for instance, are cut to one, the last, and images to four. Every value is a float32:
#           123,456,789 kept edges are 123,456,792, and two counts past 2^24 that differ by one are the same. Nothing is said.
#           size_guidance={"scalars": 0, "histograms": 0} keeps all.
# Seen with tensorboard 2.21.0, torch 2.15.0 (its SummaryWriter) and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'tensorboard==2.21.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - "$folder/run" <<'PY'
import sys

import tensorboard
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

best = set(range(1000, 40_000, 1000))
with SummaryWriter(sys.argv[1]) as writer:
    for step in range(40_000):
        writer.add_scalar("accuracy", 1.0 if step in best else 0.5, step)
    for step, edges in enumerate((123_456_789, 16_777_216, 16_777_217)):
        writer.add_scalar("edges", edges, step)
    for step in range(5):
        writer.add_histogram("weight", torch.full((100,), float(step)), step)
print("tensorboard", tensorboard.__version__, "torch", torch.__version__)
reader = EventAccumulator(sys.argv[1])
reader.Reload()
values = reader.Scalars("accuracy")
kept = sum(value.value == 1 for value in values)
print(f"40,000 steps logged, {len(values)} read, the last {values[-1].step}; of {len(best)} best ones {kept} are there")
assert len(values) == 10_000 and values[-1].step == 39_999 and kept < len(best) / 2, "this has changed"
edges = [int(value.value) for value in reader.Scalars("edges")]
print("edges:", edges, "histograms read of 5:", [value.step for value in reader.Histograms("weight")])
assert edges == [123_456_792, 16_777_216, 16_777_216], "this has changed"
assert [value.step for value in reader.Histograms("weight")] == [4], "this has changed"
reader = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "histograms": 0})
reader.Reload()
print("with size_guidance:", len(reader.Scalars("accuracy")), "steps and", len(reader.Histograms("weight")), "histograms")
assert len(reader.Scalars("accuracy")) == 40_000 and len(reader.Histograms("weight")) == 5, "this has changed"
print("as described")
PY
