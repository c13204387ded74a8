#!/usr/bin/env bash
# Guess:    torchdata's StatefulDataLoader, saved in the middle of an epoch with state_dict() and loaded into a new one made
#           alike, goes on as if there had been no break: the rest of the epoch, and the epochs after it, whatever the number of
#           workers.
# Happens:  with shuffle=True and a generator, the usual way to make the order repeatable, only the rest of the epoch is right.
#           Without workers the next epochs come in other orders than in the run without a break, also from a state that is
#           saved at the end of an epoch; with two workers, or without a generator, where the global one is not even seeded
#           alike, all of them are right. So a resumed run differs from its twin from the next epoch on, by an option that has
#           no bearing on the order otherwise. Each epoch is a shuffle of all samples, so nothing shows it.
# Seen with torchdata 0.11.0, torch 2.15.0 and numpy 2.4.6, CPU, Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet 'torch==2.15.0' 'torchdata==0.11.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

warnings.simplefilter("error")  # a warning would end the script
warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
print("torchdata", version("torchdata"), "torch", torch.__version__)


def loader(workers, seeded):
    generator = torch.Generator().manual_seed(0) if seeded else None
    return StatefulDataLoader(range(40), batch_size=4, shuffle=True, num_workers=workers, generator=generator)


def epoch(of):
    return [sample for batch in of for sample in batch.tolist()]


for workers in (0, 2):
    for seeded in (False, True):
        torch.manual_seed(0)
        whole = loader(workers, seeded)
        expected = [epoch(whole) for _ in range(3)]
        seen = {}
        for batches in (3, 10):  # in the middle and at the end of an epoch of ten batches
            torch.manual_seed(0)
            broken = loader(workers, seeded)
            batch = iter(broken)
            for _ in range(batches):
                next(batch)
            if batches == 10:
                assert not list(batch)
            state = broken.state_dict()
            torch.manual_seed(1)
            resumed = loader(workers, seeded)
            resumed.load_state_dict(state)
            if batches == 3:
                seen["rest of the epoch"] = epoch(resumed) == expected[0][12:]
            seen[f"next epoch, saved after {batches} batches"] = epoch(resumed) == expected[1]
            seen[f"the one after, saved after {batches} batches"] = epoch(resumed) == expected[2]
        print(f"{workers} workers, {'generator' if seeded else 'no generator'}: as without a break:", seen)
        assert seen.pop("rest of the epoch"), "this has changed"
        assert set(seen.values()) == {not (seeded and workers == 0)}, "this has changed"
print("as described")
PY
