"""Path rules of contractions: matrix products, einsum, linear layers and convolutions as functions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growfx.passes.operators.einsum import spelled
from growfx.passes.path_products.rules.arithmetic import add, balanced
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import (
    ComparedValue,
    Ended,
    Learned,
    NoPathRuleError,
    PathValue,
    move,
    paths_in,
    raw,
)

__all__ = ["FAMILIES", "FUNCTIONS", "METHODS", "MODULES", "SEES_ENDS", "carrying", "matmul"]


def carrying(value: Any) -> Tensor:
    """The tensor of a path value that carries paths."""
    if not isinstance(value, PathValue):
        raise NoPathRuleError("a weight computed from data has no path rule")
    if value.divisor:
        raise NoPathRuleError("a reciprocal of data enters a layer")
    return value.tensor


def matmul(run: PathRun, left: Any, right: Any) -> Any:
    """Path times constant: magnitudes. Path times path: balanced product of the means over the contracted index."""
    if not isinstance(right, PathValue):
        run.watch_use(right, -2 if raw(right).ndim > 1 else 0, carrying(left), -1)
        return PathValue(torch.matmul(carrying(left), run.matrix(right)))
    if not isinstance(left, PathValue):
        run.watch_use(left, -1, carrying(right), -2 if right.tensor.ndim > 1 else 0)
        return PathValue(torch.matmul(run.matrix(left), carrying(right)))
    if left.tensor.ndim < 2 or right.tensor.ndim < 2:
        raise NoPathRuleError("a product of activations needs two matrices")
    rows, columns = left.tensor.mean(-1, keepdim=True), right.tensor.mean(-2, keepdim=True)
    return PathValue(balanced(rows, columns, left.bounded, right.bounded), left.bounded and right.bounded)


def reverse_matmul(run: PathRun, right: Any, left: Any) -> Any:
    """`__rmatmul__`."""
    return matmul(run, left, right)


def add_matmul(run: PathRun, base: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """`addmm`, `baddbmm`: beta * base + alpha * left @ right."""
    if not paths_in(left, right):
        raise NoPathRuleError("a constant product added to an activation: write it as a sum")
    product = matmul(run, left, right)
    return add(run, PathValue(product.tensor * abs(alpha)), base, alpha=beta)


def einsum(run: PathRun, equation: str, *operands: Any) -> Any:
    """Path times constant: magnitudes. Path times path: each averaged over indices no longer needed, balanced.

    With more than two operands, one after the other from the left, path values last where constants can be contracted
    first.
    """
    items = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    if len(paths_in(items)) == 1:
        factors = [carrying(item) if isinstance(item, PathValue) else run.matrix(item) for item in items]
        return PathValue(torch.einsum(equation, *factors))
    terms, output = spelled(equation, [raw(item).ndim for item in items])
    pairs = [_diagonal(run, term, item) for term, item in zip(terms, items, strict=True)]
    pairs.sort(key=lambda pair: isinstance(pair[1], PathValue))  # stable: constants first, each in its order
    while len(pairs) > 1:
        (left_term, left), (right_term, right), *rest = pairs
        needed = {*output, *"".join(term for term, _ in rest)}
        kept = "".join(letter for letter in dict.fromkeys(left_term + right_term) if letter in needed)
        kept = kept if rest else output
        pairs = [(kept, _contracted(left_term, left, right_term, right, kept)), *rest]
    return pairs[0][1]


def tensor_dot(run: PathRun, a: Any, b: Any, dims: Any = 2, **kwargs: Any) -> Any:
    """`tensordot` over the last `dims` axes of one and the first of the other, or over pairs of axes."""
    left, right = raw(a).ndim, raw(b).ndim
    pairs = (range(left - dims, left), range(dims)) if isinstance(dims, int) else raw(dims)
    first, second = "abcdefghijklmnop"[:left], [*"ABCDEFGHIJKLMNOP"[:right]]
    for one, other in zip(*pairs, strict=True):
        second[int(other)] = first[int(one)]
    summed = {first[int(one)] for one in pairs[0]}
    output = "".join(letter for letter in (*first, *second) if letter not in summed)
    return einsum(run, f"{first},{''.join(second)}->{output}", a, b)


def _diagonal(run: PathRun, term: str, item: Any) -> tuple[str, Any]:
    """An operand whose indices all differ: a repeated one means its diagonal. Constants as magnitudes."""
    own = "".join(dict.fromkeys(term))
    if not isinstance(item, PathValue):
        return own, torch.einsum(f"{term}->{own}", run.matrix(item))
    carrying(item)
    return own, move(lambda tensor: torch.einsum(f"{term}->{own}", tensor), item)


def _contracted(left_term: str, left: Any, right_term: str, right: Any, output: str) -> Any:
    """The product of two operands with the indices of `output`."""
    if not (isinstance(left, PathValue) and isinstance(right, PathValue)):
        product = torch.einsum(f"{left_term},{right_term}->{output}", raw(left), raw(right))
        return PathValue(product) if paths_in(left, right) else product
    sizes = {
        letter: size
        for term, item in ((left_term, left), (right_term, right))
        for letter, size in zip(term, item.tensor.shape, strict=True)
    }
    first, second = _averaged_to(left.tensor, left_term, output), _averaged_to(right.tensor, right_term, output)
    product = balanced(first, second, left.bounded, right.bounded)
    return PathValue(product.expand([sizes[letter] for letter in output]), left.bounded and right.bounded)


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


def linear(run: PathRun, value: Any, weight: Any, bias: Any = None) -> Any:
    """`F.linear`: magnitude of the weight, no bias."""
    tensor = carrying(value)
    run.watch_use(weight, -1, tensor, -1)
    return PathValue(F.linear(tensor, run.matrix(weight)))


def convolving(
    function: Callable[..., Tensor],
    spatial: int,
    contracted: int,
    /,
    run: PathRun,
    input: Any,  # noqa: A002 - torch's name
    weight: Any,
    bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Convolution functions over `contracted` of the weight's axes: its magnitude, no bias."""
    tensor = carrying(input)
    run.watch_use(weight, contracted, tensor, -spatial - 1)
    return PathValue(function(tensor, run.matrix(weight), None, *args, **kwargs))


def bilinear(run: PathRun, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    """`F.bilinear`: the product of both inputs, contracted with the magnitude of the weight (out, in, in)."""
    return einsum(run, "...i,oij,...j->...o", input1, weight, input2)


def bilinear_module(run: PathRun, module: Any, input1: Any, input2: Any) -> Any:
    """The same as a module."""
    return bilinear(run, input1, input2, Learned(run.signed(module)))


def grouped_matmul(run: PathRun, left: Any, right: Any, offs: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Rows (rows, in) through matrices (groups, in, out), which end at `offs`; chosen by data: the mean over groups."""
    if raw(left).ndim == 3 or offs is None:
        return matmul(run, left, right)
    if raw(right).ndim != 3 or isinstance(right, PathValue):
        raise NoPathRuleError("a grouped product needs rows of activations and a stack of matrices")
    rows, matrices = carrying(left), run.matrix(right)
    if isinstance(offs, (ComparedValue, Ended)):
        return PathValue(rows @ matrices.mean(0))
    starts = [0, *raw(offs).tolist()]
    groups = [rows[start:end] @ matrix for start, end, matrix in zip(starts, starts[1:], matrices, strict=False)]
    return PathValue(torch.cat([*groups, rows[starts[-1] :] @ torch.zeros_like(matrices[0])]))


_CONVOLUTIONS = (
    (torch.conv1d, 1), (torch.conv2d, 2), (torch.conv3d, 3), (F.conv1d, 1), (F.conv2d, 2), (F.conv3d, 3),
)  # fmt: skip
_TRANSPOSED = (
    (torch.conv_transpose1d, 1), (torch.conv_transpose2d, 2), (torch.conv_transpose3d, 3),
    (F.conv_transpose1d, 1), (F.conv_transpose2d, 2), (F.conv_transpose3d, 3),
)  # fmt: skip

_GROUPED = [vars(owner)[name] for owner, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if name in vars(owner)]

FUNCTIONS: dict[Any, Any] = {
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, operator.matmul), matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm), add_matmul),
    **dict.fromkeys((torch.einsum, torch.functional.einsum), einsum),
    **dict.fromkeys((torch.tensordot, torch.functional.tensordot), tensor_dot),
    **{function: partial(convolving, function, spatial, 1) for function, spatial in _CONVOLUTIONS},
    **{function: partial(convolving, function, spatial, 0) for function, spatial in _TRANSPOSED},
    F.linear: linear,
    **dict.fromkeys((F.bilinear, torch.bilinear), bilinear),
    **dict.fromkeys(_GROUPED, grouped_matmul),
}

METHODS: dict[str, Any] = {
    **dict.fromkeys(["matmul", "bmm", "mm", "__matmul__"], matmul),
    "__rmatmul__": reverse_matmul,
    **dict.fromkeys(["addmm", "baddbmm"], add_matmul),
}

MODULES: dict[Any, Any] = {nn.Bilinear: bilinear_module}

FAMILIES: dict[str, tuple[Any, ...]] = {
    "matmul": (matmul,),
    "reverse_matmul": (reverse_matmul,),
    "add_matmul": (add_matmul,),
    "einsum": (einsum,),
    "linear": (linear,),
    "convolution": (convolving,),
}

# Rules that tell what data chose from constants.
SEES_ENDS: frozenset[Callable[..., Any]] = frozenset({grouped_matmul})
