"""Kernels of `growfx.train`: which ones ran, and that they change nothing but the time."""

import dataclasses
from typing import Any

import pytest
import torch
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx.errors import ConfigError
from growfx.runs.checkpoint import content_digest
from growfx.runs.folder import RunFolder
from growfx.runtime.train.library import training_status

built = pytest.mark.skipif(bool(training_status()), reason=training_status() or "the kernels are there")


def run(kernels: str, name: str = "static", **more: Any) -> tuple[growfx.MaskedGraph, Any]:
    net = fresh_net()
    method = growfx.methods.create(name, density=0.3)
    options = dataclasses.replace(QUICK, kernels=kernels)
    return net, growfx.train(net, *loaders(), method=method, options=options, progress=False, **more)


@built
@pytest.mark.parametrize("name", ["static", "rigl", "gmp"])
def test_sparse_kernels_end_where_dense_ones_do_but_for_rounding(name):
    sparse, said = run("sparse", name)
    dense, plain = run("dense", name)
    assert (plain.kernels["sparse"], plain.kernels["asked"]) == (0, "dense")
    assert said.kernels["sparse"] > 0
    assert set(said.kernels["layers"]) == set(sparse.layers)
    assert sparse.mask_digest() == dense.mask_digest()
    for key, value in dense.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(sparse.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@built
@pytest.mark.parametrize("kernels", ["auto", "sparse"])
def test_a_run_that_is_resumed_takes_the_kernels_it_took_before(kernels, tmp_path, monkeypatch):
    whole = run(kernels, out=tmp_path / "whole")[1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 3)
        with pytest.raises(KeyboardInterrupt):
            run(kernels, out=tmp_path / "parts")
    stored = RunFolder.open(tmp_path / "parts").checkpoints.load()[0]["kernels"]
    assert (stored is None) == (kernels == "dense")
    resumed = run(kernels, out=tmp_path / "parts", resume=True)[1]
    assert resumed == whole
    assert resumed.kernels == whole.kernels
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))


def test_sparse_kernels_of_which_none_is_taken_are_told_of():
    options = dataclasses.replace(QUICK, epochs=2, kernels="sparse", amp="fp16")
    method = growfx.methods.create("static", density=0.3)
    with pytest.warns(growfx.GrowfxWarning, match="`kernels` = 'sparse' has no effect: .*dense kernels") as seen:
        growfx.train(fresh_net(), *loaders(48), method=method, options=options, progress=False)
    assert len(seen) == 1


@built
def test_a_deterministic_run_times_nothing(monkeypatch):
    monkeypatch.setattr("growfx.runtime.train.choice._measure", lambda *_: pytest.fail("timed"))
    first, second = (run("auto", deterministic=True)[0] for _ in range(2))
    assert first.kernel_report.kernels == "auto"
    assert content_digest(dict(first.state_dict())) == content_digest(dict(second.state_dict()))


def test_an_unknown_choice_is_refused_before_anything_is_trained(tmp_path):
    net = fresh_net()
    before = content_digest(dict(net.state_dict()))
    with pytest.raises(ConfigError, match=r"`kernels`.*'fast'.*auto.*dense.*sparse"):
        growfx.train(net, *loaders(), options=QUICK, kernels="fast", out=tmp_path / "run", progress=False)
    assert content_digest(dict(net.state_dict())) == before
    assert not (tmp_path / "run").exists()


def test_without_a_compiler_training_goes_on_with_dense_kernels_and_says_why(monkeypatch):
    monkeypatch.setattr("growfx.runtime.train.switch.training_status", lambda: "there is no compiler")
    net, result = run("auto")
    assert (result.kernels["sparse"], result.kernels["asked"]) == (0, "dense")
    assert "there is no compiler" in str(net.kernel_report)
    same, _ = run("dense")
    assert content_digest(dict(net.state_dict())) == content_digest(dict(same.state_dict()))


@built
def test_the_test_accuracy_is_computed_as_the_artifact_computes_it(monkeypatch):
    net = fresh_net()
    options = dataclasses.replace(QUICK, kernels="sparse")
    method = growfx.methods.create("static", density=0.3)
    train_loader, val_loader = loaders()
    kernels = []
    evaluate = growfx.training.run.evaluate

    def noted(net, loader, device):
        kernels.append(getattr(net, "kernels", None) is not None)
        return evaluate(net, loader, device)

    monkeypatch.setattr("growfx.training.run.evaluate", noted)
    growfx.train(net, train_loader, val_loader, test_loader=val_loader, method=method, options=options, progress=False)
    assert kernels == [True] * 3 + [False]
    assert net.kernel_report.kernels == "sparse"
