import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from growfx.commands.zoo.gradients import reached_matrices, step, step_difference


def steps(model: nn.Module, other: nn.Module, given, seed: int = 1, training: bool = True) -> str:
    expected = step(model, dict(model.named_parameters()), given, seed, training)
    return step_difference(expected, step(other, dict(other.named_parameters()), given, seed, training))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))


class Rounded(nn.Module):
    """A linear map behind a rounding whose gradient is the author's (`honest`), or torch's: none."""

    def __init__(self, honest: bool):
        super().__init__()
        self.first, self.last, self.honest = nn.Linear(4, 4), nn.Linear(4, 2), honest

    def forward(self, x):
        y = self.first(x)
        return self.last(y + (y.round() - y).detach() if self.honest else y.round())


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_takes_the_same_step(training):
    model = small()
    assert steps(model, copy.deepcopy(model), (torch.randn(5, 4),), training=training) == ""


def test_outputs_that_differ_come_first():
    model, other = small(), small()
    assert steps(model, other, (torch.randn(5, 4),)).startswith("output 0 differs by")


def test_a_gradient_that_is_lost_is_named_though_outputs_are_equal():
    honest, lost = Rounded(True), Rounded(False)
    lost.load_state_dict(honest.state_dict())
    x = torch.randn(6, 4)
    assert torch.equal(honest(x), lost(x))
    problem = steps(honest, lost, (x,))
    assert problem.startswith("2 of 4 gradients: ")
    assert "`first." in problem


def test_a_gradient_where_there_was_none_is_named_unless_it_is_zero():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other = copy.deepcopy(model)
    model[0].requires_grad_(False)
    assert "`0.weight` has a gradient" in steps(model, other, (torch.randn(2, 3),))


@pytest.mark.parametrize(
    "draw",
    [lambda: float(torch.rand([])), lambda: float(np.random.rand()), random.random],  # noqa: NPY002
    ids=["torch", "numpy", "random"],
)
def test_a_branch_by_chance_shows_under_another_seed_whoever_draws(draw):
    class Lucky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) if draw() < 0.5 else x + 0 * self.layer(x)

    model = Lucky()
    layer, same = copy.deepcopy(model.layer), nn.Module()
    same.layer, same.forward = layer, layer.forward
    said = [steps(model, same, (torch.randn(2, 3),), seed) for seed in range(1, 9)]
    assert "" in said
    assert any(said)


def test_keyword_arguments_are_passed_by_name():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, *, x, scale=1.0):
            return {"y": self.layer(x) * scale}

    model = Keyed()
    x = torch.randn(2, 3)
    by_name = step(model, dict(model.named_parameters()), {"x": x, "scale": 2.0}, 1)
    both = step(model, dict(model.named_parameters()), ((), {"x": x, "scale": 2.0}), 1)
    assert torch.equal(by_name.outputs[0], 2 * model.layer(x))
    assert step_difference(by_name, both) == ""


def test_a_step_leaves_statistics_gradients_and_random_states_alone():
    model = small()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    step(model, dict(model.named_parameters()), (torch.randn(5, 4, generator=torch.Generator()),), 1, training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p for p in model.parameters() if p.grad is not None] == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_reached_matrices_are_neither_vectors_nor_embeddings_nor_norms_nor_idle():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm, self.idle = nn.Embedding(9, 4), nn.LayerNorm([3, 4]), nn.Linear(4, 4)
            self.positions, self.gain = nn.Parameter(torch.randn(1, 3, 4)), nn.Parameter(torch.ones(1, 1, 4))
            self.experts = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, ids):
            x = self.norm(self.words(ids) + self.positions) * self.gain
            return torch.einsum("bld,edf->bef", x, self.experts)

    model = Net()
    found = step(model, dict(model.named_parameters()), (torch.randint(9, (2, 3)),), 1, training=True)
    assert reached_matrices(model, [found]) == {"positions", "experts"}
