import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from artifact_nets import Tied, bits, make_net, plain, same_bits
from breadth import some
from places import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

import growfx
from growfx.artifact.writer import load_masks, load_state
from growfx.errors import ArtifactError

WEIGHTS = "sparse.safetensors"
FIRST = GOLDEN / "artifact-1.0"


@pytest.fixture(scope="module")
def zoo_net() -> growfx.MaskedGraph:
    model = growfx.create_model("test_resnet", num_classes=4, in_chans=1)
    return growfx.wrap(model, torch.rand(2, 1, 32, 32), density=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", some([0.0, 0.004, 0.03, 0.3, 0.9, 1.0], lambda density: density in (0.004, 0.9)))
def test_any_bit_pattern_at_any_density_comes_back_bit_by_bit(tmp_path: Path, density: float, dtype: torch.dtype):
    net = make_net(density, dtype, wild=True)
    info = growfx.save(net, tmp_path / "out")
    model = growfx.load(tmp_path / "out", model=Tied())
    assert same_bits(model, plain(net))
    state, expected = load_state(tmp_path / "out"), plain(net).state_dict()
    assert state.keys() == expected.keys()
    assert all(bits(state[name]) == bits(expected[name]) for name in expected)
    masks = load_masks(tmp_path / "out")
    assert list(masks) == list(net.layers)
    assert all(torch.equal(masks[name], layer.mask) for name, layer in net.layers.items())
    assert (info.nnz, info.numel, info.density) == (net.nnz, net.numel, net.density)


def test_outside_the_masks_everything_is_plus_zero(tmp_path: Path):
    net = make_net(0.3, wild=True)
    growfx.save(net, tmp_path / "out")
    model = growfx.load(tmp_path / "out", model=Tied())
    weights = dict(model.named_parameters())
    for name, layer in net.layers.items():
        assert set(bits(weights[f"{name}.weight"][~layer.mask])) == {0}


def test_active_zeros_and_special_values_are_weights(tmp_path: Path):
    net = make_net(0.3)
    layer = net.layers["conv"]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])
    where = layer.mask.nonzero()[: len(special)].unbind(1)
    layer.parameter.data[where] = special
    info = growfx.save(net, tmp_path / "out")
    assert info.nnz == net.nnz
    assert next(x for x in info.layers if x.name == "conv").nnz == layer.nnz
    loaded = growfx.load(tmp_path / "out", model=Tied()).get_parameter("conv.weight")
    assert bits(loaded[where]) == bits(special)
    assert torch.equal(load_masks(tmp_path / "out")["conv"], layer.mask)


def test_a_zoo_model_loads_by_its_own_name_in_eval_mode(tmp_path: Path, zoo_net: growfx.MaskedGraph):
    growfx.save(zoo_net, tmp_path / "out")
    model = growfx.load(tmp_path / "out")
    assert type(model) is type(timm.create_model("test_resnet"))
    assert not any(module.training for module in model.modules())
    assert same_bits(model, plain(zoo_net))
    x = torch.rand(3, 1, 32, 32)
    assert torch.equal(model(x), zoo_net.eval()(x))


def test_the_weights_file_alone_is_enough(tmp_path: Path, zoo_net: growfx.MaskedGraph):
    growfx.save(zoo_net, tmp_path / "out")
    alone = (tmp_path / "out" / WEIGHTS).rename(tmp_path / "any-name.safetensors")
    assert same_bits(growfx.load(alone), plain(zoo_net))
    assert growfx.inspect(alone).nnz == zoo_net.nnz


@pytest.mark.slow
def test_a_fresh_process_gives_equal_outputs_without_the_training_code(tmp_path: Path, zoo_net: growfx.MaskedGraph):
    growfx.save(zoo_net, tmp_path / "out")
    x = torch.rand(3, 1, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, growfx\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # sums are split by threads
        f"model = growfx.load({str(tmp_path / 'out')!r})\n"
        f"torch.save(model(torch.load({str(tmp_path / 'x.pt')!r})), {str(tmp_path / 'y.pt')!r})\n"
        "assert not [m for m in sys.modules if m.startswith(('growfx.training.start', 'growfx.methods'))]\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), zoo_net.eval()(x))


def test_loading_draws_no_random_number(tmp_path: Path, zoo_net: growfx.MaskedGraph):
    growfx.save(zoo_net, tmp_path / "out")
    state = torch.get_rng_state()
    growfx.load(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_net_gives_the_same_bytes(tmp_path: Path):
    for out in ("a", "b"):
        growfx.save(make_net(0.2), tmp_path / out, dense=True, provenance={"seed": 1, "data": "digits"})
    for file in ("config.json", "README.md", WEIGHTS, "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_weights_file_is_a_valid_safetensors_file_with_one_metadata_entry(tmp_path: Path):
    net = make_net(0.3)
    growfx.save(net, tmp_path / "out", dense=True)
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as handle:
        assert set(handle.metadata()) == {"growfx"}
        metadata = handle.metadata()
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(tensors["norm.weight"], net.get_parameter("norm.weight"))
    assert "conv.weight" not in tensors
    assert safetensors_bytes(tensors, metadata) == (tmp_path / "out" / WEIGHTS).read_bytes()
    dense = load_file(tmp_path / "out" / "model.safetensors")
    expected = plain(net).state_dict()
    assert dense.keys() == expected.keys()
    assert all(bits(dense[k]) == bits(expected[k]) for k in expected)


def test_the_dense_folder_loads_with_timm(tmp_path: Path, zoo_net: growfx.MaskedGraph):
    growfx.save(zoo_net, tmp_path / "out", dense=True)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert same_bits(model, plain(zoo_net))


def test_dense_weights_of_an_earlier_save_do_not_stay_behind(tmp_path: Path):
    growfx.save(make_net(0.3), tmp_path / "out", dense=True)
    growfx.save(make_net(0.2), tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("of another program")
    growfx.save(make_net(0.2), foreign)
    assert (foreign / "model.safetensors").read_text() == "of another program"


@pytest.mark.parametrize(("name", "dense"), [("config.json", False), ("README.md", False), ("model.safetensors", True)])
def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path, name: str, dense: bool):
    # The folder of a run has a `config.json` of its own, a project a `README.md`, a model of others both.
    (tmp_path / name).write_text('{"train": {}}')
    with pytest.raises(ArtifactError, match=f"`{name}` .* not written by `growfx.save`.* choose another folder"):
        growfx.save(make_net(0.5), tmp_path, dense=dense)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"train": {}}'


@pytest.mark.parametrize("left", ["config.json", "sparse.safetensors"])
def test_what_is_left_of_an_artifact_is_replaced(tmp_path: Path, left: str):
    net = make_net(0.5)
    growfx.save(net, tmp_path / "out")
    (tmp_path / "out" / left).write_bytes(b"{")
    growfx.save(net, tmp_path / "out")
    assert growfx.inspect(tmp_path / "out").nnz == net.nnz


def test_a_save_that_was_killed_does_not_stand_in_the_way_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net = make_net(0.5)
    (tmp_path / "out").mkdir()
    order: list[str] = []
    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (order.append(Path(target).name), replace(source, target)))
        growfx.save(net, tmp_path / "out")
    assert len(order) == 3
    for done in range(1, 3):  # files that were in place when it was killed
        left = tmp_path / str(done)
        left.mkdir()
        for name in order[:done]:
            shutil.copy(tmp_path / "out" / name, left)
        growfx.save(net, left)
        assert growfx.inspect(left).nnz == net.nnz


def test_dense_weights_beside_an_artifact_without_them_are_not_replaced(tmp_path: Path):
    net = make_net(0.5)
    growfx.save(net, tmp_path)
    (tmp_path / "model.safetensors").write_text("of somebody else")
    growfx.save(net, tmp_path)
    with pytest.raises(ArtifactError, match=r"`model\.safetensors` .* not written by"):
        growfx.save(net, tmp_path, dense=True)
    assert (tmp_path / "model.safetensors").read_text() == "of somebody else"


def test_ties_are_stored_once_and_hold_after_loading(tmp_path: Path):
    net = make_net(0.3)
    growfx.save(net, tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert "first.weight::index" in stored
    assert not any(name.startswith("second.weight") for name in stored)
    model = growfx.load(tmp_path / "out", model=Tied())
    assert isinstance(model, Tied)
    assert model.second.weight is model.first.weight
    untied = Tied()
    untied.second.weight = nn.Parameter(untied.first.weight.detach().clone())
    growfx.load(tmp_path / "out", model=untied)
    assert bits(untied.second.weight) == bits(untied.first.weight)
    assert untied.second.weight.data_ptr() != untied.first.weight.data_ptr()


def test_loading_keeps_the_parameters_of_the_given_instance(tmp_path: Path):
    growfx.save(make_net(0.3, torch.bfloat16), tmp_path / "out")
    model = Tied()
    before = dict(model.named_parameters())
    assert growfx.load(tmp_path / "out", model=model) is model
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.requires_grad


def test_inspect_tells_what_save_told_and_reads_no_weight(tmp_path: Path):
    net = make_net(0.3)
    info = growfx.save(net, tmp_path / "out", provenance={"epochs": 3})
    assert growfx.inspect(tmp_path / "out") == info
    assert info.to_dict() == json.loads(json.dumps(info.to_dict()))
    assert info.provenance == {"epochs": 3}
    assert info.bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert info.dense_bytes == sum(t.nbytes for t in plain(net).state_dict().values()) - 24 * 24 * 4
    assert [x.name for x in info.layers] == list(net.layers)
    for layer in info.layers:
        own = net.layers[layer.name]
        assert (layer.nnz, layer.numel, layer.shape) == (own.nnz, own.numel, tuple(own.mask.shape))
        assert 0 < layer.bytes < own.numel * 4 or layer.codec == "dense"
    # Spoil the last stream: the header alone still tells everything.
    content = bytearray((tmp_path / "out" / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / WEIGHTS).write_bytes(content)
    assert growfx.inspect(tmp_path / "out") == info


def test_info_prints_as_a_table(tmp_path: Path):
    info = growfx.save(make_net(0.3), tmp_path / "out")
    text = str(info)
    assert "24x3x3x3" in text
    assert f"{info.bytes} bytes on disk" in text
    assert any("all masked layers" in line and str(info.nnz) in line for line in text.splitlines())


def test_the_config_speaks_timm_and_the_card_says_how_to_load(tmp_path: Path, zoo_net: growfx.MaskedGraph):
    info = growfx.save(zoo_net, tmp_path / "out", provenance={"seed": 3})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["num_classes"] == 4
    assert config["model_args"] == {"num_classes": 4, "in_chans": 1}
    assert config["pretrained_cfg"]["input_size"] == [3, 160, 160]
    block = config["growfx"]
    assert (block["format"], block["version"], block["weights"]) == ("growfx.sparse", "1.2", WEIGHTS)
    assert (block["nnz"], block["density"], block["bytes"]) == (info.nnz, info.density, info.bytes)
    assert block["provenance"] == {"seed": 3}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: growfx\n")
    assert f"{info.nnz:,} of {info.numel:,} weights" in card


def test_preprocessing_of_the_saved_model_comes_back(tmp_path: Path):
    model = growfx.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 32, 32), "mean": (0, 0, 0)})
    growfx.save(growfx.wrap(model), tmp_path / "out")
    config: Any = growfx.load(tmp_path / "out").pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0, 0, 0)


def test_a_model_changed_after_it_was_made_loads_only_into_an_instance(tmp_path: Path):
    def make() -> nn.Module:
        model: Any = timm.create_model("test_resnet", num_classes=4)
        model.fc = nn.Sequential(nn.Linear(model.num_features, 8), nn.ReLU(), nn.Linear(8, 4))
        return model

    net = growfx.wrap(make(), torch.rand(1, 3, 32, 32), density=0.1)
    with pytest.warns(growfx.GrowfxWarning, match="`fc` is a Sequential, not Linear"):
        growfx.save(net, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"not say how its model is built \(.*\); pass an instance as `model=`"):
        growfx.load(tmp_path / "out")
    assert same_bits(growfx.load(tmp_path / "out", model=make()), plain(net))


def test_a_model_with_another_activation_is_not_taken_for_the_usual_one(tmp_path: Path):
    model = timm.create_model("test_resnet")
    model.act1 = nn.GELU()
    with pytest.warns(growfx.GrowfxWarning, match="`act1` is a GELU, not ReLU"):
        growfx.save(growfx.wrap(model, torch.rand(1, 3, 32, 32)), tmp_path / "out")
    assert growfx.inspect(tmp_path / "out").model is None


def test_only_a_masked_graph_is_saved(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"expects a growfx.MaskedGraph, got `Tied`; make one with growfx.wrap"):
        growfx.save(Tied(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_cannot_be_stored_is_named(tmp_path: Path):
    net = make_net(0.3)
    net.get_submodule("norm").register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(ArtifactError, match=r"`norm.table` \(torch.float32 .*sparse.*cannot be stored; allowed: .*F32"):
        growfx.save(net, tmp_path / "out")


class Phases(nn.Module):
    """Complex parameters and buffers, one of them a conjugate view."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.turn = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.register_buffer("wide", torch.randn(2, 3, dtype=torch.complex128).conj())
        self.register_buffer("none", torch.zeros(0, 2, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second((self.first(x) * self.turn).real + self.wide.sum().real.float())


def test_complex_tensors_come_back_bit_by_bit(tmp_path: Path):
    model = Phases()
    net = growfx.wrap(model, torch.rand(2, 4), density=0.5).eval()
    growfx.save(net, tmp_path / "out")
    assert growfx.inspect(tmp_path / "out").version == "1.2"
    loaded: Any = growfx.load(tmp_path / "out", model=Phases())
    for name, tensor in plain(net).state_dict().items():
        found = loaded.state_dict()[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)
        assert torch.equal(torch.from_numpy(growfx.to_numpy(tmp_path / "out")[name]), tensor.resolve_conj())
    x = torch.rand(3, 4)
    assert torch.equal(loaded(x), net(x))
    with pytest.raises(ArtifactError, match=r"`turn` \(torch.complex64\) has no dense safetensors file"):
        growfx.save(net, tmp_path / "dense", dense=True)
    assert not (tmp_path / "dense").exists()


def test_provenance_must_be_json(tmp_path: Path):
    with pytest.raises(ArtifactError, match="only JSON values can be stored"):
        growfx.save(make_net(0.3), tmp_path / "out", provenance={"net": object()})
    with pytest.raises(ArtifactError, match="only JSON values can be stored"):
        growfx.save(make_net(0.3), tmp_path / "out", provenance={"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_an_artifact_error(tmp_path: Path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ArtifactError, match="is a file; save writes a folder"):
        growfx.save(make_net(0.3), tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"is a file; save writes a folder"):
        growfx.save(make_net(0.3), tmp_path / "net.safetensors")
    with pytest.raises(ArtifactError, match=r"cannot be written to `.*` \(.*\); nothing was changed"):
        growfx.save(make_net(0.3), tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "keep"


@pytest.mark.parametrize("limit", [100, 2000, 5000])
def test_a_full_disk_leaves_the_old_artifact_whole(tmp_path: Path, limit: int):
    resource = pytest.importorskip("resource")
    growfx.save(make_net(0.3), tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    net = make_net(0.9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for target in ("old", "new"):
            with pytest.raises(ArtifactError, match=r"cannot be written to .*nothing was changed"):
                growfx.save(net, tmp_path / target, dense=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_the_golden_artifact_of_version_1_0_reads_for_ever():
    expected = load_file(FIRST / "expected.safetensors")
    masks = {name.removeprefix("mask "): expected.pop(name) for name in list(expected) if name.startswith("mask ")}
    model = growfx.load(FIRST, model=Tied(64))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[k].dtype == expected[k].dtype and bits(state[k]) == bits(expected[k]) for k in state)
    stored = load_masks(FIRST)
    assert stored.keys() == masks.keys()
    assert all(torch.equal(stored[k], masks[k]) for k in masks)
    codecs = {x.codec for x in growfx.inspect(FIRST).layers}
    assert codecs == {"bitmask+planes", "gap8.huffman+planes", "gap8+raw", "dense"}


def test_a_network_recorded_with_constants_of_its_own_is_built_by_name(tmp_path: Path) -> None:
    size = {"img_size": 32, "embed_dim": 4, "depth": 1, "num_heads": 2, "local_up_to_layer": 1, "num_classes": 3}
    model = growfx.create_model("convit_tiny", **size)
    net = growfx.wrap(model, density=0.5)
    net.shell.register_buffer("_recorded_constant_0", torch.ones(2), persistent=False)
    growfx.save(net, tmp_path / "out")
    loaded, x = growfx.load(tmp_path / "out"), torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), net.eval()(x))
