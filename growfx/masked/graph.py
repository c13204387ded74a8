"""`MaskedGraph`: a model as a torch.fx graph over masked layers."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from growfx.distributed import ranks
from growfx.distributed.sharded import fsdp_modules, is_sharded, local_shard, part_of
from growfx.errors import ConfigError, MaskError, TraceError
from growfx.masked.agreement import require_same_masks
from growfx.masked.averages import copy_masks_into_averages
from growfx.masked.direct_uses import masked_reads
from growfx.masked.layers import MaskedLayer, MaskedParameter, check_mask
from growfx.masked.module_copy import copy_modules
from growfx.masked.modules import chain_tensors, float_type
from growfx.masked.optimizers import watch_optimizers
from growfx.masked.placement import Places
from growfx.masked.plain_state import hide_masks, load_by_model, state_by_model, zeroed_outside_masks
from growfx.masked.present.exchange import whole_layers
from growfx.masked.recordings import Recordings
from growfx.masked.registry import note_replaced
from growfx.masked.torch_pruning import translated
from growfx.masked.weight_reads import watch_parameter
from growfx.recorded.inputs import Inputs, as_inputs
from growfx.recorded.recording import RecordedGraph, RecordFunction, plain_graph_module
from growfx.recorded.trace_report import TraceReport

__all__ = ["MaskedGraph", "RecordFunction", "RecordedGraph"]


_REGISTRIES = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


class MaskedGraph(fx.GraphModule):
    """A model over masked layers, with the torch.fx graph that explains it; made by `growfx.wrap`.

    What runs is the model's own forward, whatever it does; it has the model's parameters, buffers and submodules under
    their own names, with a bool buffer `<layer>.mask` beside each masked weight. Attributes and methods are the
    model's where the net has none of that name. The recorded graph is for passes: path products, connectivity,
    compaction. It holds for one mode and for inputs of the same shapes, batch size aside; others are recorded when a
    pass asks.

    Attributes:
        trace_report: what was recorded and what was left out.
        replicated: whether `DistributedDataParallel` holds it, so that all ranks must have the same masks.
        averaged: whether it is the average that a torch `AveragedModel` keeps.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> net = growfx.wrap(model, torch.randn(1, 4))
        >>> isinstance(net, growfx.MaskedGraph), list(net.state_dict())
        (True, ['0.weight', '0.bias', '0.mask'])
        >>> net.set_masks({"0": torch.eye(2, 4, dtype=torch.bool)})
        >>> net.density, net.layers["0"].nnz
        (0.25, 2)
    """

    trace_report: TraceReport
    kernels: Any = None  # what `growfx.use_kernels` set up
    averaged: bool = False

    def __init__(
        self,
        shell: nn.Module,
        example: Inputs,
        recorder: RecordFunction,
        report: TraceReport,
        find_identity: Callable[[], Any] = lambda: None,
    ):
        nn.Module.__init__(self)
        watch_optimizers()
        copy_masks_into_averages()
        self._adopt(shell)
        self._example, self._example_type = example, float_type(self)
        self.recordings = Recordings(recorder)
        self._graph = fx.Graph()
        self._code = ""
        self.meta: dict[str, Any] = {}
        self.trace_report = report
        # Telling where a model came from may need building others to compare: only done when asked for.
        self._identity: tuple[Callable[[], Any]] | Any = (find_identity,)
        self.replicated, self._compared = False, False
        self._replicated_edges: list[Tensor] | None = None  # that `DistributedDataParallel` was made for
        self._searched_as: type | None = None  # `fully_shard` gives what it is called on another class
        # In plain containers the layers would become submodules.
        self._named_layers: tuple[dict[str, MaskedLayer]] = ({},)
        self._tied: tuple[list[list[MaskedLayer]]] = ([],)
        self._read_directly: tuple[list[MaskedLayer]] = ([],)
        self._places: Places | None = None
        self._complete = True

    def _adopt(self, shell: nn.Module) -> None:
        """Be the shell's root: share its very registries, so that whatever changes one changes the other."""
        self.__dict__["_shell"] = (shell,)  # in a tuple, or it would be registered as a submodule
        for registry in _REGISTRIES:
            self.__dict__[registry] = shell.__dict__[registry]

    @property
    def training(self) -> bool:
        """Whether the model is in train mode: one flag for both, whoever sets it."""
        shell = self.__dict__.get("_shell")
        return shell is None or shell[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        shell = self.__dict__.get("_shell")
        if shell is not None:
            shell[0].training = mode

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
        self._check_places()
        return self._named_layers[0]

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
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Buffers that `DistributedDataParallel` need not send before each step; it asks this of what it wraps.

        Masks are chosen alike on every rank and compared; being asked is how the network learns of it.
        """
        self.replicated, self._replicated_edges = True, self.kept_edges()
        return list(self._mask_names())

    def kept_edges(self) -> list[Tensor]:
        """Packed masks of the layers that keep values of present edges; others than before where edges are others."""
        layers = [layer for layer in self._named_layers[0].values() if layer.present is not None]
        for layer in layers:
            layer.settle()
        return [layer.present.bits for layer in layers if layer.present is not None]

    def _check_replica(self) -> None:
        """Refuse a forward of ranks whose exchange of gradients was set up for other masks."""
        if not ranks.within_ddp():
            return
        now = self.kept_edges()
        known = self._replicated_edges or now
        if any(a is not b for a, b in zip(known, now, strict=False)):
            raise ConfigError(
                "`DistributedDataParallel` exchanges gradients of the edges it found; masks have changed since, with "
                'them the values that are kept (`storage` = "present"); put the network into a new '
                "`DistributedDataParallel` after every change of masks, as growfx.train does"
            )
        self._replicated_edges = now

    def _compare_ranks(self) -> None:
        """Compare the masks once, in the first forward that all ranks make together."""
        if ranks.within_ddp():
            # also where something around this network was wrapped
            self.replicated = self._compared = True
            require_same_masks(self.layers)
        elif self.sharded:
            self._compared = True
            require_same_masks(self.layers)

    def find_shards(self) -> None:
        """Find out what `fully_shard` was called on: this network, or modules inside that gather their own weights.

        The first forward after a change of the mode or of this class looks, and a method when it is attached.
        """
        self._searched_as = type(self)
        for name, layer in self.layers.items() if fsdp_modules(self) else ():
            if layer.present is not None:
                raise ConfigError(
                    f"`fully_shard` spreads rows of whole weights over ranks, and `{name}` keeps values of present "
                    'edges only (`storage` = "present"), which have no rows; use `DistributedDataParallel`, or '
                    '`growfx.use_kernels(net, storage="dense")` before `fully_shard`'
                )
            layer.sharded = True

    def whole_weights(self) -> AbstractContextManager[None]:
        """A block in which every weight is a parameter of its own shape, where values of present edges are kept.

        For work that reads or writes whole weights; what was changed is kept.
        """
        return whole_layers(self.layers.values())

    @property
    def kernel_report(self) -> Any:
        """Which kernel each layer takes and why (`growfx.runtime.train.KernelReport`); None before `use_kernels`."""
        return None if self.kernels is None else self.kernels.report(self)

    # -- changes of the model ----------------------------------------------------------------------------------------

    def place_layers(self, layers: Mapping[str, MaskedLayer], tied: Sequence[list[MaskedLayer]]) -> None:
        """Name the masked layers, in data-flow order, and those that share a weight; of `growfx.wrap`."""
        self._named_layers[0].clear()
        self._named_layers[0].update(layers)
        masked = [*layers.values(), *(layer for group in tied for layer in group)]
        read = [*self._read_directly[0], *self.masked_parameters.values()]
        self._read_directly[0][:] = {id(m): m for m in read if any(m is layer for layer in masked)}.values()
        self._find_readers()
        self._tied[0].extend(tied)
        self._places = None
        hide_masks(self.shell, list(self._mask_names()))

    @property
    def masked_parameters(self) -> dict[str, MaskedParameter]:
        """Those of `layers` that are masks on parameters of modules that stay what they are."""
        return {name: layer for name, layer in self._named_layers[0].items() if isinstance(layer, MaskedParameter)}

    def note_direct_read(self, name: str) -> None:
        """Remember that the model reads the weight of the masked layer `name` without calling the layer."""
        layer = self.shell.get_submodule(name)
        if isinstance(layer, MaskedLayer) and not layer.read_directly:
            layer.read_directly = True
            self._read_directly[0].append(layer)
            self._find_readers()

    def _find_readers(self) -> None:
        """Let modules that hold a weight that is read directly, and are not its layer, find the masked one."""
        layers = {id(layer.parameter): layer for layer in self._read_directly[0]}
        for module in self.shell.modules():
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in layers and not isinstance(module, MaskedLayer):
                    self._watch(module, name, layers[id(parameter)])

    def _watch(self, module: nn.Module, name: str, layer: MaskedLayer) -> None:
        registry = watch_parameter(module, name, layer)
        if module is self.shell:
            self.__dict__["_parameters"] = registry
        for other in self.masked_parameters.values():
            if other.__dict__["owner"] is module:
                other.__dict__["_parameters"] = registry

    def _check_places(self) -> None:
        """Check that every masked layer is still where it was, with its weight."""
        if self._places is None:
            self._places = Places(self.shell, self._named_layers[0])
        self._places.check()

    # -- graphs -------------------------------------------------------------------------------------------------------

    def example(self, batch: int = 1) -> Inputs:
        """A call that the model accepts: that given to `growfx.wrap`, with `batch` rows, on the net's device.

        Where the net's floating-point type was changed (`net.double()`), inputs of its former type follow.
        """
        return self._placed(self._example.with_batch(batch) if self.batch_is_free else self._example)

    def _placed(self, inputs: Inputs) -> Inputs:
        """A copy of a call on the net's device, with tensors of the type it was wrapped in converted to its own."""
        device = next(chain_tensors(self), torch.empty(0)).device
        before, now = self._example_type, float_type(self)

        def place(tensor: Tensor) -> Tensor:
            # a model may take inputs of a type that is not that of its weights; such inputs stay as they are
            dtype = now if tensor.dtype == before and now is not None else tensor.dtype
            if tensor.is_meta and device.type != "meta":  # the net got its values after it was wrapped
                return torch.zeros_like(tensor, dtype=dtype, device=device)
            return tensor.to(device, dtype)

        return inputs.copied(place)

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
        given = as_inputs(tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs)
        given = self._placed(given)
        return given if batch is None or not self.batch_is_free else given.with_batch(batch)

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
            return self.recordings.for_pass(self, recording, given, training, look_inside).graph

    def graph_module(self, *, training: bool | None = None) -> fx.GraphModule:
        """The recorded program as a plain `torch.fx.GraphModule` over the same masked layers, to run or transform.

        Args:
            training: the mode it was recorded in; default: the net's.

        Raises:
            TraceError: the graph would compute something else than the model does; gives the reasons.
        """
        training = self.training if training is None else training
        recording = self.recording(self.example(self._example.batch or 1), training)
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
        found = self.recordings.find(self, inputs, training)
        if found is not None:
            return found
        with self.whole_weights():
            made = self.recordings.make(self, inputs, training)
        if len(self.recordings) == 1 or (training == self.training and inputs is self._example):
            self._show(made)
        return made

    def recordings_in_mode(self, training: bool) -> Iterator[RecordedGraph]:
        """What was recorded in train or evaluation mode so far."""
        return self.recordings.in_mode(training)

    def _show(self, recording: RecordedGraph) -> None:
        self._graph, code = recording.graph, recording.code
        # torch.compile reads these of every GraphModule.
        self.__dict__.update(_code=code.src, _lineno_map=code._lineno_map, _prologue_start=code._prologue_start)

    def recompile(self) -> Any:
        """Print the shown graph anew after it was edited; what runs is the model's own forward."""
        code = self._graph.python_code("self")
        self._code = code.src
        return code

    @property
    def shell(self) -> nn.Module:
        """The model's own class over the same masked modules and parameters."""
        return self._shell[0]

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
            raise TraceError(_UNWRAP_FIRST)
        if self._searched_as is not type(self):
            self.find_shards()
        if not self._compared and self.training:
            self._compare_ranks()
        if self.replicated and self.training:
            self._check_replica()
        self._check_places()

    def _masked_reads(self, layers: Iterable[MaskedLayer] | None = None) -> AbstractContextManager[Any]:
        """Masks where the model reads a weight without calling its layer, for one call of the model's code.

        `layers`: whose weights may be read; default: those that the forward was seen to read.
        """
        return masked_reads(self._read_directly[0] if layers is None else layers)

    def __prepare_scriptable__(self) -> Any:
        raise TraceError(_UNWRAP_FIRST)

    def get_submodule(self, target: str) -> nn.Module:
        """The submodule of that name, also where the model calls one `layers` or `graph`."""
        return self.shell.get_submodule(target) if target else self

    def __getattr__(self, name: str) -> Any:
        # Called where the net itself has nothing of that name: `no_weight_decay()`, `pretrained_cfg`, ... of the model.
        shell = self.__dict__.get("_shell")
        if shell is None:
            raise AttributeError(name)
        if isinstance(getattr(type(shell[0]), name, None), property) and self.__dict__.get("_complete"):
            with self._masked_reads(self._named_layers[0].values()):
                return getattr(shell[0], name)
        value = getattr(shell[0], name)
        if inspect.ismethod(value) and value.__self__ is shell[0]:
            return self._with_masked_reads(value)
        return value

    def __getitem__(self, index: Any) -> Any:
        """A part of a model that has numbered parts (`nn.Sequential`)."""
        shell: Any = self.shell
        return shell[index]

    def __len__(self) -> int:
        shell: Any = self.shell
        return len(shell)

    def __iter__(self) -> Any:
        shell: Any = self.shell
        return iter(shell)

    def __contains__(self, item: object) -> bool:
        shell: Any = self.shell
        return item in shell

    def __bool__(self) -> bool:
        return bool(self.shell)

    def _with_masked_reads(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return method(*args, **kwargs)
            # A method may read what the forward calls.
            with self._masked_reads(self.layers.values()):
                return method(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if not self.__dict__.get("_complete") or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.shell, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or not self.__dict__.get("_complete"):
            super().__delattr__(name)
        else:
            delattr(self.shell, name)

    # -- what an nn.Module does, with masks in mind -------------------------------------------------------------------

    def train(self, mode: bool = True) -> MaskedGraph:
        """Switch the mode and show its graph."""
        self.shell.train(mode)
        self._searched_as = None
        recording = self.recordings.known(self, self.example(), mode)
        if recording is not None:
            self._show(recording)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.shell._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.shell._load_from_state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the net's own state dict, or the plain model's: then the masks stay as they are.

        One of a model that `torch.nn.utils.prune` pruned brings its masks.

        Raises:
            MaskError: some masks are missing, or have another shape or dtype; names them.
        """
        names = self._mask_names()
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
        self._tie_masks()
        self._adopt_parameters()  # `assign` puts others in place
        self.settle()
        return result

    def _mask_names(self) -> dict[str, str]:
        """The name of every mask in the state dict -> that of its layer."""
        modules = list(self.named_modules(remove_duplicate=False))
        found = {f"{name}.mask": name for name, module in modules if isinstance(module, MaskedLayer)}
        for label, layer in self.masked_parameters.items():
            owner = self if layer.__dict__["owner"] is self.shell else layer.__dict__["owner"]
            for name in (name for name, module in modules if module is owner):
                found[f"{name}.{layer.mask_name}".lstrip(".")] = label
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's state dict with one mask per masked layer; weights are +0.0 outside their masks.

        Values share the network's memory, as those of any module do, for what averages a network writes into them.
        (Where torch's `AveragedModel` does the averaging, into parameters, weights that are not zero outside their
        masks are copies, so that a look at the average does not change it.)
        """
        self._check_places()
        prefix = kwargs.get("prefix", "")
        layers = () if kwargs.get("keep_vars", False) else self._named_layers[0].values()
        dirty = zeroed_outside_masks(layers, in_copies=self.averaged)
        found = state_by_model(self.shell, self._mask_names(), args, kwargs)
        found = super().state_dict(*args, **kwargs) if found is None else found
        for name, parameter in self.named_parameters(remove_duplicate=False) if dirty else ():
            if id(parameter) in dirty and f"{prefix}{name}" in found:  # under every name it has
                found[f"{prefix}{name}"] = dirty[id(parameter)]
        return found

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MaskedGraph:
        super()._apply(fn, recurse)
        for layer in self.masked_parameters.values():
            layer.keep_mask_bool()
        self._tie_masks()
        self._adopt_parameters()
        return self

    def _adopt_parameters(self) -> None:
        for module in (*self.shell.modules(), *self._named_layers[0].values()):
            if isinstance(module, MaskedLayer) and not is_sharded(module.trained):
                module.adopt()

    def _tie_masks(self) -> None:
        for first, *others in self._tied[0]:
            for other in others:
                other._buffers["mask"] = first.mask

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
        anew = ("_compiled_call_impl", "recordings", "_graph", "_identity", "meta", "_places", "_shell", "kernels")
        state = {k: v for k, v in self.__dict__.items() if k not in (*anew, *_REGISTRIES)}
        clone.__dict__.update(copy.deepcopy(state, memo))
        clone._adopt(shell)
        recordings, shown = self.recordings.copied(self._graph)
        clone.__dict__.update(_identity=self._identity, meta=dict(self.meta), _places=None)
        clone.__dict__.update(recordings=recordings, _graph=shown)
        clone._find_readers()
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


_UNWRAP_FIRST = (
    "a MaskedGraph cannot be traced or scripted: its masks would become constants; work on the plain model, "
    "growfx.unwrap(net), which has zeros in their place"
)
