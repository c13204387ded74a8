"""Shared settings of the tests: two processes share two cores, and nothing is random between runs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _steady() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
