import copy
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from growfx.errors import ConfigError
from growfx.models.build import (
    ModelIdentity,
    blueprint,
    build_unfilled,
    create_model,
    default_input_shape,
    identity_of,
    remember,
)


def make_tiny(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width))


def give_text() -> str:
    return "no module"


def settings(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(t.shape)) for name, t in model.state_dict().items()]


def test_a_timm_name_builds_that_model_and_is_remembered():
    model = create_model("resnet10t", num_classes=7, in_chans=1)
    assert type(model) is type(timm.create_model("resnet10t"))
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 7)
    assert identity_of(model) == ModelIdentity("timm", "resnet10t", {"num_classes": 7, "in_chans": 1})


def test_a_torchvision_name_builds_that_model_and_is_remembered():
    model = create_model("torchvision/squeezenet1_1", num_classes=4)
    assert isinstance(model, torchvision.models.SqueezeNet)
    assert identity_of(model) == ModelIdentity("torchvision", "squeezenet1_1", {"num_classes": 4})


def test_a_callable_builds_its_model_and_is_remembered():
    model = create_model(f"{__name__}:make_tiny", width=5)
    assert settings(model) == settings(make_tiny(5))
    identity = identity_of(model)
    assert identity == ModelIdentity("python", f"{__name__}:make_tiny", {"width": 5})
    assert identity is not None
    assert identity.spec == f"{__name__}:make_tiny"


def test_the_memory_is_not_in_the_state_dict_and_survives_a_deepcopy():
    plain, model = timm.create_model("resnet10t"), create_model("resnet10t")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert identity_of(copy.deepcopy(model)) == identity_of(model)


@pytest.mark.parametrize("spec", ["resnet10t", "torchvision/squeezenet1_1"])
def test_the_spec_of_an_identity_builds_the_same_model_again(spec: str):
    model = create_model(spec, num_classes=3)
    identity = identity_of(model)
    assert identity is not None
    assert identity.spec == spec
    assert settings(create_model(identity.spec, **identity.kwargs)) == settings(model)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet10t", {"num_classes": 5}),
        ("resnet10t", {"in_chans": 1}),
        ("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 2}),
        ("vit_tiny_patch16_224.augreg_in21k", {}),
    ],
)
def test_a_model_made_by_timm_itself_is_recognised(name: str, kwargs: dict[str, Any]):
    model = timm.create_model(name, **kwargs)
    identity = identity_of(model)
    assert identity is not None
    assert (identity.library, identity.name) == ("timm", name)
    assert settings(create_model(identity.spec, **identity.kwargs)) == settings(model)


def test_a_timm_model_is_read_back_from_its_attributes_where_timm_recorded_no_arguments():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, in_chans=1)
    model.__dict__.pop("_model_args", None)
    identity = identity_of(model)
    assert identity is not None
    assert identity.kwargs == {"img_size": [32, 32], "num_classes": 2, "in_chans": 1}


def test_a_classifier_that_was_reset_is_part_of_the_identity():
    model = create_model("resnet10t", in_chans=1)
    assert identity_of(model) == ModelIdentity("timm", "resnet10t", {"in_chans": 1})
    model.reset_classifier(6)
    assert identity_of(model) == ModelIdentity("timm", "resnet10t", {"in_chans": 1, "num_classes": 6})


def test_a_blueprint_has_all_shapes_and_draws_no_random_number():
    state = torch.get_rng_state()
    plan = blueprint(ModelIdentity("timm", "resnet10t", {"num_classes": 3}))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(t.is_meta for t in plan.state_dict().values())
    assert settings(plan) == settings(timm.create_model("resnet10t", num_classes=3))


def test_a_model_made_by_torchvision_itself_is_recognised():
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=6)
    assert identity_of(model) == ModelIdentity("torchvision", "shufflenet_v2_x0_5", {"num_classes": 6})


def test_a_torchvision_model_with_another_setting_is_not_taken_for_the_usual_one():
    model = torchvision.models.squeezenet1_1(dropout=0.25)
    assert identity_of(model) is None
    swapped = torchvision.models.shufflenet_v2_x0_5()
    swapped.conv1[2] = nn.GELU()
    assert identity_of(swapped) is None


def test_an_own_model_has_no_identity_until_it_is_given_one():
    model = make_tiny()
    assert identity_of(model) is None
    identity = ModelIdentity("python", "mine:make")
    assert identity_of(remember(model, identity)) is identity
    assert identity_of(remember(model, None)) is None


def test_default_input_shape_follows_the_model():
    assert default_input_shape(make_tiny()) == (1, 3, 224, 224)
    assert default_input_shape(create_model("torchvision/squeezenet1_1")) == (1, 3, 224, 224)
    assert default_input_shape(create_model("resnet10t")) == (1, 3, 176, 176)
    assert default_input_shape(timm.create_model("resnet10t", in_chans=1)) == (1, 1, 176, 176)
    assert default_input_shape(timm.create_model("vit_tiny_patch16_224", img_size=32)) == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("spec", "kwargs", "text"),
    [
        ("resnet81", {}, r"`resnet81` is unknown; did you mean .*`resnet18`.*Allowed: a timm name"),
        ("torchvision/resnet81", {}, r"`torchvision/resnet81` is unknown; did .* `torchvision/resnet18`"),
        ("qqqq/zzzz", {}, r"no known name is close"),
        ("hf-hub:some/model", {}, r"`hf-hub:some/model` is unknown"),
        ("resnet10t.no_such_tag", {}, r"`resnet10t.no_such_tag` cannot be built .*no_such_tag"),
        ("resnet10t", {"no_such_option": 1}, r"`resnet10t` cannot be built .*no_such_option"),
        ("torchvision/resnet18", {"in_chans": 1}, r"`torchvision/resnet18` cannot be built .*in_chans"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, r"`weights` is not an argument"),
        ("no.such.module:make", {}, r"`no.such.module` cannot be imported"),
        (f"{__name__}:no_such", {}, r"has no callable `no_such`"),
        (f"{__name__}:give_text", {}, r"returned a `str`; it must return a torch.nn.Module"),
    ],
)
def test_a_spec_that_cannot_be_built_says_what_is_wrong(spec: str, kwargs: dict[str, object], text: str):
    with pytest.raises(ConfigError, match=text):
        create_model(spec, **kwargs)


def test_an_unknown_library_is_refused():
    with pytest.raises(ConfigError, match="`keras` is unknown; allowed: timm, torchvision, python"):
        ModelIdentity("keras", "x")


def test_importing_the_module_imports_no_model_library():
    code = "import sys, growfx.models; assert not {'timm', 'torchvision'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def built(spec: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    identity = identity_of(create_model(spec, **kwargs))
    assert identity is not None
    torch.manual_seed(1)
    filled = create_model(identity.spec, **identity.kwargs)
    torch.manual_seed(1)
    return filled, build_unfilled(identity, blueprint(identity))


@pytest.mark.parametrize(
    "spec", ["test_resnet", "test_vit", "test_convnext", "torchvision/resnet18", "test_efficientnet"]
)
def test_a_model_built_for_other_weights_is_the_usual_one_once_they_are_set(spec: str) -> None:
    filled, unfilled = built(spec)
    names = {name: t.shape for name, t in filled.named_buffers()} | {n: t.shape for n, t in filled.named_parameters()}
    assert names == {n: t.shape for n, t in [*unfilled.named_buffers(), *unfilled.named_parameters()]}
    for name, buffer in filled.named_buffers():
        assert torch.equal(unfilled.get_buffer(name), buffer)
    unfilled.load_state_dict(filled.state_dict())
    x = torch.rand(1, *default_input_shape(filled)[1:])
    with torch.no_grad():
        assert torch.equal(unfilled.eval()(x), filled.eval()(x))


def test_no_random_number_is_drawn_for_weights_that_are_set_later() -> None:
    identity = identity_of(create_model("test_resnet"))
    assert identity is not None
    draws: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            draws.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    plan = blueprint(identity)
    with Watch():
        build_unfilled(identity, plan)
    assert not {"normal_", "uniform_", "kaiming_normal_", "trunc_normal_"} & set(draws)
    with Watch():
        create_model("test_resnet")
    assert {"normal_", "uniform_", "kaiming_normal_"} & set(draws)


class Derived(nn.Module):
    """Holds a tensor computed from its parameter, where `place` says."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.constant_(self.linear.weight, 2.0)
        derived = self.linear.weight.detach().sum(0)
        if place == "buffer":
            self.register_buffer("table", derived, persistent=False)
        elif place == "attribute":
            self.table = derived
        elif place == "list":
            self.tables = [derived]
        else:
            self.number = float(derived[0])


@pytest.mark.parametrize("place", ["buffer", "attribute", "list", "number"])
def test_a_model_that_computes_from_its_parameters_is_filled(place: str) -> None:
    identity = ModelIdentity("python", f"{__name__}:Derived", {"place": place})
    model: Any = build_unfilled(identity, blueprint(identity))
    found = {"buffer": lambda: model.table[0], "attribute": lambda: model.table[0], "list": lambda: model.tables[0][0]}
    assert float(found[place]() if place in found else model.number) == 6.0
