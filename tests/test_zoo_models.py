"""Models of timm and torchvision: recorded faithfully, all layers masked, scored, and no bit unlike the model."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_sample import SAMPLES, Sample

import growfx
from growfx.density import random_masks

MASKABLE = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, CondConv2d)
WHOLE = [
    "resnet50",
    "mobilenetv3_large_100",
    "nfnet_f0",
    "beit_base_patch16_224",
    "crossvit_tiny_240",
    "torchvision/vit_b_16",
    "torchvision/swin_t",
    "torchvision/mvit_v2_s",
]


@dataclass(frozen=True)
class Wrapped:
    sample: Sample
    model: nn.Module
    net: growfx.MaskedGraph

    def arguments(self, batch: int) -> tuple[Any, ...]:
        return self.sample.arguments(torch.randn(batch, *self.sample.shape))


@pytest.fixture(scope="module", params=SAMPLES)
def wrapped(request: pytest.FixtureRequest) -> Wrapped:
    sample: Sample = SAMPLES[request.param]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = sample.build()
    for parameter in model.parameters():  # scales that start at zero would hide what they multiply
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return Wrapped(sample, model, growfx.wrap(model, sample.arguments(torch.randn(1, *sample.shape))))


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def results(module: nn.Module, model: nn.Module, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    """Outputs, gradients and buffers of one step; the buffers are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    torch.manual_seed(7)
    outputs = tensors(module(*arguments))
    torch.stack([output.square().sum() for output in outputs if output.requires_grad]).sum().backward()
    yield from ((f"output {i}", output.detach()) for i, output in enumerate(outputs))
    yield from ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    yield from ((name, buffer.clone()) for name, buffer in model.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])


def test_it_is_recorded_faithfully_with_every_layer_masked(wrapped: Wrapped) -> None:
    report = wrapped.net.trace_report
    assert report.faithful, report.notes
    assert not report.opaque
    modules = dict(wrapped.model.named_modules())
    assert {*report.layers, *report.tied} == {name for name, m in modules.items() if isinstance(m, MASKABLE)}
    # What is left are parameters that no maskable layer owns: recurrent matrices and tables of positions.
    bare = {name: parameter for name, parameter in wrapped.model.named_parameters() if name in report.unmasked}
    assert bare.keys() == report.unmasked.keys()
    assert all(parameter.ndim > 1 for parameter in bare.values())
    recurrent = [name for name, module in modules.items() if isinstance(module, nn.RNNBase)]
    assert {f"{name}.weight_hh_l0" for name in recurrent} <= report.unmasked.keys()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_gradients_and_statistics_are_the_models_bit_for_bit(wrapped: Wrapped, training: bool) -> None:
    arguments = wrapped.arguments(3)
    wrapped.model.train(training), wrapped.net.train(training)
    expected = dict(results(wrapped.model, wrapped.model, arguments))
    got = dict(results(wrapped.net, wrapped.model, arguments))
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []


@contextmanager
def extreme_norms(net: nn.Module) -> Generator[None]:
    """Values that a float32 sum of products would not survive."""
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.weight.data.fill_(10)
            module.running_var.fill_(1e-3)
    yield
    net.load_state_dict(kept)


def test_scores_are_finite_and_none_negative_whatever_the_norms(wrapped: Wrapped) -> None:
    with extreme_norms(wrapped.net):
        paths = growfx.path_products(wrapped.net)
    assert math.isfinite(paths.log_total)
    assert {*paths.scores, *paths.off_path} == {*wrapped.net.layers}
    wrong = {}
    for name, score in paths.scores.items():
        assert score.shape == wrapped.net.layers[name].mask.shape
        if not bool(torch.isfinite(score).all() & (score >= 0).all() & score.any()):
            wrong[name] = score
    assert not wrong
    patterns = wrapped.sample.off_path
    assert [name for name in paths.off_path if not any(fnmatch.fnmatch(name, p) for p in patterns)] == []
    assert all(any(fnmatch.fnmatch(name, p) for name in paths.off_path) for p in patterns)


def test_with_random_masks_the_unwrapped_model_computes_the_same(wrapped: Wrapped) -> None:
    net = wrapped.net.eval()
    arguments = wrapped.arguments(2)
    dense = tensors(net(*arguments))
    net.set_masks(random_masks({n: tuple(layer.mask.shape) for n, layer in net.layers.items()}, 0.1, seed=0))
    assert net.nnz == round(0.1 * net.numel)
    plain = growfx.unwrap(net)
    assert type(plain) is type(wrapped.model)
    assert plain.state_dict().keys() == wrapped.model.state_dict().keys()
    sparse = tensors(net(*arguments))
    assert all(torch.equal(a, b) for a, b in zip(sparse, tensors(plain(*arguments)), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(sparse, dense, strict=True))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_record_on_the_meta_device_with_every_layer_masked(name: str) -> None:
    with torch.device("meta"):
        model = growfx.create_model(name)
    shape = (1, 3, 16, 224, 224) if "mvit" in name else None
    net = growfx.wrap(model, None if shape is None else torch.randn(shape, device="meta"))
    report = net.trace_report
    assert report.faithful
    assert not report.opaque
    assert set(net.layers) == {n for n, m in model.named_modules() if isinstance(m, MASKABLE)}
