"""Path rules of contractions: matrix products, einsum, linear layers and convolutions as functions, attention."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.passes.path_rules_arithmetic import add, balanced
from growfx.passes.path_values import NoPathRuleError, PathValue, Weight, paths_in, raw

if TYPE_CHECKING:
    from growfx.passes.path_graph import PathGraph

__all__ = ["FUNCTIONS", "METHODS", "attention", "carrying", "matmul"]


def carrying(value: Any) -> Tensor:
    """The tensor of a path value that carries paths."""
    if not isinstance(value, PathValue):
        raise NoPathRuleError("a weight computed from data has no path rule")
    if value.divisor:
        raise NoPathRuleError("a reciprocal of data enters a layer")
    return value.tensor


def matmul(run: PathGraph, left: Any, right: Any) -> Any:
    """Path times constant: magnitudes. Path times path: balanced product of the means over the contracted index."""
    if not isinstance(right, PathValue):
        return PathValue(torch.matmul(carrying(left), run.matrix(right)))
    if not isinstance(left, PathValue):
        return PathValue(torch.matmul(run.matrix(left), carrying(right)))
    if left.tensor.ndim < 2 or right.tensor.ndim < 2:
        raise NoPathRuleError("a product of activations needs two matrices")
    rows, columns = left.tensor.mean(-1, keepdim=True), right.tensor.mean(-2, keepdim=True)
    return PathValue(balanced(rows, columns, left.bounded, right.bounded), left.bounded and right.bounded)


def reverse_matmul(run: PathGraph, right: Any, left: Any) -> Any:
    """`__rmatmul__`."""
    return matmul(run, left, right)


def add_matmul(run: PathGraph, base: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`addmm`, `baddbmm`: beta * base + alpha * left @ right."""
    if not paths_in(left, right):
        raise NoPathRuleError("a constant product added to an activation: write it as a sum")
    product = matmul(run, left, right)
    return add(run, PathValue(product.tensor * abs(alpha)), base, alpha=beta)


def _spelled(equation: str, operands: list[Any]) -> tuple[list[str], str]:
    """Index letters of every operand and of the output, ellipses written out."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    spare = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
    longest = 0
    for position, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        if "..." in term:
            hidden = raw(operand).ndim - len(term.replace("...", ""))
            longest = max(longest, hidden)
            terms[position] = term.replace("...", "".join(spare[:longest][longest - hidden :]) if hidden else "")
    if not arrow:
        letters = sorted(set("".join(terms)))
        output = "".join(letter for letter in letters if "".join(terms).count(letter) == 1)
    return terms, output.replace("...", "".join(spare[:longest]))


def einsum(run: PathGraph, equation: str, *operands: Any) -> Any:
    """One path operand: magnitudes of the others. Two: each averaged over indices absent from the output, balanced."""
    items = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    paths = paths_in(items)
    if len(paths) == 1:
        factors = [carrying(item) if isinstance(item, PathValue) else run.matrix(item) for item in items]
        return PathValue(torch.einsum(equation, *factors))
    terms, output = _spelled(equation, items)
    if len(items) != 2 or any(len(set(term)) < len(term) for term in terms):
        raise NoPathRuleError(f"einsum `{equation}` of several activations has no path rule")
    sizes = {
        letter: size
        for term, item in zip(terms, items, strict=True)
        for letter, size in zip(term, item.tensor.shape, strict=True)
    }
    left, right = (_averaged_to(carrying(item), term, output) for term, item in zip(terms, items, strict=True))
    shape = [sizes[letter] for letter in output]
    both = paths[0].bounded and paths[1].bounded
    return PathValue(balanced(left, right, paths[0].bounded, paths[1].bounded).expand(shape), both)


def _averaged_to(tensor: Tensor, term: str, output: str) -> Tensor:
    """`tensor` averaged over indices absent from `output`, laid out in its order with ones for missing indices."""
    absent = [position for position, letter in enumerate(term) if letter not in output]
    kept = [letter for letter in term if letter in output]
    tensor = tensor.mean(absent) if absent else tensor
    tensor = tensor.permute([kept.index(letter) for letter in output if letter in kept])
    for position, letter in enumerate(output):
        if letter not in kept:
            tensor = tensor.unsqueeze(position)
    return tensor


def linear(run: PathGraph, value: Any, weight: Any, bias: Any = None) -> Any:
    """`F.linear`: magnitude of the weight, no bias."""
    tensor = carrying(value)
    if isinstance(weight, Weight):
        run.watch(weight.layer, tensor, -1)
    return PathValue(F.linear(tensor, run.matrix(weight)))


def convolving(function: Callable[..., Tensor], spatial: int) -> Callable[..., Any]:
    """The rule of a convolution function: magnitude of the weight, no bias."""

    def rule(run: PathGraph, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
        tensor = carrying(input)
        if isinstance(weight, Weight):
            run.watch(weight.layer, tensor, -spatial - 1)
        return PathValue(function(tensor, run.matrix(weight), None, *args, **kwargs))

    return rule


def attention(run: PathGraph, query: Any, key: Any, value: Any, logit_bias: Any = None) -> Any:
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
    run: PathGraph,
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


_CONVOLUTIONS = (
    (torch.conv1d, 1), (torch.conv2d, 2), (torch.conv3d, 3),
    (F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3),
    (torch.conv_transpose1d, 1), (torch.conv_transpose2d, 2), (torch.conv_transpose3d, 3),
    (F.conv_transpose1d, 1), (F.conv_transpose2d, 2), (F.conv_transpose3d, 3),
)  # fmt: skip

FUNCTIONS: dict[Any, Any] = {
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, operator.matmul), matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm), add_matmul),
    **dict.fromkeys((torch.einsum, torch.functional.einsum), einsum),
    **{function: convolving(function, spatial) for function, spatial in _CONVOLUTIONS},
    F.linear: linear,
    F.scaled_dot_product_attention: dot_product_attention,
}

METHODS: dict[str, Any] = {
    **dict.fromkeys(["matmul", "bmm", "mm", "__matmul__"], matmul),
    "__rmatmul__": reverse_matmul,
    **dict.fromkeys(["addmm", "baddbmm"], add_matmul),
}
