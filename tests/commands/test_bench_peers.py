"""Other runtimes give torch's outputs, where they are installed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.commands.bench import peers
from growfx.commands.bench.measure import bench
from growfx.commands.bench.peers import DEEPSPARSE_PYTHON, DeepSparse, OnnxSession, OpenVino, export_for_deepsparse
from growfx.errors import ConfigError

# Name -> the packages to skip without, and how a file is opened for a batch of 3 on one thread.
RUNTIMES: dict[str, tuple[tuple[str, ...], Callable[[Path], nn.Module]]] = {
    "onnxruntime": (("onnxruntime",), lambda file: OnnxSession(file, 1)),
    "openvino float32": (("openvino", "packaging"), lambda file: OpenVino(file, 1, "f32")),
    "deepsparse": ((DEEPSPARSE_PYTHON,), lambda file: DeepSparse(file, 3, 1)),
}


class TwoHeads(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        planes = self.conv(x).relu() * scale
        return self.head(planes.mean((2, 3))), planes.amax((2, 3))


def need(*packages: str) -> None:
    if DEEPSPARSE_PYTHON in packages and DEEPSPARSE_PYTHON not in os.environ:
        pytest.skip(f"no Python that has DeepSparse is named by {DEEPSPARSE_PYTHON}")
    for package in set(packages) - {DEEPSPARSE_PYTHON}:
        pytest.importorskip(package, reason=f"{package} is not installed, an optional runtime of `growfx bench`")


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_gives_the_outputs_of_torch_call_after_call(name: str, tmp_path: Path) -> None:
    packages, open_file = RUNTIMES[name]
    need("onnxscript", *packages)
    inputs = [(torch.randn(3, 3, 8, 8), torch.rand(3, 1, 1, 1)) for _ in range(2)]
    net = growfx.wrap(TwoHeads(), inputs[0], density=0.4).eval()
    file = tmp_path / "net.onnx"
    if name == "deepsparse":
        export_for_deepsparse(growfx.unwrap(net).eval(), inputs[0], file)
    else:
        growfx.export_onnx(net, file, example_inputs=inputs[0], batch=False)
    runtime = open_file(file)
    found = [runtime(*given) for given in inputs]  # both kept: the second call writes over nothing
    for got, given in zip(found, inputs, strict=True):
        for ours, theirs in zip(got, net(*given), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_file_that_a_runtime_does_not_take_is_a_config_error(name: str, tmp_path: Path) -> None:
    packages, open_file = RUNTIMES[name]
    need(*packages)
    (tmp_path / "net.onnx").write_bytes(b"not ONNX")
    with pytest.raises(ConfigError, match=f"{name.split()[0]} does not take the network"):
        open_file(tmp_path / "net.onnx")


def test_openvino_tells_the_precision_it_has_chosen(tmp_path: Path) -> None:
    need("openvino", "packaging", "onnxscript")
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 2)), torch.rand(1, 4), density=0.5)
    file = growfx.export_onnx(net, tmp_path / "net.onnx", batch=False)
    assert OpenVino(file, 1, "f32").precision == "f32"
    assert OpenVino(file, 1).precision in ("f32", "bf16", "f16")


def test_bench_times_every_runtime_that_is_installed(tmp_path: Path) -> None:
    need("onnxruntime", "onnxscript")
    installed = [name for name in peers.PEERS if peers.is_offered(name) and not peers.missing_packages(name)]
    growfx.save(growfx.wrap(growfx.create_model("test_resnet"), torch.rand(1, 3, 64, 64), density=0.2), tmp_path / "a")
    report = bench(tmp_path / "a", variants=list(peers.PEERS), repeats=2, clock="cpu")
    rows: dict[str, Any] = {row.variant: row for row in report.measurements[0].rows}
    assert list(rows) == ["dense", *installed]
    assert {name: row.note for name, row in rows.items() if row.minimum is None} == {}
    assert report.measurements[0].best_peer in installed
    for package in {name.split()[0] for name in installed if name != "deepsparse"}:
        assert f"{package} {report.versions[package]}" in str(report)


FAKE_DEEPSPARSE = """
import time

class Engine:
    def __init__(self, model, batch_size, num_cores):
        print("a banner")
        assert open(model).read() == "a network", "no network in the file"
        assert (batch_size, num_cores) == (3, 2)

    def run(self, arrays):
        assert len(arrays) < 3, "at most two arrays"
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return [2 * array for array in arrays]
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    """A Python that finds something called deepsparse."""
    (tmp_path / "deepsparse.py").write_text(FAKE_DEEPSPARSE)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    (tmp_path / "net.onnx").write_text("a network")
    return str(program)


def test_deepsparse_runs_in_the_process_of_another_python_until_it_is_dropped(tmp_path: Path, fake_python: str) -> None:
    runtime = DeepSparse(tmp_path / "net.onnx", 3, 2, fake_python)
    x, y = torch.randn(3, 4), torch.arange(6).reshape(3, 2)
    before = runtime.processor_seconds()
    twice = runtime(x, y)
    assert runtime.processor_seconds() - before >= 0.02
    assert torch.equal(twice[0], 2 * x)
    assert torch.equal(twice[1], 2 * y)
    assert torch.equal(runtime(x), 2 * x)
    with pytest.raises(ConfigError, match="at most two arrays"):
        runtime(x, x, x)
    process = runtime.process
    del runtime
    assert process.poll() is not None


def test_a_python_without_deepsparse_and_a_file_that_it_refuses_are_config_errors(
    tmp_path: Path, fake_python: str
) -> None:
    (tmp_path / "bad.onnx").write_text("something else")
    with pytest.raises(ConfigError, match="no network in the file"):
        DeepSparse(tmp_path / "bad.onnx", 3, 2, fake_python)
    with pytest.raises(ConfigError, match="No module named 'deepsparse'"):
        DeepSparse(tmp_path / "net.onnx", 3, 2, sys.executable)
    with pytest.raises(ConfigError, match=f"`{DEEPSPARSE_PYTHON}` = `{tmp_path}/none` is not a Python"):
        DeepSparse(tmp_path / "net.onnx", 3, 2, f"{tmp_path}/none")
