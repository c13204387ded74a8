"""The kernels a lowered layer can have: torch's own, a sparse-dense product, and the direct sparse kernel.

All compute the same sum over the active weights of a layer, in another order. A weight outside the mask is never
read; one inside it counts whatever its value.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growfx.quiet import ignored_warnings
from growfx.runtime import sparse_kernel
from growfx.runtime.lowered_layer import Kernel, finish

__all__ = [
    "CHOICES", "KernelRefusedError", "clear_choice", "likely_choice", "make_kernel", "padding_of", "sparse_choices",
]  # fmt: skip

CHOICES: Final = ("dense", "csr", "direct")
# The direct kernel takes this times the density of the time of torch's own: 3.5 to 5 for the layers of resnet50 and
# vit_small in float32 on a processor with AVX-512; elsewhere it may be wrong by a factor of two.
_TIMES, _UNSURE = 4.4, 2.0
# Below so many multiplications a call is what takes time.
_LEAST_PRODUCTS = 1 << 20

Pair = tuple[int, int]


class KernelRefusedError(Exception):
    """A kernel cannot be had for a layer, here; says why."""


class _Dense(Kernel):
    choice = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + _nbytes(self.bias)


class DenseConv2d(_Dense):
    """torch's own convolution."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__(plain.weight, plain.bias)
        self.geometry: Any = plain.stride, plain.padding, plain.dilation, plain.groups

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        return finish(F.conv2d(x, self.weight, self.bias, *self.geometry), residual, relu)


class DenseLinear(_Dense):
    """torch's own linear layer."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.weight, plain.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """(..., I) -> (..., O)."""
        return finish(F.linear(x, self.weight, self.bias), residual, relu)


class _Csr(Kernel):
    """A weight in compressed rows; the matrix is put together at each use, for torch cannot copy one."""

    choice = "csr"

    def __init__(self, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        active = mask.flatten(1)
        rows = torch.zeros(active.shape[0] + 1, dtype=torch.int32)
        rows[1:] = active.sum(1).cumsum(0)
        self.rows: Tensor = nn.Buffer(rows)
        self.columns: Tensor = nn.Buffer(active.nonzero()[:, 1].to(torch.int32))
        self.values: Tensor = nn.Buffer(weight.detach().flatten(1)[active])
        self.bias = None if bias is None else nn.Parameter(bias.detach().unsqueeze(1), requires_grad=False)
        self.shape = (active.shape[0], active.shape[1])
        # torch says once in a process that compressed rows are in beta; outputs are compared all the same.
        with ignored_warnings(UserWarning, "Sparse CSR tensor support is in beta"):
            self._matrix()

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.columns.nbytes + self.values.nbytes + _nbytes(self.bias)

    def product(self, x: Tensor) -> Tensor:
        """(I, n) -> (O, n), bias added."""
        return self._matrix() @ x if self.bias is None else torch.addmm(self.bias, self._matrix(), x)

    def _matrix(self) -> Tensor:
        parts = self.rows, self.columns, self.values
        return torch.sparse_csr_tensor(*parts, self.shape, check_invariants=False)


class CsrConv2d(_Csr):
    """A convolution as one product an image: with its pixels, or with its unfolded patches."""

    def __init__(self, plain: nn.Conv2d, mask: Tensor) -> None:
        super().__init__(plain.weight, mask, plain.bias)
        self.kernel_size = _pair(plain.kernel_size)
        self.stride, self.padding, self.dilation = _pair(plain.stride), padding_of(plain), _pair(plain.dilation)
        self.pointwise = self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        if x.ndim == 3:
            return finish(self._images(x.unsqueeze(0)).squeeze(0), residual, relu)
        return finish(self._images(x), residual, relu)

    def _images(self, x: Tensor) -> Tensor:
        height, width = self._output_size(x.shape[2], x.shape[3])
        if self.pointwise:
            columns = x.flatten(2)
        else:
            columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        # One by one: to bring the images of a batch side by side costs more than the products save.
        images = [self.product(image) for image in columns]
        if len(images) == 1:
            return images[0].view(1, self.shape[0], height, width)
        return torch.stack(images).unflatten(2, (height, width)) if images else x.new_empty(0, *self._size(x))

    def _size(self, x: Tensor) -> tuple[int, int, int]:
        return self.shape[0], *self._output_size(x.shape[2], x.shape[3])

    def _output_size(self, height: int, width: int) -> Pair:
        sizes = zip((height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        return rows, columns


class CsrLinear(_Csr):
    """A linear layer as one product with the transposed inputs."""

    def __init__(self, plain: nn.Linear, mask: Tensor) -> None:
        super().__init__(plain.weight, mask, plain.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """(..., I) -> (..., O)."""
        y = self.product(x.reshape(-1, self.shape[1]).t()).t()
        return finish(y.reshape(*x.shape[:-1], self.shape[0]), residual, relu)


class _Direct(Kernel):
    choice = "direct"

    def __init__(self, packed: sparse_kernel.SparseWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + _nbytes(self.bias)


class DirectConv2d(_Direct):
    """A convolution over its active weights alone."""

    def __init__(self, plain: nn.Conv2d, mask: Tensor) -> None:
        geometry = {"stride": _pair(plain.stride), "padding": padding_of(plain), "dilation": _pair(plain.dilation)}
        super().__init__(sparse_kernel.SparseWeight.pack(plain.weight.detach(), mask, **geometry), plain.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        if x.ndim == 3:
            y = sparse_kernel.conv2d(x.unsqueeze(0), self.packed, self.bias).squeeze(0)
            return finish(y, residual, relu)
        return sparse_kernel.conv2d(x, self.packed, self.bias, residual=residual, relu=relu)


class DirectLinear(_Direct):
    """A linear layer over its active weights alone."""

    def __init__(self, plain: nn.Linear, mask: Tensor) -> None:
        super().__init__(sparse_kernel.SparseWeight.pack(plain.weight.detach(), mask), plain.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """(..., I) -> (..., O)."""
        if residual is None:
            return sparse_kernel.linear(x, self.packed, self.bias, relu=relu)
        return finish(sparse_kernel.linear(x, self.packed, self.bias), residual, relu)


_KINDS: Final[dict[tuple[str, str], Any]] = {
    ("csr", "conv"): CsrConv2d,
    ("csr", "linear"): CsrLinear,
    ("direct", "conv"): DirectConv2d,
    ("direct", "linear"): DirectLinear,
}


def sparse_choices(plain: nn.Conv2d | nn.Linear) -> dict[str, str]:
    """Choices other than dense kernels -> why they are unavailable for this layer; "" where they can."""
    direct = sparse_kernel.kernel_status()
    csr = "" if plain.weight.dtype == torch.float32 else f"torch has no sparse product of {plain.weight.dtype}"
    if not csr and not torch.backends.mkl.is_available():
        csr = "this torch was built without MKL, which computes its sparse products"
    return {"csr": csr, "direct": direct}


def make_kernel(plain: nn.Conv2d | nn.Linear, mask: Tensor | None, choice: str) -> Kernel:
    """The kernel of a layer.

    Args:
        plain: a convolution of one group, or a linear layer; its weight is shared with a dense kernel.
        mask: bool, of the weight's shape; None: all weights are active.
        choice: one of `CHOICES`.

    Raises:
        KernelRefusedError: it cannot be had here.
    """
    convolution = isinstance(plain, nn.Conv2d)
    if choice == "dense":
        return DenseConv2d(plain) if convolution else DenseLinear(plain)
    refusal = sparse_choices(plain)[choice]
    if refusal:
        raise KernelRefusedError(refusal)
    mask = torch.ones_like(plain.weight, dtype=torch.bool) if mask is None else mask
    return _KINDS[choice, "conv" if convolution else "linear"](plain, mask)


def likely_choice(plain: nn.Conv2d | nn.Linear, density: float) -> str:
    """The choice that is fastest for most layers of this density, found without timing anything."""
    return "direct" if _TIMES * density < 1 and not sparse_choices(plain)["direct"] else "dense"


def clear_choice(plain: nn.Conv2d | nn.Linear, density: float, shape: tuple[int, ...]) -> str:
    """The choice that is fastest beyond doubt, or "" where that must be timed.

    Args:
        plain: the layer.
        density: of its weight.
        shape: of its input.
    """
    share = _TIMES * density
    sure = share * _UNSURE < 1 or share > _UNSURE
    if not sure or plain.weight.dtype != torch.float32 or sparse_choices(plain)["direct"]:
        return ""
    rows = math.prod(shape) / max(plain.weight.shape[1], 1)
    if isinstance(plain, nn.Conv2d):
        rows /= math.prod(plain.stride)
    return likely_choice(plain, density) if rows * plain.weight.numel() >= _LEAST_PRODUCTS else ""


def padding_of(plain: nn.Conv2d) -> Pair:
    """The zeros a convolution adds on each side of height and width.

    Raises:
        KernelRefusedError: they differ between the sides.
    """
    if plain.padding == "valid":
        return (0, 0)
    if plain.padding == "same":
        sizes = [d * (k - 1) for d, k in zip(plain.dilation, plain.kernel_size, strict=True)]
        if any(size % 2 for size in sizes):
            raise KernelRefusedError('`padding="same"` adds unequal zeros on the two sides')
        return (sizes[0] // 2, sizes[1] // 2)
    return _pair(plain.padding)


def _pair(value: object) -> Pair:
    assert isinstance(value, tuple)
    return (int(value[0]), int(value[1]))


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
