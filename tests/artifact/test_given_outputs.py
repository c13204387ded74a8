"""An artifact knows what its network gave, so that another one with the same tensors is not taken for it."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from artifact_nets import forge
from torch import Tensor, nn

import growfx
from growfx.artifact.input_specs import InputSpec
from growfx.artifact.remembered_inputs import output_difference, outputs_of
from growfx.artifact.writer import WEIGHTS
from growfx.errors import ArtifactError


class Body(nn.Module):
    def __init__(
        self, act: Callable[[], nn.Module] = nn.ReLU, stride: int = 1, eps: float = 1e-5, padding: str = "zeros"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=stride, padding=1, padding_mode=padding)
        self.norm, self.act, self.head = nn.BatchNorm2d(8, eps=eps), act(), nn.Linear(8, 4)
        self.register_buffer("gain", torch.ones(8, 1, 1), persistent=False)
        self.tables = {"shift": torch.zeros(4)}

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.act(self.norm(self.conv(x))) * self.gain).mean((2, 3))) + self.tables["shift"]


def saved(tmp_path: Path, model: nn.Module, **options: Any) -> Path:
    dtype = next(model.parameters()).dtype
    net = growfx.wrap(model, torch.randn(2, 3, 8, 8, dtype=dtype), density=0.5)
    growfx.save(net, tmp_path / "out", **options)
    return tmp_path / "out"


def notices(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in seen if issubclass(warning.category, growfx.GrowfxWarning)]


def with_buffer() -> nn.Module:
    model = Body()
    model.gain.mul_(2)
    return model


def with_table() -> nn.Module:
    model = Body()
    model.tables["shift"] += 1
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "activation": lambda: Body(nn.GELU),
    "stride": lambda: Body(stride=2),
    "eps": lambda: Body(eps=1e-2),
    "padding": lambda: Body(padding="circular"),
    "buffer": with_buffer,
    "table": with_table,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("runtime", ["dense", "sparse"])
def test_an_instance_that_computes_something_else_is_told(tmp_path: Path, other: str, runtime: str):
    if runtime == "sparse" and other != "stride":
        pytest.skip("one is enough: both load by the same reader")
    path = saved(tmp_path, Body())
    found = notices(lambda: growfx.load(path, model=OTHERS[other](), runtime=runtime))
    assert [text for text in found if "not the network that was saved" in text and "1x3x8x8" in text]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_class_loads_without_a_word(tmp_path: Path, compact: bool, dtype: torch.dtype):
    model = Body().to(dtype)
    model.tables = {"shift": torch.zeros(4, dtype=dtype)}
    path = saved(tmp_path, copy.deepcopy(model), compact=compact)
    assert notices(lambda: growfx.load(path, model=model.train())) == []


def test_a_named_model_that_is_replaced_by_an_instance_is_compared_too(tmp_path: Path):
    import timm

    path = saved(tmp_path, timm.create_model("test_resnet", num_classes=3))
    assert notices(lambda: growfx.load(path, model=timm.create_model("test_resnet", num_classes=3))) == []
    other = timm.create_model("test_resnet", num_classes=3, act_layer="gelu")
    assert "largest off" in notices(lambda: growfx.load(path, model=other))[0]


def test_an_instance_that_fails_on_the_inputs_is_told_with_the_reason(tmp_path: Path):
    class Failing(Body):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not these")

    path = saved(tmp_path, Body())
    assert "ValueError: not these" in notices(lambda: growfx.load(path, model=Failing()))[0]


def test_networks_that_give_something_else_at_every_call_are_not_compared(tmp_path: Path):
    class Noisy(Body):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(4)

    path = saved(tmp_path, Noisy())
    assert notices(lambda: growfx.load(path, model=Noisy())) == []


def test_comparing_leaves_the_instance_and_the_generators_alone(tmp_path: Path):
    class Counting(Body):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            torch.rand(1)
            return super().forward(x)

    path = saved(tmp_path, Counting())
    model, seen = Counting(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    state = torch.get_rng_state()
    growfx.load(path, model=model)
    assert (model.calls, torch.equal(torch.get_rng_state(), state)) == (0, True)


@pytest.mark.parametrize(
    "forged",
    [
        1,
        {"tolerance": 0.1},
        {"tolerance": "much", "values": []},
        {"tolerance": 0.1, "values": [1]},
        {"tolerance": 0.1, "values": [{"shape": [-1], "largest": 1.0, "samples": []}]},
        {"tolerance": 0.1, "values": [{"shape": [1], "largest": 1.0, "samples": [1.0] * 17}]},
        {"tolerance": 0.1, "values": [{"shape": [1], "largest": 1.0, "samples": ["a"]}]},
    ],
)
def test_damaged_outputs_are_refused(tmp_path: Path, forged: Any):
    path = saved(tmp_path, Body())

    (path / "config.json").unlink()

    def change(manifest: dict[str, Any]) -> None:
        manifest["outputs"] = forged

    forge(path / WEIGHTS, change)
    with pytest.raises(ArtifactError, match="field `outputs`"):
        growfx.inspect(path / WEIGHTS)


def test_torchs_default_dtype_is_none_of_the_inputs(tmp_path: Path):
    path, model = saved(tmp_path, Body()), Body()
    torch.set_default_dtype(torch.float64)
    try:
        assert notices(lambda: growfx.load(path, model=model)) == []
    finally:
        torch.set_default_dtype(torch.float32)


class Counting(Body):
    rows: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def test_no_network_is_run_on_inputs_of_a_size_that_only_a_file_names() -> None:
    """Their shapes are read from the file, and what comes of them in a network may be a hundred times as large."""
    large, small = ([InputSpec(None, "F32", (rows, 3, 8, 16))] for rows in (1 << 14, 2))
    model = Counting()
    assert outputs_of(model, large) is None
    given = outputs_of(model, small)
    assert given is not None
    assert output_difference(model, large, given) == ""
    assert set(model.rows) == {2}
