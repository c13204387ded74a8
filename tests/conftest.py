"""Shared settings of the tests: two processes share two cores, and nothing is random between runs."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

# What is compiled and timed is kept between sessions, but not among what the user has.
os.environ.setdefault("GROWFX_CACHE", str(Path(tempfile.gettempdir()) / "growfx-tests"))

# The same examples in every run, however long a loaded machine takes for one.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
