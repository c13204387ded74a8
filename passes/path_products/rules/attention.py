"""Path rules of attention: functions and the multi-head module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growfx.passes.path_products.rules.arithmetic import add, balanced
from growfx.passes.path_products.rules.products import carrying, matmul
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import PathValue, Weight, raw

__all__ = ["FAMILIES", "FUNCTIONS", "MODULES", "attention"]


def attention(run: PathRun, query: Any, key: Any, value: Any, logit_bias: Any = None) -> Any:
    """balanced(balanced(query, key), value), the logits bounded; equal to the rules of its two matrix products.

    Shapes (..., queries, dim), (..., keys, dim), (..., keys, value dim). Scale and masks are ignored.
    """
    three = all(isinstance(item, PathValue) for item in (query, key, value))
    if not three:
        logits = matmul(run, query, _transposed(key))
        logits = logits if logit_bias is None else add(run, logits, logit_bias)
        return matmul(run, PathValue(logits.tensor, bounded=True), value)
    # The mean over keys is all that the second product needs of the logits.
    mean_key = key.tensor.mean((-2, -1), keepdim=True)
    logits = balanced(query.tensor.mean(-1, keepdim=True), mean_key, query.bounded, key.bounded)
    if isinstance(logit_bias, PathValue):
        logits = logits + logit_bias.tensor.mean(-1, keepdim=True)
    mixed = balanced(logits, value.tensor.mean(-2, keepdim=True), True, value.bounded)
    return PathValue(mixed, value.bounded)


def _transposed(item: Any) -> Any:
    """Keys as columns, of a path value or a constant."""
    return PathValue(item.tensor.mT, item.bounded) if isinstance(item, PathValue) else raw(item).mT


def _repeat_heads(item: Any, heads: int) -> Any:
    """Grouped heads: every key and value head serves several query heads."""
    tensor = raw(item)
    if tensor.shape[-3] == heads:
        return item
    repeated = tensor.repeat_interleave(heads // tensor.shape[-3], -3)
    return PathValue(repeated, item.bounded) if isinstance(item, PathValue) else repeated


def dot_product_attention(
    run: PathRun,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`F.scaled_dot_product_attention`, fused, scored as its unfused form."""
    if enable_gqa:
        heads = raw(query).shape[-3]
        key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    if isinstance(query, PathValue) or isinstance(key, PathValue):
        return attention(run, query, key, value, attn_mask)
    with torch.no_grad():  # constant queries and keys: the attention is a constant matrix
        logits = raw(query) @ raw(key).mT * (raw(query).shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            mask = raw(attn_mask)
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        if is_causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        weights = logits.softmax(-1)
    return matmul(run, weights, value)


def _heads(item: Any, magnitude: Any, signed: Any, bias: Tensor | None, count: int, batch_first: bool) -> Any:
    """One projection, split into heads: (..., heads, tokens, dim), with the batch first where there is one."""
    if isinstance(item, PathValue):
        projected = F.linear(carrying(item), magnitude)
    else:
        projected = F.linear(raw(item), signed.to(raw(item)), bias)
    if projected.ndim == 3 and not batch_first:
        projected = projected.transpose(0, 1)
    split = projected.unflatten(-1, (count, -1)).transpose(-3, -2)
    return PathValue(split) if isinstance(item, PathValue) else split


def _mixed(run: PathRun, parts: list[Any], batch_first: bool) -> Tensor:
    """Attention of projected queries, keys and values, heads joined again. Extra constant tokens carry no path."""
    if any(isinstance(part, PathValue) for part in parts[:2]):
        mixed = attention(run, *parts)
    else:
        mixed = dot_product_attention(run, parts[0].detach(), parts[1].detach(), parts[2])
    joined = mixed.tensor.transpose(-3, -2).flatten(-2)
    return joined.transpose(0, 1) if joined.ndim == 3 and not batch_first else joined


def multihead_attention(
    run: PathRun, module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> tuple[Any, None]:
    """In-projections, attention, out-projection; masks and extra tokens ignored; no attention weights."""
    name = run.layer_of(module)
    if module.in_proj_weight is not None:
        magnitudes, signed = list(run.weight(module).chunk(3)), list(run.signed(module).chunk(3))
    else:
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        magnitudes, signed = [run.learned(weight) for weight in separate], [weight.detach() for weight in separate]
    biases = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.detach().chunk(3))
    for item in (query, key, value):
        if isinstance(item, PathValue):
            run.watch(name, carrying(item), -1)
    parts = [
        _heads(*each, module.num_heads, module.batch_first)
        for each in zip((query, key, value), magnitudes, signed, biases, strict=True)
    ]
    joined = _mixed(run, parts, module.batch_first)
    run.watch(run.layer_of(module.out_proj), joined, -1)
    return PathValue(run.produced(module.out_proj, -1, lambda weight: F.linear(joined, weight))), None


def multihead_function(
    run: PathRun,
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    *args: Any,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """`F.multi_head_attention_forward`: as the module; tokens first, batch second."""
    if use_separate_proj_weight:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        magnitudes, signed = [run.matrix(weight) for weight in separate], [raw(weight).detach() for weight in separate]
    else:
        separate = (in_proj_weight,)
        magnitudes, signed = list(run.matrix(in_proj_weight).chunk(3)), list(raw(in_proj_weight).detach().chunk(3))
    bias = raw(in_proj_bias)
    biases = [None] * 3 if bias is None else list(bias.detach().chunk(3))
    for position, item in enumerate((query, key, value)):
        weight = separate[position % len(separate)]
        if isinstance(item, PathValue) and isinstance(weight, Weight):
            run.watch(weight.layer, carrying(item), -1)
    parts = [
        _heads(*each, num_heads, False) for each in zip((query, key, value), magnitudes, signed, biases, strict=True)
    ]
    joined = _mixed(run, parts, False)
    if isinstance(out_proj_weight, Weight):
        run.watch(out_proj_weight.layer, joined, -1)
    return PathValue(F.linear(joined, run.matrix(out_proj_weight))), None


FAMILIES: dict[str, tuple[Any, ...]] = {"attention": (dot_product_attention, multihead_attention)}

FUNCTIONS: dict[Any, Any] = {
    F.scaled_dot_product_attention: dot_product_attention,
    F.multi_head_attention_forward: multihead_function,
}

MODULES: dict[Any, Any] = {nn.MultiheadAttention: multihead_attention}
