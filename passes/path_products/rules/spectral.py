"""Path rules of Fourier transforms and complex numbers.

A path value stands for complex numbers by one magnitude each: real and imaginary part carry the same paths. A transform
is a product with a constant matrix whose elements all have one magnitude: every coefficient is the sum of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.passes.path_products.rules.arithmetic import add, identity
from growfx.passes.path_products.rules.products import carrying
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import PathValue, move, raw

__all__ = ["FUNCTIONS", "METHODS"]


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Cut off or padded with zeros at the end of `dim`."""
    tensor = tensor.narrow(dim, 0, min(size, tensor.shape[dim]))
    return F.pad(tensor.movedim(dim, -1), (0, size - tensor.shape[dim])).movedim(-1, dim)


def _scale(size: int, norm: str | None, inverse: bool) -> float:
    if norm == "ortho":
        return size**-0.5
    return 1 / size if inverse == (norm in (None, "backward")) else 1.0


def _along(tensor: Tensor, size: int | None, dim: int, norm: str | None, inverse: bool, half: str = "") -> Tensor:
    """One transform along `dim`; `half`: whose coefficients are the non-negative frequencies only, "out" or "in"."""
    if half != "in":
        size = tensor.shape[dim] if size is None else size
        tensor = _resized(tensor, dim, size)
        outputs = size // 2 + 1 if half == "out" else size
    else:
        outputs = size = 2 * (tensor.shape[dim] - 1) if size is None else size
        tensor = _resized(tensor, dim, size // 2 + 1)
        twice = torch.full((tensor.shape[dim],), 2.0, dtype=tensor.dtype, device=tensor.device)
        twice[0] = 1.0
        if size % 2 == 0:
            twice[-1] = 1.0
        tensor = (tensor.movedim(dim, -1) * twice).movedim(-1, dim)  # the others stand for two frequencies
    shape = list(tensor.shape)
    shape[dim] = outputs
    return (tensor.sum(dim, keepdim=True) * _scale(size, norm, inverse)).expand(shape)


def transform(inverse: bool, half: str = "") -> Callable[..., Any]:
    """The rule of a transform along one dim."""

    def rule(
        run: PathRun,
        input: Any,  # noqa: A002 - torch's name
        n: int | None = None,
        dim: int = -1,
        norm: str | None = None,
    ) -> Any:
        return PathValue(_along(carrying(input), n, dim, norm, inverse, half))

    return rule


def transform_several(inverse: bool, dims: int | None, half: str = "") -> Callable[..., Any]:
    """The rule of a transform along several dims, the last `dims` when none are named; the last one is the halved."""

    def rule(
        run: PathRun,
        input: Any,  # noqa: A002 - torch's name
        s: Sequence[int] | None = None,
        dim: Any = None,
        norm: str | None = None,
    ) -> Any:
        tensor = carrying(input)
        if dim is None:
            count = dims if s is None and dims is not None else tensor.ndim if s is None else len(s)
            dim = tuple(range(-count, 0))
        axes = [dim] if isinstance(dim, int) else list(dim)
        sizes: list[int | None] = [None] * len(axes) if s is None else [None if n == -1 else n for n in s]
        pairs = list(zip(axes, sizes, strict=True))
        for position, (axis, size) in enumerate(pairs):
            tensor = _along(tensor, size, axis, norm, inverse, half if position == len(pairs) - 1 else "")
        return PathValue(tensor)

    return rule


def short_time(
    run: PathRun,
    input: Any,  # noqa: A002 - torch's name
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    **kwargs: Any,
) -> Any:
    """`stft`: every coefficient of a frame is the sum of its values times the magnitude of the window."""
    signal = carrying(input)
    lines = signal[None] if signal.ndim == 1 else signal
    length = n_fft if win_length is None else win_length
    taps = torch.ones(length, dtype=signal.dtype, device=signal.device) if window is None else run.matrix(window)
    before = (n_fft - length) // 2
    taps = F.pad(taps, (before, n_fft - length - before))
    if center:
        lines = F.pad(lines[:, None], (n_fft // 2, n_fft // 2), mode=pad_mode)[:, 0]
    frames = F.conv1d(lines[:, None], taps[None, None], stride=n_fft // 4 if hop_length is None else hop_length)
    frames = frames * n_fft**-0.5 if normalized else frames
    bins = n_fft if onesided is False else n_fft // 2 + 1
    result = frames.expand(-1, bins, -1)
    result = result[0] if signal.ndim == 1 else result
    return PathValue(result if return_complex else result[..., None].expand(*result.shape, 2))


def part(run: PathRun, value: PathValue) -> Any:
    """Real part, imaginary part, conjugate, angle: the paths of the whole."""
    return value.same(bounded=False)


def as_pairs(run: PathRun, value: PathValue) -> Any:
    """`view_as_real`: both parts."""
    return move(lambda tensor: tensor[..., None].expand(*tensor.shape, 2), value)


def from_pairs(run: PathRun, value: PathValue) -> Any:
    """`view_as_complex`: what reaches either part reaches the number."""
    return PathValue(carrying(value).sum(-1))


def from_parts(run: PathRun, first: Any, second: Any) -> Any:
    """`complex`, `polar`: what reaches either part reaches the number."""
    return add(run, first, second)


def shifted(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """`fftshift` and its inverse are executed."""

    def rule(run: PathRun, value: PathValue, dim: Any = None) -> Any:
        return move(lambda tensor: function(tensor, raw(dim)), value)

    return rule


FUNCTIONS: dict[Any, Any] = {
    torch.fft.fft: transform(False),
    torch.fft.ifft: transform(True),
    torch.fft.rfft: transform(False, "out"),
    torch.fft.irfft: transform(True, "in"),
    torch.fft.fft2: transform_several(False, 2),
    torch.fft.ifft2: transform_several(True, 2),
    torch.fft.rfft2: transform_several(False, 2, "out"),
    torch.fft.irfft2: transform_several(True, 2, "in"),
    torch.fft.fftn: transform_several(False, None),
    torch.fft.ifftn: transform_several(True, None),
    torch.fft.rfftn: transform_several(False, None, "out"),
    torch.fft.irfftn: transform_several(True, None, "in"),
    torch.fft.fftshift: shifted(torch.fft.fftshift),
    torch.fft.ifftshift: shifted(torch.fft.ifftshift),
    torch.stft: short_time,
    **dict.fromkeys((torch.real, torch.imag, torch.angle), part),
    **dict.fromkeys((torch.conj, torch.conj_physical, torch.resolve_conj), identity),
    torch.view_as_real: as_pairs,
    torch.view_as_complex: from_pairs,
    **dict.fromkeys((torch.complex, torch.polar), from_parts),
}

METHODS: dict[str, Any] = {
    **dict.fromkeys(["angle"], part),
    **dict.fromkeys(["conj", "conj_physical", "resolve_conj"], identity),
    "stft": short_time,
}
