import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from breadth import some
from torch.utils.data import DataLoader
from training_nets import QUICK, Tiny, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx.errors import CheckpointError, ConfigError, DataError, GrowfxError
from growfx.methods.session import Stage
from growfx.runs.checkpoint import content_digest, read
from growfx.selection.density import random_masks
from growfx.training.config import describe_run
from growfx.training.progress import Progress
from growfx.training.start import train


@dataclass
class Doubling:
    """As small as a growing method can be: doubles random masks, stops after `rounds`, goes back one."""

    name = "doubling"
    rounds: int = 3
    epochs_per_round: int = 2
    seed: int = 0
    trace: list = field(default_factory=list, init=False)
    changes_masks = True
    needs_dense_gradient = False
    finished: bool = field(default=False, init=False)
    growing: bool = field(default=True, init=False)
    stop_reason: str = field(default="", init=False)
    noises: list = field(default_factory=list, init=False)
    steps: int = field(default=0, init=False)

    def attach(self, net, optimizer, *, total_steps, steps_per_epoch):
        self.net, self.optimizer = net, optimizer
        self.before: dict = {}
        self._draw(0.1)

    def begin(self, session):
        steps = session.steps_per_epoch
        self.options = session.options
        self.attach(session.net, session.optimizer, total_steps=steps * session.options.epochs, steps_per_epoch=steps)

    def next_stage(self):
        if self.growing:
            return Stage("round", self.epochs_per_round, len(self.trace), warmup=0.2, averaged=True)
        return None if self.finished else Stage("final", self.options.epochs)

    def end_stage(self, stage):
        self.finished = stage.kind == "final"

    def _draw(self, density):
        shapes = {name: tuple(layer.mask.shape) for name, layer in self.net.layers.items()}
        self.net.set_masks(random_masks(shapes, density, seed=self.seed))

    def step(self):
        self.steps += 1
        return False

    def report(self, accuracy, noise=None):
        if not self.growing:
            return
        entry = {"round": len(self.trace), "density": self.net.density, "nnz": self.net.nnz}
        self.trace.append({**entry, "val_accuracy": accuracy, "fit": None})
        self.noises.append(noise)
        if len(self.trace) < self.rounds:
            self.before = {k: v.clone() for k, v in self.net.state_dict().items()}
            self._draw(0.1 * 2 ** len(self.trace))
        else:
            self.net.load_state_dict(self.before)
            self.growing, self.stop_reason = False, "rounds are over"

    def state_dict(self):
        names = ("trace", "finished", "growing", "stop_reason", "noises", "steps", "before")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)


def doubling() -> Any:
    return Doubling()


def test_a_dense_network_learns_and_the_result_says_what_was_done():
    train_loader, val_loader = loaders()
    net = fresh_net()
    result = train(net, train_loader, val_loader, options=QUICK, epochs=8, test_loader=val_loader, progress=False)
    assert result.method == "dense"
    assert result.val_accuracy > 0.6
    assert result.test_accuracy == result.val_accuracy
    assert (result.epochs, result.steps) == (8, 48)
    assert (result.density, result.nnz, result.numel) == (1.0, net.numel, net.numel)
    assert result.mask_digest == net.mask_digest()
    assert result.dense_equivalent_epochs == pytest.approx(8)
    assert result.trace == []


def test_a_growing_method_runs_its_rounds_then_the_full_schedule_from_what_it_put_back():
    train_loader, val_loader = loaders()
    net, method = fresh_net(), doubling()
    result = train(net, train_loader, val_loader, method=method, options=QUICK, progress=False)
    assert [round(entry["density"], 2) for entry in result.trace] == [0.1, 0.2, 0.4]
    assert result.density == pytest.approx(0.2, abs=0.01)
    assert result.epochs == 3 * 2 + 3
    assert method.steps == result.steps == 6 * 9
    assert result.stop_reason == "rounds are over"
    # Every round and the final training cost their density, and no more.
    assert 2 * (0.1 + 0.2 + 0.4) * 0.3 < result.dense_equivalent_epochs < 9 * 0.8
    assert all(noise > 0 for noise in method.noises)
    for layer in net.layers.values():
        assert bool((layer.weight[~layer.mask] == 0).all())


def test_a_round_is_scored_on_averaged_weights_and_ends_near_a_rate_of_zero(tmp_path):
    train_loader, val_loader = loaders()
    train(fresh_net(), train_loader, val_loader, method=doubling(), options=QUICK, out=tmp_path / "run", progress=False)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rounds = [r for r in log if r["event"] == "round"]
    epochs = [r for r in log if r["event"] == "epoch"]
    assert len(rounds) == 3
    assert {"raw_accuracy", "noise", "standard_error", "val_accuracy", "density", "fit"} <= set(rounds[0])
    assert [r["phase"] for r in epochs] == ["round"] * 6 + ["final"] * 3
    # The last step of a round is one step short of the end of its cosine.
    assert epochs[1]["lr"] < 0.1 * QUICK.lr < epochs[0]["lr"]
    assert epochs[-1]["lr"] < 0.1 * QUICK.lr


def pwmpr() -> Any:
    """Three rounds of two epochs, as `doubling` has."""
    return growfx.methods.create(
        "pwmpr", seed_density=0.1, growth_ratio=2.0, max_density=0.4, growth_rounds="published"
    )


CUTS = [(doubling, epoch, step) for epoch, step in [(0, 3), (1, 0), (3, 4), (4, 0), (6, 2), (8, 5)]] + [
    (pwmpr, epoch, step) for epoch, step in [(1, 2), (4, 0), (7, 1)]
]


@pytest.mark.parametrize(("make", "epoch", "step"), some(CUTS, lambda cut: cut in CUTS[::3]))
def test_a_run_that_is_interrupted_and_resumed_ends_as_one_that_was_not(tmp_path, monkeypatch, make, epoch, step):
    """Epochs 0 to 5 are those of the growth rounds, two each; 6 to 8 the final training."""

    def run(path, **flags):
        train_loader, val_loader = loaders()
        torch.manual_seed(len(str(path)))  # what came before the run must not matter
        return train(
            net := fresh_net(),
            train_loader,
            val_loader,
            method=make(),
            options=QUICK,
            out=path,
            progress=False,
            **flags,
        ), net

    whole, net = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch, step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    resumed, again = run(tmp_path / "parts", resume=True)
    assert whole.epochs == 9
    assert content_digest(dict(again.state_dict())) == content_digest(dict(net.state_dict()))
    assert resumed == whole
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))
    logs = [[json.loads(x) for x in (tmp_path / p / "log.jsonl").read_text().splitlines()] for p in ("whole", "parts")]
    for records in logs:
        for record in records:
            record.pop("seconds", None)
    assert logs[0] == logs[1]


def test_a_damaged_newest_checkpoint_costs_an_epoch_and_nothing_else(tmp_path, monkeypatch, capfd):
    def run(path, **flags):
        train_loader, val_loader = loaders()
        net = fresh_net()
        return train(net, train_loader, val_loader, options=QUICK, out=path, progress=False, **flags), net

    whole, _ = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    latest = tmp_path / "parts" / "checkpoint" / "latest.pt"
    latest.write_bytes(latest.read_bytes()[:-500])
    resumed, _ = run(tmp_path / "parts", resume=True)
    assert resumed == whole
    assert "continuing from the previous one" in capfd.readouterr().err


def test_resuming_a_finished_run_gives_its_result_again(tmp_path):
    def run(**flags):
        train_loader, val_loader = loaders()
        return train(fresh_net(), train_loader, val_loader, options=QUICK, out=tmp_path / "r", progress=False, **flags)

    assert run() == run(resume=True)


def test_the_best_checkpoint_is_of_the_best_validation_accuracy(tmp_path):
    train_loader, val_loader = loaders()
    path = tmp_path / "run"
    train(fresh_net(), train_loader, val_loader, options=QUICK, epochs=6, out=path, progress=False)
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    best = max(r["val_accuracy"] for r in log)
    state = read(path / "checkpoint" / "best.pt")
    assert state["val_accuracy"] == state["best"] == best


def test_the_best_checkpoint_is_one_at_the_final_density(tmp_path):
    train_loader, val_loader = loaders()
    path = tmp_path / "run"
    # pruned to almost nothing in the last epoch, which cannot be as good as those before
    method = growfx.methods.create("gmp", density=0.005, start=0.9, end=1.0)
    train(fresh_net(), train_loader, val_loader, method=method, options=QUICK, epochs=8, out=path, progress=False)
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    sparse = [r["val_accuracy"] for r in log if r["nnz"] == log[-1]["nnz"]]
    assert max(sparse) < max(r["val_accuracy"] for r in log)
    assert read(path / "checkpoint" / "best.pt")["val_accuracy"] == max(sparse)


def test_a_run_its_method_refuses_leaves_no_folder_and_keeps_the_one_it_was_to_replace(tmp_path):
    train_loader, val_loader = loaders()
    path = tmp_path / "run"
    method = growfx.methods.create("imp", rewind_epochs=99)
    with pytest.raises(ConfigError, match="`rewind_epochs` = 99 is not before the end"):
        train(fresh_net(), train_loader, val_loader, method=method, options=QUICK, out=path, progress=False)
    assert not path.exists()
    train(fresh_net(), train_loader, val_loader, options=QUICK, out=path, progress=False)
    before = (path / "result.json").read_text()
    with pytest.raises(ConfigError, match="`rewind_epochs` = 99 is not before the end"):
        train(fresh_net(), train_loader, val_loader, method=method, options=QUICK, out=path, overwrite=True)
    assert (path / "result.json").read_text() == before


def test_the_run_folder_is_complete(tmp_path):
    train_loader, val_loader = loaders()
    path = tmp_path / "run"
    result = train(fresh_net(), train_loader, val_loader, options=QUICK, out=path, progress=False, about={"note": 1})
    names = {"config.json", "log.jsonl", "checkpoint", "result.json", "curve.png", "summary.txt", "artifact"}
    assert {p.name for p in path.iterdir()} == names
    assert json.loads((path / "result.json").read_text()) == dataclasses.asdict(result)
    config = json.loads((path / "config.json").read_text())
    assert config["train"]["epochs"] == 3
    assert config["note"] == 1
    assert "validation accuracy" in (path / "summary.txt").read_text()
    loaded = growfx.load(path / "artifact", model=Tiny())
    images = torch.randn(4, 1, 8, 8)
    state = read(path / "checkpoint" / "latest.pt")["net"]
    assert torch.equal(loaded.state_dict()["conv2.weight"], state["conv2.weight"])
    assert loaded(images).shape == (4, 4)


def test_resuming_with_another_method_option_or_network_is_refused_by_name(tmp_path):
    train_loader, val_loader = loaders()
    path = tmp_path / "run"
    train(fresh_net(), train_loader, val_loader, options=QUICK, out=path, progress=False)
    with pytest.raises(CheckpointError, match=r"`train\.epochs` = 3, now it is 4"):
        train(fresh_net(), train_loader, val_loader, options=QUICK, epochs=4, out=path, resume=True)
    with pytest.raises(CheckpointError, match=r"`method\.name` = None, now it is '\w+'"):
        train(fresh_net(), train_loader, val_loader, method=doubling(), options=QUICK, out=path, resume=True)
    other = growfx.wrap(Tiny(classes=5), torch.randn(1, 1, 8, 8))
    with pytest.raises(CheckpointError, match=r"`masks\.\w+` = "):
        train(other, train_loader, val_loader, options=QUICK, out=path, resume=True)


@pytest.mark.parametrize("missing", [("masks",), ("masks", "scope"), ("density",)])
def test_a_run_from_before_an_option_of_its_method_existed_had_the_default(tmp_path, monkeypatch, missing):
    """`config.json` edited by hand, and then a checkpoint that does not know of the option either."""
    train_loader, val_loader = loaders()
    path = tmp_path / "run"

    def gmp(**options: Any) -> growfx.methods.Method:
        return growfx.methods.create("gmp", **options)

    def without(*args: Any) -> dict[str, Any]:
        config = describe_run(*args)
        return {**config, "method": {k: v for k, v in config["method"].items() if k not in missing}}

    def again(method: Any) -> Any:
        return train(
            fresh_net(), train_loader, val_loader, method=method, options=QUICK, out=path, resume=True, progress=False
        )

    with monkeypatch.context() as patch:
        patch.setattr("growfx.training.start.describe_run", without)
        first = train(fresh_net(), train_loader, val_loader, method=gmp(), options=QUICK, out=path, progress=False)
    assert not {*missing} & json.loads((path / "config.json").read_text())["method"].keys()
    assert dataclasses.asdict(again(gmp())) == dataclasses.asdict(first)
    other = {"masks": "given"} if missing == ("masks",) else {"density": 0.31}
    with pytest.raises(CheckpointError, match=rf"`method\.{next(iter(other))}` = "):
        again(gmp(**other))
    config = json.loads((path / "config.json").read_text())
    config["method"]["density"] = 0.5
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"`method\.density` = 0\.5, now"):
        again(gmp())


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_a_checkpoint_there_is(tmp_path, epoch):
    train_loader, val_loader = loaders()
    path = tmp_path / "run"
    net, steps = fresh_net(), itertools.count()

    def spoil(net, _, output):
        return output * float("nan") if net.training and next(steps) >= (epoch - 1) * len(train_loader) else output

    net.register_forward_hook(spoil)
    with pytest.raises(GrowfxError, match=rf"loss is not finite in epoch {epoch}.*lower `lr`") as raised:
        train(net, train_loader, val_loader, options=QUICK, out=path, progress=False)
    assert ("the last checkpoint is kept" in str(raised.value)) == (epoch == 2)
    assert any((path / "checkpoint").glob("*")) == (epoch == 2)
    assert not (path / "result.json").exists()


def test_the_callers_random_numbers_are_left_alone():
    import random

    train_loader, val_loader = loaders()
    net = fresh_net()
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(3), random.random()
    torch.manual_seed(7)
    random.seed(7)
    train(net, train_loader, val_loader, options=QUICK, epochs=1, progress=False)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_the_seed_decides_the_outcome_and_another_one_changes_it():
    def weights(seed):
        train_loader, val_loader = loaders()
        net = fresh_net()
        train(net, train_loader, val_loader, options=QUICK, epochs=1, seed=seed, progress=False)
        return content_digest(dict(net.state_dict()))

    assert weights(1) == weights(1) != weights(2)


def test_a_loader_with_a_generator_of_its_own_is_seeded_too(tmp_path, monkeypatch):
    def run(path, **flags):
        train_loader, val_loader = loaders()
        own = DataLoader(train_loader.dataset, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(5))
        return train(fresh_net(), own, val_loader, options=QUICK, out=path, progress=False, **flags)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 1)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    run(tmp_path / "parts", resume=True)
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))
    assert whole.epochs == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sdg"}, "`optimizer` = `sdg` cannot be used"),
        ({"device": "abacus"}, "`device` = `abacus` cannot be used"),
        ({"epoch": 3}, "option `epoch` is unknown"),
        ({"resume": True}, "`resume` needs `out`"),
    ],
)
def test_a_bad_option_is_refused_by_name(changes, message):
    train_loader, val_loader = loaders()
    with pytest.raises(ConfigError) as caught:
        train(fresh_net(), train_loader, val_loader, progress=False, **changes)
    assert message in str(caught.value)


def test_a_plain_model_and_an_empty_loader_are_refused():
    train_loader, val_loader = loaders()
    with pytest.raises(ConfigError, match=r"expects a growfx\.MaskedGraph, got `Tiny`; make one with growfx\.wrap"):
        train(Tiny(), train_loader, val_loader)
    with pytest.raises(ConfigError, match=r"`method`.*got 'rigl'.*growfx\.methods\.create"):
        train(fresh_net(), train_loader, val_loader, method="rigl")
    with pytest.raises(ConfigError, match=r"`options`.*got dict"):
        train(fresh_net(), train_loader, val_loader, options={"epochs": 1})
    empty = DataLoader(train_loader.dataset, batch_size=1000, drop_last=True)
    with pytest.raises(DataError, match="training loader gives no batches"):
        train(fresh_net(), empty, val_loader, progress=False)
    unsized: Any = type("Unsized", (), {"__iter__": lambda self: iter(train_loader)})()
    with pytest.raises(DataError, match="has no length"):
        train(fresh_net(), unsized, val_loader, progress=False)
    with pytest.raises(DataError, match="validation loader gives no images"):
        train(fresh_net(), train_loader, [], progress=False)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda x, y: x, "a Tensor of Tensor"),
        (lambda x, y: {"x": x, "y": y}, "a dict of dict"),
        (lambda x, y: (x, y, y), "a tuple of Tensor, Tensor, Tensor"),
        (lambda x, y: (x, y.tolist()), "a tuple of Tensor, list"),
        (lambda x, y: (x, y[:-1]), "class numbers"),
        (lambda x, y: [], "a list of nothing"),
    ],
)
@pytest.mark.parametrize("wrong", ["training", "validation"])
def test_batches_of_another_form_are_refused(batch, words, wrong):
    train_loader, val_loader = ([tuple(each) for each in loader] for loader in loaders())
    chosen = train_loader if wrong == "training" else val_loader
    chosen[:] = [batch(*pair) for pair in chosen]
    with pytest.raises(DataError, match=r"pairs of tensors \(images, class numbers\)") as caught:
        train(fresh_net(), train_loader, val_loader, options=QUICK, progress=False)
    assert words in str(caught.value)


def test_what_gives_no_batches_at_all_and_classes_without_an_output_are_refused():
    train_loader, val_loader = ([tuple(each) for each in loader] for loader in loaders())
    with pytest.raises(DataError, match=r"the validation loader expects batches .*got NoneType"):
        train(fresh_net(), train_loader, None, progress=False)
    images, classes = train_loader[0]
    wrong = [(images, classes.clone().fill_(0).index_fill_(0, torch.tensor([0]), 99))]
    with pytest.raises(DataError, match="class numbers from 0 to 99, but the network has"):
        train(fresh_net(), wrong, val_loader, options=QUICK, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "rmsprop"])
def test_optimizers_of_timm_train_and_resume(tmp_path, monkeypatch, optimizer):
    def run(path, **flags):
        train_loader, val_loader = loaders()
        changes = {"optimizer": optimizer, "lr": 0.01, "clip_grad": 1.0, "label_smoothing": 0.1}
        return train(fresh_net(), train_loader, val_loader, options=QUICK, out=path, progress=False, **changes, **flags)

    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    run(tmp_path / "parts", resume=True)
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))


def test_progress_shows_rounds_epochs_accuracy_and_density(capfd):
    train_loader, val_loader = loaders()
    train(fresh_net(), train_loader, val_loader, method=doubling(), options=QUICK)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "round 0: density" in shown.err
    assert "stop: rounds are over" in shown.err
    assert "training: 100%" in shown.err


def test_progress_is_silent_when_not_wanted_but_for_notices(capfd):
    with Progress(False) as progress:
        stage = Stage("final", 3)
        progress.begin_stage(stage, 0)
        with progress.epoch(stage, 0, 5) as tick:
            tick()
        progress.stage_epoch(0.5, 0.1)
        progress.end_stage()
        assert capfd.readouterr().err == ""
        progress.say("a notice")
    assert capfd.readouterr().err == "a notice\n"
