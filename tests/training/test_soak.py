"""Thousands of updates in one process, with options drawn at random: nothing drifts, nothing piles up."""

import gc
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growfx
from growfx import methods
from growfx.analysis.cost import CostMeter

UPDATES = 2000

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}


def net_of(draw: random.Random) -> growfx.MaskedGraph:
    width = draw.choice((5, 8, 11))
    model = nn.Sequential(
        nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(4 * width, 3)
    )
    return growfx.wrap(model, torch.randn(2, 2, 4, 4))


def exchanging(draw: random.Random) -> Any:
    name = draw.choice(("set", "rigl", "rigl-sg", "rigl-sm", "snfs", "mest"))
    options: dict[str, Any] = {
        "density": draw.uniform(0.1, 0.9),
        "distribution": draw.choice(("erk", "er", "uniform")),
        "update_every": draw.choice((1, 1, 1, 2)),
        "update_until": draw.uniform(0.8, 1.0),
        "drop_fraction": draw.uniform(0.2, 1.0),
        "decay": draw.choice(("cosine", "linear", "constant")),
        "seed": draw.randrange(1000),
    }
    if name == "mest":
        options["excess"] = 0.0
    return methods.create(name, **options)


def growing(draw: random.Random) -> Any:
    return methods.create(
        draw.choice(("pwmpr", "random-growth", "gradient-growth", "grow-prune")),
        seed_density=draw.uniform(0.05, 0.3),
        max_density=draw.uniform(0.7, 1.0),
        growth_ratio=draw.uniform(1.02, 1.2),
        epochs_per_round=1,
        tolerance=1e-6,
        seed=draw.randrange(1000),
    )


def check(net, optimizer, meter: CostMeter) -> None:
    """Mask, weight, optimizer state, counts and cost say the same."""
    net.verify()
    for name, layer in net.layers.items():
        assert layer.nnz == int(layer.mask.sum()), name
        assert layer.parameter.requires_grad, name
        assert layer.gate is None, name
        expected = torch.where(layer.mask, layer.parameter, 0).detach()
        assert torch.equal(layer.effective_weight.detach(), expected), name
        for value in optimizer.state.get(layer.parameter, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == layer.mask.shape:
                assert not value[~layer.mask].any(), name
    meter.read_masks()
    sparse = meter.cost.sparse({name: float(layer.mask.double().mean()) for name, layer in net.layers.items()})
    assert meter._share == pytest.approx(sparse / meter.cost.dense)


def life(net, draw: random.Random, growth: bool) -> Iterator[None]:
    """Train one method to its end on `net`; yields after each update."""
    net.set_masks({name: torch.ones_like(layer.mask) for name, layer in net.layers.items()})
    optimizer = OPTIMIZERS[draw.choice(sorted(OPTIMIZERS))](net.parameters())
    method = growing(draw) if growth else exchanging(draw)
    steps_per_epoch = 1 if growth else 3
    total = draw.randrange(20, 60)
    method.attach(net.train(), optimizer, total_steps=total, steps_per_epoch=steps_per_epoch)
    meter, edges = CostMeter(net), net.nnz
    reported = draw.random() < 0.2  # else growth follows its clock; the fit takes most of a report's time
    for number in range(total):
        images = torch.randn(4, 2, 4, 4)
        F.cross_entropy(net(images), torch.randint(0, 3, (4,))).backward()
        if draw.random() < 0.1:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        before = net.mask_digest()
        updated = method.step()
        optimizer.zero_grad()
        if growth:
            if reported:
                method.report(1 - 0.9 * math.exp(-0.05 * number) + 0.001 * draw.random())
            updated = net.mask_digest() != before
            assert net.nnz >= edges or not method.growing
        else:
            assert net.nnz == edges
            assert updated == (net.mask_digest() != before)
        if method.trace and growth and len(method.trace) > 1:
            assert [entry["nnz"] for entry in method.trace] == sorted(entry["nnz"] for entry in method.trace)
            assert method.trace[-1]["density"] == method.trace[-1]["nnz"] / net.numel
        edges = net.nnz
        if updated:
            check(net, optimizer, meter)
            yield
        if growth and not method.growing:
            return


def updates() -> Iterator[int]:
    draw, number = random.Random(7), 0
    net = net_of(draw)
    for lives in range(UPDATES):
        if lives % 10 == 9:
            net = net_of(draw)
        for _ in life(net, draw, growth=lives % 4 == 3):
            number += 1
            yield number
            if number == UPDATES:
                return


def resident() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_thousands_of_updates_with_random_options_leave_counts_exact_and_memory_as_it_was():
    objects, memory = [], []
    for number in updates():
        if number % (UPDATES // 4) == 0:
            gc.collect()
            objects.append(sum(issubclass(type(o), torch.Tensor | nn.Module) for o in gc.get_objects()))
            memory.append(resident())
    assert len(objects) == 4
    # what is alive is one network, its optimizer and its method, whichever they are at that moment
    assert max(objects[1:]) < objects[0] + 400
    assert memory[-1] < memory[0] + 32 * 2**20
