import pytest
import torch
from torch import nn
from torch.nn import functional as F

from growfx.commands.zoo.outputs import difference, enliven, leaves, run_followed, run_seeded, weight_layers


def test_equal_outputs_do_not_differ_and_rounding_is_allowed_unless_exact():
    a = torch.randn(4, 5)
    b = a * (1 + 1e-6)
    assert difference([a], [a.clone()], exact=True) == ""
    assert difference([a], [b]) == ""
    assert "differs by" in difference([a], [b], exact=True)
    assert "differs by" in difference([a], [a * 1.001])


@pytest.mark.parametrize(
    ("got", "text"),
    [
        ([], "0 outputs instead of 1"),
        ([torch.zeros(2, 3)], "(2, 3) instead of"),
        ([torch.zeros(3, 2).double()], "torch.float64 (3, 2) instead of"),
        (["a text"], "'a text' instead of a tensor"),
        ([torch.full((3, 2), torch.nan)], "differs by inf"),
    ],
)
def test_differences_of_kind_shape_and_dtype_are_named(got, text):
    assert text in difference([torch.arange(6.0).reshape(3, 2)], got)


@pytest.mark.parametrize(
    "blank", [torch.zeros(3), torch.empty(0, 4), torch.full((2, 2), 7.0), torch.full((3,), torch.nan)]
)
def test_outputs_that_tell_nothing_are_no_proof(blank):
    assert "nothing was compared" in difference([blank], [blank.clone()]) or "differs" in difference([blank], [blank])
    assert difference([blank], [blank.clone()]) != ""
    assert difference([blank.nan_to_num(), torch.randn(3)][::-1][:1], [torch.zeros(3)]) != ""


def test_enlivened_heads_scales_and_statistics_vary_but_drawn_weights_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(model[0].bias)
    model.register_parameter("scale", nn.Parameter(torch.full((8,), 1e-6)))
    weight = model[0].weight.clone()
    enliven(model)
    assert torch.equal(model[0].weight, weight)
    for tensor in (model[0].bias, model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
        assert tensor.unique().numel() == 4
    assert model.scale.min() > 0.01
    assert model[1].running_var.min() > 0


def test_a_seeded_run_repeats_itself_and_leaves_the_statistics_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    x = torch.randn(2, 3, 5, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (run_seeded(model, (x,), training=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(first[0], run_seeded(model, (x,), training=False)[0])


def test_outputs_in_containers_are_flattened_in_order():
    class Nested(nn.Module):
        def forward(self, x):
            return {"b": [x, x + 1], "a": (x + 2,)}

    assert [int(t) for t in run_seeded(Nested(), (torch.tensor(1),), training=False)] == [1, 2, 3]


class Uses(nn.Module):
    """Weights used in every way there is, and parameters that are no weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.functional = nn.Parameter(torch.randn(4, 4))
        self.transposed = nn.Parameter(torch.randn(4, 4))
        self.standardised = nn.Parameter(torch.randn(4, 4))
        self.table = nn.Parameter(torch.randn(4, 4))
        self.mixed = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.ones(4, 1))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = F.linear(self.linear(x), self.functional) + self.table
        x = F.linear(x, self.transposed.T)
        centred = self.standardised - self.standardised.mean(1, keepdim=True)
        x = F.linear(x, (centred / centred.std(1, keepdim=True)) * self.gain)
        x = F.linear(x, self.mixed * x.mean())  # a weight that depends on the data is an activation
        return self.attention(x, x, x, need_weights=False)[0]


def test_used_weights_are_followed_through_functions_and_transformations():
    expected = {
        "linear.weight",
        "functional",
        "transposed",
        "standardised",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    for training in (True, False):
        assert run_followed(Uses(), (torch.randn(2, 4, 4),), training)[1] == expected
    with torch.device("meta"):
        model = Uses()
    assert run_followed(model, (torch.empty(2, 4, 4, device="meta"),), False)[1] == expected


def test_weight_layers_are_convolutions_linear_layers_and_attentions():
    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 1), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.MultiheadAttention(2, 1))
    assert list(weight_layers(model)) == ["0", "2", "3", "3.out_proj"]


def test_blank_outputs_may_be_allowed_but_still_have_to_be_equal():
    assert difference([torch.zeros(3)], [torch.zeros(3)], blank=True) == ""
    assert "differs by" in difference([torch.zeros(3)], [torch.ones(3)], blank=True)


def test_a_single_number_tells_something_unless_it_is_zero():
    assert difference([torch.tensor([3.0])], [torch.tensor([3.0])]) == ""
    assert "nothing was compared" in difference([torch.tensor([0.0])], [torch.tensor([0.0])])


def test_tensors_inside_objects_are_leaves_and_cycles_end():
    class Box:
        def __init__(self):
            self.items = {"a": torch.zeros(1), "b": [torch.ones(1)]}
            self.itself = self

    assert [int(t) for t in leaves((Box(), torch.tensor(2)))] == [0, 1, 2]


def test_objects_of_named_classes_are_passed_over():
    class Cache:
        def __init__(self):
            self.keys = torch.ones(1)

    value = {"logits": torch.zeros(1), "cache": [Cache()]}
    assert [int(t) for t in leaves(value)] == [0, 1]
    assert [int(t) for t in leaves(value, without={"Cache"})] == [0]
