"""The fast copy of a module tree against `copy.deepcopy`."""

import collections
import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations

from growfx.masked.module_copy import copy_modules
from growfx.masked.twins import to_twin


class Odd(nn.Module):
    """Shares a module, names another one in a plain attribute, and holds lists and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding_mode="reflect")
        self.again = self.first
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.missing = None
        self.alias = [self.blocks[0], {"norm": self.blocks[1]}]
        self.table = torch.arange(3)
        self.cache: dict[str, torch.Tensor] = {"a": torch.ones(2)}
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_a_copy_has_its_own_modules_and_keeps_their_relations() -> None:
    model = Odd().eval()
    made = copy_modules(model, {})
    assert made.first is made.again
    assert made.first is not model.first
    assert made.alias[0] is made.blocks[0]
    assert made.alias[1]["norm"] is made.blocks[1]
    made.cache["b"] = torch.zeros(1)
    assert list(model.cache) == ["a"]
    assert not made.training
    expected = copy.deepcopy(model)
    assert {k: v.tolist() for k, v in made.state_dict().items()} == {
        k: v.tolist() for k, v in expected.state_dict().items()
    }
    assert str(made) == str(expected)
    assert made._non_persistent_buffers_set == {"scratch"}
    made.first.register_forward_hook(lambda *_: None)
    assert not model.first._forward_hooks


def test_what_the_memo_names_is_shared() -> None:
    model = Odd()
    made = copy_modules(model, {id(p): p for p in model.parameters()})
    assert made.first.weight is model.first.weight
    assert made.scratch is not model.scratch


def test_a_twin_is_copied_with_a_mask_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    to_twin(model[0]).mask[0] = False
    model(torch.ones(1, 3)).sum().backward()  # a layer in training remembers tensors that no copy can be made of
    made = copy_modules(model, {})
    made[0].mask[1] = False
    assert int(model[0].mask.sum()) == 6
    assert made[0](torch.ones(1, 3))[0, 0] == made[0].bias[0]


def test_modules_with_a_copy_of_their_own_are_left_to_it() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    made, x = copy_modules(model, {}), torch.randn(2, 3)
    assert torch.equal(made(x), model(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.gain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.gain + self.shift


def test_modules_that_look_at_their_parts_when_they_are_copied_are_copied_whole() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(Inner(), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))))
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    model = nn.Sequential(collections.OrderedDict(a=traced, b=nn.Sequential(compiled), c=Around(traced))).eval()
    copied = copy_modules(model, {})
    x = torch.randn(3, 4)
    assert torch.equal(copied.a(x), model.a(x))
    assert copied.state_dict().keys() == model.state_dict().keys()
    for name, value in copied.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    theirs = {id(part) for part in model.modules()}
    assert not any(id(part) in theirs for part in copied.modules())
    assert copied.c.whole is copied.a
    assert copied.b[0]._orig_mod[0].weight is not model.b[0]._orig_mod[0].weight


class Around(nn.Module):
    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole
