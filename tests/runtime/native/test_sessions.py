"""One network of the native runtime, called by several threads and at several batch sizes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from native_nets import Classifier

from growfx.deploy.native.export import native_plan
from growfx.errors import ConfigError
from growfx.passes.lower.plan.file import network_bytes
from growfx.runtime.native import sessions as module
from growfx.runtime.native.library import NativeNetwork, library_status
from growfx.runtime.native.sessions import Sessions

pytestmark = pytest.mark.skipif(bool(library_status()), reason=library_status() or "the library is there")

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def made() -> tuple[Sessions, Classifier]:
    model = Classifier().eval()
    return Sessions(network_bytes(native_plan(model, (X[:1],)), compressed=False)), model


def test_threads_that_call_at_the_same_time_have_a_network_each_and_few_are_kept() -> None:
    sessions, model = made()
    with torch.no_grad():
        expected = {rows: model(X[:rows]) for rows in (1, 2, 4)}
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        for i in range(6):
            rows = (1, 2, 4)[(seed + i) % 3]
            (found,) = sessions.run(rows, [X[:rows].contiguous()])
            torch.testing.assert_close(found, expected[rows], rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert 1 <= len(sessions._idle) <= module._MOST_IDLE


def test_one_thread_has_one_network_whatever_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, _ = made()
    opened: list[int] = []
    monkeypatch.setattr(
        module, "NativeNetwork", lambda data, **options: opened.append(1) or NativeNetwork(data, **options)
    )
    for rows in (1, 3, 1, 2):
        sessions.run(rows, [X[:rows].contiguous()])
    assert not opened


def test_a_network_that_failed_is_not_kept() -> None:
    sessions, model = made()
    with pytest.raises(ConfigError):
        sessions.run(2**62, [X])
    with torch.no_grad():
        torch.testing.assert_close(sessions.run(4, [X])[0], model(X), rtol=1e-4, atol=1e-5)
