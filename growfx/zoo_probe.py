"""Find inputs that a model itself takes, before anything is recorded: at its own size and at another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from growfx.zoo_compare import used_weights
from growfx.zoo_facts import one_line
from growfx.zoo_inputs import Form, other_forms

__all__ = ["Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """What the model takes.

    Attributes:
        form: of its inputs; `other`: the same at another height and width, None where it refuses (`refusal` says how).
        used: names of the weights that its convolutions, linear maps and attentions use, in eval and in train mode.
    """

    form: Form
    other: Form | None = None
    refusal: str = ""
    used: frozenset[str] = field(default_factory=frozenset)


def probe(model: nn.Module, forms: Sequence[Form], device: str) -> Probe:
    """Try `forms` in order; the first that the model takes in both modes, else in eval mode alone.

    Without values (device "meta") this takes a fraction of a forward. Raises what the model raises when it takes none.
    """
    alone: tuple[Form, set[str]] | None = None
    refusal: Exception | None = None
    for form in forms:
        try:
            used = _used(model, form, device, training=False)
        except Exception as error:
            refusal = refusal or error
            continue
        try:
            used |= _used(model, form, device, training=True)
        except Exception:
            alone = alone or (form, used)
            continue
        return _with_other(model, form, used, device)
    if alone is None:
        assert refusal is not None
        raise refusal
    return _with_other(model, *alone, device)


def _with_other(model: nn.Module, form: Form, used: set[str], device: str) -> Probe:
    refusal = ""
    for other in other_forms(form):
        try:
            _used(model, other, device, training=False)
        except Exception as error:
            refusal = one_line(error)
            continue
        return Probe(form, other, "", frozenset(used))
    return Probe(form, None, refusal, frozenset(used))


def _used(model: nn.Module, form: Form, device: str, training: bool) -> set[str]:
    return used_weights(model.train(training), form.inputs(2, seed=0, device=device))
