import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact_nets import Tied, make_net, plain
from breadth import some
from torch import nn

import growfx
from growfx.deploy import onnx as onnx_file
from growfx.errors import ArtifactError, ConfigError


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


can_export = pytest.mark.skipif(not installed("onnx", "onnxscript"), reason="onnx and onnxscript are not installed")
can_run = pytest.mark.skipif(
    not installed("onnx", "onnxscript", "onnxruntime"), reason="onnx, onnxscript and onnxruntime are not installed"
)


def run(file: Path, *inputs: torch.Tensor) -> Any:
    return run_all(file, *inputs)["output_0"]


def run_all(file: Path, *inputs: torch.Tensor) -> dict[str, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {f"input_{i}": x.numpy() for i, x in enumerate(inputs)}), strict=True))


@can_run
@pytest.mark.parametrize("source", some(["artifact", "net", "module"], lambda source: source == "artifact"))
def test_the_file_gives_the_outputs_of_the_network(tmp_path: Path, source: str):
    net = make_net(0.3).eval()
    model = plain(net).eval()
    given: Any = {"net": net, "module": model}.get(source)
    if source == "artifact":
        pytest.importorskip("timm")
        model = growfx.create_model("test_resnet", num_classes=4).eval()
        growfx.save(growfx.wrap(model, torch.rand(1, 3, 32, 32)), tmp_path / "out")
        given = tmp_path / "out"
    x = torch.rand(3, 3, 32, 32) if source == "artifact" else torch.rand(3, 3, 6, 6)
    file = growfx.export_onnx(given, tmp_path / "sub" / "net.onnx", example_inputs=x[:1])
    assert [f.name for f in file.parent.iterdir()] == ["net.onnx"]
    for batch in (1, 3):
        expected = model(x[:batch]).detach().numpy()
        assert np.allclose(run(file, x[:batch]), expected, atol=1e-5)


@can_export
def test_a_network_that_onnx_cannot_express_is_a_config_error(tmp_path: Path):
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * int(x.sum().item() > 0) if x.sum() > 0 else x.nonzero()

    with pytest.raises(ConfigError, match=r"cannot be exported to ONNX by this torch .*data-dependent"):
        growfx.export_onnx(Odd(), tmp_path / "x.onnx", example_inputs=torch.rand(1, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [("onnx",), ("onnxscript",), ("onnx", "onnxscript")])
def test_what_is_not_installed_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
):
    monkeypatch.setattr(onnx_file, "_is_installed", lambda name: name not in missing)
    text = f"export to ONNX needs {' and '.join(missing)}: pip install onnx onnxscript"
    with pytest.raises(ConfigError, match=text):
        growfx.export_onnx(tmp_path / "nothing", tmp_path / "x.onnx")


class Exporter:
    """Stands for torch.onnx.export where its packages are not installed: exports, but writes no ONNX."""

    def __init__(self) -> None:
        self.program: Any = None

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...], file: str, **options: Any) -> None:
        self.options, self.inputs = options, inputs
        self.program = torch.export.export(model, inputs, dynamic_shapes=options["dynamic_shapes"])
        Path(file).write_bytes(b"graph")


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    fake = Exporter()
    monkeypatch.setattr(onnx_file, "_is_installed", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", fake)
    return fake


@pytest.mark.parametrize("source", ["artifact", "net", "module"])
def test_the_exporter_gets_the_plain_network_with_an_open_batch_size(tmp_path: Path, exporter: Exporter, source: str):
    net: Any = make_net(0.3)
    model = plain(net).eval()
    given: Any = {"net": net, "module": plain(net)}.get(source)
    size = (3, 6, 6)
    if source == "artifact":
        model = growfx.create_model("test_resnet", num_classes=4).eval()
        growfx.save(growfx.wrap(model, torch.rand(1, 3, 32, 32)), tmp_path / "out")
        given, size = tmp_path / "out", (3, 32, 32)
    example = torch.rand(1, *size) if source == "module" else None
    growfx.export_onnx(given, tmp_path / "net.onnx", example_inputs=example)
    assert (tmp_path / "net.onnx").read_bytes() == b"graph"
    assert exporter.options["external_data"] is False
    assert exporter.options["input_names"] == ["input_0"]
    for batch in (1, 3):
        x = torch.rand(batch, *size)
        assert torch.allclose(exporter.program.module()(x), model(x), atol=1e-6)
    assert not any("mask" in name for name in exporter.program.state_dict)
    if source == "net":
        assert net.training, "the net given stays as it was"


def test_a_fixed_batch_size_is_that_of_the_example(tmp_path: Path, exporter: Exporter):
    growfx.export_onnx(Tied(), tmp_path / "x.onnx", example_inputs=torch.rand(1, 3, 6, 6), batch=False)
    assert exporter.options["dynamic_shapes"] is None
    assert exporter.inputs[0].shape == (1, 3, 6, 6)


@pytest.mark.usefixtures("exporter")
def test_a_file_that_exists_is_replaced_and_one_that_cannot_be_written_is_an_artifact_error(tmp_path: Path):
    (tmp_path / "x.onnx").write_text("old")
    growfx.export_onnx(Tied(), tmp_path / "x.onnx", example_inputs=torch.rand(1, 3, 6, 6))
    assert (tmp_path / "x.onnx").read_bytes() == b"graph"
    with pytest.raises(ArtifactError, match="cannot be written"):
        growfx.export_onnx(Tied(), tmp_path / "x.onnx" / "y.onnx", example_inputs=torch.rand(1, 3, 6, 6))
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]


def test_a_failing_exporter_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_model: Any, _inputs: Any, file: str, **_: Any) -> None:
        Path(file).write_text("half")
        raise RuntimeError("no operator for aten::odd\nand a long trace")

    monkeypatch.setattr(onnx_file, "_is_installed", lambda name: True)
    monkeypatch.setattr(torch.onnx, "export", fail)
    (tmp_path / "x.onnx").write_text("old")
    with pytest.raises(
        ConfigError, match=r"ONNX by this torch \(.*no operator for aten::odd\); `batch=False` \(`--fixed-batch`\)"
    ):
        growfx.export_onnx(Tied(), tmp_path / "x.onnx", example_inputs=torch.rand(1, 3, 6, 6))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.onnx", "old")]


@pytest.mark.usefixtures("exporter")
def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="expects an artifact's path, a MaskedGraph or a module, got `int`"):
        growfx.export_onnx(7, tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="there is no artifact at this path"):
        growfx.export_onnx(tmp_path / "nothing", tmp_path / "x.onnx")
    monkeypatch.setattr(onnx_file, "_LARGEST", 100)
    with pytest.raises(ConfigError, match="one ONNX file holds less than 100 bytes and the network has"):
        growfx.export_onnx(Tied(), tmp_path / "x.onnx", example_inputs=torch.rand(1, 3, 6, 6))


@pytest.mark.slow
@can_run
def test_a_network_is_exported_inside_inference_mode_too(tmp_path: Path):
    net = make_net(0.3).eval()
    x = torch.rand(2, 3, 6, 6)
    expected = net(x).detach()
    with torch.inference_mode():
        growfx.export_onnx(net, tmp_path / "net.onnx")
        growfx.export_onnx(net, tmp_path / "given.onnx", example_inputs=torch.rand(1, 3, 6, 6))
    for file in ("net.onnx", "given.onnx"):
        assert np.allclose(run(tmp_path / file, x), expected.numpy(), atol=1e-5)


@can_export
def test_what_onnx_lacks_is_named(tmp_path: Path):
    class Airy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.airy_ai(x)

    with pytest.raises(ConfigError, match="special_airy_ai"):
        growfx.export_onnx(Airy(), tmp_path / "x.onnx", example_inputs=torch.rand(1, 2))


def test_a_file_that_cannot_be_one_is_refused_first(tmp_path: Path, exporter: Exporter):
    for file, text in ((tmp_path, "is a folder"), (3, "expects a path, got 3"), ("", "expects a path")):
        with pytest.raises(ArtifactError, match=text):
            growfx.export_onnx(Tied(), file, example_inputs=torch.rand(1, 3, 6, 6))
    assert exporter.program is None


@pytest.mark.usefixtures("exporter")
def test_arguments_by_keyword_reach_the_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from growfx.artifact.input_specs import InputSpec
    from growfx.artifact.remembered_inputs import remember_inputs

    class Named(nn.Module):
        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    model = remember_inputs(Named(), (InputSpec(None, "F32", (1, 2)), InputSpec("scale", "F32", (1, 2))))
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: (given.update(options), Path(args[2]).touch()))
    growfx.export_onnx(model, tmp_path / "x.onnx")
    assert given["kwargs"]["scale"].shape == (2, 2)
    assert given["input_names"] == ["input_0", "input_1"]


class Nested(nn.Module):
    """Takes and returns tensors in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Any, scale: float, *more: torch.Tensor, **named: Any) -> Any:
        total = self.a(x["one"]) + scale * self.a(x["two"][0]) - sum(i * self.a(y) for i, y in enumerate(more, 2))
        return {"total": total, "parts": (self.b(named["late"]), None, [x["one"]])}


@can_run
def test_tensors_in_containers_are_numbered_in_their_order(tmp_path: Path):
    def call(batch: int) -> tuple[Any, list[torch.Tensor]]:
        one, two, more, late = tensors = [torch.randn(batch, 4) for _ in range(4)]
        return (({"one": one, "two": [two]}, 0.5, more), {"late": late}), tensors

    net = growfx.wrap(Nested(), call(1)[0], density=0.5)
    growfx.export_onnx(net, tmp_path / "x.onnx")
    for batch in (1, 3):
        (args, kwargs), tensors = call(batch)
        expected = net(*args, **kwargs)
        found = run_all(tmp_path / "x.onnx", *tensors)
        wanted = (expected["total"], expected["parts"][0], expected["parts"][2][0])
        assert list(found) == ["output_0", "output_1", "output_2"]
        for array, tensor in zip(found.values(), wanted, strict=True):
            assert np.allclose(array, tensor.detach().numpy(), atol=1e-5)


@pytest.mark.slow
@can_run
def test_a_dictionary_as_the_last_argument_is_no_keyword_arguments(tmp_path: Path):
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.layer(inputs["x"])

    model = Taken()
    file = growfx.export_onnx(model, tmp_path / "x.onnx", example_inputs=({"x": torch.rand(1, 4)},))
    x = torch.rand(3, 4)
    assert np.allclose(run(file, x), model({"x": x}).detach().numpy(), atol=1e-5)


class Asking(nn.Module):
    def __init__(self, condition: Any) -> None:
        super().__init__()
        self.layer, self.condition = nn.Linear(4, 2), condition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x) if self.condition(len(x)) else self.layer(x)


@can_export
@pytest.mark.parametrize(
    ("condition", "text"),
    [
        (lambda size: size == 1, "with a batch of 1 the model does something else than with one of 2"),
        (lambda size: size % 2, "with a batch of 1 the model does something else than with one of 2"),
        (lambda size: size > 9, "what the model did holds for batches of up to 9"),
    ],
)
def test_a_network_that_does_something_else_at_another_batch_size_is_refused(tmp_path: Path, condition: Any, text: str):
    with pytest.raises(ConfigError, match=f"for every batch size: {text}.*`batch=False`"):
        growfx.export_onnx(Asking(condition), tmp_path / "x.onnx", example_inputs=torch.rand(1, 4))
    assert not list(tmp_path.iterdir())


@can_export
def test_a_network_that_itself_takes_no_larger_batch_is_exported(tmp_path: Path):
    def refuses(size: int) -> bool:
        if size > 9:
            raise ValueError("at most nine rows")
        return False

    assert growfx.export_onnx(Asking(refuses), tmp_path / "x.onnx", example_inputs=torch.rand(1, 4)).exists()


@can_export
@pytest.mark.parametrize("width", [torch.float16, torch.bfloat16])
def test_a_network_that_computes_in_16_bits_is_compared_as_such(tmp_path: Path, width: torch.dtype):
    class Short(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # What another order of sums does to networks of many layers.
            rounding = 1 + 2**-7 if torch.compiler.is_compiling() else 1
            return (x.to(width) * rounding).float()

    x = torch.rand(1, 4)
    assert growfx.export_onnx(Short(), tmp_path / "x.onnx", example_inputs=x).exists()
    width = torch.float32
    with pytest.raises(ConfigError, match="the model does something else"):
        growfx.export_onnx(Short(), tmp_path / "x.onnx", example_inputs=x)


@pytest.mark.slow
@can_export
def test_a_network_that_draws_numbers_is_compared_by_its_shapes(tmp_path: Path):
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x) + torch.randn_like(x)

    x = torch.rand(1, 4)
    state = torch.get_rng_state()
    assert growfx.export_onnx(Noisy(), tmp_path / "x.onnx", example_inputs=x).exists()
    assert torch.equal(state, torch.get_rng_state())


@can_export
def test_a_buffer_that_changes_at_each_call_is_told_of(tmp_path: Path):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    model = Counting()
    with pytest.warns(growfx.GrowfxWarning, match=r"changes `calls` whenever it is called; .* holds now"):
        growfx.export_onnx(model, tmp_path / "x.onnx", example_inputs=torch.rand(1, 4))
    assert model.calls == 0


def test_a_parameter_with_a_name_of_the_file_is_refused(tmp_path: Path, exporter: Exporter):
    model = nn.Linear(4, 2)
    model.register_buffer("output_0", torch.zeros(2))
    with pytest.raises(ConfigError, match="parameter or buffer `output_0`, which is a name of the file's; rename it"):
        growfx.export_onnx(model, tmp_path / "x.onnx", example_inputs=torch.rand(1, 4))
    assert exporter.program is None


@can_export
def test_a_value_that_is_no_tensor_is_named(tmp_path: Path):
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x * 2, 3

    with pytest.raises(ConfigError, match="returns a value of type `int`, and a file holds tensors only"):
        growfx.export_onnx(Two(), tmp_path / "x.onnx", example_inputs=torch.rand(1, 4))
