import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.cli import main
from growfx.commands.bench import variants as bench_variants
from growfx.commands.bench.measure import bench
from growfx.commands.bench.subject import opened_subject
from growfx.commands.bench.variants import VARIANTS, Built, Setting, VariantBuilder
from growfx.errors import ArtifactError, ConfigError
from growfx.runtime.native.library import library_status

PEERS = ["onnxruntime", "openvino float32", "openvino default", "deepsparse"]
SHOWN = ["dense", "norms folded", "torch.compile", *PEERS, "masked", "compact", "sparse runtime", "native runtime"]
QUICK = ["dense", "norms folded", "masked", "compact"]


class Small(nn.Module):
    """A convolution with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored network with two dead units."""
    torch.manual_seed(0)
    net = growfx.wrap(Small(), torch.rand(1, 3, 8, 8), density=0.5)
    conv = net.layers["conv"].mask.clone()
    conv[:2] = False
    net.set_masks({"conv": conv})
    path = tmp_path_factory.mktemp("bench") / "artifact"
    growfx.save(net, path)
    return path


def run(artifact: Path, **options: Any) -> Any:
    usual = {"model": Small(), "example_inputs": torch.rand(1, 3, 8, 8), "variants": QUICK, "repeats": 2}
    return bench(artifact, **usual | options)


@dataclass(frozen=True)
class Choices:
    """Stands for the sparse runtime's report."""

    text: str = "conv direct"

    def to_json(self) -> dict[str, str]:
        return {"choices": self.text}

    def __str__(self) -> str:
        return self.text


def test_every_variant_has_a_time_and_the_outputs_of_dense_torch(artifact: Path):
    report = run(artifact, batches=(1, 3))
    assert [(m.batch, m.threads, m.rounds) for m in report.measurements] == [(1, 1, 2), (3, 1, 2)]
    for measurement in report.measurements:
        rows = {row.variant: row for row in measurement.rows}
        assert list(rows) == QUICK
        for row in rows.values():
            assert 0 < row.minimum <= row.median
            assert row.error < 1e-5
        assert rows["dense"].speedup == 1.0
        # 3*3*3*8 + norm 4*8 and its counter + head 8*4+4
        assert rows["dense"].weight_bytes == 4 * (216 + 32 + 36) + 8
        assert rows["masked"].weight_bytes == rows["dense"].weight_bytes + 216 + 32
        assert rows["compact"].weight_bytes < rows["dense"].weight_bytes
        assert rows["compact"].note == "2 units left out, 75.4% of the parameters; 1 norms folded"
        assert rows["norms folded"].note == "1 norms folded"


def test_the_variants_are_those_that_are_promised():
    assert list(VARIANTS) == SHOWN


def test_the_report_prints_as_tables_and_is_the_same_in_json(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    def lowered(work: VariantBuilder, _: Setting) -> Built:
        return Built(work.dense(), 5_000_000, lowering=Choices())

    monkeypatch.setitem(VARIANTS, "sparse runtime", lowered)
    report = run(artifact, variants=["sparse runtime"])
    text = str(report)
    assert f"artifact {artifact}: Small, density" in text
    assert "inputs 3x8x8" in text
    assert "batch 1, 1 thread, 2 rounds" in text
    assert "sparse runtime, layer by layer\nconv direct" in text
    (line,) = [line for line in text.splitlines() if line.startswith("sparse runtime ")]
    assert "5.00" in line
    facts = json.loads(json.dumps(report.to_json()))
    assert facts["machine"]["cpu"]
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["density"] == pytest.approx(report.nnz / report.numel)
    assert facts["inputs"] == [[3, 8, 8]]
    (table,) = facts["measurements"]
    assert table["lowering"] == {"choices": "conv direct"}
    assert [row["variant"] for row in table["variants"]] == ["dense", "sparse runtime"]
    assert set(table["variants"][0]) == {
        *("variant", "minimum", "median", "speedup", "over_peer", "weight_bytes", "error", "note"),
    }


def test_the_sparse_runtime_is_timed_for_the_setting(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GROWFX_CACHE", str(tmp_path))
    monkeypatch.setenv("GROWFX_NO_KERNEL", "1")
    (measurement,) = run(artifact, batches=(3,), variants=["sparse runtime"]).measurements
    row = measurement.rows[1]
    assert row.minimum is not None, row.note
    assert row.error < 1e-5
    assert row.note.endswith(("dense", "csr"))
    assert measurement.lowering.inputs == ((3, 3, 8, 8),)
    assert 0 < row.weight_bytes < 4000
    assert "no direct kernel: " in str(measurement)


def test_the_native_runtime_is_timed_for_each_batch_size_and_number_of_threads(artifact: Path):
    if reason := library_status():
        pytest.skip(reason)
    report = run(artifact, batches=(1, 3), threads=(1, 2), variants=["native runtime"])
    rows = [measured.rows[1] for measured in report.measurements]
    assert [row.note for row in rows if row.minimum is None] == []
    assert len(rows) == 4
    assert all(row.error < 1e-5 and "kernels" in row.note for row in rows)
    assert len({row.weight_bytes for row in rows}) == 1
    assert rows[0].weight_bytes < 4 * (216 + 36)
    assert run(artifact, dtype="bfloat16", variants=["native runtime"]).measurements[0].rows[1].minimum is None


def test_fresh_times_the_choices_anew(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GROWFX_CACHE", str(tmp_path))
    monkeypatch.setattr("growfx.passes.lower.kept._NOISY", float("inf"))  # this machine may be busy
    cached = []
    for fresh in (False, False, True, False):
        report = run(artifact, variants=["sparse runtime"], fresh=fresh)
        cached.append(report.measurements[0].lowering.cached)
    assert cached == [False, True, False, True]


def test_the_command_passes_fresh_on(monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []

    def noted(*_: Any, **options: Any) -> Any:
        given.append(options["fresh"])
        raise ConfigError("enough")

    monkeypatch.setattr("growfx.commands.bench.measure.bench", noted)
    assert call("bench", "somewhere", "--fresh") == 1
    assert call("bench", "somewhere") == 1
    assert given == [True, False]


def test_a_variant_that_cannot_be_had_is_a_row_that_says_why(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", none)
    monkeypatch.setattr(bench_variants, "OnnxSession", none)
    monkeypatch.setattr(bench_variants, "small_network", none)
    monkeypatch.setattr(bench_variants, "export_onnx", lambda *_, **__: None)
    rows = {row.variant: row for row in run(artifact, variants=SHOWN[:-2]).measurements[0].rows}
    for name in ("torch.compile", "onnxruntime", "compact"):
        assert rows[name].note == "RuntimeError: no C++ compiler"
        assert rows[name].minimum is rows[name].speedup is None
    assert all(rows[name].minimum for name in ("dense", "norms folded", "masked"))


def test_a_runtime_that_is_not_installed_is_left_out_and_named_with_its_packages(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("growfx.commands.bench.peers._is_installed", lambda name: not name.startswith("o"))
    monkeypatch.delenv("GROWFX_DEEPSPARSE", raising=False)
    report = run(artifact, variants=[*PEERS, "masked"])
    assert [row.variant for row in report.measurements[0].rows] == ["dense", "masked"]
    assert report.missing["openvino float32"] == ["openvino", "onnx", "onnxscript"]
    text = str(report)
    assert "not measured: onnxruntime (pip install onnxruntime onnx onnxscript)" in text
    assert "openvino float32, openvino default (pip install openvino onnx onnxscript)" in text
    assert "deepsparse" not in text  # retired: measured where it is, not asked for
    assert "speed over onnxruntime" not in text
    assert report.measurements[0].best_peer is None
    assert json.loads(json.dumps(report.to_json()))["missing"].keys() == set(PEERS[:3])


class Slowed(nn.Module):
    """The model, with its work done several times."""

    def __init__(self, model: nn.Module, times: int) -> None:
        super().__init__()
        self.model, self.times = model, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times - 1):
            self.model(x)
        return self.model(x)


def test_speeds_are_also_told_over_the_fastest_dense_float32_runtime(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("growfx.commands.bench.measure.missing_packages", lambda name: [])
    monkeypatch.setenv("GROWFX_DEEPSPARSE", "python")
    for name, times in (("onnxruntime", 20), ("openvino float32", 5), ("openvino default", 1), ("deepsparse", 1)):
        monkeypatch.setitem(VARIANTS, name, lambda work, _, times=times: Built(Slowed(work.dense(), times), 1))
    (measured,) = run(artifact, variants=PEERS, repeats=5).measurements
    rows = {row.variant: row for row in measured.rows}
    # The default may compute in less than float32, and DeepSparse leaves out zeros.
    assert measured.best_peer == "openvino float32"
    assert rows["openvino float32"].over_peer == 1.0
    assert rows["onnxruntime"].over_peer < 1 < rows["dense"].over_peer
    assert "speed over openvino float32" in str(measured)
    assert measured.to_json()["best_peer"] == "openvino float32"


def test_outputs_in_lower_precision_are_allowed_the_error_of_it(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("growfx.commands.bench.measure.missing_packages", lambda name: [])

    class Lower(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.bfloat16()).float()

    def lower(work: VariantBuilder, _: Setting) -> Built:
        return Built(Lower(work.subject.load(dtype=torch.bfloat16)), 1, is_lower_precision=told)

    monkeypatch.setitem(VARIANTS, "openvino default", lower)
    for told in (True, False):
        row = run(artifact, variants=["openvino default"]).measurements[0].rows[1]
        assert (row.minimum is not None) == told, row.note
        assert row.error > 1e-4


def test_processor_time_leaves_out_what_a_variant_waits_for(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    class Waits(Slowed):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.03)
            return self.model(x)

    monkeypatch.setitem(VARIANTS, "masked", lambda work, _: Built(Waits(work.dense(), 1), 1))
    for clock, waits in (("wall", True), ("cpu", False)):
        report = run(artifact, variants=["masked"], clock=clock)
        assert (report.measurements[0].rows[1].minimum >= 0.03) == waits
        assert report.to_json()["clock"] == clock


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda y: y * 1.01, "its outputs differ by 0.01 of the largest; not timed"),
        (lambda y: y[:, :2], "its outputs differ by inf of the largest"),
        (lambda y: y * torch.nan, "its outputs differ by inf of the largest"),
    ],
    ids=["values", "shape", "nan"],
)
def test_a_variant_that_computes_something_else_gets_no_time(artifact, monkeypatch, change, told):
    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return change(self.model(x))

    monkeypatch.setitem(VARIANTS, "sparse runtime", lambda work, _: Built(Wrong(work.dense()), 1))
    row = run(artifact, variants=["sparse runtime"]).measurements[0].rows[1]
    assert row.minimum is row.median is row.speedup is None
    assert told in row.note


def test_a_variant_that_fails_while_it_is_timed_is_a_row_too(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    class Tires(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 2:
                raise RuntimeError("tired")
            return self.model(x)

    def tires(work: VariantBuilder, _: Setting) -> Built:
        module = Tires()
        module.model = work.dense()
        return Built(module, 1)

    monkeypatch.setitem(VARIANTS, "masked", tires)
    rows = {row.variant: row for row in run(artifact).measurements[0].rows}
    assert rows["masked"].note == "RuntimeError: tired"
    assert rows["masked"].minimum is None
    assert rows["compact"].minimum is not None


def test_the_threads_asked_for_are_used_and_restored(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []

    def noted(work: VariantBuilder, setting: Setting) -> Built:
        seen.append((setting.threads, torch.get_num_threads()))
        return Built(work.dense(), 1)

    monkeypatch.setitem(VARIANTS, "masked", noted)
    run(artifact, threads=(2, 1), variants=["masked"])
    assert seen == [(2, 2), (1, 1)]
    assert torch.get_num_threads() == 1


def test_what_does_not_depend_on_the_setting_is_made_once(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    calls = {"fold_norm": 0, "small_network": 0}

    def counted(name: str, work: Any) -> Any:
        def count(*args: Any) -> Any:
            calls[name] += 1
            if name == "small_network":
                raise ConfigError("not this one")
            return work(*args)

        return count

    for name in calls:
        monkeypatch.setattr(bench_variants, name, counted(name, getattr(bench_variants, name)))
    report = run(artifact, batches=(1, 2))
    assert calls == {"fold_norm": 1, "small_network": 1}
    assert [m.rows[3].note for m in report.measurements] == ["not this one"] * 2


def test_bfloat16_is_measured_against_float32(artifact: Path):
    rows = {
        r.variant: r for r in run(artifact, dtype="bfloat16", variants=[*QUICK, "onnxruntime"]).measurements[0].rows
    }
    assert rows["onnxruntime"].note == "measured in float32 only"
    assert rows["dense"].weight_bytes == 2 * (216 + 32 + 36) + 8
    assert all(rows[name].minimum and rows[name].error > 0 for name in QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, "`batches` is empty"),
        ({"batches": (0,)}, "`batches` has `0`; allowed: whole numbers from 1 on"),
        ({"threads": (1, -2)}, "`threads` has `-2`"),
        ({"repeats": 0}, "`repeats` has `0`"),
        ({"dtype": "int8"}, "`dtype` = `int8` cannot be measured; allowed: `float32`, `bfloat16`"),
        ({"clock": "sun"}, "`clock` = `sun` is unknown; allowed: `wall`, `cpu`"),
        ({"variants": ["fast"]}, "variant `fast` is unknown; allowed: `dense`"),
        ({"density": 0.1}, "is stored with its masks; `density` and model arguments are for a model by name"),
        ({"img_size": 32}, "`example_inputs` and `img_size` exclude each other"),
        ({"example_inputs": torch.rand(1, 5, 8, 8)}, "the network does not run on inputs of 1x5x8x8"),
        ({"example_inputs": torch.tensor(1.0), "batches": (2,)}, "no batch size that can change"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_option_is_a_config_error(artifact: Path, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        run(artifact, **options)
    assert message in str(caught.value)


def test_a_model_by_name_gets_random_masks():
    with opened_subject("test_resnet", density=0.1, img_size=32, model_kwargs={"num_classes": 3}) as subject:
        assert (subject.kind, subject.name) == ("model", "test_resnet")
        assert subject.info.density == pytest.approx(0.1, abs=1e-4)
        net = subject.masked()
        assert net.density == pytest.approx(0.1, abs=1e-4)
        inputs = subject.inputs(2, torch.float32)
        assert torch.equal(inputs.args[0], subject.inputs(2, torch.float32).args[0])
        assert inputs.args[0].shape == (2, 3, 32, 32)
        with torch.no_grad():
            ours, theirs = net(*inputs.args), subject.load()(*inputs.args)
        assert ours.shape == (2, 3)
        assert torch.allclose(ours, theirs, atol=1e-5)
        place = subject.artifact
    assert not place.exists()


def test_a_path_that_holds_no_network_is_an_error(tmp_path: Path):
    with pytest.raises(ArtifactError, match="neither an artifact"), opened_subject(tmp_path):
        pass
    with pytest.raises(ConfigError, match="unknown"), opened_subject(tmp_path / "missing"):
        pass


def test_the_command_prints_the_tables_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    quick = {name: VARIANTS[name] for name in ("dense", "norms folded", "torch.compile", "masked")}
    for module in ("measure", "variants"):
        monkeypatch.setattr(f"growfx.commands.bench.{module}.VARIANTS", quick)
    options = ["--density", 0.2, "--img-size", 32, "--repeats", 1, "--no-compile", "--batch", 1, "--batch", 2]
    assert call("bench", "test_resnet", *options, "--set", "model.num_classes=2") == 0
    shown = capsys.readouterr()
    assert "model test_resnet: test_resnet, density 20.00 %, float32, inputs 3x32x32" in shown.out
    assert shown.out.count("\nnorms folded") == 2
    assert "torch.compile" not in shown.out
    assert "bench" in shown.err
    assert call("bench", "test_resnet", *options, "--json", "--quiet") == 0
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    assert [m["batch"] for m in facts["measurements"]] == [1, 2]
    assert facts["dtype"] == "float32"
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["no_such_model"], 1, "growfx: ConfigError: "),
        (["."], 1, "ArtifactError: `.` is neither an artifact"),
        (["test_resnet", "--density", "2"], 1, "density"),
        (["test_resnet", "--set", "model.nonsense=1"], 1, "ConfigError: model `test_resnet` cannot be built"),
        (["test_resnet", "--batch", "0"], 2, "Usage:"),
        (["test_resnet", "--dtype", "int8"], 2, "Usage:"),
        ([], 2, "Usage:"),
    ],
)
def test_wrong_usage_of_the_command_says_so(arguments, status, message, capsys):
    assert call("bench", *arguments) == status
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
