"""Models of timm and torchvision: recorded faithfully, every layer masked, and no bit different from the model."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import growfx

SMALL: dict[str, dict[str, Any]] = {
    "convnext_atto": {"drop_path_rate": 0.3},
    "densenet121": {},
    "efficientnet_b0": {"drop_rate": 0.2, "drop_path_rate": 0.2},
    "mixer_s32_224": {"img_size": 64},
    "nf_resnet26": {},
    "regnety_004": {"drop_rate": 0.2},
    "seresnet50": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4, "drop_path_rate": 0.2},
    "vit_tiny_patch16_224": {"img_size": 64, "drop_rate": 0.2, "drop_path_rate": 0.2},
    "torchvision/googlenet": {"init_weights": False},
    "torchvision/shufflenet_v2_x0_5": {},
}
WHOLE = [
    "resnet18",
    "resnet50",
    "resnet50d",
    "mobilenetv3_large_100",
    "nfnet_f0",
    "nf_resnet50",
    "vgg16_bn",
    "torchvision/resnet18",
    "torchvision/vit_b_16",
    "torchvision/swin_t",
    "torchvision/mvit_v2_s",
    "beit_base_patch16_224",
    "crossvit_tiny_240",
]


def first(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output


@pytest.mark.parametrize("name", SMALL)
def test_outputs_gradients_and_statistics_equal_the_models_bit_for_bit(name: str) -> None:
    model = growfx.create_model(name, num_classes=7, **SMALL[name])
    net = growfx.wrap(copy.deepcopy(model), torch.randn(1, 3, 64, 64))
    assert net.trace_report.faithful
    for training, batch in ((True, 3), (False, 1)):
        x = torch.randn(batch, 3, 64, 64)
        outputs = []
        for module in (model, net):
            torch.manual_seed(7)
            module.train(training).zero_grad()
            outputs.append(first(module(x)))
            outputs[-1].pow(2).sum().backward()
        assert torch.equal(*outputs)
    state = net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    theirs = dict(model.named_parameters())
    for key, parameter in net.named_parameters():
        expected = theirs[key].grad
        assert (parameter.grad is None) == (expected is None), key
        assert expected is None or torch.equal(parameter.grad, expected), key


@pytest.mark.parametrize("name", WHOLE)
def test_whole_models_record_on_the_meta_device_with_every_layer_masked(name: str) -> None:
    with torch.device("meta"):
        model = growfx.create_model(name)
    shape = (1, 3, 16, 224, 224) if "mvit" in name else None
    net = growfx.wrap(model, None if shape is None else torch.randn(shape, device="meta"))
    report = net.trace_report
    assert report.faithful
    assert not report.opaque
    assert not report.unmasked
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
    assert set(net.layers) == {n for n, m in model.named_modules() if isinstance(m, kinds)}


def test_with_random_masks_the_unwrapped_model_computes_the_same() -> None:
    for name in ("nf_resnet26", "vit_tiny_patch16_224"):
        model = growfx.create_model(name, num_classes=7, **({"img_size": 64} if "vit" in name else {}))
        net = growfx.wrap(model, torch.randn(1, 3, 64, 64), density=0.2).eval()
        plain = growfx.unwrap(net)
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(plain(x), net(x))
        assert type(plain) is type(model)
