import importlib.util
import json
import warnings

import pytest
from training_nets import QUICK, fresh_net, interrupt_at, loaders

import growfx
from growfx.errors import ConfigError
from growfx.training.start import train


def pwmpr():
    return growfx.methods.create("pwmpr", seed_density=0.1, growth_ratio=1.3, max_density=0.4, epochs_per_round=1)


def run(path, method=None, **flags):
    train_loader, val_loader = loaders()
    return train(fresh_net(), train_loader, val_loader, method=method, options=QUICK, out=path, progress=False, **flags)


def read(path):
    """Tag -> list of (step, value), as TensorBoard shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its imports announce of one another
        accumulation = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulation.EventAccumulator(str(path / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_records(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, pwmpr(), tensorboard=True)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    epochs = [r for r in log if r["event"] == "epoch"]
    rounds = [r for r in log if r["event"] == "round"]
    # the first round is longer than the others
    ends = list({r["stage"]: r["steps"] for r in epochs if r["phase"] == "round"}.values())
    found = read(tmp_path)
    assert found["train/loss"] == [(r["steps"], pytest.approx(r["train_loss"])) for r in epochs]
    assert found["train/lr"] == [(r["steps"], pytest.approx(r["lr"])) for r in epochs]
    assert found["network/density"] == [(r["steps"], pytest.approx(r["density"])) for r in epochs]
    validated = [r for r in epochs if r["val_accuracy"] is not None]
    assert found["validation/accuracy"] == [(r["steps"], pytest.approx(r["val_accuracy"])) for r in validated]
    last = epochs[-1]
    assert found["cost/dense_equivalent_epochs"][-1] == (18 + ends[-1], pytest.approx(last["dense_equivalent_epochs"]))
    scored = [(step, pytest.approx(r["val_accuracy"])) for step, r in zip(ends, rounds, strict=True)]
    assert found["round/accuracy"] == scored
    fits = [(step, r["fit"]) for step, r in zip(ends, rounds, strict=True) if r["fit"]]
    assert fits
    for key in ("A0", "Ainf", "k", "x0", "gain", "gain_error"):
        expected = [(step, pytest.approx(fit[key], rel=1e-5)) for step, fit in fits if fit[key] is not None]
        assert found[f"fit/{key}"] == expected


def test_a_continued_run_goes_on_where_its_checkpoint_was_and_an_overwritten_one_begins_anew(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tensorboard=True)
    assert [step for step, _ in read(tmp_path)["train/loss"]] == [6, 12]
    run(tmp_path, tensorboard=True, resume=True)
    assert [step for step, _ in read(tmp_path)["train/loss"]] == [6, 12, 18]
    run(tmp_path, overwrite=True)
    assert not (tmp_path / "tensorboard").exists()
    run(tmp_path, tensorboard=True, resume=True)  # who looks on does not matter to a run


def test_tensorboard_without_its_package_or_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package `tensorboard`: pip install tensorboard"):
        run(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="`tensorboard` writes into the run folder; give `out`"):
        run(None, tensorboard=True)
