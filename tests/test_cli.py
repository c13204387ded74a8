import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from growfx.cli import main
from growfx.runs.checkpoint import content_digest, read

RUN = [
    "test_resnet",
    "--data",
    "digits",
    "--quiet",
    "--set",
    "img_size=16",
    "--set",
    "lr=0.05",
    "--set",
    "kernels=dense",
]


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A sparse control, trained once for all tests that only read it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("cli") / "run"
    assert call("train", *RUN, "--method", "static", "--density", 0.2, "--epochs", 2, "--out", path) == 0
    return path


def test_the_command_line_is_there_before_torch_is():
    code = "import sys, growfx.cli; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "command", ["grow", "train", "export", "inspect", "eval", "compare", "bench", "methods", "report", "zoo"]
)
def test_every_command_explains_itself(command, capsys):
    assert call(command, "--help") == 0
    assert command in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    import growfx

    assert call("--version") == 0
    assert growfx.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["grow"], ["grow", "test_resnet"], ["bake"], ["train", *RUN, "--out", "x"], ["train", *RUN, "--epochs", "few"]],
)
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    assert call(*arguments) == 2
    assert "Usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dense", "--data", "nowhere"], "DataError: data `nowhere` was not found"),
        (["--method", "magic"], "ConfigError: method `magic` is unknown"),
        (["--method", "pwmpr"], "(that one is `growfx grow`)"),
        (["--method", "dense", "--density", "0.5"], "ConfigError: method `dense` has density 1"),
        (["--method", "static", "--density", "1.5"], "ConfigError: `density` = 1.5 is out of range"),
        (["--method", "dense", "--epochs", "0"], "ConfigError: `epochs` = 0 is out of range"),
        (["--method", "dense", "--set", "lr=-1"], "ConfigError: `lr` = -1.0 is out of range"),
        (["--method", "dense", "--set", "model.nonsense=1"], "ConfigError: model `test_resnet` cannot be built"),
        (["--method", "dense", "--resume", "--overwrite"], "ConfigError: `resume` and `overwrite` exclude"),
    ],
)
def test_a_bad_value_is_one_line_with_status_1_and_leaves_nothing(tmp_path, capsys, arguments, message):
    assert call("train", *RUN, "--out", tmp_path / "run", *arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_gets_a_hint(tmp_path, capsys):
    assert call("train", "test_resnte", *RUN[1:], "--method", "dense", "--out", tmp_path / "run") == 1
    assert "did you mean `test_resnet`" in capsys.readouterr().err


def test_a_run_folder_that_exists_or_is_of_another_model_is_refused(run, capsys):
    again = [*RUN, "--method", "static", "--density", 0.2, "--epochs", 2, "--out", run]
    assert call("train", *again) == 1
    assert "exists; continue it with `--resume`" in capsys.readouterr().err
    assert call("train", "test_vit", *RUN[1:], *again[len(RUN) :], "--resume") == 1
    assert "was started with `model.name` = 'test_resnet', now it is 'test_vit'" in capsys.readouterr().err


@pytest.mark.slow
def test_excluded_layers_have_no_mask_in_the_run_its_export_and_its_continuation(tmp_path, capsys):
    out = tmp_path / "run"
    common = [*RUN, "--method", "static", "--set", "masks=magnitude", "--density", 0.2, "--epochs", 1, "--out", out]
    command = ["train", *common, "--exclude", "layer1*", "--exclude", "fc"]
    assert call(*command) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["exclude"] == ["layer1*", "fc"]
    assert config["method"]["masks"] == "magnitude"
    result = json.loads((out / "result.json").read_text())
    assert result["nnz"] == round(0.2 * result["numel"])
    masks = [name for name in read(out / "checkpoint" / "latest.pt")["net"] if name.endswith(".mask")]
    assert masks
    assert not any(name.startswith(("layer1", "fc")) for name in masks)
    assert call("export", out, "--out", tmp_path / "artifact") == 0
    assert call(*command, "--resume") == 0
    capsys.readouterr()
    for other in ([], ["--exclude", "fc"]):
        assert call("train", *common, *other, "--resume") == 1
        assert "was started with `exclude` = ['layer1*', 'fc']" in capsys.readouterr().err
    assert call("train", *common[:-1], tmp_path / "new", "--exclude", "nothing*") == 1
    assert "nothing*" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_finished_run_resumes_to_the_same_result_as_json(run, capsys):
    again = [*RUN, "--method", "static", "--density", 0.2, "--epochs", 2, "--out", run]
    assert call("train", *again, "--resume", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / "result.json").read_text())
    assert result["density"] == pytest.approx(0.2, abs=1e-5)
    assert result["method"] == "static"
    assert result["epochs"] == 2


def test_a_run_its_artifact_and_its_export_have_the_accuracy_of_the_result(run, tmp_path, capsys):
    assert call("export", run, "--out", tmp_path / "artifact") == 0
    assert "active weights" in capsys.readouterr().out
    expected = json.loads((run / "result.json").read_text())["test_accuracy"]
    for path in (run, run / "artifact", tmp_path / "artifact"):
        assert call("eval", path, "--data", "digits", "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["accuracy"] == expected
        assert facts["images"] == 359
    assert call("eval", run, "--data", "digits", "--split", "val") == 0
    assert "val accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_an_artifact_is_evaluated_alike_in_a_new_process(run):
    command = [sys.executable, "-m", "growfx", "eval", str(run / "artifact"), "--data", "digits", "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert json.loads(shown.stdout)["accuracy"] == expected


def test_a_folder_that_runs_the_run_without_python_can_be_written_beside_the_artifact(run, tmp_path, capsys):
    import growfx
    from growfx.runtime.native.library import NativeNetwork

    assert call("export", run, "--out", tmp_path / "artifact", "--native", tmp_path / "native", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["native"]["bytes"] < 1.05 * facts["bytes"]
    model = growfx.load(tmp_path / "artifact")
    network = NativeNetwork((tmp_path / "native" / "network.gfx").read_bytes())
    x = torch.randn(network.input_shapes(3)[0])
    with torch.no_grad():
        expected = model(x)
    assert (network(x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert call("export", run, "--native", tmp_path / "native") == 1
    assert "is not empty" in capsys.readouterr().err
    assert call("export", run, "--native", tmp_path / "other", "--compact") == 2
    assert "`--compact` goes with `--out DIR`" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_page_that_runs_the_run_can_be_written(run, tmp_path, capsys):
    assert call("export", run, "--web", tmp_path / "web", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["web"]
    assert facts["classes"] == 10
    page = (tmp_path / "web" / "index.html").read_text()
    config = json.loads((run / "config.json").read_text())
    told = json.loads(page.partition('<script id="facts" type="application/json">')[2].partition("</script>")[0])
    assert told["classes"] == config["data"]["classes"]
    assert told["input"]["mean"] == config["input"]["mean"]
    assert (told["draw"], told["grain"]) == (True, 8)
    assert call("export", run, "--web", tmp_path / "web") == 1
    assert "is not empty" in capsys.readouterr().err
    assert call("export", run) == 2
    assert "--web DIR" in capsys.readouterr().err


def test_the_best_checkpoint_can_be_exported_too(run, tmp_path, capsys):
    import growfx

    assert call("export", run, "--out", tmp_path / "best", "--best") == 0
    state = read(run / "checkpoint" / "best.pt")["net"]
    loaded = growfx.load(tmp_path / "best").state_dict()
    assert torch.equal(loaded["fc.weight"], torch.where(state["fc.mask"], state["fc.weight"], 0))


@pytest.mark.slow
def test_the_onnx_file_of_a_compact_export_is_of_the_compact_network(run, tmp_path, monkeypatch):
    monkeypatch.setattr("growfx.commands.export.require_onnx", lambda: None)
    norms = {}
    for name, options in (("whole", []), ("small", ["--compact"])):
        count = partial(_note_norms, norms, name)
        monkeypatch.setattr("growfx.commands.export.export_onnx", count)
        assert call("export", run, "--out", tmp_path / name, "--onnx", tmp_path / "net.onnx", *options) == 0
    assert norms == {"whole": 15, "small": 0}


def _note_norms(found, name, net, file, **_) -> None:
    found[name] = sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.shell.modules())


@pytest.mark.slow
def test_a_compact_export_says_what_left_and_why_the_rest_stayed(run, tmp_path, capsys):
    assert call("export", run, "--out", tmp_path / "small", "--compact") == 0
    shown = capsys.readouterr().out
    assert "units left out; " in shown
    assert "batch norms folded into the layers before them; largest error" in shown
    assert call("export", run, "--out", tmp_path / "small", "--compact", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["compaction"]
    assert facts["parameters"][1] <= facts["parameters"][0]
    assert len(facts["norms_folded"]) == 15
    assert facts["largest_error"] < 1e-5
    assert call("eval", tmp_path / "small", "--data", "digits", "--json") == 0
    expected = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(expected, abs=0.006)
    assert call("export", run, "--out", tmp_path / "both", "--compact", "--dense") == 1
    assert "exclude each other" in capsys.readouterr().err


def test_inspect_tells_the_same_of_a_run_and_its_artifact(run, capsys, monkeypatch):
    facts = {}
    for name, path in (("run", run), ("artifact", run / "artifact")):
        assert call("inspect", path, "--json") == 0
        facts[name] = json.loads(capsys.readouterr().out)
        assert (facts[name]["kind"], facts[name]["model"]) == (name, "test_resnet")
    assert facts["artifact"]["recipe"] == {"library": "timm", "name": "test_resnet", "kwargs": {"num_classes": 10}}
    ours = [{k: layer[k] for k in ("name", "shape", "nnz", "alive_out")} for layer in facts["run"]["layers"]]
    theirs = [{k: layer[k] for k in ("name", "shape", "nnz", "alive_out")} for layer in facts["artifact"]["layers"]]
    assert ours == theirs
    assert facts["run"]["nnz"] == sum(layer["nnz"] for layer in ours)
    for layer in facts["artifact"]["layers"]:
        assert 0 < layer["sparse_macs"] <= layer["dense_macs"]
    for total in ("dense", "sparse", "rest"):
        assert facts["run"]["cost"][total] == pytest.approx(facts["artifact"]["cost"][total])
    assert facts["artifact"]["bytes"] == (run / "artifact" / "sparse.safetensors").stat().st_size
    monkeypatch.setenv("COLUMNS", "160")
    assert call("inspect", run / "artifact") == 0
    table = capsys.readouterr().out
    assert table.startswith(f"artifact {run / 'artifact'}: test_resnet, density 20.00 %")
    assert "layer4.0.conv1" in table
    assert "alive out" in table
    assert "multiply-adds" in table
    assert "20.00 %" in table


def test_inspect_refuses_a_damaged_artifact(run, tmp_path, capsys):
    shutil.copytree(run / "artifact", tmp_path / "bad")
    file = tmp_path / "bad" / "sparse.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert call("inspect", tmp_path / "bad") == 1
    assert "is damaged" in capsys.readouterr().err


def test_inspect_builds_a_model_by_name(capsys):
    assert call("inspect", "test_resnet", "--set", "model.num_classes=7", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["density"] == 1.0
    last = facts["layers"][-1]
    assert last["shape"][0] == 7
    assert last["alive_out"] == [7, 7]


def test_arguments_of_a_model_are_refused_for_what_is_stored_with_its_own(run, capsys):
    for path in (run, run / "artifact"):
        assert call("inspect", path, "--set", "model.num_classes=7") == 1
        assert "arguments are for a model by name" in capsys.readouterr().err


def test_inspect_and_eval_refuse_what_is_neither(tmp_path, capsys):
    assert call("inspect", tmp_path) == 1
    assert "neither an artifact" in capsys.readouterr().err
    assert call("eval", tmp_path, "--data", "digits") == 1
    assert "neither an artifact" in capsys.readouterr().err
    assert call("export", tmp_path, "--out", tmp_path / "out") == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_eval_takes_data_options_and_no_training_options(run, capsys):
    assert call("eval", run, "--data", "digits", "--set", "lr=1") == 1
    assert "no training options" in capsys.readouterr().err
    assert call("eval", run, "--data", "digits", "--set", "batch_size=50", "--json") == 0
    expected = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert json.loads(capsys.readouterr().out)["accuracy"] == expected


@pytest.mark.filterwarnings("default")
def test_eval_tells_of_a_split_with_images_of_the_training(run, capsys):
    for split, told in (("test", 1), ("train", 0)):
        assert call("eval", run, "--data", "digits", "--split", split, "--split-seed", 5) == 0
        shown = capsys.readouterr().err
        assert shown.count("`split_seed` = 5 (then 0) makes another split `test` than the one of training") == told


def test_inspect_says_what_it_takes_after_set(run, capsys):
    assert call("inspect", run, "--set", "lr=1") == 1
    assert "option `lr` is unknown; allowed: `model.KEY`" in capsys.readouterr().err


@pytest.fixture
def ten_folders(tmp_path):
    """Noise in class folders named as the digits are, one image cut short."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in "0123456789":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                noise = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / split / name / f"{i}.png")
    bad = tmp_path / "test" / "7" / "1.png"
    bad.write_bytes(bad.read_bytes()[:1000])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_one_line_from_any_process(run, ten_folders, capsys, workers):
    assert call("eval", run, "--data", ten_folders, "--set", f"workers={workers}") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("growfx: DataError: image `")
    assert "7/1.png` cannot be decoded" in shown
    assert shown.count("\n") == 1


def test_eval_refuses_data_of_other_classes(run, ten_folders, capsys):
    for split in ("train", "test"):
        (ten_folders / split / "3").rename(ten_folders / split / "three")
    assert call("eval", run, "--data", ten_folders) == 1
    shown = capsys.readouterr().err
    assert "was trained on 10 classes (`0`, `1`, `2`, ...)" in shown
    assert "the numbers of the classes would not mean the same" in shown


def test_methods_are_listed_with_their_defaults(capsys):
    from growfx import methods

    assert call("methods", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["methods"]) == list(methods.names())
    assert call("methods") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in [*methods.names(), "dense"])
    assert "budget=(flops=0.5, or" in table
    assert "=None" not in table


def test_a_network_grows_and_stops_and_the_artifact_is_what_was_grown(tmp_path, capsys):
    options = ["--seed-density", 0.05, "--max-density", 0.1, "--set", "growth_ratio=1.5", "--set", "epochs_per_round=1"]
    assert call("grow", *RUN, *options, "--epochs", 1, "--out", tmp_path / "run", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "pwmpr"
    assert [round(entry["density"], 3) for entry in result["trace"]] == [0.05, 0.075, 0.1]
    assert result["epochs"] == 4
    assert result["nnz"] <= round(0.1 * result["numel"])
    assert call("inspect", tmp_path / "run" / "artifact", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nnz"] == result["nnz"]


def test_ctrl_c_leaves_a_checkpoint_that_resume_finishes_as_if_nothing_happened(tmp_path, capsys):
    options = [*RUN, "--method", "static", "--density", "0.2", "--epochs", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "growfx", "train", *options, "--out", str(tmp_path / "parts")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    latest = tmp_path / "parts" / "checkpoint" / "latest.pt"
    deadline = time.monotonic() + 60
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "growfx: interrupted; `--resume` continues" in errors
    assert "Traceback" not in errors
    assert read(latest)["position"]["epoch"] < 5
    assert call("train", *options, "--out", tmp_path / "parts", "--resume") == 0
    assert call("train", *options, "--out", tmp_path / "whole") == 0
    states = [read(tmp_path / part / "checkpoint" / "latest.pt")["net"] for part in ("parts", "whole")]
    assert content_digest(states[0]) == content_digest(states[1])


@pytest.mark.parametrize(
    ("command", "inner"),
    [
        (["eval", "x", "--data", "digits"], "growfx.commands.inspection.accuracy_of"),
        (["inspect", "x"], "growfx.commands.inspection.facts_of"),
        (["bench", "x"], "growfx.commands.bench.measure.bench"),
        (["export", "x", "--out", "y"], "growfx.commands.export.reopen"),
    ],
)
def test_an_interrupted_command_promises_only_what_it_has(command, inner, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(inner, interrupt)
    assert call(*command) == 130
    error = capsys.readouterr().err
    assert "growfx: interrupted" in error
    assert "resume" not in error


def test_the_batch_size_of_an_onnx_file_is_fixed_on_demand(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("growfx.commands.export.require_onnx", lambda: None)
    asked: list[bool] = []
    monkeypatch.setattr("growfx.commands.export.export_onnx", lambda *_, batch: asked.append(batch))
    command = ("export", run, "--out", tmp_path / "out")
    for options in ([], ["--fixed-batch"]):
        assert call(*command, "--onnx", tmp_path / "net.onnx", *options) == 0
    assert asked == [True, False]
    assert call(*command, "--fixed-batch") == 2
    assert "`--onnx FILE`" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--dense", "--compact"], ["--compact", "--onnx", "."]])
def test_export_checks_its_options_before_it_writes(run, tmp_path, options, capsys):
    onnx = [] if "--onnx" in options else ["--onnx", tmp_path / "net.onnx"]
    assert call("export", run, "--out", tmp_path / "out", *options, *onnx) == 1
    assert capsys.readouterr().err.count("growfx: ArtifactError") == 1
    (tmp_path / "file").write_text("keep")
    assert call("export", run, "--out", tmp_path / "file", "--onnx", tmp_path / "net.onnx") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
