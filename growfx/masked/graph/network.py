"""`MaskedGraph`: a model as a torch.fx graph over masked layers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from growfx.distributed.sharded import local_shard, part_of
from growfx.errors import MaskError, TraceError
from growfx.masked.averages import copy_masks_into_averages
from growfx.masked.direct_uses import masked_reads
from growfx.masked.graph.example_call import ExampleCall
from growfx.masked.graph.face import UNWRAP_FIRST, ModelFace
from growfx.masked.graph.layer_table import LayerTable
from growfx.masked.graph.plain_state import load_by_model, state_by_model, zeroed_outside_masks
from growfx.masked.graph.recordings import Recordings
from growfx.masked.graph.replicas import Replicas
from growfx.masked.layers import MaskedLayer, check_mask
from growfx.masked.module_copy import copy_modules
from growfx.masked.optimizers import watch_optimizers
from growfx.masked.parameter import MaskedParameter
from growfx.masked.present.exchange import whole_layers
from growfx.masked.registry import note_replaced
from growfx.masked.torch_pruning import translated
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph, plain_graph_module
from growfx.recorded.trace_report import TraceReport

__all__ = ["MaskedGraph"]


class MaskedGraph(ModelFace):
    """A model over masked layers, with the torch.fx graph that explains it; made by `growfx.wrap`.

    What runs is the model's own forward, whatever it does; it has the model's parameters, buffers and submodules under
    their own names, with a bool buffer `<layer>.mask` beside each masked weight. Attributes and methods are the
    model's where the net has none of that name. The recorded graph is for passes: path products, connectivity,
    compaction. It holds for one mode and for inputs of the same shapes, batch size aside; others are recorded when a
    pass asks.

    Attributes:
        averaged: whether it is the average that a torch `AveragedModel` keeps.
        recordings: the recorded graphs, by mode and inputs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> net = growfx.wrap(model, torch.randn(1, 4))
        >>> isinstance(net, growfx.MaskedGraph), list(net.state_dict())
        (True, ['0.weight', '0.bias', '0.mask'])
        >>> net.set_masks({"0": torch.eye(2, 4, dtype=torch.bool)})
        >>> net.density, net.layers["0"].nnz
        (0.25, 2)
    """

    kernels: Any = None  # what `growfx.use_kernels` set up
    averaged: bool = False

    def __init__(
        self,
        table: LayerTable,
        recordings: Recordings,
        example: ExampleCall,
        find_identity: Callable[[], Any] = lambda: None,
    ):
        nn.Module.__init__(self)
        watch_optimizers()
        copy_masks_into_averages()
        self._stand_for(table.shell)
        table.shown_by(self)
        self._table, self.recordings, self._example = table, recordings, example
        self._replicas = Replicas(table)
        self._graph = fx.Graph()
        self._code = ""
        self.meta: dict[str, Any] = {}
        # Telling where a model came from may need building others to compare: only done when asked for.
        self._identity: tuple[Callable[[], Any]] | Any = (find_identity,)
        for mode in (not self.training, self.training):
            for recording in recordings.recordings_in_mode(mode):
                self._show(recording)
        self._complete = True

    @property
    def trace_report(self) -> TraceReport:
        """What was recorded and what was left out."""
        return self.recordings.trace_report

    @property
    def identity(self) -> Any:
        """Where the model came from, for `growfx.save`; None when unknown."""
        if isinstance(self._identity, tuple):
            self._identity = self._identity[0]()
        return self._identity

    # -- masks --------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> dict[str, MaskedLayer]:
        """Masked layers by name, in data-flow order; layers with tied weights appear once.

        Raises:
            MaskError: one of them was replaced, or its weight was taken away, since the model was wrapped.
        """
        self._table.check()
        return self._table.layers

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks of `layers`, by name."""
        return {name: layer.mask for name, layer in self.layers.items()}

    @property
    def nnz(self) -> int:
        """Active weights of all masked layers."""
        return sum(layer.nnz for layer in self.layers.values())

    @property
    def numel(self) -> int:
        """Weights of all masked layers, active or not."""
        return sum(layer.numel for layer in self.layers.values())

    @property
    def density(self) -> float:
        """Active weights over all weights of the masked layers."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def sharded(self) -> bool:
        """Whether each rank has a part of the weights (`fully_shard`)."""
        return any(layer.sharded for layer in self.layers.values())

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks of the named layers; weights outside the new masks become +0.0.

        Args:
            masks: layer name -> bool tensor of the weight's shape. Nothing is changed unless all of them fit.

        Raises:
            MaskError: unknown layer, wrong shape or dtype, or a layer on the meta device, where a mask has no values.
        """
        if not isinstance(masks, Mapping):
            raise MaskError(f"set_masks expects a mapping of layer name -> bool tensor, got {type(masks).__name__}")
        layers = self.layers
        for name, mask in masks.items():
            if name not in layers:
                raise MaskError(f"`{name}` is not a masked layer; {_names(layers)}")
            check_mask(name, layers[name].mask, mask)
            _require_values(name, layers[name].mask)
        for name, mask in masks.items():
            layers[name].mask.copy_(mask)
            layers[name].settle()

    def mask_digest(self) -> str:
        """SHA-256, in hex, over the names, shapes and packed masks of all masked layers, in order of their names.

        Raises:
            MaskError: a layer is on the meta device, where masks have no values.
        """
        digest = hashlib.sha256()
        for name in sorted(self.layers):
            mask = self.layers[name].mask
            _require_values(name, mask)
            digest.update(f"{name}:{','.join(map(str, mask.shape))};".encode())
            digest.update(np.packbits(mask.cpu().numpy()).tobytes())
        return digest.hexdigest()

    def settle(self) -> None:
        """Make every stored parameter +0.0 outside its mask."""
        for layer in self.layers.values():
            layer.settle()

    def verify(self) -> None:
        """Check that every stored parameter is exactly +0.0 outside its mask.

        Raises:
            MaskError: names the layers where it is not, or one that is on the meta device, without values.
        """
        wrong = []
        for name, layer in self.layers.items():
            if layer.present is not None:
                continue
            _require_values(name, layer.mask)
            outside = local_shard(layer.parameter)[~part_of(layer.mask, layer.parameter)]
            if bool((outside != 0).any() | torch.signbit(outside).any()):
                wrong.append(name)
        if wrong:
            raise MaskError(f"stored weights outside the mask are not +0.0 in {', '.join(f'`{n}`' for n in wrong)}")

    @property
    def masked_parameters(self) -> dict[str, MaskedParameter]:
        """Those of `layers` that are masks on parameters of modules that stay what they are."""
        return self._table.parameters

    def whole_weights(self) -> AbstractContextManager[None]:
        """A block in which every weight is a parameter of its own shape, where values of present edges are kept.

        For work that reads or writes whole weights; what was changed is kept.
        """
        return whole_layers(self.layers.values())

    @property
    def kernel_report(self) -> Any:
        """Which kernel each layer takes and why (`growfx.runtime.train.KernelReport`); None before `use_kernels`."""
        return None if self.kernels is None else self.kernels.report(self)

    # -- ranks --------------------------------------------------------------------------------------------------------

    @property
    def replicated(self) -> bool:
        """Whether `DistributedDataParallel` holds it, so that all ranks must have the same masks."""
        return self._replicas.found

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Buffers that `DistributedDataParallel` need not send before each step; it asks this of what it wraps.

        Masks are chosen alike on every rank and compared; being asked is how the network learns of it.
        """
        self._replicas.note_ddp()
        return list(self._table.mask_names())

    def kept_edges(self) -> list[Tensor]:
        """Packed masks of the layers that keep values of present edges; others than before where edges are others."""
        return self._replicas.kept_edges()

    def find_shards(self) -> None:
        """Find out what `fully_shard` was called on: this network, or modules inside that gather their own weights.

        The first forward after a change of the mode or of this class looks, and a method when it is attached.
        """
        self._replicas.find_shards(self)

    # -- graphs -------------------------------------------------------------------------------------------------------

    def example(self, batch: int = 1) -> Inputs:
        """A call that the model accepts: that given to `growfx.wrap`, with `batch` rows, on the net's device.

        Where the net's floating-point type was changed (`net.double()`), inputs of its former type follow.
        """
        return self._example.of(self.shell, batch if self.batch_is_free else None)

    def inputs_like(self, example_inputs: Any = None, *, batch: int | None = None) -> Inputs:
        """What a pass works on: the call that `example_inputs` stand for, on the net's device; default: as recorded.

        As in `example`, inputs of the type that the net was wrapped in are converted to the type it has now.

        Args:
            example_inputs: as of `growfx.wrap`; a list stands for a tuple.
            batch: rows to have, where the first dimension is a batch.

        Raises:
            TraceError: nothing that a model can be called with.
        """
        if example_inputs is None:
            return self.example(1 if batch is None else batch)
        return self._example.like(example_inputs, self.shell, batch if self.batch_is_free else None)

    @property
    def batch_is_free(self) -> bool:
        """Whether the first dimension of the inputs is a batch of any size, as far as is known."""
        return self.recordings.batch_is_free

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Inputs the model accepts: those given to `growfx.wrap`, with `batch` rows, on the net's device.

        The positional ones; `example` has those that are given by keyword too.
        """
        return self.example(batch).args

    def graph_at(self, *inputs: Any, training: bool = False, **named: Any) -> fx.Graph:
        """The recorded graph for inputs like these in the given mode; targets of its nodes are names in this net.

        Where the model takes values out of its data the graph holds for the values of these inputs only, and looks
        into the modules that `trace_report.opaque` lists: a graph to work on, not to run on others.

        Raises:
            TraceError: the model cannot be recorded faithfully for these inputs.
        """
        return self.graph_for(Inputs(inputs, named), training=training)

    def graph_for(self, given: Inputs, *, training: bool = False, look_inside: bool = False) -> fx.Graph:
        """`graph_at` for one call of the model, its keyword arguments included.

        `look_inside`: for passes that follow values, with what autograd functions compute in eval mode instead of their
        application, whose gradient is its author's.
        """
        recording = self.recording(given, training)
        with self.whole_weights():
            return self.recordings.for_pass(recording, given, training, look_inside).graph

    def graph_module(self, *, training: bool | None = None) -> fx.GraphModule:
        """The recorded program as a plain `torch.fx.GraphModule` over the same masked layers, to run or transform.

        Args:
            training: the mode it was recorded in; default: the net's.

        Raises:
            TraceError: the graph would compute something else than the model does; gives the reasons.
        """
        training = self.training if training is None else training
        recording = self.recording(self.example(self._example.inputs.batch or 1), training)
        reasons = [] if recording.faithful else list(self.trace_report.notes) or ["the recording is not faithful"]
        reasons += [f"`{name or type(self.shell).__name__}`: {why}" for name, why in self.trace_report.opaque.items()]
        reasons += [f"the forward {effect}" for effect in self.trace_report.side_effects]
        if reasons:
            raise TraceError(
                f"there is no graph that does what the model does: {'; '.join(reasons)}; call the net itself"
            )
        return plain_graph_module(self.shell, recording.graph, training, shapes_are_fixed=not recording.batch_is_free)

    def recording(self, inputs: Inputs, training: bool) -> RecordedGraph:
        """The recording for inputs like these in the given mode; made, and compared with the model, when first asked.

        Raises:
            TraceError: the model fails on the inputs.
        """
        found = self.recordings.find(inputs, training)
        if found is not None:
            return found
        with self.whole_weights():
            return self.recordings.make(inputs, training)

    def _show_known(self) -> None:
        """Show the graph of the mode of now, as far as one was recorded."""
        recording = self.recordings.known(self.example(), self.training)
        if recording is not None:
            self._show(recording)

    def _show(self, recording: RecordedGraph) -> None:
        self._graph, code = recording.graph, recording.code
        # torch.compile reads these of every GraphModule.
        self.__dict__.update(_code=code.src, _lineno_map=code._lineno_map, _prologue_start=code._prologue_start)

    def recompile(self) -> Any:
        """Print the shown graph anew after it was edited; what runs is the model's own forward."""
        code = self._graph.python_code("self")
        self._code = code.src
        return code

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with its masked weights: its own forward.

        Raises:
            MaskError: a masked layer was replaced since the model was wrapped.
            TraceError: a tracer of another kind is at work, which would see masks as constants.
        """
        if torch.compiler.is_compiling():
            return self.shell(*args, **kwargs)
        self._before_call(args, kwargs)
        with self._masked_reads():
            if self.kernels is not None:
                return self.kernels.run(self.shell, args, kwargs)
            return self.shell(*args, **kwargs)

    def _before_call(self, args: Any, kwargs: Any) -> None:
        symbolic = isinstance(args, fx.Proxy) or isinstance(kwargs, fx.Proxy)
        if symbolic or torch._C._is_tracing() or any(isinstance(v, fx.Proxy) for v in (*args, *kwargs.values())):
            raise TraceError(UNWRAP_FIRST)
        self._replicas.before_forward(self, self.training)
        self._table.check()

    def _masked_reads(self, layers: Iterable[MaskedLayer] | None = None) -> AbstractContextManager[Any]:
        """Masks where the model reads a weight without calling its layer, for one call of the model's code.

        `layers`: whose weights may be read; default: those that the forward was seen to read.
        """
        return masked_reads(self._table.read_directly if layers is None else layers)

    def _reading_any_weight(self) -> AbstractContextManager[Any]:
        return self._masked_reads(self._table.layers.values())

    def _check_parts(self) -> None:
        self._table.check()

    # -- what an nn.Module does, with masks in mind -------------------------------------------------------------------

    def train(self, mode: bool = True) -> MaskedGraph:
        """Switch the mode and show its graph."""
        self.shell.train(mode)
        self._replicas.mode_changed()
        self._show_known()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the net's own state dict, or the plain model's: then the masks stay as they are.

        One of a model that `torch.nn.utils.prune` pruned brings its masks.

        Raises:
            MaskError: some masks are missing, or have another shape or dtype; names them.
        """
        names = self._table.mask_names()
        modules = list(self.named_modules(remove_duplicate=False))
        masked = [(name, m.weight_name, m.mask_name) for name, m in modules if isinstance(m, MaskedLayer)]
        state_dict = translated(state_dict, masked)
        given = [name for name in names if name in state_dict]
        if given and len(given) < len(names):
            missing = [f"`{n}`" for n in names if n not in state_dict]
            raise MaskError(f"the state dict has {len(given)} of {len(names)} masks; missing: {', '.join(missing)}")
        for name in given:
            check_mask(names[name], self.get_buffer(name), state_dict[name])
        if not given:
            own = {name: self.get_buffer(name) for name in names}
            state_dict = {**state_dict, **own}
        load = load_by_model(self.shell, names) or super().load_state_dict
        result = load(state_dict, strict=strict, assign=assign)
        self._table.adopt_parameters()  # `assign` puts others in place
        self.settle()
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state dict with one mask per masked layer; weights are +0.0 outside their masks.

        Values share the network's memory, as those of any module do, for what averages a network writes into them.
        (Where torch's `AveragedModel` does the averaging, into parameters, weights that are not zero outside their
        masks are copies, so that a look at the average does not change it.)
        """
        self._table.check()
        prefix = kwargs.get("prefix", "")
        layers = () if kwargs.get("keep_vars", False) else self._table.layers.values()
        dirty = zeroed_outside_masks(layers, in_copies=self.averaged)
        found = state_by_model(self.shell, self._table.mask_names(), args, kwargs)
        found = super().state_dict(*args, **kwargs) if found is None else found
        for name, parameter in self.named_parameters(remove_duplicate=False) if dirty else ():
            if id(parameter) in dirty and f"{prefix}{name}" in found:  # under every name it has
                found[f"{prefix}{name}"] = dirty[id(parameter)]
        return found

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MaskedGraph:
        super()._apply(fn, recurse)
        for layer in self.masked_parameters.values():
            layer.keep_mask_bool()
        self._table.adopt_parameters()
        return self

    @torch.inference_mode(False)  # a copy made inside may be trained outside
    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedGraph:
        clone = fx.GraphModule.__new__(type(self))
        memo[id(self)] = clone
        for layer in self.layers.values():
            if layer.present is not None:  # an optimizer that is copied along would hold values of nobody
                values = layer.present.values
                memo.setdefault(id(values), nn.Parameter(values.detach().clone()))
                note_replaced(memo[id(values)])
        with self.whole_weights():  # a copy has whole weights and dense kernels
            shell = copy_modules(self.shell, memo)
            return self._copied_around(shell, clone, memo)

    def _copied_around(self, shell: nn.Module, clone: MaskedGraph, memo: dict[int, Any]) -> MaskedGraph:
        anew = ("_compiled_call_impl", "_table", "_replicas", "recordings", "_graph", "_identity", "meta", "kernels")
        clone.__dict__.update(copy.deepcopy({k: v for k, v in self._own_state().items() if k not in anew}, memo))
        clone._stand_for(shell)
        table = self._table.copied(shell, memo)
        table.shown_by(clone)
        recordings, shown = self.recordings.copied(table, self._graph)
        clone.__dict__.update(_table=table, _replicas=self._replicas.copied(table), recordings=recordings, _graph=shown)
        clone.__dict__.update(_identity=self._identity, meta=dict(self.meta))
        return clone

    def __copy__(self) -> MaskedGraph:
        return copy.deepcopy(self)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a MaskedGraph is not pickled: save `net.state_dict()`, or the network with `growfx.save(net, path)`"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __str__(self) -> str:
        kind = type(self.shell).__name__
        return f"MaskedGraph of {kind}: {len(self.layers)} masked layers, density {self.density:.4g}\n{self._code}"


def _names(layers: Mapping[str, Any], limit: int = 6) -> str:
    shown = ", ".join(f"`{name}`" for name in list(layers)[:limit])
    return f"the masked layers are {shown}{f' and {len(layers) - limit} more' if len(layers) > limit else ''}"


def _require_values(name: str, mask: Tensor) -> None:
    if mask.is_meta:
        raise MaskError(
            f"the mask of `{name}` is on the meta device, which has no values; load a state dict first: "
            "`net.load_state_dict(state, assign=True)`"
        )
