"""Masks taken from runs and artifacts, trained from other weights."""

import pytest
import torch
from method_nets import OPTIMIZERS, small_net, train_steps
from torch import nn
from training_nets import QUICK, Tiny, fresh_net, interrupt_at, loaders

import growfx
from growfx import methods
from growfx.errors import ArtifactError, CheckpointError, ConfigError
from growfx.runs import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of another method."""
    folder = tmp_path_factory.mktemp("ticket") / "run"
    torch.set_num_threads(1)
    train(folder, methods.create("rigl", density=0.2, update_every=2))
    return folder


def train(out, method, net=None, **options):
    net = fresh_net() if net is None else net
    growfx.train(net, *loaders(), method=method, options=QUICK, out=out, progress=False, **options)
    return net


def attached(net, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = methods.create("ticket", **options)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
    return method, optimizer


def counts(net) -> dict[str, int]:
    return {name: layer.nnz for name, layer in net.layers.items()}


@pytest.mark.parametrize("place", ["", "artifact", "artifact/*.safetensors"])
def test_a_run_and_its_artifact_give_the_masks_the_run_ended_with(run, place):
    net, weights = fresh_net(), fresh_net().state_dict()
    attached(net, source=str(next(run.glob(place)) if place else run))
    reference = checkpoint.read(run / "checkpoint" / "latest.pt")["net"]
    for name, layer in net.layers.items():
        assert torch.equal(layer.mask, reference[f"{name}.mask"])
        assert torch.equal(layer.parameter.detach(), torch.where(layer.mask, weights[f"{name}.weight"], 0))
    assert 0 < net.density < 0.25


def test_a_run_without_an_artifact_gives_the_masks_of_its_checkpoint(run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "artifact")
    nets = fresh_net(), fresh_net()
    for net, source in zip(nets, (run, copy), strict=True):
        attached(net, source=str(source))
    assert nets[0].mask_digest() == nets[1].mask_digest()
    (copy / "checkpoint" / "latest.pt").unlink()
    with pytest.raises(CheckpointError, match=r"latest\.pt` is not there"):
        attached(fresh_net(), source=str(copy))


def test_a_ticket_keeps_its_masks_through_training_and_resumes(run, tmp_path, monkeypatch):
    method = methods.create("ticket", source=str(run))
    whole = train(tmp_path / "whole", method)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 2)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", methods.create("ticket", source=str(run)))
    again = train(tmp_path / "cut", methods.create("ticket", source=str(run)), resume=True)
    source = fresh_net()
    attached(source, source=str(run))
    assert whole.mask_digest() == again.mask_digest() == source.mask_digest()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert {entry["nnz"] for entry in method.trace} == {source.nnz}


def test_shuffled_masks_have_the_same_counts_in_every_layer_at_random_places(run):
    straight, *shuffled = (fresh_net() for _ in range(4))
    attached(straight, source=str(run))
    for net, seed in zip(shuffled, (1, 1, 2), strict=True):
        attached(net, source=str(run), shuffle=True, seed=seed)
        assert counts(net) == counts(straight)
    digests = [net.mask_digest() for net in (straight, *shuffled)]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3


def test_every_place_of_a_layer_is_as_likely_in_a_shuffle(tmp_path):
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4))
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, :3] = True
    net.set_masks({"0": mask})
    growfx.save(net, tmp_path / "artifact")
    seen = torch.zeros(3, 4)
    for seed in range(400):
        attached(net, source=str(tmp_path / "artifact"), shuffle=True, seed=seed)
        seen += net.layers["0"].mask
    assert seen.sum() == 1200
    assert (seen - 100).abs().max() < 4.5 * (400 * 0.25 * 0.75) ** 0.5


class Position(nn.Module):
    """A layer that no path crosses: it is fed by a constant."""

    def __init__(self):
        super().__init__()
        self.fc, self.place = nn.Linear(4, 3), nn.Linear(2, 3)
        self.register_buffer("table", torch.randn(1, 2))

    def forward(self, x):
        return self.fc(x) + self.place(self.table)


def test_layers_off_every_path_take_their_masks_too(tmp_path):
    torch.manual_seed(0)
    model = Position()
    net = growfx.wrap(model, torch.randn(1, 4))
    assert "place" in growfx.path_products(net).off_path
    net.set_masks({"place": torch.tensor([[True, False], [False, True], [True, True]])})
    growfx.save(net, tmp_path / "artifact")
    other = growfx.wrap(Position(), torch.randn(1, 4))
    method, optimizer = attached(other, source=str(tmp_path / "artifact"))
    assert other.mask_digest() == net.mask_digest()
    state = method.state_dict()
    method.load_state_dict(state)
    other(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert method.step() is False
    other.verify()


def test_a_ticket_needs_a_source_before_it_is_used():
    method = methods.create("ticket")
    net = small_net()
    with pytest.raises(ConfigError, match="method `ticket` has no `source`; give the path of a finished run"):
        method.attach(net, OPTIMIZERS["sgd"](net), total_steps=4, steps_per_epoch=2)
    with pytest.raises(ConfigError, match="method `ticket` is not attached"):
        train_steps(net, OPTIMIZERS["sgd"](net), method, 1)
    with pytest.raises(ConfigError, match="`shuffle` = 'yes' is not of type bool"):
        methods.create("ticket", shuffle="yes")


def test_what_is_no_source_says_why(run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"`source` = `.*nowhere` is not there; give the path"):
        attached(fresh_net(), source=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"the folder has no `config\.json`, so it holds no artifact"):
        attached(fresh_net(), source=str(tmp_path / "empty"))
    (tmp_path / "text").write_text("masks")
    with pytest.raises(ArtifactError, match="not a safetensors file, so not an artifact"):
        attached(fresh_net(), source=str(tmp_path / "text"))
    interrupt_at(monkeypatch, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "half", methods.create("static"))
    with pytest.raises(ConfigError, match="is a run that has not finished, so its masks are not its last"):
        attached(fresh_net(), source=str(tmp_path / "half"))


def test_masks_of_another_network_are_refused_by_the_names_of_its_layers(run):
    with pytest.raises(ConfigError, match=r"no masks of `stem`, `block`, `wide`; .*no masked layers `conv1`, `conv2`"):
        attached(small_net(), source=str(run))
    wider = growfx.wrap(Tiny(classes=7), torch.randn(1, 1, 8, 8))
    before = wider.mask_digest()
    with pytest.raises(ConfigError, match=r"`head` is \(4, 8\) there and \(7, 8\) in the network"):
        attached(wider, source=str(run))
    assert wider.mask_digest() == before
    without = growfx.wrap(Tiny(), torch.randn(1, 1, 8, 8), exclude=["head"])
    with pytest.raises(ConfigError, match="the network has no masked layers `head`; train the model they come from"):
        attached(without, source=str(run))
