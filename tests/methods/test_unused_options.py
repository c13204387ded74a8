"""Options of methods that have no effect: told exactly where two values of them train the same network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import growfx
from growfx.methods.stepwise.dynamic import RigL
from growfx.methods.unused import Use, stages_of, unused_of

STEPS = 8
GIVEN = {"masks": "given"}
ONCE = {"budget": "params=0.6", "schedule": "once", "start": 0.25}
DENSE = {"density": 0.3, "update_every": 2}
EXCHANGE = {"density": 0.4, "update_every": 2, "drop_fraction": 0.5}

# Method, what it is created with, an option with a value that is not the default, and whether it is told of.
ROWS: list[tuple[str, dict[str, Any], str, Any, bool]] = [
    ("channel-prune", ONCE, "end", 0.9, True),
    ("channel-prune", ONCE, "update_every", 3, True),
    ("channel-prune", {"budget": "params=0.6", "update_every": 1}, "end", 0.9, False),
    ("channel-prune", {**ONCE, "start": 0.0, "score": "taylor"}, "update_every", 3, False),
    ("static", GIVEN, "distribution", "uniform", True),
    ("static", {"density": 0.3}, "distribution", "uniform", False),
    ("mest", {**GIVEN, "update_every": 2}, "distribution", "uniform", True),
    ("granet", DENSE, "distribution", "uniform", True),
    ("granet", DENSE, "masks", "magnitude", True),
    ("granet", {**DENSE, "initial_density": 0.7}, "masks", "magnitude", False),
    ("granet", {**DENSE, "initial_density": 0.7}, "distribution", "uniform", False),
    ("set", {"density": 0.4}, "drop_fraction", 0.6, True),
    ("set", {"density": 0.4, "update_every": 8}, "decay", "constant", True),
    ("set", EXCHANGE, "update_until", 0.3, False),
    ("set", {"density": 0.4, "update_every": 2}, "drop_fraction", 0.6, False),
    ("snfs", {"density": 0.4}, "averaging", 0.1, True),
    ("mest", {"density": 0.4}, "excess", 0.2, True),
    ("mest", {"density": 0.4, "update_every": 2}, "excess", 0.4, False),
    ("snip", {"density": 0.4}, "score_batches", 3, True),
    ("pwmpr", {"seed_density": 0.3, "seed_epochs": 1}, "growth_rounds", "adaptive", True),
    ("pwmpr", {"seed_density": 0.3, "epochs_per_round": 1}, "growth_rounds", "adaptive", False),
]


def attached(name: str, **options: Any) -> tuple[growfx.MaskedGraph, list[str]]:
    """The network after a few steps in a loop of plain torch, and what was warned of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3))
    net = growfx.wrap(model, torch.randn(2, 6), density=0.5 if options.get("masks") == "given" else 1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        method = growfx.methods.create(name, **options)
        method.attach(net, optimizer, total_steps=STEPS, steps_per_epoch=STEPS // 2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(16, 6, generator=generator)
        nn.functional.cross_entropy(net(images), images[:, :3].argmax(1)).backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    return net, [str(warning.message) for warning in seen]


@pytest.mark.parametrize(("name", "options", "option", "value", "told"), ROWS)
def test_an_option_is_told_of_where_it_changes_nothing(name, options, option, value, told):
    plain, before = attached(name, **options)
    changed, seen = attached(name, **{**options, option: value})
    same = all(map(torch.equal, plain.state_dict().values(), changed.state_dict().values()))
    messages = [message for message in seen if f"`{option}` = {value!r}" in message]
    assert (same, len(messages)) == (told, int(told)), seen
    assert not [message for message in before if f"`{option}` =" in message]


@pytest.mark.parametrize("options", [{"update_every": 9}, {"update_every": 4, "update_until": 0.5}], ids=str)
def test_a_training_too_short_for_an_update_is_told_of_where_options_of_updates_were_given(options):
    net, seen = attached("set", density=0.4, **options)
    start, _ = attached("static", density=0.4)
    assert net.mask_digest() == start.mask_digest()
    (message,) = seen
    assert all(f"`{name}` = {value}" in message for name, value in options.items())
    assert f"{STEPS} steps has no update" in message


@pytest.mark.parametrize("name", growfx.methods.names())
def test_defaults_are_not_told_of(name):
    assert not unused_of(Use(growfx.methods.create(name), total_steps=1, own_loop=True))


def test_a_method_of_others_may_have_options_of_any_type_and_name():
    @dataclass(frozen=True)
    class Weighted(RigL):
        name: ClassVar[str] = "weighted"
        weights: np.ndarray | None = None
        shares: torch.Tensor = field(default_factory=lambda: torch.ones(3))
        unused: float = 0.5  # pyright: ignore
        stages: int = 3  # pyright: ignore

    method = Weighted(density=0.4, drop_fraction=0.6, weights=np.ones(3), unused=0.2, stages=4)
    assert set(unused_of(Use(method, total_steps=1))) == {"drop_fraction"}
    assert stages_of(method) is None


def test_stages_are_known_where_the_class_that_chooses_them_says_so():
    class Repeated(RigL):
        def next_stage(self) -> Any:
            return super().next_stage()

    class Said(Repeated):
        stages = ("search", "final")

    assert stages_of(RigL(density=0.4)) == ("final",)
    assert stages_of(Repeated(density=0.4)) is None
    assert stages_of(Said(density=0.4)) == ("search", "final")
    assert all(stages_of(growfx.methods.create(name)) for name in growfx.methods.names())


def test_a_table_names_options_that_there_are():
    for name in growfx.methods.names():
        kind = growfx.methods.kind_of(name)
        named = {option for base in kind.__mro__ for row in vars(base).get("unused", ()) for option in row.options}
        assert named <= set(kind.__dataclass_fields__)
        assert set(kind.stages) <= {"round", "level", "search", "base", "cycle", "final"}
