"""The sparse runtime: a network of an artifact that one call of a native library computes, on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.artifact import reader as artifact_reader
from growfx.artifact.reader import DEFAULT_MAX_BYTES, check_target
from growfx.artifact.remembered_inputs import default_inputs
from growfx.errors import ConfigError, TraceError
from growfx.passes.lower.network import lower_network
from growfx.runtime.program import set_through
from growfx.runtime.report import LoweringReport

__all__ = ["SparseRuntime", "load"]

_RUNTIMES = ("dense", "sparse")
_DTYPES = (torch.float32, torch.bfloat16)


@torch.inference_mode(False)  # the network may be used and trained outside such a block, too
def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    runtime: str = "dense",
    batch: int | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Load the network of an artifact as a module in eval mode.

    Args:
        path: the folder, its weights file alone, `hf-hub:USER/NAME[@REVISION]`, or `growfx:NAME`, a small network that
            comes with growfx (an unknown name lists them).
        model: an instance of the network's own class, to load into; needed where the artifact does not name a
            timm or torchvision model. Its tensors take the dtype of the stored ones. A `growfx.GrowfxWarning` tells
            where it gives other outputs than the network that was saved.
        dtype: cast to after exact decoding, as `model.to(dtype)` does: floating parameters and buffers only.
        device: of the network; default: where it is built, or where `model` is.
        max_bytes: refuse an artifact whose tensors would take more bytes than this. Decoding the largest tensor
            takes a multiple of its size on top.
        runtime: `dense`: a plain module, every bit of its weights as saved. `sparse`: a `SparseRuntime` for inference
            on a CPU. In float32 one call of the native runtime computes the whole network at any batch size, or several
            calls with torch's operators in between where it has no kernel; it is built on first use, where there is a
            C++ compiler. Inputs of other sizes, bfloat16, and networks that another way is faster for have norms folded
            and each layer computed by the fastest kernel here: torch, a sparse-dense product, or a direct sparse
            kernel. What is timed is timed once for these inputs, this processor and `torch.get_num_threads()`, and kept
            in the user's cache folder (`GROWFX_CACHE` names another).
        batch: sparse: how many rows to time on; default: as many as the example inputs have, else 1. Others work.
        example_inputs: sparse: what to plan for and to time on, in the forms of `growfx.wrap`; default: as the artifact
            tells, else as `growfx.wrap`. Other shapes work, less fast.

    Raises:
        ArtifactError: not an artifact, damaged, newer, too large, or of another network; `model` is unchanged.
        ConfigError: `dtype` is not a floating one, `device` is not there, or the runtime cannot have them.
        TraceError: sparse: the network fails on the example inputs.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> _ = growfx.save(net, "out")
        >>> own = torch.nn.Sequential(torch.nn.Linear(4, 2))  # no library builds this one by a name
        >>> model = growfx.load("out", model=own)
        >>> x = torch.randn(3, 4)
        >>> torch.equal(model(x), net.eval()(x))
        True
    """
    if runtime not in _RUNTIMES:
        raise ConfigError(f"`runtime={runtime}` is unknown; allowed: {', '.join(_RUNTIMES)}")
    if runtime == "dense":
        for name, value in (("batch", batch), ("example_inputs", example_inputs)):
            if value is not None:
                raise ConfigError(f'`{name}` is for `runtime="sparse"`, which times the network on it; leave it out')
        return artifact_reader.load(path, model=model, dtype=dtype, device=device, max_bytes=max_bytes)
    _check_target(dtype, device, batch)
    plain = artifact_reader.load(path, model=model, device=device, max_bytes=max_bytes)
    masks = artifact_reader.load_masks(path, max_bytes=max_bytes)
    example = default_inputs(plain) if example_inputs is None else example_inputs
    try:
        lowered = lower_network(plain, masks, _dtype_of(plain, dtype), example, batch)
    except TraceError as error:
        # Its advice is for those who call `growfx.wrap`.
        raise TraceError(str(error).replace("`growfx.wrap`", "`growfx.load`")) from error
    return SparseRuntime(lowered.net.eval().requires_grad_(False), lowered.report)


def _check_target(dtype: torch.dtype | None, device: Any, batch: int | None) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"`dtype={dtype}` has no sparse runtime; allowed: torch.float32, torch.bfloat16")
    check_target(dtype, device)
    if device is not None and torch.device(device).type != "cpu":
        raise ConfigError(f'`device={device}` has no sparse runtime; allowed: `cpu`; or load with `runtime="dense"`')
    if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise ConfigError(f"`batch={batch}` is not a number of rows; expected 1 or more")


def _dtype_of(plain: nn.Module, wanted: torch.dtype | None) -> torch.dtype:
    tensors = [tensor for tensor in (*plain.parameters(), *plain.buffers()) if tensor.is_floating_point()]
    other = {tensor.device.type for tensor in tensors} - {"cpu"}
    if other:
        raise ConfigError(f'`model` is on `{min(other)}`; the sparse runtime is for `cpu`: pass `device="cpu"`')
    stored = {tensor.dtype for tensor in tensors}
    if wanted is None and (len(stored) > 1 or not stored <= {*_DTYPES}):
        names = ", ".join(sorted(map(str, stored)))
        raise ConfigError(f"its tensors are {names}; pass `dtype=torch.float32` or `dtype=torch.bfloat16`")
    return wanted or next(iter(stored), torch.float32)


def _wants_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class SparseRuntime(nn.Module):
    """A network lowered for inference on this machine; made by ``growfx.load(path, runtime="sparse")``.

    It takes the model's inputs, of any size and batch that the model takes, and gives its outputs up to the order of
    sums. Weights of layers that are not dense are kept packed. There are no gradients and no train mode. Several
    threads may call it at the same time; each gets buffers and packed weights of its own.

    Attributes:
        network: what runs.
        lowering: how, and why so: `.torch_steps` names the operators that torch computes.
    """

    def __init__(self, network: nn.Module, lowering: LoweringReport) -> None:
        super().__init__()
        self.lowering, self.network = lowering, network
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes.

        Raises:
            ConfigError: an input wants a gradient.
        """
        if torch.is_grad_enabled() and any(map(_wants_gradient, pytree.tree_leaves((args, kwargs)))):
            raise ConfigError(
                "an input requires a gradient, which the sparse runtime does not compute; detach it, or load with "
                '`runtime="dense"`'
            )
        if not torch.is_autocast_enabled("cpu"):
            return self.network(*args, **kwargs)
        # Packed weights have the dtype they were packed in.
        with torch.autocast("cpu", enabled=False):
            return self.network(*args, **kwargs)

    def train(self, mode: bool = True) -> SparseRuntime:
        """Evaluation mode only.

        Raises:
            ConfigError: train mode is asked for.
        """
        if mode:
            raise ConfigError('the sparse runtime only infers; to train, load with `runtime="dense"` or growfx.wrap')
        return self

    def requires_grad_(self, requires_grad: bool = True) -> SparseRuntime:
        """No gradients.

        Raises:
            ConfigError: they are asked for.
        """
        if requires_grad:
            raise ConfigError('the sparse runtime computes no gradients; load with `runtime="dense"`')
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("the sparse runtime keeps its weights packed; load the artifact that has the new ones")

    def _apply(self, fn: Any, recurse: bool = True) -> SparseRuntime:
        tensor = next(self.network.parameters(), torch.empty(0))
        probe = torch.empty(0, dtype=tensor.dtype)
        after = fn(probe)
        if after.dtype != probe.dtype or after.device != probe.device:
            raise ConfigError(
                f"the sparse runtime stays {probe.dtype} on `cpu`; `growfx.load` takes `dtype`, and other devices take "
                '`runtime="dense"`'
            )
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "network" not in modules:
                raise
            return getattr(modules["network"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        set_through(self, "network", name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseRuntime:
        return SparseRuntime(copy.deepcopy(self.network, memo), self.lowering)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a SparseRuntime is not pickled: keep the artifact, and load it where it is to run")
