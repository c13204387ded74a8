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
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from zoo_sample import SAMPLES, Sample

import growfx
from growfx.selection.density import random_masks

pytestmark = pytest.mark.slow

MASKABLE = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, CondConv2d)
WHOLE = [
    "resnet50",
    "nfnet_f0",
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
    """Outputs, gradients and buffers of one step; the buffers are put back, those that the forward assigns anew too."""
    parts = list(module.modules())
    before = [(part, key, b, b.clone()) for part in parts for key, b in part._buffers.items() if b is not None]
    model.zero_grad()
    torch.manual_seed(7)
    outputs = tensors(module(*arguments))
    torch.stack([output.square().sum() for output in outputs if output.requires_grad]).sum().backward()
    yield from ((f"output {i}", output.detach()) for i, output in enumerate(outputs))
    yield from ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    names = {name for name, _ in model.named_buffers()}
    yield from ((name, buffer.clone()) for name, buffer in module.named_buffers() if name in names)
    for part, key, buffer, value in before:
        part._buffers[key] = buffer.copy_(value)


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


def detector(kind: str) -> nn.Module:
    """A detector over one small feature map."""
    backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
    backbone.out_channels = 16
    anchors = AnchorGenerator(((16, 32),), ((0.5, 1.0, 2.0),))
    sizes: dict[str, Any] = {"num_classes": 4, "min_size": 64, "max_size": 96}
    if kind == "one stage":
        return RetinaNet(backbone, anchor_generator=anchors, detections_per_img=9, score_thresh=0.0, **sizes)
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    kept = {f"rpn_p{order}_nms_top_n_{mode}": 20 for order in ("re", "ost") for mode in ("train", "test")}
    head = TwoMLPHead(16 * 9, 24)
    predictor = FastRCNNPredictor(24, sizes.pop("num_classes"))
    return FasterRCNN(
        backbone,
        None,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=head,
        box_predictor=predictor,
        **kept,
        **sizes,
    )


@pytest.mark.parametrize("kind", ["one stage", "two stages"])
def test_a_detector_takes_lists_of_images_and_in_training_targets(kind: str) -> None:
    model = detector(kind)
    images = [torch.rand(3, 80, 64), torch.rand(3, 64, 72)]
    boxes = torch.tensor([[2.0, 4.0, 40.0, 50.0], [20.0, 10.0, 60.0, 44.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in images]
    net = growfx.wrap(model, (images,))
    assert set(net.layers) == {name for name, m in model.named_modules() if isinstance(m, MASKABLE)}
    paths = growfx.path_products(net)
    assert paths.scores.keys() == net.layers.keys()
    assert all(bool(torch.isfinite(s).all() & (s >= 0).all() & s.any()) for s in paths.scores.values())
    net.set_masks(random_masks({n: tuple(layer.mask.shape) for n, layer in net.layers.items()}, 0.5, seed=0))
    plain = growfx.unwrap(net)
    for given in (images, images[:1], [*images, torch.rand(3, 50, 90)]):
        got, expected = tensors(net.eval()(given)), tensors(plain.eval()(given))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert any(tensor.numel() for tensor in got)
    losses = []
    for module in (net.train(), plain.train()):
        torch.manual_seed(3)  # of the proposals that are kept for training
        losses.append(module(images, targets))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][name], loss) for name, loss in losses[1].items())
    sum(losses[0].values()).backward()
    assert not any(bool(layer.parameter.grad[~layer.mask].any()) for layer in net.layers.values())


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
