"""Find out how an artifact's model can be rebuilt, and verify it by building it.

A model that was changed after it was made keeps the name it was made under. So `growfx.save` builds what `growfx.load`
would build, and compares settings and, on the example inputs, outputs with the network's.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.artifact.input_specs import GivenOutputs
from growfx.artifact.manifest import canonical
from growfx.artifact.model_settings import setting_differences
from growfx.artifact.remembered_inputs import outputs_of, specs_of, tensors_and_numbers
from growfx.errors import ArtifactError, ConfigError, one_line
from growfx.masked.graph import MaskedGraph
from growfx.masked.isolation import generators_restored
from growfx.masked.layers import MaskedLayer
from growfx.masked.module_copy import copy_modules, separate_hooks
from growfx.masked.twins import to_plain
from growfx.models.build import ModelIdentity, blueprint, build_unfilled, has_builder, likely_identity
from growfx.quiet import ignored_warnings
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RECORDED_CONSTANT

__all__ = ["FoundRecipe", "find_recipe"]

_SHOWN = 3
# Of the largest output: the same operators on the same weights, perhaps summed in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_FLOAT32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class FoundRecipe:
    """How a model can be rebuilt, as stored in an artifact.

    Attributes:
        recipe: `library`, `name` and `kwargs`; None where no name is known, or it would give another network.
        checked: whether what the recipe builds gave the network's outputs.
        notes: why there is no recipe, for people.
        unexpected: whether the model has a name, so that the user must be told that it is not used.
        outputs: what the network gives on the example inputs that are stored, None where that cannot be told.
    """

    recipe: dict[str, Any] | None = None
    checked: bool = False
    notes: tuple[str, ...] = ()
    unexpected: bool = False
    outputs: GivenOutputs | None = None


def find_recipe(net: MaskedGraph) -> FoundRecipe:
    """Find out how to build the plain model of `net` again; `net` is not changed.

    Settings are compared first: constructor arguments, classes, shapes, ties and functions decide. Outputs are compared
    on the example inputs in eval mode and, where hooks or other attributes differ, in train mode too.
    """
    with _undisturbed(net):
        try:
            ours = _plain_copy(net)
        except Exception as error:  # whatever copying an attribute of the user's raises
            return FoundRecipe(notes=(f"the network cannot be copied to be compared: {one_line(error)}",))
        outputs = outputs_of(ours, specs_of(net.example()))
        return dataclasses.replace(_recipe(net, ours), outputs=outputs)


def _recipe(net: MaskedGraph, ours: nn.Module) -> FoundRecipe:
    identity = net.identity if isinstance(net.identity, ModelIdentity) else likely_identity(ours)
    if identity is None:
        note = f"no name is known that builds this `{type(net.shell).__name__}`"
        return FoundRecipe(notes=(note,), unexpected=has_builder(ours))
    try:
        identity = dataclasses.replace(identity, kwargs=json.loads(canonical(identity.kwargs)))
    except ArtifactError as error:
        return FoundRecipe(notes=(f"the arguments of `{identity.spec}` cannot be stored: {error}",), unexpected=True)
    differences, checked = _compared(identity, ours, net)
    if differences:
        more = len(differences) - _SHOWN
        shown = "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        return FoundRecipe(notes=(f"the model is not what `{identity.spec}` builds: {shown}",), unexpected=True)
    recipe = {"kwargs": identity.kwargs, "library": identity.library, "name": identity.name}
    return FoundRecipe(recipe, checked)


@contextmanager
def _undisturbed(net: MaskedGraph) -> Generator[None]:
    """Restore the global generators afterwards, and silence the builders of other libraries."""
    devices = {t.device.index or 0 for t in net.parameters() if t.device.type == "cuda"}
    with generators_restored(sorted(devices)), torch.no_grad(), ignored_warnings():
        yield


def _plain_copy(net: MaskedGraph) -> nn.Module:
    """The plain model; parameters share their memory with the net's, buffers do not."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in net.shell.parameters()}
    memo |= {id(b): b.detach().clone() for b in net.shell.buffers()}
    model = copy_modules(net.shell, memo)
    separate_hooks(model)
    for layer in net.masked_parameters.values():
        copy.deepcopy(layer, memo).remove()
    for module in list(model.modules()):
        if isinstance(module, MaskedLayer):
            to_plain(module)
            for key in _TWIN_ATTRIBUTES & vars(module).keys():
                if key not in getattr(type(module), "__annotations__", {}):
                    del module.__dict__[key]
    for key in _OF_THE_GRAPH:
        model.__dict__.pop(key, None)
    for name in [n for n in model._buffers if n.startswith(RECORDED_CONSTANT)]:
        del model._buffers[name]
        model._non_persistent_buffers_set.discard(name)
    return model


_TWIN_ATTRIBUTES = {"_collecting", "_lent", "dense_gradient", "gate", "kernel", "present", "sharded"}
# What the net keeps of the graph it shows: names it has not had before are set on the shell.
_OF_THE_GRAPH = ("_lineno_map", "_prologue_start")


def _compared(identity: ModelIdentity, ours: nn.Module, net: MaskedGraph) -> tuple[list[str], bool]:
    """How `ours` differs from what `identity` builds, and whether outputs were compared."""
    try:
        plan = blueprint(identity)
        decisive = [d.text for d in setting_differences(ours, plan) if d.decisive]
        if decisive or any(p.is_meta for p in ours.parameters()):
            return decisive, False
        with next(ours.parameters(), torch.empty(0)).device:  # whatever the default is
            theirs = build_unfilled(identity, plan)
    except ConfigError as error:
        return [one_line(error)], False
    if {id(p) for p in theirs.parameters()} & {id(p) for p in net.parameters()}:
        return [], False  # a builder that gives the same model every time
    found = setting_differences(ours, theirs)
    decisive = [d.text for d in found if d.decisive]
    if decisive:
        return decisive, False
    _share_tensors(ours, theirs)
    example = net.example(2)
    verdicts: list[str | None] = []
    for training in (False, True) if found else (False,):
        verdicts.append(_output_difference(ours, theirs, example, training))
    different = next((verdict for verdict in verdicts if verdict), None)
    if different is not None:
        return [different, *(d.text for d in found)], True
    return [], verdicts[0] is not None


def _share_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    """Give `theirs` the weights of `ours`, as `growfx.load` would, and buffers with the same values."""
    tensor = next(ours.parameters(), torch.empty(0))
    floats = {p.dtype for p in ours.parameters() if p.is_floating_point()}
    theirs.to(device=tensor.device, dtype=floats.pop() if len(floats) == 1 else None)
    targets = theirs.state_dict(keep_vars=True)
    for name, value in ours.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            targets[name].data = value.data
        elif isinstance(value, Tensor):
            targets[name].data = value.detach().clone()


def _output_difference(ours: nn.Module, theirs: nn.Module, example: Inputs, training: bool) -> str | None:
    """How outputs and buffers differ, "" where they do not; None where `ours` does not run."""
    for inputs in (example, _as_weights(example, ours)):
        try:
            expected = _outputs(ours, inputs, training)
        except Exception:  # a detector in train mode, a network cast to another dtype than its example
            continue
        mode = "train" if training else "eval"
        try:
            found = _outputs(theirs, inputs, training)
        except Exception as error:
            return f"in {mode} mode that fails on the example inputs ({one_line(error)[:200]})"
        same = len(found) == len(expected) and all(map(_equal, found, expected))
        return "" if same else f"in {mode} mode its outputs on the example inputs differ"
    return None


def _as_weights(inputs: Inputs, model: nn.Module) -> Inputs:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return Inputs(*pytree.tree_map(cast, (inputs.args, dict(inputs.kwargs))))


def _outputs(model: nn.Module, inputs: Inputs, training: bool) -> list[Any]:
    for module in model.modules():
        module.training = training  # some models do more than that in their `train()`
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    result = list(tensors_and_numbers(model(*inputs.args, **inputs.kwargs)))
    return [*result, *(model.buffers() if training else ())]


def _equal(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return type(found) is type(expected) and found == expected
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if torch.equal(found, expected) or not expected.numel():
        return True
    if not (expected.is_floating_point() or expected.is_complex()):
        return False
    a, b = found.to(torch.complex128), expected.to(torch.complex128)
    scale = float(b.abs().nan_to_num(posinf=0.0).max())
    tolerance = _TOLERANCE.get(expected.dtype, _FLOAT32_TOLERANCE)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
