"""Models of the transformers library, built from a configuration: text and image, called by position and by keyword."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growfx

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 3,
}
TEXT = {**TINY, "vocab_size": 50, "max_position_embeddings": 32}
IMAGE = {**TINY, "image_size": 16, "patch_size": 4}
MASKABLE = (nn.modules.conv._ConvNd, nn.Linear)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)).eval()


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)).eval()


def tokens(batch: int, length: int = 7) -> Tensor:
    return torch.randint(0, 50, (batch, length))


def assert_same(net: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    got, expected = net(*args, **kwargs), model(*args, **kwargs)
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


CASES = {"text": (bert, lambda batch: tokens(batch)), "image": (vit, lambda batch: torch.randn(batch, 3, 16, 16))}


@pytest.mark.parametrize("kind", CASES)
def test_a_model_is_recorded_faithfully_with_every_layer_masked(kind: str) -> None:
    build, draw = CASES[kind]
    model = build()
    net = growfx.wrap(model, (draw(2),))
    report = net.trace_report
    assert report.faithful
    assert not report.opaque
    assert not report.unmasked.keys() & dict(model.named_modules()).keys()  # parameters of no layer may be named
    assert set(net.layers) == {name for name, m in model.named_modules() if isinstance(m, MASKABLE)}
    assert_same(net, model, draw(3))
    inputs, outputs = draw(3), []
    for module in (net.train(), model.train()):
        torch.manual_seed(1)  # of the dropout
        outputs.append(module(inputs).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", CASES)
def test_every_layer_is_scored(kind: str) -> None:
    build, draw = CASES[kind]
    net = growfx.wrap(build(), (draw(2),))
    paths = growfx.path_products(net)
    assert math.isfinite(paths.log_total)
    assert not paths.off_path
    assert paths.scores.keys() == net.layers.keys()
    assert all(bool(torch.isfinite(s).all() & (s >= 0).all() & s.any()) for s in paths.scores.values())


def test_paths_of_a_text_model_begin_at_its_embeddings() -> None:
    net = growfx.wrap(bert(), (tokens(2),))
    expected = growfx.path_products(net).log_total
    for parameter in net.get_submodule("bert.embeddings.word_embeddings").parameters():
        parameter.data.mul_(100)
    assert growfx.path_products(net).log_total == pytest.approx(expected, rel=1e-12)


def test_other_lengths_keywords_labels_and_attention_masks_work_as_on_the_model() -> None:
    model = bert()
    net = growfx.wrap(model, (tokens(2),))
    ids = tokens(3, 5)
    padding = torch.ones_like(ids)
    padding[0, 3:] = 0
    assert_same(net, model, ids)
    assert_same(net, model, input_ids=ids)
    assert_same(net, model, input_ids=ids, attention_mask=padding)
    assert_same(net, model, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert_same(net, model, ids, labels=torch.tensor([0, 2, 1]))
    assert_same(net, model, ids, output_hidden_states=False)


def test_a_text_model_wrapped_with_an_attention_mask_is_masked_and_scored_too() -> None:
    model, ids = bert(), tokens(2)
    padding = torch.ones_like(ids)
    padding[0, 4:] = 0
    net = growfx.wrap(model, (ids, padding), density=0.5)
    assert net.trace_report.faithful
    assert set(net.layers) == {name for name, m in model.named_modules() if isinstance(m, MASKABLE)}
    plain = growfx.unwrap(net).eval()
    assert_same(net.eval(), plain, ids, padding)
    assert_same(net, plain, ids, torch.ones_like(ids))
    assert growfx.path_products(net).scores.keys() == net.layers.keys()


@pytest.mark.parametrize("kind", CASES)
def test_a_saved_network_loads_into_a_new_model(kind: str, tmp_path: Path) -> None:
    build, draw = CASES[kind]
    net = growfx.wrap(build(), (draw(2),), density=0.3).eval()
    growfx.save(net, tmp_path / "artifact")
    assert_same(growfx.load(tmp_path / "artifact", model=build()), net, draw(2))


@pytest.mark.parametrize("kind", CASES)
def test_base_sizes_record_on_the_meta_device(kind: str) -> None:
    with torch.device("meta"):
        if kind == "text":
            model = transformers.BertModel(transformers.BertConfig())
            inputs = (torch.zeros(1, 16, dtype=torch.long),)
        else:
            model = transformers.ViTForImageClassification(transformers.ViTConfig())
            inputs = (torch.zeros(1, 3, 224, 224),)
    net = growfx.wrap(model, inputs)
    assert net.trace_report.faithful
    assert set(net.layers) == {name for name, m in model.named_modules() if isinstance(m, MASKABLE)}
