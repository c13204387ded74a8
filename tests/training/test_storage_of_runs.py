"""Runs of `growfx.train` that keep values of present edges: they end where runs on whole weights do, bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders, untimed

import growfx
from growfx.errors import CheckpointError, ConfigError
from growfx.masked.present.storage import storage_of
from growfx.runs.checkpoint import content_digest

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "static": {"density": 0.3},
    "rigl": {"density": 0.3, "update_every": 3},
    "gmp": {"density": 0.3, "update_every": 2},
    "snip": {"density": 0.3},
    "imp": {"density": 0.3, "levels": 1},
    "pwmpr": {"seed_density": 0.2, "max_density": 0.4, "epochs_per_round": 1, "sign_in": 1},
}


def run(storage: str, name: str = "rigl", net: Any = None, **changes: Any) -> tuple[growfx.MaskedGraph, Any]:
    net = fresh_net() if net is None else net
    method = growfx.methods.create(name, **METHODS.get(name, {}))
    changes = {"storage": storage, "progress": False, **changes}
    return net, growfx.train(net, *loaders(), method=method, options=QUICK, **changes)


def digest(net: growfx.MaskedGraph) -> str:
    return content_digest(dict(net.state_dict()))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_ends_with_the_same_bits_as_on_whole_weights(name):
    kernels = "sparse" if name in ("rigl", "pwmpr") else "dense"
    found, said = run("present", name, kernels=kernels)
    expected, plain = run("dense", name, kernels=kernels)
    assert (storage_of(found), storage_of(expected)) == ("present", "dense")
    assert digest(found) == digest(expected)
    assert untimed(dataclasses.asdict(said)) == untimed(dataclasses.asdict(plain))


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adamw", "clip_grad": 1e3}, {"accumulate": 2}, {"amp": "bf16"}], ids=str
)
def test_options_of_training_do_the_same_to_both(changes):
    found, expected = (run(storage, **changes)[0] for storage in ("present", "dense"))
    assert digest(found) == digest(expected)


def test_decay_is_of_the_same_tensors_though_values_have_one_dimension():
    found, expected = (run(storage, "static", weight_decay=0.5)[0] for storage in ("present", "dense"))
    assert digest(found) == digest(expected)
    assert digest(found) != digest(run("present", "static", weight_decay=0.0)[0])


@pytest.mark.parametrize("name", ["rigl", "pwmpr"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(name, tmp_path, monkeypatch):
    whole = run("present", name, out=tmp_path / "whole")[1]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 3)
        with pytest.raises(KeyboardInterrupt):
            run("present", name, out=tmp_path / "parts")
    assert run("present", name, out=tmp_path / "parts", resume=True)[1] == whole
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))


def test_a_checkpoint_of_another_storage_is_refused_by_name(tmp_path):
    run("present", "static", out=tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"`train.storage` = 'present', now it is 'dense'"):
        run("dense", "static", out=tmp_path / "run", resume=True)


def test_the_checkpoint_has_dense_shapes_that_a_network_with_whole_weights_loads(tmp_path):
    net = run("present", out=tmp_path / "run")[0]
    other = fresh_net()
    other.load_state_dict(final_state(tmp_path / "run")["net"])
    assert digest(other) == digest(net)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft masks": ("continuous", {}, r"`storage` = \"present\".*`continuous`.*soft masks"),
    "optimizer": ("static", {"optimizer": "adafactor"}, r"`Adafactor`.*`AdamW`.*`storage` = \"dense\""),
    "unknown": ("static", {"storage": "sparse"}, r"`storage`.*'sparse'.*dense.*present"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("before", ["dense", "present"])
def test_what_cannot_be_kept_so_is_refused_before_anything_is_trained(case, before, tmp_path):
    name, changes, message = REFUSED[case]
    net = growfx.use_kernels(fresh_net(), "dense", storage=before)
    state = digest(net)
    with pytest.raises(ConfigError, match=message):
        run(name=name, net=net, out=tmp_path / "run", **{"storage": "present", **changes})
    assert digest(net) == state
    assert storage_of(net) == before
    assert not (tmp_path / "run").exists()


def test_parameters_gradients_and_state_are_of_present_edges_only(monkeypatch):
    sizes: list[tuple[int, int, int]] = []
    step = torch.optim.SGD.step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        held = [p for group in self.param_groups for p in group["params"]]
        state = [
            value for values in self.state.values() for value in values.values() if isinstance(value, torch.Tensor)
        ]
        gradients = [p.grad for p in held if p.grad is not None]
        sizes.append((sum(map(torch.numel, held)), sum(map(torch.numel, gradients)), sum(map(torch.numel, state))))
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    net = run("present", "rigl")[0]
    most = net.nnz + sum(p.numel() for name, p in net.named_parameters() if not name.endswith("values"))
    assert len(sizes) == 18
    assert all(size == (most, most, most) for size in sizes)
