"""Runs that start from weights: a state dict in a file, or the pretrained weights of a library."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

import growfx
from growfx.cli import main
from growfx.commands.compare.pool import RunSpec
from growfx.commands.starting_weights import StartingWeights, split_arguments
from growfx.errors import CheckpointError, ConfigError, GrowfxWarning
from growfx.models.build import create_model

TRAIN = [
    *("train", "test_resnet", "--data", "digits", "--quiet", "--method", "static", "--density", 0.2),
    *("--epochs", 1, "--img-size", 16, "--lr", 0.05, "--kernels", "dense"),
]


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def state():
    torch.manual_seed(7)
    return timm.create_model("test_resnet", num_classes=10).state_dict()


@pytest.fixture
def file(state, tmp_path):
    torch.save(state, tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def wrapped_by_timm(state, path):
    """As timm's training script saves it, averaged weights beside the others, from `DistributedDataParallel`."""
    other = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    averaged = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "arch": "test_resnet", "state_dict": other, "state_dict_ema": averaged}, path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("plain.pth", torch.save),
        ("plain.bin", torch.save),
        ("plain.safetensors", lambda state, path: save_file(state, path)),
        ("timm.pth.tar", wrapped_by_timm),
        ("compiled.pt", lambda state, path: torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, path)),
        ("half.pth", lambda state, path: torch.save({k: v.half() for k, v in state.items()}, path)),
    ],
)
def test_a_model_has_the_weights_of_the_file_bit_for_bit_whatever_wrote_it(state, tmp_path, name, save):
    save(state, tmp_path / name)
    model, facts = StartingWeights(tmp_path / name).build("test_resnet", {"num_classes": 10}, 0)
    for key, tensor in model.state_dict().items():
        expected = state[key].half().to(state[key].dtype) if name.startswith("half") else state[key]
        assert torch.equal(tensor, expected), key
    digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert facts == {"kind": "checkpoint", "name": name, "sha256": digest, "of": "file", "left_out": []}


def test_a_head_of_another_number_of_classes_starts_anew_and_is_named(file, state):
    with pytest.warns(GrowfxWarning, match=r"fc\.weight"):
        model, facts = StartingWeights(file).build("test_resnet", {"num_classes": 3}, 5)
    assert facts["left_out"] == ["fc.weight", "fc.bias"]
    torch.manual_seed(5)
    drawn = create_model("test_resnet", num_classes=3).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, drawn[key] if key.startswith("fc.") else state[key]), key


def test_tables_of_positions_are_resized_by_timm(tmp_path):
    torch.manual_seed(1)
    small = timm.create_model("test_vit", img_size=96, num_classes=10)
    torch.save(small.state_dict(), tmp_path / "vit.pth")
    kwargs = {"num_classes": 4, "img_size": 160}
    with pytest.warns(GrowfxWarning, match=r"head\.weight"):
        model, facts = StartingWeights(tmp_path / "vit.pth").build("test_vit", kwargs, 0)
    assert facts["left_out"] == ["head.weight", "head.bias"]
    assert torch.equal(model.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    assert model.pos_embed.shape != small.pos_embed.shape
    assert model.pos_embed.mean().item() == pytest.approx(small.pos_embed.mean().item(), abs=1e-3)
    assert model.pretrained_cfg["num_classes"] == timm.create_model("test_vit").pretrained_cfg["num_classes"]


def test_models_of_torchvision_and_own_ones_start_from_files_too(tmp_path):
    torch.manual_seed(2)
    source = torchvision.models.squeezenet1_1(num_classes=10)
    torch.save(source.state_dict(), tmp_path / "net.pth")
    with pytest.warns(GrowfxWarning, match="classifier"):
        model, facts = StartingWeights(tmp_path / "net.pth").build("torchvision/squeezenet1_1", {"num_classes": 5}, 0)
    assert facts["left_out"] == ["classifier.1.weight", "classifier.1.bias"]
    assert torch.equal(model.features[0].weight, source.features[0].weight)
    linear = torch.nn.Linear(4, 2)
    torch.save(linear.state_dict(), tmp_path / "linear.pth")
    own, _ = StartingWeights(tmp_path / "linear.pth").build("torch.nn:Linear", {"in_features": 4, "out_features": 2}, 0)
    assert torch.equal(own.weight, linear.weight)


def damaged(path: Path):
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])


def not_a_state(path: Path):
    torch.save({"epoch": 3}, path)


def with_code(path: Path):
    torch.save(timm.create_model("test_resnet"), path)


def make_an_artifact_of(path: Path):
    net = growfx.wrap(timm.create_model("test_resnet", num_classes=10), density=0.5)
    growfx.save(net, path.parent / "artifact")
    path.unlink()
    (path.parent / "artifact" / "sparse.safetensors").rename(path.with_suffix(".safetensors"))


def not_finite(path: Path):
    state = torch.load(path)
    state["conv1.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)


def of_another(path: Path):
    torch.save(timm.create_model("test_vit").state_dict(), path)


def of_another_with_as_many_classes(path: Path):
    torch.save(timm.create_model("test_efficientnet", num_classes=10).state_dict(), path)


@pytest.mark.parametrize(
    ("spoil", "facts"),
    [
        (lambda path: path.unlink(), ["was not found"]),
        (lambda path: (path.unlink(), path.mkdir()), ["is a folder", "--dense"]),
        (damaged, ["cannot be read"]),
        (lambda path: path.write_text("nonsense"), ["cannot be read"]),
        (with_code, ["cannot be read", "state_dict()"]),
        (not_a_state, ["holds no state dict"]),
        (not_finite, ["`conv1.0.weight`", "not finite"]),
        (of_another, ["is not of `test_resnet`", "missing", "unknown"]),
        (of_another_with_as_many_classes, ["is not of `test_resnet`", "missing", "unknown"]),
    ],
)
def test_weights_that_cannot_be_had_are_one_line_with_status_1_and_leave_nothing(file, tmp_path, capsys, spoil, facts):
    spoil(file)
    assert call(*TRAIN, "--out", tmp_path / "run", "--checkpoint", file) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("growfx: CheckpointError: checkpoint `")
    assert shown.count("\n") == 1
    assert [fact for fact in facts if fact not in shown] == []
    assert not (tmp_path / "run").exists()


def test_an_artifact_of_growfx_is_told_apart_from_a_state_dict(file):
    make_an_artifact_of(file)
    with pytest.raises(CheckpointError, match=r"sparse artifact.*--dense"):
        StartingWeights(file.with_suffix(".safetensors")).build("test_resnet", {"num_classes": 10}, 0)


def test_a_file_that_is_missing_is_named_by_the_builder_too(tmp_path):
    with pytest.raises(ConfigError, match=r"`checkpoint_path` = `.*none.pth` was not found"):
        create_model("test_resnet", checkpoint_path=str(tmp_path / "none.pth"))


def test_a_damaged_safetensors_file_is_refused_by_name(state, tmp_path):
    save_file(state, tmp_path / "mine.safetensors")
    damaged(tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"mine\.safetensors. cannot be read"):
        StartingWeights(tmp_path / "mine.safetensors").build("test_resnet", {"num_classes": 10}, 0)


@pytest.mark.slow
def test_a_run_its_artifact_and_its_card_say_which_weights_it_started_from(file, tmp_path, capsys):
    out = tmp_path / "run"
    assert call(*TRAIN, "--out", out, "--checkpoint", file) == 0
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    config = json.loads((out / "config.json").read_text())
    expected = {"kind": "checkpoint", "name": "mine.pth", "sha256": digest, "of": "file", "left_out": []}
    assert config["weights_from"] == expected
    assert json.loads((out / "result.json").read_text())["weights_from"] == expected
    recorded = json.loads((out / "artifact" / "config.json").read_text())["growfx"]["provenance"]
    assert recorded["weights_from"] == expected
    assert digest in (out / "artifact" / "README.md").read_text()
    assert digest[:16] in (out / "summary.txt").read_text()
    # It continues with the same weights, wherever the file lies by now, and with no others.
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(file, tmp_path / "elsewhere" / "renamed.pth")
    assert call(*TRAIN, "--out", out, "--resume", "--checkpoint", moved) == 0
    capsys.readouterr()
    assert call(*TRAIN, "--out", out, "--resume") == 1
    assert "was started with `weights_from" in capsys.readouterr().err
    torch.manual_seed(8)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), moved)
    assert call(*TRAIN, "--out", out, "--resume", "--checkpoint", moved) == 1
    assert "`weights_from.sha256`" in capsys.readouterr().err


def test_weights_given_as_arguments_of_timm_are_told_like_those_of_flags(file, tmp_path):
    weights, rest = split_arguments("test_resnet", {"checkpoint_path": str(file), "num_classes": 10})
    assert weights == StartingWeights(file)
    assert rest == {"num_classes": 10}
    assert split_arguments("test_resnet", {"pretrained": True}) == (StartingWeights(), {})
    assert split_arguments("test_resnet", {"pretrained": False}) == (None, {})
    own = {"pretrained": True}  # the argument of a builder of one's own is its own
    assert split_arguments("package.module:build", own) == (None, own)
    spec = RunSpec.parse("test_resnet", "digits", "static", [f"model.checkpoint_path={file}"])
    assert spec.weights == StartingWeights(file)


def test_two_sources_of_weights_are_refused(file):
    for given in ({"pretrained": True}, {"pretrained": False}):
        kwargs = given if given["pretrained"] else {"checkpoint_path": "other.pth"}
        with pytest.raises(ConfigError, match="one source"):
            split_arguments("test_resnet", kwargs, checkpoint=file)
    with pytest.raises(ConfigError, match="one source"):
        split_arguments("test_resnet", {}, pretrained=True, checkpoint=file)
    with pytest.raises(ConfigError, match="contradict"):
        split_arguments("test_resnet", {"pretrained": False}, pretrained=True)


def test_pretrained_weights_of_timm_are_told_by_their_tensors(file, state):
    kwargs = {"num_classes": 10, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 10}}
    model, facts = StartingWeights().build("test_resnet", kwargs, 0)
    assert torch.equal(model.conv1[0].weight, state["conv1.0.weight"])
    assert facts["kind"] == "pretrained"
    assert facts["name"].startswith("test_resnet")
    assert facts["of"] == "tensors"
    again = StartingWeights().build("test_resnet", kwargs, 1)[1]
    assert again == facts


def test_pretrained_weights_of_torchvision_are_its_recommended_ones(monkeypatch):
    torch.manual_seed(3)
    source = torchvision.models.squeezenet1_1()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: source.state_dict())
    with pytest.warns(GrowfxWarning, match="classifier"):
        model, facts = StartingWeights().build("torchvision/squeezenet1_1", {"num_classes": 10}, 0)
    assert torch.equal(model.features[0].weight, source.features[0].weight)
    assert facts["name"] == "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert facts["left_out"] == ["classifier.1.weight", "classifier.1.bias"]


def test_pretrained_weights_that_cannot_be_had_are_one_line_with_what_to_do(monkeypatch, tmp_path, capsys):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    assert call(*TRAIN, "--out", tmp_path / "run", "--pretrained") == 1
    shown = capsys.readouterr().err
    assert "no route to host" in shown
    assert "--checkpoint FILE" in shown
    assert shown.count("\n") == 1
    with pytest.raises(ConfigError, match="--checkpoint"):
        StartingWeights().build("torch.nn:Linear", {"in_features": 2, "out_features": 2}, 0)
    assert list(tmp_path.iterdir()) == []


def test_every_run_of_a_comparison_starts_from_the_weights_but_those_with_fresh_ones(file, tmp_path):
    from growfx.commands.compare.comparison import Comparison, FinishedRun, plan_controls

    comparison = Comparison("test_resnet", "digits", ("rigl",), checkpoint=file, controls=True)
    runs = comparison.runs()
    assert [run.spec.weights for run in runs] == [StartingWeights(file)]
    assert comparison.config()["checkpoint"] == hashlib.sha256(file.read_bytes()).hexdigest()
    controls = plan_controls(comparison, runs, {runs[0].name: FinishedRun(2, 0.1)}, tmp_path)
    fresh = {control.name: control.spec.weights for control in controls}
    assert [name for name, weights in fresh.items() if weights is None] == [f"ticket-fresh-of-{runs[0].name}"]
