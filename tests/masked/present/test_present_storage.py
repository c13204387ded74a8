"""Networks that keep values of present edges: the same training, state dicts and passes as with whole weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from breadth import representative, some
from method_nets import small_net, train_steps
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import growfx
from growfx import methods
from growfx.errors import CheckpointError, ConfigError, MaskError
from growfx.masked.present.optimizer_state import POINTWISE
from growfx.masked.present.storage import keep_present, storage_of


def start(storage: str, kernels: str = "dense") -> growfx.MaskedGraph:
    return growfx.use_kernels(small_net().train(), kernels, storage=storage)


def assert_same_state(found: Any, expected: Any) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


METHODS: dict[str, dict[str, Any]] = {
    "static": {"density": 0.3},
    "set": {"density": 0.3, "update_every": 2},
    "rigl": {"density": 0.3, "update_every": 2},
    "gmp": {"density": 0.3, "update_every": 2},
    "granet": {"density": 0.3, "update_every": 2},
    "snip": {"density": 0.3},
    "pwmpr": {"seed_density": 0.1, "max_density": 0.5, "epochs_per_round": 1},
    "gradient-growth": {"seed_density": 0.1, "max_density": 0.5, "epochs_per_round": 1},
}


def trained(storage: str, name: str, kernels: str, make: Callable[..., Any], **options: Any) -> Any:
    net = start(storage, kernels)
    optimizer = make(net.parameters())
    method = methods.create(name, **options)
    method.attach(net, optimizer, total_steps=30, steps_per_epoch=3)
    train_steps(net, optimizer, method, 10)
    return net, optimizer, method


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01)


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
@pytest.mark.parametrize("name", some(METHODS, representative))
def test_a_loop_of_ones_own_ends_with_the_same_bits_as_with_whole_weights(name, kernels):
    make = momentum if kernels == "dense" else adamw
    found = trained("present", name, kernels, make, **METHODS[name])[0]
    expected = trained("dense", name, kernels, make, **METHODS[name])[0]
    assert storage_of(found) == "present"
    assert found.mask_digest() == expected.mask_digest()
    assert_same_state(found, expected)


@pytest.mark.parametrize("name", ["static", "rigl"])
def test_signs_flip_by_products_of_present_values_too(name):
    options = {**METHODS[name], "sign_in": 1}
    found, expected = (trained(storage, name, "dense", momentum, **options)[0] for storage in ("present", "dense"))
    assert_same_state(found, expected)


def optimizer_class(name: str) -> Any:
    library = torch.optim if name.startswith("torch.") else timm.optim
    return getattr(library, name.rpartition(".")[2])


@pytest.mark.parametrize("name", some(sorted(POINTWISE), lambda name: name in sorted(POINTWISE)[::4]))
def test_the_optimizers_that_are_allowed_step_as_they_step_whole_weights(name):
    kind = optimizer_class(name)
    assert f"{kind.__module__}.{kind.__qualname__}" == name

    def make(parameters: Any) -> torch.optim.Optimizer:
        return kind(parameters, lr=0.01)

    found, expected = (trained(s, "set", "dense", make, **METHODS["set"])[0] for s in ("present", "dense"))
    assert found.mask_digest() == expected.mask_digest()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adafactor, timm.optim.Adafactor, timm.optim.AdamP])
def test_an_optimizer_of_shapes_is_refused_before_its_first_step(kind):
    net = start("present")
    before = copy.deepcopy(net.state_dict())
    optimizer = kind(list(net.parameters()))
    net(*net.example_inputs(2)).sum().backward()
    closure = {"closure": lambda: torch.zeros(())} if kind is torch.optim.LBFGS else {}
    with pytest.raises(ConfigError, match=rf"`{kind.__name__}`.*`AdamW`.*`SGD`.*`storage` = \"dense\""):
        optimizer.step(**closure)
    for name, parameter in net.named_parameters():
        if name.endswith("values"):
            assert torch.equal(before[name.replace("values", "weight")][net.masks[name[:-7]]], parameter.detach())


class RowMeans(torch.optim.Optimizer):
    """Of another library, with state that is not one value an edge."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = torch.zeros(3)


def test_state_that_cannot_follow_the_edges_is_refused_and_nothing_changes():
    net = start("present")
    optimizer = RowMeans(net.parameters())
    net(*net.example_inputs(2)).sum().backward()
    optimizer.step()
    name, layer = next(iter(net.layers.items()))
    values = layer.values.detach().clone()
    with pytest.raises(ConfigError, match=rf"`RowMeans`.*`{name}`.*`rows`.*re-indexed"):
        net.set_masks({name: ~layer.mask})
    assert torch.equal(layer.values.detach(), values)


def test_state_of_whole_weights_is_refused_by_name():
    dense, net = start("dense"), start("present")
    saved = torch.optim.Adam(dense.parameters())
    dense(*dense.example_inputs(2)).sum().backward()
    saved.step()
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.load_state_dict(saved.state_dict())
    net(*net.example_inputs(2)).sum().backward()
    with pytest.raises(CheckpointError, match=r"`exp_avg`.*present edge.*`storage`"):
        optimizer.step()


# -- state dicts and copies ---------------------------------------------------------------------------------------


def test_state_dicts_have_the_same_names_and_shapes_and_load_both_ways():
    present = trained("present", "set", "dense", momentum, **METHODS["set"])[0]
    dense = trained("dense", "rigl", "dense", momentum, **METHODS["rigl"])[0]
    for source, target in ((present, start("dense")), (dense, start("present"))):
        kept = storage_of(target)
        target.load_state_dict(source.state_dict())
        assert storage_of(target) == kept
        assert_same_state(target, source)


def test_a_plain_model_loads_its_weights_under_the_masks_that_are_there():
    net = start("present")
    plain = growfx.unwrap(start("dense"))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    net.load_state_dict(plain.state_dict())
    for name, layer in net.layers.items():
        assert torch.equal(layer.weight, torch.where(layer.mask, plain.get_parameter(f"{name}.weight"), 0))


def test_a_state_dict_that_does_not_fit_is_refused_as_torch_does():
    net = start("present")
    name, layer = next(iter(net.layers.items()))
    state, before = net.state_dict(), layer.values.detach().clone()
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}.weight"):
        net.load_state_dict({**state, f"{name}.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match=rf"Missing.*{name}.weight"):
        net.load_state_dict({key: value for key, value in state.items() if key != f"{name}.weight"})
    with pytest.raises(MaskError, match=rf"`{name}`"):
        net.load_state_dict({**state, f"{name}.mask": torch.ones(2, 2, dtype=torch.bool)})
    assert torch.equal(layer.values.detach(), before)


def test_training_that_is_resumed_ends_with_the_same_bits():
    options = METHODS["rigl"]
    net, optimizer, method = trained("present", "rigl", "dense", adamw, **options)
    saved = copy.deepcopy([part.state_dict() for part in (net, optimizer, method)])
    train_steps(net, optimizer, method, 5, 77)
    other = start("present")
    again, anew = adamw(other.parameters()), methods.create("rigl", **options)
    anew.attach(other, again, total_steps=30, steps_per_epoch=3)
    for part, state in zip((other, again, anew), saved, strict=True):
        part.load_state_dict(state)
    train_steps(other, again, anew, 5, 77)
    assert_same_state(other, net)


def test_a_copy_has_whole_weights_of_its_own():
    net = start("present")
    clone = copy.deepcopy(net)
    assert (storage_of(net), storage_of(clone)) == ("present", "dense")
    assert_same_state(clone, net)
    with torch.no_grad():
        next(clone.parameters()).add_(1)
    assert storage_of(net) == "present"


AVERAGES: dict[str, Callable[[Any], Any]] = {
    "timm": lambda net: ModelEmaV3(net, decay=0.9),
    "torch": AveragedModel,
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_are_those_of_whole_weights(kind):
    found = []
    for storage in ("present", "dense"):
        net, optimizer, method = trained(storage, "set", "dense", momentum, **METHODS["set"])
        average = AVERAGES[kind](net)
        for number in range(5):
            train_steps(net, optimizer, method, 1, number)
            average.update(net) if kind == "timm" else average.update_parameters(net)
        found.append(average.module)
    assert_same_state(*found)


# -- passes and artifacts -----------------------------------------------------------------------------------------


def test_passes_and_artifacts_are_those_of_whole_weights(tmp_path):
    nets = [trained(storage, "static", "dense", momentum, density=0.3)[0] for storage in ("present", "dense")]
    found, expected = (growfx.path_products(net) for net in nets)
    assert found.log_total == expected.log_total
    for name, score in expected.scores.items():
        assert torch.equal(found.scores[name], score)
    assert growfx.cost(nets[0]).to_json() == growfx.cost(nets[1]).to_json()
    for net, name in zip(nets, ("present", "dense"), strict=True):
        growfx.save(net, tmp_path / name)
    for file in (tmp_path / "dense").iterdir():
        assert (tmp_path / "present" / file.name).read_bytes() == file.read_bytes()
    assert_same_state(growfx.unwrap(nets[0]), growfx.unwrap(nets[1]))
    assert storage_of(nets[0]) == "present"


def test_a_pass_that_fails_leaves_values_of_present_edges():
    net = start("present")
    with pytest.raises(ConfigError):
        growfx.path_products(net, norm="none")
    assert storage_of(net) == "present"
    net.verify()


# -- what keeps whole weights -------------------------------------------------------------------------------------


class Reader(nn.Module):
    """One layer whose weight is read without calling it, two that share theirs, and one like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.first, self.second, self.plain = (nn.Linear(6, 6) for _ in range(4))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.second(self.first(nn.functional.linear(x, self.read.weight))))


def test_layers_whose_weight_others_use_keep_it_whole_and_train_as_before():
    nets = []
    for storage in ("present", "dense"):
        torch.manual_seed(0)
        net = growfx.wrap(Reader(), torch.randn(1, 6), density=0.5)
        growfx.use_kernels(net, "dense", storage=storage)
        optimizer = momentum(net.parameters())
        for number in range(3):
            net(torch.randn(4, 6, generator=torch.Generator().manual_seed(number))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        nets.append(net)
    assert_same_state(*nets)
    assert {name for name, layer in nets[0].layers.items() if layer.present is not None} == {"plain"}
    reasons = keep_present(nets[0])
    assert set(reasons) == set(nets[0].layers) - {"plain"}
    assert "without calling it" in reasons["read"]
    assert "`read` keeps its whole weight" in str(nets[0].kernel_report)
    assert nets[0].kernel_report.to_json()["storage"] == "present"


def test_an_optimizer_that_has_stepped_goes_along_and_one_that_has_not_is_refused():
    found, expected = [], []
    for storages, into in ((("dense", "present", "dense"), found), (("dense",) * 3, expected)):
        net = start("dense")
        optimizer = momentum(net.parameters())
        for number, storage in enumerate(storages):
            growfx.use_kernels(net, "dense", storage=storage)
            net(*net.example_inputs(2)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=number == 0)
        into.append(net)
    assert_same_state(found[0], expected[0])
    net = start("dense")
    optimizer = momentum(net.parameters())
    growfx.use_kernels(net, "dense", storage="present")
    net(*net.example_inputs(2)).sum().backward()
    with pytest.raises(ConfigError, match=r"`SGD`.*`storage` was changed.*`net.parameters\(\)`"):
        optimizer.step()


def test_storage_can_be_changed_back_and_forth():
    net, expected = start("present"), start("dense")
    assert storage_of(growfx.use_kernels(net, "dense")) == "present"
    growfx.use_kernels(net, "dense", storage="dense")
    assert_same_state(net, expected)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in expected.named_parameters()]


def test_an_unknown_storage_is_refused_with_what_is_allowed():
    net = start("dense")
    with pytest.raises(ConfigError, match=r"`storage`.*'presnt'.*`dense`, `present`.*did you mean `present`"):
        growfx.use_kernels(net, storage="presnt")
    assert net.kernel_report is not None
    assert storage_of(net) == "dense"


@pytest.mark.parametrize("net_first", [True, False])
@pytest.mark.parametrize("stepped", [True, False])
def test_an_optimizer_that_is_copied_along_is_refused_and_the_original_goes_on(net_first: bool, stepped: bool) -> None:
    net = start("present")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    method = methods.create("static", density=0.3)
    method.attach(net, optimizer, total_steps=4, steps_per_epoch=2)
    if stepped:
        train_steps(net, optimizer, method, 1)
    pair = copy.deepcopy((net, optimizer) if net_first else (optimizer, net))
    copied, other = pair if net_first else pair[::-1]
    copied(torch.randn(2, 3, 8, 8)).sum().backward()
    with pytest.raises(ConfigError, match="storage"):
        other.step()
    train_steps(net, optimizer, method, 1)
