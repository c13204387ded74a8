import json
from dataclasses import dataclass

import numpy as np
import pytest

import growfx
from growfx.errors import ConfigError
from growfx.options import DataOptions, TrainOptions, as_json, parse_assignments
from growfx.selection.density import check_density


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "[1, inf)"),
        ("lr", 0.0, "(0, inf)"),
        ("lr", float("nan"), "(0, inf)"),
        ("momentum", 1.0, "[0, 1)"),
        ("round_warmup", 0.95, "[0, 0.9]"),
        ("ema_decay", -0.1, "[0, 1)"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_the_range(name, value, allowed):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**{name: value})
    assert f"`{name}`" in str(caught.value)
    assert allowed in str(caught.value)


def test_a_value_of_another_type_is_refused():
    with pytest.raises(ConfigError, match=r"`epochs` = 2\.5 is not of type int"):
        TrainOptions(epochs=2.5)
    with pytest.raises(ConfigError, match="`download` = 1 is not of type bool"):
        DataOptions(download=1)


def test_an_integer_is_taken_where_a_float_is_asked_for():
    assert TrainOptions(lr=1).lr == 1.0
    assert isinstance(TrainOptions(lr=1).lr, float)


def test_choices_are_listed_when_another_one_arrives():
    with pytest.raises(ConfigError, match="`augment` = 'flip' is unknown; allowed: `auto`, `crop`, `none`"):
        DataOptions(augment="flip")


def test_assignments_are_typed_as_the_fields_are():
    texts = ["lr=0.5", "epochs=3", "clip_grad=none", "batch_size=7", "download=true", "img_size=32"]
    values = parse_assignments(texts, {"train": TrainOptions, "data": DataOptions})
    assert values["train"] == {"lr": 0.5, "epochs": 3, "clip_grad": None}
    assert values["data"] == {"batch_size": 7, "download": True, "img_size": 32}
    assert values["model"] == {}


def test_assignments_survive_the_way_through_json():
    options = TrainOptions(lr=0.3, clip_grad=1.0, optimizer="adamw")
    texts = [f"{k}={v}" for k, v in as_json(options).items()]
    assert TrainOptions(**parse_assignments(texts, {"train": TrainOptions})["train"]) == options


def test_a_key_of_two_classes_goes_to_both():
    @dataclass(frozen=True)
    class Other:
        seed: int = 0

    assert parse_assignments(["seed=5"], {"train": TrainOptions, "other": Other}) == {
        "model": {},
        "train": {"seed": 5},
        "other": {"seed": 5},
    }


def test_model_arguments_are_literals_or_texts():
    values = parse_assignments(["model.in_chans=1", "model.act=relu", "model.depths=(1, 2)"], {})
    assert values["model"] == {"in_chans": 1, "act": "relu", "depths": (1, 2)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch=3", "option `epoch` is unknown; allowed: `epochs`"),
        ("epochs", "`--set epochs` has no value"),
        ("epochs=few", "`epochs` = `few` is not of type int"),
        ("clip_grad=big", "`clip_grad` = `big` is not of type float or none"),
    ],
)
def test_a_bad_assignment_is_refused_by_name(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_assignments([text], {"train": TrainOptions})
    assert message in str(caught.value)


def test_numbers_of_numpy_become_pythons_own_and_wrong_types_stay_refused():
    options = TrainOptions(lr=np.float64(0.1), epochs=np.int64(3), clip_grad=np.float32(0.5), compile=np.bool_(True))
    assert [type(options.lr), type(options.epochs), type(options.clip_grad), type(options.compile)] == [
        float,
        int,
        float,
        bool,
    ]
    assert options == TrainOptions(lr=0.1, epochs=3, clip_grad=0.5, compile=True)
    assert json.loads(json.dumps(as_json(options)))["epochs"] == 3
    method = growfx.methods.create("rigl", density=np.float64(0.1), update_every=np.int32(5), seed=np.uint8(2))
    assert method == growfx.methods.create("rigl", density=0.1, update_every=5, seed=2)
    assert check_density(np.float32(0.5)) == 0.5
    for wrong in ({"epochs": np.float64(3.0)}, {"lr": "0.1"}, {"lr": np.bool_(True)}, {"epochs": True}, {"lr": [0.1]}):
        with pytest.raises(ConfigError, match="is not of type"):
            TrainOptions(**wrong)
    with pytest.raises(ConfigError, match="out of range"):
        TrainOptions(lr=np.float64("nan"))
