"""Path products of library models: finite, positive, off path where that is known, fused equal to written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import growfx
from growfx.passes.path_products import path_products

MODELS = [
    ("resnet10t", 64),
    ("seresnet18", 64),
    ("densenet121", 64),
    ("mobilenetv3_small_050", 64),
    ("efficientnet_b0", 64),
    ("regnety_002", 64),
    ("convnext_atto", 64),
    ("nf_resnet26", 64),
    ("test_vit", 160),
    ("torchvision/shufflenet_v2_x0_5", 64),
    ("torchvision/googlenet", 64),
    ("torchvision/swin_t", 64),
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        options = {"init_weights": False} if name.endswith("googlenet") else {}
        model = torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, **options)
    else:
        model = timm.create_model(name)
    for module in model.modules():  # values that a float32 sum of products would not survive
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.fill_(10)
            assert module.running_var is not None
            module.running_var.fill_(1e-3)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize(("name", "size"), MODELS, ids=[name for name, _ in MODELS])
def test_scores_of_a_library_model_are_finite_and_none_negative(name: str, size: int) -> None:
    net = growfx.wrap(build(name), torch.randn(2, 3, size, size))
    paths = path_products(net)
    assert math.isfinite(paths.log_total)
    for layer, score in paths.scores.items():
        assert score.shape == net.layers[layer].mask.shape
        assert bool(torch.isfinite(score).all() & (score >= 0).all() & score.any())
        assert bool(paths.alive_in[layer].any() & paths.alive_out[layer].all())
    off = {layer for layer in paths.off_path if not layer.startswith("aux")}
    assert not off
    assert (len(paths.off_path) == 6) == name.endswith("googlenet")


def shares(net: Any) -> torch.Tensor:
    paths = path_products(net)
    scale = paths.log_scale - paths.log_total
    mass = [(net.layers[n].effective_weight.detach().double().abs() * s).sum() for n, s in paths.scores.items()]
    return torch.stack(mass) * math.exp(scale)


def test_a_vision_transformer_scores_alike_with_fused_and_written_out_attention() -> None:
    model: Any = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    fused = shares(growfx.wrap(model.eval(), torch.randn(2, 3, 32, 32)))
    model = growfx.unwrap(growfx.wrap(model, torch.randn(2, 3, 32, 32)))
    for block in model.blocks:
        block.attn.fused_attn = False
    written = shares(growfx.wrap(model, torch.randn(2, 3, 32, 32)))
    torch.testing.assert_close(fused, written, rtol=1e-12, atol=0)


def test_the_queries_of_a_class_attention_layer_are_off_path() -> None:
    model: Any = timm.models.cait.Cait(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=3)
    paths = path_products(growfx.wrap(model.eval(), torch.randn(2, 3, 32, 32)))
    assert "blocks_token_only.0.attn.q" in paths.off_path
    assert "blocks_token_only.1.attn.q" not in paths.off_path
    assert "blocks_token_only.0.attn.k" in paths.scores


def test_shifted_windows_carry_paths() -> None:
    model: Any = timm.models.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 4)
    )
    paths = path_products(growfx.wrap(model.eval(), torch.randn(2, 3, 32, 32)))
    assert not paths.off_path
    assert all(bool((score > 0).all()) for score in paths.scores.values())
