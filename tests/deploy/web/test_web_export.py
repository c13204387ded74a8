"""What `growfx.export_web` writes and refuses; the page itself runs in test_web_page.py."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.deploy.web.build import EXPORTS, RECORD, RUNTIME_FILE, build, compiler_version, sources_digest
from growfx.deploy.web.facts import expected_output, noise
from growfx.errors import ArtifactError, ConfigError, DataError, TraceError, UnsupportedOperatorError

FORM = {"input_size": [3, 8, 8], "mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}


class Classifier(nn.Module):
    """Classes of small images."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


class Doubled(nn.Module):
    """Two images at once."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).mean((2, 3))


class Sorted(nn.Module):
    """An operator that the native runtime has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(2).sort(-1).values.mean(-1))


def network(channels: int = 3) -> growfx.MaskedGraph:
    return growfx.wrap(Classifier(channels), torch.rand(1, channels, 8, 8), density=0.5)


def part(page: Path, name: str) -> str:
    found = re.search(rf'<script id="{name}"[^>]*>(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def facts_in(page: Path) -> dict[str, Any]:
    return json.loads(part(page, "facts"))


def test_the_page_holds_the_runtime_and_the_network_that_export_native_writes(tmp_path: Path) -> None:
    net = network()
    made = growfx.export_web(net, tmp_path / "web")
    growfx.export_native(net, tmp_path / "native")
    assert [file.name for file in (tmp_path / "web").iterdir()] == ["index.html"] == [made.page.name]
    assert made.bytes == made.page.stat().st_size
    held = base64.b64decode(part(made.page, "network"))
    assert held == (tmp_path / "native" / "network.gfx").read_bytes()
    assert base64.b64decode(part(made.page, "runtime")) == RUNTIME_FILE.read_bytes()
    assert (made.network_bytes, made.runtime_bytes) == (len(held), RUNTIME_FILE.stat().st_size)
    assert str(made.page) in str(made)
    assert json.loads(json.dumps(made.to_json()))["classes"] == 4


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = growfx.export_web(network(), tmp_path / "web").page.read_text()
    assert not re.search(r"(?:src|href)\s*=|https?:|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text


def test_the_input_format_classes_and_figures_are_those_of_the_artifact(tmp_path: Path) -> None:
    origin = {
        "input": {**FORM, "interpolation": "bicubic", "crop_pct": 0.9},
        "data": {"spec": "pets", "classes": ["cat", "dog", "</script><b>", "'\"&"]},
        "result": {"test_accuracy": 0.75},
    }
    net = growfx.wrap(growfx.create_model("test_resnet", num_classes=4), torch.rand(1, 3, 32, 32), density=0.3)
    growfx.save(net, tmp_path / "artifact", provenance=origin)
    facts = facts_in(growfx.export_web(tmp_path / "artifact", tmp_path / "web").page)
    assert facts["classes"] == origin["data"]["classes"]
    form = facts["input"]
    assert (form["mean"], form["std"]) == (FORM["mean"], FORM["std"])
    assert (form["interpolation"], form["crop_pct"]) == ("bicubic", 0.9)
    assert (form["channels"], form["height"], form["width"]) == (3, 32, 32)  # the network's, not the recorded size
    rows = dict(facts["rows"])
    assert f"{net.nnz:,} of {net.numel:,}" in rows["density"]
    assert rows["trained on"] == "pets"
    assert rows["test accuracy"] == "75.00%"
    text = (tmp_path / "web" / "index.html").read_text()
    assert text.count("<script") == text.count("</script>") == 4


def test_a_network_without_a_record_is_given_images_as_its_model_states(tmp_path: Path) -> None:
    timm = growfx.wrap(growfx.create_model("resnet18", num_classes=4), torch.rand(1, 3, 32, 32), density=0.1)
    stated = facts_in(growfx.export_web(timm, tmp_path / "timm").page)
    assert stated["input"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert stated["input"]["crop_pct"] == pytest.approx(0.95)
    assert not stated["draw"]
    plain = facts_in(growfx.export_web(network(1), tmp_path / "plain").page)
    assert (plain["input"]["mean"], plain["input"]["std"]) == ([0.0], [1.0])
    assert plain["classes"] == []
    assert plain["draw"]


def test_the_outputs_to_compare_with_are_those_of_the_masked_network(tmp_path: Path) -> None:
    net = network().eval()
    facts = facts_in(growfx.export_web(net, tmp_path / "web").page)
    found = np.frombuffer(base64.b64decode(facts["expected"]), "<f4")
    with torch.no_grad():
        expected = net(torch.from_numpy(noise(192)).reshape(1, 3, 8, 8))
    assert found == pytest.approx(expected[0].numpy(), rel=1e-5)
    assert expected_output(growfx.unwrap(net).eval(), (3, 8, 8)).numpy() == pytest.approx(found, rel=1e-5)


def test_the_noise_fills_its_range_evenly() -> None:
    values = noise(100_000)
    assert values.dtype == np.float32
    assert -1 <= values.min() < -0.999 < 0.999 < values.max() < 1
    counts, _ = np.histogram(values, 10, (-1, 1))
    assert abs(counts - 10_000).max() < 500
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02


@pytest.mark.parametrize(
    ("model", "inputs", "error", "told"),
    [
        (Doubled(), (torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)), ConfigError, "export_native"),
        (nn.Linear(4, 2), torch.rand(1, 4), ConfigError, r"\(1, 4\)"),
        (Classifier(2), torch.rand(1, 2, 8, 8), ConfigError, "1 or 3 channels"),
        (nn.Conv2d(3, 2, 1), torch.rand(1, 3, 8, 8), ConfigError, r"\(1, 2, 8, 8\)"),
        (Sorted(), torch.rand(1, 3, 8, 8), UnsupportedOperatorError, "sort"),
    ],
    ids=["two inputs", "no images", "two channels", "no classes", "no kernel"],
)
def test_what_the_page_is_not_for_is_refused_and_nothing_is_written(
    model: nn.Module, inputs: Any, error: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=told):
        growfx.export_web(model, tmp_path / "web", example_inputs=inputs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"mean": [0.5]}, ArtifactError),
        ({"std": [0.0, 1.0, 1.0]}, ArtifactError),
        ({"mean": ["a", "b", "c"]}, ArtifactError),
        ({"std": [float("nan")] * 3}, ArtifactError),
        ({"mean": 0.5}, ArtifactError),
        ({"crop_pct": 0}, ArtifactError),
        ({"crop_pct": None}, ArtifactError),
        ({"interpolation": "random"}, ConfigError),
        ({"interpolation": ["bilinear"]}, ConfigError),
        ({"colour": "blue"}, DataError),
        ("grey", ArtifactError),
    ],
    ids=str,
)
def test_an_input_format_that_cannot_be_meant_is_refused(
    change: dict[str, Any] | str, error: type[Exception], tmp_path: Path
) -> None:
    given = FORM | change if isinstance(change, dict) else change
    with pytest.raises(error):
        growfx.export_web(network(), tmp_path / "web", provenance={"input": given})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_has_something_in_it_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "full" / "note"):
        with pytest.raises(ArtifactError, match="new folder"):
            growfx.export_web(network(), target)
    assert (tmp_path / "full" / "note").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert growfx.export_web(network(), tmp_path / "empty").page.is_file()


@pytest.mark.parametrize("source", ["nowhere", 3])
def test_something_else_than_a_network_is_refused(source: Any, tmp_path: Path) -> None:
    with pytest.raises((ArtifactError, ConfigError)):
        growfx.export_web(source, tmp_path / "web")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("origin", [{"data": 3, "result": []}, {"data": {"spec": ["a"], "classes": [1, 2]}}])
def test_a_record_that_says_nothing_of_use_is_no_matter(origin: dict[str, Any], tmp_path: Path) -> None:
    facts = facts_in(growfx.export_web(network(), tmp_path / "web", provenance=origin).page)
    assert facts["classes"] == []
    assert facts["grain"] is None


def test_the_shipped_runtime_was_built_from_the_sources_as_they_are() -> None:
    """After a change of `growfx/runtime/native`: `python -m growfx.deploy.web.build`."""
    record = json.loads(RECORD.read_text())
    assert record["bytes"] == RUNTIME_FILE.stat().st_size
    assert record["sources"] == sources_digest()
    assert all(name.encode() in RUNTIME_FILE.read_bytes() for name in EXPORTS)


@pytest.mark.slow
def test_the_runtime_is_built_again_to_the_same_bytes() -> None:
    made_by, here = json.loads(RECORD.read_text())["compiler"], compiler_version()
    if here is None:
        pytest.skip("no clang++ here (Debian: apt-get install clang lld wasi-libc libc++-dev-wasm32)")
    try:
        built = build()
    except ConfigError as error:
        pytest.skip(f"clang++ here cannot build for WebAssembly: {error}")
    if here != made_by:
        pytest.skip(f"the shipped runtime was built by {made_by}, here is {here}: other bytes are no error")
    assert built == RUNTIME_FILE.read_bytes()


def test_a_runtime_cannot_be_built_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert compiler_version() is None
    with pytest.raises(ConfigError, match="apt-get install clang lld"):
        build()


def test_a_compiler_that_fails_is_a_config_error_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match="no such header"):
        build()


def test_images_that_the_network_cannot_compute_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="expected input"):
        growfx.export_web(network(3), tmp_path / "page", example_inputs=torch.rand(1, 1, 8, 8))
    assert not list(tmp_path.iterdir())
