"""The ways to run a network that `growfx bench` compares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growfx.commands.bench.peers import (
    DEEPSPARSE,
    ONNXRUNTIME,
    OPENVINO,
    OPENVINO_DEFAULT,
    DeepSparse,
    OnnxSession,
    OpenVino,
    export_for_deepsparse,
)
from growfx.commands.bench.subject import Subject
from growfx.deploy.loading import SparseRuntime
from growfx.deploy.native.export import native_plan
from growfx.deploy.onnx import export_onnx
from growfx.deploy.saving import small_network
from growfx.errors import ConfigError
from growfx.masked.graph import MaskedGraph
from growfx.passes.fold_norm import fold_norm
from growfx.passes.lower.plan.file import network_bytes
from growfx.passes.mask.swap import unwrap
from growfx.quiet import ignored_warnings
from growfx.recorded.inputs import Inputs
from growfx.runtime.lowered_layer import Kernel
from growfx.runtime.native.library import NativeNetwork
from growfx.runtime.report import LoweringReport

__all__ = ["COMPILED", "DENSE", "NATIVE", "SPARSE", "VARIANTS", "Built", "Setting", "VariantBuilder", "bytes_of"]

DENSE, COMPILED, SPARSE, NATIVE = "dense", "torch.compile", "sparse runtime", "native runtime"


@dataclass(frozen=True)
class Setting:
    """What the times of one table hold for."""

    inputs: Inputs
    batch: int
    threads: int


@dataclass(frozen=True)
class Built:
    """One way to run the network.

    Attributes:
        module: called with the network's inputs.
        weight_bytes: what its weights take, in memory or, for another runtime, in the file it is given.
        note: what is worth knowing of it.
        lowering: the sparse runtime's report of its choices.
        is_lower_precision: it computes in less than the precision of the table, by its own choice.
    """

    module: nn.Module
    weight_bytes: int
    note: str = ""
    lowering: LoweringReport | None = None
    is_lower_precision: bool = False


class VariantBuilder:
    """Builds variants of one network; what does not depend on batch and threads is made once, and so are failures."""

    def __init__(self, subject: Subject, dtype: torch.dtype, folder: Path) -> None:
        self.subject, self.dtype, self.folder = subject, dtype, folder
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first asked for `key`; its error is raised again."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:
                self._made[key] = error
        if isinstance(self._made[key], Exception):
            raise self._made[key]
        return self._made[key]

    def dense(self) -> nn.Module:
        """The plain model."""
        return self.once(DENSE, lambda: self.subject.load(dtype=self.dtype))

    def net(self) -> MaskedGraph:
        """The masked network, in the precision it is stored in."""
        return self.once("net", self.subject.masked)


def _dense(work: VariantBuilder, _: Setting) -> Built:
    return Built(work.dense(), bytes_of(work.dense()))


def _folded(work: VariantBuilder, _: Setting) -> Built:
    folded = work.once("folded", lambda: fold_norm(work.net()))
    if not folded.folded:
        raise ConfigError("no norm can be folded" if folded.kept else "the network has no batch norm to fold")
    model = work.once("folded model", lambda: folded.model.to(work.dtype))
    return Built(model, bytes_of(model), f"{len(folded.folded)} norms folded")


def _compiled(work: VariantBuilder, _: Setting) -> Built:
    # Beyond a few compilations of one class torch would silently run it uncompiled.
    torch.compiler.reset()
    compiled: Any = torch.compile(work.dense(), dynamic=False)
    return Built(_SilentModule(compiled), bytes_of(work.dense()))


def _onnx_file(work: VariantBuilder, setting: Setting) -> Path:
    """The network with its zeros as an ONNX file of a fixed batch size, which every other runtime takes."""
    if work.dtype is not torch.float32:
        raise ConfigError("measured in float32 only")
    file = work.folder / f"batch{setting.batch}.onnx"
    inputs = setting.inputs.args
    return work.once(file, lambda: export_onnx(work.dense(), file, example_inputs=inputs, batch=False))


def _onnxruntime(work: VariantBuilder, setting: Setting) -> Built:
    file = _onnx_file(work, setting)
    return Built(OnnxSession(file, setting.threads), file.stat().st_size, "dense")


def _openvino(work: VariantBuilder, setting: Setting) -> Built:
    file = _onnx_file(work, setting)
    return Built(OpenVino(file, setting.threads, "f32"), file.stat().st_size, "dense")


def _openvino_default(work: VariantBuilder, setting: Setting) -> Built:
    file = _onnx_file(work, setting)
    model = OpenVino(file, setting.threads)
    note = f"dense, computes in {model.precision}"
    return Built(model, file.stat().st_size, note, is_lower_precision=model.precision != "f32")


def _deepsparse(work: VariantBuilder, setting: Setting) -> Built:
    if work.dtype is not torch.float32:
        raise ConfigError("measured in float32 only")
    file = work.folder / f"batch{setting.batch}.deepsparse.onnx"
    work.once(file, lambda: export_for_deepsparse(work.dense(), setting.inputs.args, file))
    return Built(DeepSparse(file, setting.batch, setting.threads), file.stat().st_size, "leaves out zeros")


def _masked(work: VariantBuilder, setting: Setting) -> Built:
    net: MaskedGraph = work.once("masked", lambda: work.subject.masked().to(work.dtype))
    with torch.no_grad():
        net(*setting.inputs.args, **setting.inputs.kwargs)  # records it, which inference mode would disturb
    return Built(net, bytes_of(net))


def _compact(work: VariantBuilder, _: Setting) -> Built:
    small = work.once("compact", lambda: small_network(work.net()))
    report = small.units
    if not small.plan:
        raise ConfigError(f"left whole: {report.refusal}" if report.refusal else "nothing can be left out or folded")
    model = work.once("compact model", lambda: unwrap(small.net).to(work.dtype))
    before, after = report.parameters
    note = f"{report.removed} units left out, {after / before:.1%} of the parameters"
    return Built(model, bytes_of(model), f"{note}; {len(small.folded)} norms folded")


def _sparse(work: VariantBuilder, setting: Setting) -> Built:
    model = work.subject.load(dtype=work.dtype, runtime="sparse", example_inputs=setting.inputs)
    assert isinstance(model, SparseRuntime)
    kernels = [module for module in model.modules() if isinstance(module, Kernel)]
    rest = bytes_of(model) - sum(map(bytes_of, kernels))  # kernels count their packed weights themselves
    packed, report = sum(kernel.nbytes for kernel in kernels), model.lowering
    if report.taken == "native":
        packed += report.nbytes[1] - sum(layer.nbytes for layer in report.layers)
    choices = Counter(report.choices.values())
    note = ", ".join(f"{count} layers {choice}" for choice, count in sorted(choices.items()))
    return Built(model, rest + packed, note, report)


def _native(work: VariantBuilder, setting: Setting) -> Built:
    if work.dtype is not torch.float32:
        raise ConfigError("measured in float32 only")
    data: bytes = work.once(NATIVE, lambda: network_bytes(native_plan(work.net(), setting.inputs.args)))
    network = NativeNetwork(data, setting.threads)
    return Built(_NativeModule(network), len(data), f"without torch, {network.instructions} kernels")


# In the order they are shown. Each raises where it cannot be had, and says why.
VARIANTS: dict[str, Callable[[VariantBuilder, Setting], Built]] = {
    DENSE: _dense,
    "norms folded": _folded,
    COMPILED: _compiled,
    ONNXRUNTIME: _onnxruntime,
    OPENVINO: _openvino,
    OPENVINO_DEFAULT: _openvino_default,
    DEEPSPARSE: _deepsparse,
    "masked": _masked,
    "compact": _compact,
    SPARSE: _sparse,
    NATIVE: _native,
}


class _NativeModule(nn.Module):
    """A network of the native runtime, called like a torch module."""

    def __init__(self, network: NativeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        """The network's outputs for these tensors; other values are part of its plan."""
        outputs = self.network(*(value for value in inputs if isinstance(value, torch.Tensor)))
        return outputs[0] if len(outputs) == 1 else outputs


class _SilentModule(nn.Module):
    """A compiled model whose compiler keeps its warnings, about itself, to itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.compiled = False

    def forward(self, *inputs: Any) -> Any:
        """The model's outputs; the first call compiles."""
        if self.compiled:
            return self.module(*inputs)
        with ignored_warnings():
            result = self.module(*inputs)
        self.compiled = True
        return result


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(model)}.values())


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
