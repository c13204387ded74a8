"""Networks that several processes train together, in loops of one's own."""

import copy
import tempfile
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from error_facts import facts
from rank_processes import run_ranks, same
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset
from training_nets import Tiny, loaders

import growfx
from growfx.distributed import ranks
from growfx.errors import ConfigError, DataError, GrowfxError, MaskError
from growfx.methods.masks import dense_gradients
from growfx.runs.checkpoint import content_digest
from growfx.training.evaluation import evaluate
from growfx.training.recipe import seed_globally, steps_of
from growfx.training.step import unused_parameters


def plain_model() -> nn.Module:
    """No norms, no dropout: the gradient of a batch is the mean of those of its parts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10))


def plain_net() -> growfx.MaskedGraph:
    return growfx.wrap(plain_model(), torch.randn(1, 1, 8, 8))


def normed_net() -> growfx.MaskedGraph:
    torch.manual_seed(3)
    return growfx.wrap(Tiny(), torch.randn(1, 1, 8, 8))


def data(batches: int = 6, size: int = 16):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(batches, size, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 4, (batches, size), generator=generator)


def train(net, model, method, images, targets, optimizer=None, after=lambda step: None):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    method.attach(net, optimizer, total_steps=len(images), steps_per_epoch=2)
    for step, (x, y) in enumerate(zip(images, targets, strict=True)):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after(step)
        method.step()
        optimizer.zero_grad()
    return net


def own_part(values):
    """What this rank has of each batch."""
    return values.unflatten(1, (-1, ranks.world_size()))[:, :, ranks.rank()]


METHODS = {
    "rigl": {"update_every": 2, "update_until": 1.0},
    "rigl-sg": {"update_every": 2, "update_until": 1.0},
    "set": {"update_every": 2, "update_until": 1.0},
    "snfs": {"update_every": 2, "update_until": 1.0},
    "mest": {"update_every": 2, "update_until": 1.0},
    "gmp": {"density": 0.2},
    "granet": {"density": 0.2},
    "acdc": {"density": 0.2},
    "snip": {"density": 0.2},
    "synflow": {"density": 0.2, "rounds": 3},
    "phew": {"density": 0.2},
    "channel-prune": {"budget": "flops=0.5", "update_every": 2, "floor": 0.0},
    "channel-growth": {"seed_density": 0.4, "max_density": 0.8, "epochs_per_round": 1},
    "random-growth": {"seed_density": 0.2, "max_density": 0.5, "epochs_per_round": 1},
    "gradient-growth": {"seed_density": 0.2, "max_density": 0.5, "epochs_per_round": 1},
    "pwmpr": {"seed_density": 0.2, "max_density": 0.5, "epochs_per_round": 1},
}


def shared_against_alone(*names: str) -> dict[str, tuple[str, str, int]]:
    """Masks of methods, trained by all ranks on parts of each batch, and by this rank alone on whole batches.

    The two networks live side by side: the one that is not shared says nothing to the other ranks. In float64 what is
    left of sums in another order turns no two edges round.
    """
    images, targets = data()
    images = images.double()
    found = {}
    for name in names:
        options = METHODS[name]
        alone, shared = plain_net().double(), plain_net().double()
        train(alone, alone, growfx.methods.create(name, **options), images, targets)
        parts = own_part(images), own_part(targets)
        train(shared, DistributedDataParallel(shared), growfx.methods.create(name, **options), *parts)
        shared.verify()
        found[name] = (shared.mask_digest(), alone.mask_digest(), shared.nnz)
    return found


def mean_gradients() -> float:
    """Largest difference between what a method reads at an update and the mean over ranks of local gradients."""
    images, targets = data(batches=3)
    net = plain_net()
    method = growfx.methods.create("rigl", update_every=1, update_until=1.0)
    local = copy.deepcopy(net)
    read = {}

    def note(step):
        if step == 0:
            read.update({name: gradient.clone() for name, gradient in dense_gradients(net, net.layers).items()})

    train(net, DistributedDataParallel(net), method, own_part(images), own_part(targets), after=note)
    growfx.methods.create("static").attach(local, torch.optim.SGD(local.parameters()), total_steps=1, steps_per_epoch=1)
    for layer in local.layers.values():
        layer.collects_gradient = True
    nn.functional.cross_entropy(local(own_part(images)[0]), own_part(targets)[0]).backward()
    worst = 0.0
    for name, layer in local.layers.items():
        parts = ranks.everyone(layer.parameter.grad)
        worst = max(worst, float((read[name] - torch.stack(parts).mean(0)).abs().max()))
        assert not torch.equal(parts[0], parts[1])
        assert bool((read[name][~layer.mask] != 0).any())
    return worst


def clipped_windows(storage: str) -> tuple[str, list[float]]:
    """Masks and norms of a loop that adds up two batches and clips, of one process or of all ranks on their parts."""
    alone = ranks.world_size() == 1
    images, targets = data()
    net = plain_net().double()
    growfx.use_kernels(net, "dense", storage=storage)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = growfx.methods.create("rigl", density=0.3, update_every=1, update_until=1.0)
    method.attach(net, optimizer, total_steps=3, steps_per_epoch=1)
    norms = []
    x, y = own_part(images.double()), own_part(targets)
    for first in range(0, len(x), 2):
        model: Any = None  # its hooks go before there are others
        model = net if alone else DistributedDataParallel(net)
        with nullcontext() if alone else model.no_sync():
            nn.functional.cross_entropy(model(x[first]), y[first]).backward()
        nn.functional.cross_entropy(model(x[first + 1]), y[first + 1]).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.1)))
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    net.verify()
    return net.mask_digest(), norms


def start_after_training() -> str:
    """Starting masks that norms count in, drawn when norm statistics differ between ranks."""
    images, targets = data(batches=2)
    net = normed_net()
    model = DistributedDataParallel(net)
    for x, y in zip(own_part(images), own_part(targets), strict=True):
        nn.functional.cross_entropy(model(x), y).backward()
    assert len({str(v) for v in ranks.everyone(net.norm1.running_var.tolist())}) == 2
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method = growfx.methods.create("synflow", density=0.3, norm="fold")
    method.attach(net, optimizer, total_steps=8, steps_per_epoch=2)
    return net.mask_digest()


def growth_by_paths() -> tuple[str, list]:
    """Growth where norm statistics and measured accuracies differ between ranks."""
    images, targets = data(batches=8)
    net = normed_net()
    model = DistributedDataParallel(net)
    method = growfx.methods.create("pwmpr", seed_density=0.2, max_density=0.5, epochs_per_round=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method.attach(net, optimizer, total_steps=8, steps_per_epoch=2)
    for step, (x, y) in enumerate(zip(own_part(images), own_part(targets), strict=True)):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
        if step % 2:
            assert len({str(v) for v in ranks.everyone(net.norm1.running_mean.tolist())}) == 2
            method.report(0.5 + 0.1 * ranks.rank(), noise=0.01)
    assert len(method.trace) == 4
    assert net.density > 0.25
    return net.mask_digest(), [entry["val_accuracy"] for entry in method.trace]


DIFFERENCES = {"weights": "conv2", "within another module": "conv2", "start": "conv1", "masks": "head"}


def differing(what: str) -> str:
    """Train with something changed on rank 1 alone; the error that follows."""
    net = normed_net()
    method = growfx.methods.create("set", update_every=1, update_until=1.0)
    images, targets = data()

    def change(step):
        if step == 2 and what in ("weights", "within another module") and ranks.rank() == 1:
            with torch.no_grad():
                net.conv2.weight.mul_(torch.randn(net.conv2.weight.shape))

    if what == "start":
        method = growfx.methods.create("set", seed=ranks.rank())
    if what == "masks" and ranks.rank() == 1:
        net.set_masks({"head": torch.rand(4, 8) < 0.5})
    model = DistributedDataParallel(nn.Sequential(net) if what == "within another module" else net)
    try:
        if what == "masks":
            model(own_part(images)[0])
        else:
            train(net, model, method, own_part(images), own_part(targets), after=change)
    except MaskError as error:
        return str(error)
    return "no error"


def small_facts() -> dict:
    """Collectives, evaluation of parts, refusals."""
    _, val_loader = loaders(count=41)
    net = normed_net()
    with torch.no_grad():
        net.norm1.running_mean.add_(ranks.rank())
    model = DistributedDataParallel(net)
    before = net.layers["conv1"].mask._version
    model(torch.randn(4, 1, 8, 8))
    assert net.layers["conv1"].mask._version == before, "masks are not sent in each step"
    whole = evaluate(net, val_loader, "cpu").correct
    parts = [val_loader.dataset, DistributedSampler(val_loader.dataset, shuffle=False)]
    part = evaluate(net, DataLoader(parts[0], batch_size=8, sampler=parts[1]), "cpu").correct
    elsewhere = DataLoader(parts[0], batch_sampler=BatchSampler(parts[1], 8, drop_last=False))
    assert evaluate(net, elsewhere, "cpu").correct.tolist() == whole.tolist()
    of_one = DistributedSampler(parts[0], num_replicas=1, rank=0, shuffle=False)
    assert evaluate(net, DataLoader(parts[0], sampler=of_one), "cpu").correct.tolist() == whole.tolist()
    own = Subset(parts[0], range(20) if ranks.rank() == 0 else range(20, 41))
    assert evaluate(net, DataLoader(own, batch_size=8), "cpu").correct.tolist() == whole.tolist()
    assert evaluate(net, list(DataLoader(own, batch_size=8)), "cpu").correct.tolist() == whole.tolist()
    numbers = torch.tensor([ranks.rank() + 1.0])
    ranks.average([numbers])
    errors = []
    for work in (lambda: 1 / 0, lambda: growfx.create_model("nothing")):
        with pytest.raises((ZeroDivisionError, GrowfxError)) as caught:
            ranks.on_first(work)
        errors.append(caught.type.__name__)
    with pytest.raises(ConfigError, match=facts(2, "`sampler=")):
        steps_of(loaders()[0])
    some, images = range(40), loaders()[0].dataset
    with pytest.raises(ConfigError, match=facts("`Subset`")):
        steps_of(DataLoader(Subset(images, some)))
    assert steps_of(DataLoader(Subset(images, some[ranks.rank() :: 2]), shuffle=True)) == 20
    sampled = DataLoader(images, batch_sampler=BatchSampler(DistributedSampler(images), 8, drop_last=True))
    assert steps_of(sampled) == 96 // 2 // 8
    seed_globally(0, 4, sampled)
    before = list(sampled.batch_sampler)
    seed_globally(0, 5, sampled)
    assert list(sampled.batch_sampler) != before, "a sampler within another gets its epoch, too"
    with pytest.raises(ConfigError, match=facts(2, "`sampler=")):
        steps_of(DataLoader(images, sampler=DistributedSampler(images, num_replicas=1, rank=0)))
    lengths = steps_of([0] * (3 + ranks.rank()))
    return {
        "correct": whole.tolist() == part.tolist() and len(whole) == 41,
        "average": numbers.item(),
        "errors": ranks.everyone(errors),
        "steps": lengths,
        "buffers": len({str(b) for b in ranks.everyone(net.norm1.running_mean.tolist())}),
        "first": ranks.from_first(lambda: dist.get_rank() + 7),
    }


def refusals() -> dict[str, str]:
    """What ranks cannot do together."""
    images, targets = data(batches=2)
    net = plain_net()
    model = DistributedDataParallel(net)
    with model.join(), pytest.raises(ConfigError) as joined:
        train(net, model, growfx.methods.create("static"), own_part(images), own_part(targets))
    return {"joined": str(joined.value)}


def spread_optimizer_state() -> tuple[list[str], list[int]]:
    """Weights and masks after training with the optimizer's state whole, and spread over the ranks; state kept."""
    images, targets = data()
    digests, kept = [], []
    for spread in (False, True):
        net = plain_net()
        model = DistributedDataParallel(net)
        kind, options = torch.optim.Adam, {"lr": 0.01}
        optimizer = (
            ZeroRedundancyOptimizer(net.parameters(), kind, **options) if spread else kind(net.parameters(), **options)
        )
        method = growfx.methods.create("rigl", density=0.2, update_every=2, update_until=1.0)
        train(net, model, method, own_part(images), own_part(targets), optimizer)
        net.verify()
        inner = optimizer.optim if spread else optimizer
        kept.append(len(inner.state))
        digests.append(net.mask_digest() + content_digest({n: p.detach() for n, p in net.named_parameters()}))
        for layer in net.layers.values():
            state = inner.state.get(layer.parameter, {})
            assert all(not value[~layer.mask].any() for value in state.values() if value.shape == layer.mask.shape)
    assert digests[0] == digests[1]
    return digests, kept


def words_without_tensors_on_the_cpu() -> list:
    """A group that carries an accelerator's tensors alone, as nccl's does."""
    # Not by the port of the group before: one rank could find the store there that the other is about to close.
    place = ranks.from_first(lambda: tempfile.mkdtemp(prefix="ranks"))
    found = {"rank": ranks.rank(), "world_size": ranks.world_size()}
    dist.destroy_process_group()
    dist.init_process_group("cuda:gloo", init_method=f"file://{place}/store", **found)
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(1))
    return [ranks.everyone(ranks.rank()), ranks.largest(ranks.rank(), -3), ranks.from_first(dist.get_rank)]


def all_jobs():
    return {
        "methods": shared_against_alone(*METHODS),
        "gradients": mean_gradients(),
        "clipped": {storage: clipped_windows(storage) for storage in ("dense", "present")},
        "growth": growth_by_paths(),
        "late start": start_after_training(),
        "differing": {what: differing(what) for what in DIFFERENCES},
        "facts": small_facts(),
        "refusals": refusals(),
        "spread": spread_optimizer_state(),
        "words": words_without_tensors_on_the_cpu(),
    }


@pytest.fixture(scope="module")
def results():
    found = run_ranks(all_jobs, 2)
    failures = [r for r in found if isinstance(r, BaseException)]
    if failures:
        raise failures[0]
    return found


def test_masks_do_not_depend_on_the_number_of_ranks(results):
    of_two = same([r["methods"] for r in results])
    some = ("rigl", "gmp", "random-growth", "gradient-growth", "pwmpr")
    of_four = same(run_ranks(shared_against_alone, 4, *some))
    for name, (shared, alone, nnz) in (of_two | of_four).items():
        assert shared == alone == of_two[name][0], name
        assert nnz < 2000
    assert len({digest for digest, *_ in of_two.values()}) == len(METHODS), "methods differ"


def test_methods_read_the_mean_gradient_of_the_ranks(results):
    assert same([r["gradients"] for r in results]) < 1e-6


def test_clipping_by_several_ranks_counts_present_edges_alone(results):
    digest, norms = clipped_windows("dense")
    for storage in ("dense", "present"):
        found, theirs = same([result["clipped"][storage] for result in results])
        assert found == digest
        assert theirs == pytest.approx(norms)


def test_growth_counts_norms_of_rank_0_and_the_mean_accuracy(results):
    digest, accuracies = same([r["growth"] for r in results])
    assert accuracies[0] == pytest.approx(0.55)
    assert len(digest) == 64


def test_starting_masks_count_the_norms_of_rank_0(results):
    assert len(same([r["late start"] for r in results])) == 64


@pytest.mark.parametrize(("what", "layer"), list(DIFFERENCES.items()))
def test_differing_masks_are_an_error_on_every_rank_that_names_the_layers(results, what, layer):
    message = same([r["differing"] for r in results])[what]
    assert message.startswith("the masks of ")
    assert f"`{layer}`" in message
    assert "differ between ranks: rank 1 against rank 0; every rank needs the same model, seed" in message
    if what != "start":
        assert "`conv1`" not in message


def test_collectives_and_evaluation_agree(results):
    facts = same([r["facts"] for r in results])
    assert facts["correct"]
    assert facts["average"] == 1.5
    assert facts["errors"] == [["ZeroDivisionError", "ConfigError"], ["GrowfxError", "ConfigError"]]
    assert (facts["steps"], facts["buffers"], facts["first"]) == (3, 1, 7)


def test_uneven_steps_are_refused_on_every_rank(results):
    found = same([r["refusals"] for r in results])
    assert found["joined"].startswith("the network trains within `join()`, where ranks end after different numbers")


def test_masks_and_weights_do_not_depend_on_where_the_state_of_the_optimizer_is(results):
    whole, spread = zip(*[r["spread"][1] for r in results], strict=True)
    assert same([r["spread"][0] for r in results])
    assert set(whole) == {4}
    assert sum(spread) == 4
    assert max(spread) < 4


def test_words_travel_in_a_group_that_has_no_tensors_on_the_cpu(results):
    assert same([r["words"] for r in results]) == [[0, 1], [1, -3], 0]


def test_one_process_has_nobody_to_talk_to():
    value = torch.ones(2)
    ranks.average([value])
    assert (ranks.world_size(), ranks.rank(), ranks.everyone(3), ranks.largest(4, 2)) == (1, 0, [3], [4, 2])
    assert ranks.finite(torch.tensor(1.0))
    assert not ranks.finite(torch.tensor(torch.inf))
    assert ranks.on_first(lambda: 5) == 5
    with pytest.raises(DataError):
        steps_of(object())


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head, self.other = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x), self.other(x)


def test_parameters_that_no_class_score_depends_on_are_found_without_a_trace():
    net = growfx.wrap(Auxiliary(), torch.randn(1, 4))
    before = torch.random.get_rng_state()
    assert unused_parameters(net) == ["other.weight", "other.bias"]
    assert unused_parameters(normed_net()) == []
    net.head.bias.requires_grad_(False)
    assert unused_parameters(net) == ["other.weight", "other.bias"]
    torch.random.set_rng_state(before)
    net = normed_net()
    kept = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    unused_parameters(net)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())
