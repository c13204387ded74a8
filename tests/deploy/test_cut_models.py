"""Models that lost whole units are ordinary models: exporters, compilers, feature widths and training take them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_nets import macs
from compact_nets import agree, awake
from torch import Tensor, nn

import growfx

pytestmark = pytest.mark.slow

# a residual network, gates and depthwise convolutions, a norm over channels, heads
MODELS = {"resnet10t": 64, "mobilenetv3_small_050": 64, "test_convnext": 64, "test_vit": 160}
can_run_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


def cut(name: str, **options: Any) -> tuple[growfx.MaskedGraph, Any, Tensor]:
    """A network at half of its multiply-accumulates, the small model, and images."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, MODELS[name], MODELS[name])
    net = growfx.wrap(awake(growfx.create_model(name, num_classes=4)), x)
    dense = macs(growfx.unwrap(net).eval(), x)
    net.set_masks(growfx.plan_channels(net, "flops=0.5", **options).masks(net))
    small = growfx.unwrap(net, compact=True)
    assert macs(small, x) <= 0.5 * dense
    agree(net, small, x)
    return net, small, x


@can_run_onnx
@pytest.mark.parametrize("source", ["module", "artifact"])
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_gives_its_outputs_by_onnx_runtime(name: str, source: str, tmp_path: Path) -> None:
    import onnxruntime

    net, small, x = cut(name)
    given: Any = small
    if source == "artifact":
        growfx.save(net, tmp_path / "small", compact=True)
        given = tmp_path / "small"
    file = growfx.export_onnx(given, tmp_path / "small.onnx", example_inputs=x[:1])
    dense = growfx.export_onnx(net, tmp_path / "dense.onnx")
    assert file.stat().st_size < dense.stat().st_size
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for images in (x, x[:1]):
        found = torch.from_numpy(session.run(None, {"input_0": images.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, small(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_is_exported_by_torch(name: str, tmp_path: Path) -> None:
    net, small, x = cut(name)
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},))
    assert sum(p.numel() for p in program.parameters()) == sum(p.numel() for p in small.parameters())
    torch.export.save(program, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    for images in (x, torch.cat([x, -x])):
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), small(images))
            torch.testing.assert_close(loaded(images), net.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_a_cut_model_is_compiled_whole(name: str, backend: str) -> None:
    _, small, x = cut(name)
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), small(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_states_its_widths_and_trains_with_a_new_head(name: str, tmp_path: Path) -> None:
    net, small, x = cut(name, round_to=2)
    growfx.save(net, tmp_path / "small", compact=True)
    for model in (small, growfx.load(tmp_path / "small")):
        with torch.no_grad():
            features = model.forward_features(x)
            assert model.num_features in (features.shape[1], features.shape[-1])
            assert model.forward_head(features, pre_logits=True).shape[-1] == model.head_hidden_size
            stages = model.forward_intermediates(x, intermediates_only=True)
        channels = [stage.shape[1] for stage in stages]
        info: Any = model.feature_info
        told = [entry["num_chs"] for entry in info]
        assert told == channels[-len(told) :]
        model.reset_classifier(7)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        nn.functional.cross_entropy(model(x), torch.tensor([1, 6])).backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)
        optimizer.step()
        again = growfx.wrap(model.eval(), x)
        assert growfx.plan_channels(again, "flops=0.9").share("flops") <= 0.9
