"""Every method through `growfx.train`: what the run ends with, that it can be interrupted, that it leaves no trace."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import some
from training_nets import QUICK, Tiny, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx import methods
from growfx.runs.checkpoint import content_digest
from growfx.training.start import train

# Short versions: a few updates, rounds, levels or cycles within four epochs of six steps.
QUICK_OPTIONS: dict[str, Any] = {
    "epochs_per_round": 1,
    "max_density": 0.4,
    "growth_ratio": 1.8,
    "update_every": 2,
    "levels": 2,
    "rewind_epochs": 1,
    "rounds": 2,
    "search_epochs": 2,
    "tickets": 2,
    "cycle_epochs": 1,
}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """An artifact to take masks from."""
    folder = tmp_path_factory.mktemp("source") / "artifact"
    net = fresh_net()
    methods.create("static", density=0.2).attach(
        net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1, steps_per_epoch=1
    )
    growfx.save(net, folder)
    return folder


def short(name: str, source: Path, **changes: Any) -> methods.Method:
    known = {field.name for field in dataclasses.fields(methods.kind_of(name)) if field.init}
    options = {"source": str(source), **QUICK_OPTIONS, **changes}
    return methods.create(name, **{k: v for k, v in options.items() if k in known})


def run(
    name: str, source: Path, out: Path, changes: dict[str, Any] | None = None, **flags: Any
) -> tuple[growfx.MaskedGraph, Any]:
    method = short(name, source, **(changes or {}))
    train_loader, val_loader = loaders()
    torch.manual_seed(len(str(out)))  # what came before the run must not matter
    net = fresh_net()
    result = train(
        net,
        train_loader,
        val_loader,
        method=method,
        options=QUICK,
        epochs=4,
        checkpoint_minutes=0,
        out=out,
        progress=False,
        **flags,
    )
    return net, result


KINDS = {"channel-growth", "imp", "pwmpr", "rigl", "snip"}


@pytest.mark.parametrize("name", some(methods.names(), lambda name: name in KINDS))
def test_every_method_trains_is_resumed_bit_for_bit_and_leaves_an_artifact(name, source, tmp_path, monkeypatch):
    net, result = run(name, source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, result.epochs // 2, 3)
        with pytest.raises(KeyboardInterrupt):
            run(name, source, tmp_path / "parts")
    again, resumed = run(name, source, tmp_path / "parts", resume=True)
    assert resumed == result
    assert content_digest(dict(again.state_dict())) == content_digest(dict(net.state_dict()))
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))

    assert (result.method, result.nnz, result.density) == (name, net.nnz, net.density)
    assert 0 < result.density < 1
    known = {field.name: field.default for field in dataclasses.fields(methods.kind_of(name))}
    density = known.get("density")
    if isinstance(density, float):
        assert net.nnz == round(density * net.numel)
    assert 0 < result.dense_equivalent_epochs < 1.4 * result.epochs
    net.verify()
    assert all(layer.gate is None and not layer.collects_gradient for layer in net.layers.values())

    loaded = growfx.load(tmp_path / "whole" / "artifact", model=Tiny())
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images), net.eval()(images))


@pytest.mark.parametrize(
    "epoch", some([1, 2, 3, 6], lambda epoch: epoch == 2), ids=["seed", "after the seed", "second round", "final"]
)
def test_growth_with_a_long_seed_round_and_initial_weights_is_resumed_bit_for_bit(epoch, source, tmp_path, monkeypatch):
    changes = {"seed_epochs": 2, "final_weights": "initial"}
    net, result = run("pwmpr", source, tmp_path / "whole", changes)
    rounds = len(result.trace)
    assert rounds > 2
    assert result.epochs == 2 + (rounds - 1) + 4
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch, 3)
        with pytest.raises(KeyboardInterrupt):
            run("pwmpr", source, tmp_path / "parts", changes)
    again, resumed = run("pwmpr", source, tmp_path / "parts", changes, resume=True)
    assert resumed == result
    assert content_digest(dict(again.state_dict())) == content_digest(dict(net.state_dict()))


@pytest.mark.parametrize(
    ("name", "changes"),
    some(
        [
            ("pwmpr", {"sign_in": 1, "price": "flops", "growth_rounds": "published"}),
            ("grow-prune", {"sign_in": 2}),
            ("rigl", {"sign_in": 1}),
        ],
        lambda case: case[0] == "pwmpr",
    ),
)
def test_products_and_prices_are_resumed_bit_for_bit(name, changes, source, tmp_path, monkeypatch):
    net, result = run(name, source, tmp_path / "whole", changes)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 3)
        with pytest.raises(KeyboardInterrupt):
            run(name, source, tmp_path / "parts", changes)
    again, resumed = run(name, source, tmp_path / "parts", changes, resume=True)
    assert resumed == result
    assert content_digest(dict(again.state_dict())) == content_digest(dict(net.state_dict()))
    loaded = growfx.load(tmp_path / "whole" / "artifact", model=Tiny())
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images), net.eval()(images))


def test_in_a_run_the_seed_is_trained_for_as_long_as_the_final_training(source, tmp_path):
    _, result = run("pwmpr", source, tmp_path / "long")
    assert result.epochs == 4 + (len(result.trace) - 1) + 4
    _, result = run("pwmpr", source, tmp_path / "short", {"growth_rounds": "published"})
    assert result.epochs == len(result.trace) + 4


@pytest.mark.parametrize("name", ["continuous", "snfs"])
def test_a_run_that_breaks_off_leaves_plain_layers(name, source, monkeypatch):
    net = fresh_net()
    train_loader, val_loader = loaders()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0, 3)
        with pytest.raises(KeyboardInterrupt):
            train(net, train_loader, val_loader, method=short(name, source), options=QUICK, epochs=4, progress=False)
    assert all(layer.gate is None and not layer.collects_gradient for layer in net.layers.values())
