import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_nets import bits, forge, make_net, plain
from breadth import some
from places import GOLDEN
from safetensors.torch import load_file
from scipy.sparse import csr_array
from torch import nn

import growfx
from growfx.artifact.arrays import _E4M3, _numbers
from growfx.errors import ArtifactError
from growfx.masked.layers import MaskedLayer

FIRST = GOLDEN / "artifact-1.0"
WIDENED = [torch.float16, torch.bfloat16]


def dense(layer: MaskedLayer) -> torch.Tensor:
    weight = torch.where(layer.mask, layer.parameter.detach(), 0)
    return (weight.float() if weight.dtype in WIDENED else weight).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *WIDENED])
@pytest.mark.parametrize("density", some([0.0, 0.004, 0.3, 0.9, 1.0], lambda density: density in (0.0, 0.3)))
def test_matrices_hold_exactly_the_active_weights(tmp_path: Path, density: float, dtype: torch.dtype):
    net = make_net(density, dtype)
    growfx.save(net, tmp_path / "out")
    matrices = growfx.to_scipy(tmp_path / "out")
    assert list(matrices) == list(net.layers)
    for name, layer in net.layers.items():
        matrix, expected = matrices[name], dense(layer)
        assert isinstance(matrix, csr_array)
        assert matrix.shape == tuple(expected.shape)
        assert matrix.nnz == layer.nnz
        assert matrix.has_canonical_format
        matrix.check_format(full_check=True)
        assert matrix.toarray().tobytes() == expected.numpy().tobytes()


def test_a_matrix_times_a_vector_is_the_layer(tmp_path: Path):
    net = make_net(0.3)
    growfx.save(net, tmp_path / "out")
    head, x = plain(net).get_parameter("head.weight"), torch.rand(24, dtype=torch.float64)
    own = growfx.to_scipy(tmp_path / "out")["head"] @ x.numpy()
    assert np.allclose(own, (head.double() @ x).detach().numpy())


def test_active_zeros_stay_entries_and_special_values_keep_their_bits(tmp_path: Path):
    net = make_net(0.3)
    layer = net.layers["conv"]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])
    layer.parameter.data[layer.mask.nonzero()[: len(special)].unbind(1)] = special
    growfx.save(net, tmp_path / "out")
    matrix = growfx.to_scipy(tmp_path / "out")["conv"]
    assert matrix.nnz == layer.nnz
    assert matrix.data[: len(special)].view(np.int32).tolist() == bits(special)


def test_numpy_arrays_are_the_state_dict(tmp_path: Path):
    net = make_net(0.3, wild=True)
    growfx.save(net, tmp_path / "out")
    arrays, expected = growfx.to_numpy(tmp_path / "out"), plain(net).state_dict()
    assert arrays.keys() == expected.keys()
    for name, tensor in expected.items():
        assert arrays[name].shape == tuple(tensor.shape)
        assert arrays[name].dtype == tensor.numpy().dtype
        assert arrays[name].tobytes() == tensor.numpy().tobytes()
    assert arrays["second.weight"] is arrays["first.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_types_that_numpy_lacks_are_widened_as_torch_widens_them(dtype: torch.dtype):
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bfloat16: "BF16"}[dtype]
    word = np.uint16 if dtype.itemsize == 2 else np.uint8
    patterns = np.arange(1 << (8 * dtype.itemsize)).astype(word)
    expected = (
        torch.from_numpy(patterns.view(np.int16 if dtype.itemsize == 2 else np.uint8)).view(dtype).float().numpy()
    )
    widened = _numbers(patterns, name)
    assert widened.dtype == np.float32
    assert np.array_equal(widened, expected, equal_nan=True)
    assert np.array_equal(np.signbit(widened), np.signbit(expected))
    assert _E4M3.size == 256


def test_layers_of_every_rank_are_matrices(tmp_path: Path):
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(12, 3))
    net = growfx.wrap(model, torch.rand(1, 2, 5), density=0.4)
    growfx.save(net, tmp_path / "out")
    assert {k: m.shape for k, m in growfx.to_scipy(tmp_path / "out").items()} == {"0": (4, 6), "2": (3, 12)}


def test_arrays_are_read_without_torch(tmp_path: Path):
    net = make_net(0.3)
    growfx.save(net, tmp_path / "out")
    code = (
        "import json, sys, growfx\n"
        f"matrices, arrays = growfx.to_scipy({str(tmp_path / 'out')!r}), growfx.to_numpy({str(tmp_path / 'out')!r})\n"
        "print(json.dumps([{k: m.nnz for k, m in matrices.items()}, sorted(arrays), 'torch' in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    expected = [{k: v.nnz for k, v in net.layers.items()}, sorted(plain(net).state_dict()), False]
    assert json.loads(run.stdout) == expected


def test_sizes_are_bounded_before_anything_is_decoded(tmp_path: Path):
    growfx.save(make_net(0.3), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"its matrices take up to \d+ bytes, more than max_bytes=100"):
        growfx.to_scipy(tmp_path / "out", max_bytes=100)
    with pytest.raises(ArtifactError, match=r"its tensors take \d+ bytes, more than max_bytes=100"):
        growfx.to_numpy(tmp_path / "out", max_bytes=100)


def test_a_matrix_of_endless_empty_rows_is_refused(tmp_path: Path):
    net = make_net(0.3)
    net.layers["gate"].mask.zero_()
    net.settle()
    growfx.save(net, tmp_path / "out")
    file = tmp_path / "out" / "sparse.safetensors"
    forge(file, lambda m: m["tensors"]["gate.weight"].update(shape=[1 << 33, 1]))
    with pytest.raises(ArtifactError, match="its matrices take up to"):
        growfx.to_scipy(file, max_bytes=10**9)


def test_a_damaged_artifact_is_refused(tmp_path: Path):
    growfx.save(make_net(0.3), tmp_path / "out")
    file = tmp_path / "out" / "sparse.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="its SHA-256 differs"):
        growfx.to_scipy(tmp_path / "out")
    with pytest.raises(ArtifactError, match="CRC-32 does not agree"):
        growfx.to_numpy(file)


def test_the_golden_artifact_reads_as_arrays():
    expected = load_file(FIRST / "expected.safetensors")
    arrays, matrices = growfx.to_numpy(FIRST), growfx.to_scipy(FIRST)
    for name, tensor in expected.items():
        if name.startswith("mask "):
            assert matrices[name.removeprefix("mask ")].nnz == int(tensor.sum())
        else:
            assert np.array_equal(arrays[name], tensor.double().numpy(), equal_nan=True)
