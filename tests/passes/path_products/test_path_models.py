"""Path products of attention models: fused equal to written out, class queries off path, shifted windows on it."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch

import growfx
from growfx.passes.path_products.products import path_products


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
