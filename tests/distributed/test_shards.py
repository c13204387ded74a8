"""Networks whose weights `fully_shard` spreads over ranks, in loops of one's own."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import run_ranks, same
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from training_nets import loaders

import growfx
from growfx.distributed import ranks
from growfx.distributed.sharded import is_sharded, local_shard, part_of
from growfx.errors import ConfigError, MaskError, TraceError


def plain_model() -> nn.Module:
    """No norms: the gradient of a batch is the mean of those of its parts. 7 and 10 rows are uneven for 2 and 4 ranks,
    and 5 leave the last of 4 ranks without any."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 36, 5), nn.Tanh(), nn.Linear(5, 10))
    return body.double()


def plain_net() -> growfx.MaskedGraph:
    return growfx.wrap(plain_model(), torch.randn(1, 1, 8, 8).double())


def sharded(net: growfx.MaskedGraph, one_by_one: bool = False, **options: Any) -> growfx.MaskedGraph:
    mesh = init_device_mesh("cpu", (ranks.world_size(),))
    if one_by_one:
        for layer in net.layers.values():
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def data(batches: int = 6, size: int = 16):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(batches, size, 1, 8, 8, generator=generator).double()
    return list(zip(images, torch.randint(0, 4, (batches, size), generator=generator), strict=True))


def own(values: torch.Tensor) -> torch.Tensor:
    """What this rank has of a batch."""
    return values.unflatten(0, (-1, ranks.world_size()))[:, ranks.rank()]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def train(net, method, batches, optimizer=None, after=lambda step: None, epoch: int = 2):
    optimizer = optimizer or sgd(net)
    method.attach(net, optimizer, total_steps=len(batches), steps_per_epoch=epoch)
    for step, (x, y) in enumerate(batches):
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        after(step)
        method.step()
        optimizer.zero_grad()
    return net


EXCHANGE = {"update_every": 2, "update_until": 1.0}
GROWTH = {"seed_density": 0.2, "max_density": 0.5, "epochs_per_round": 1}
METHODS = {
    "rigl": EXCHANGE,
    "set": EXCHANGE,
    "mest": EXCHANGE,
    "gmp": {"density": 0.2},
    "granet": {"density": 0.2, "update_every": 2},
    "acdc": {"density": 0.2},
    "static": {"init": "sparse-aware"},
    "random-growth": GROWTH,
    "gradient-growth": GROWTH,
    "pwmpr": GROWTH,
}


def spread_against_whole(*names: str) -> dict[str, tuple[str, str, int]]:
    """Masks of methods, with weights in parts on all ranks, and whole on this rank alone with whole batches.

    In float64 what is left of sums in another order turns no two edges round.
    """
    batches = data()
    found = {}
    for number, name in enumerate(names):
        alone = train(plain_net(), growfx.methods.create(name, **METHODS[name]), batches)
        parts = sharded(plain_net(), one_by_one=number % 2 == 1)
        train(parts, growfx.methods.create(name, **METHODS[name]), [(own(x), own(y)) for x, y in batches])
        parts.verify()
        found[name] = (parts.mask_digest(), alone.mask_digest(), parts.nnz)
    return found


def parts_of(batches):
    return [(own(x), own(y)) for x, y in batches]


def growth_with_reports() -> tuple[str, str]:
    """Growth that ends at a plateau, goes back to an earlier round, and then to the initial weights."""
    batches = data(batches=24)
    options = {"seed_density": 0.05, "growth_ratio": 1.5, "draw": "sampled", "epochs_per_round": 1, "tolerance": 0.02}
    found = []
    for net, own_batches in ((plain_net(), batches), (sharded(plain_net()), parts_of(batches))):
        method = growfx.methods.create("gradient-growth", **options, final_weights="initial")

        def report(step, net=net, method=method):
            if step and step % 2 == 0 and method.growing:
                net.eval()
                with torch.no_grad():
                    net(batches[0][0])  # leaves the weights gathered
                method.report(0.9 - 0.5 / step, noise=0.002)
                net.train()

        optimizer = sgd(net)
        method.attach(net, optimizer, total_steps=24, steps_per_epoch=2)
        for step, (x, y) in enumerate(own_batches):
            report(step)
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            method.step()
            optimizer.zero_grad()
        net.verify()
        whole = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
        trace = [[entry[key] for key in ("nnz", "dead_units", "val_accuracy")] for entry in method.trace]
        found.append((net.mask_digest(), trace, method.stop_reason, method.operating_round))
        found.append(whole)
    alone, weights, spread, gathered = found
    assert alone == spread
    assert alone[2] == "plateau"
    assert alone[3] < len(alone[1]) - 1, "it went back"
    assert all(torch.allclose(weights[name], value, atol=1e-12) for name, value in gathered.items())
    return alone[2], alone[0]


class Restless(torch.optim.SGD):
    """An optimizer that moves every weight, and remembers something of each."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)
                self.state[parameter]["memory"] = torch.ones_like(parameter)


def absent_and_new_edges() -> dict[str, int]:
    """New edges by optimizer; their weights and state are zero, and so is all of absent edges after every step."""
    found = {}
    for kind, options in ((torch.optim.AdamW, {"weight_decay": 0.1}), (Restless, {"momentum": 0.9})):
        net = sharded(plain_net(), one_by_one=kind is Restless)
        optimizer = kind(net.parameters(), lr=0.01, **options)
        method = growfx.methods.create("rigl", density=0.2, update_every=2, update_until=1.0)
        method.attach(net, optimizer, total_steps=6, steps_per_epoch=2)
        new = 0

        def values_of(layer, optimizer=optimizer):
            kept = optimizer.state[layer.parameter].values()
            return [local_shard(value) for value in (layer.parameter, *kept) if value.shape == layer.mask.shape]

        for x, y in parts_of(data()):
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            net.verify()
            for layer in net.layers.values():
                values = [*values_of(layer), local_shard(layer.parameter.grad)]
                assert len(values) == 4
                assert not any(value[~part_of(layer.mask, layer.parameter)].any() for value in values)
            before = {name: layer.mask.clone() for name, layer in net.layers.items()}
            method.step()
            for name, layer in net.layers.items():
                born = layer.mask & ~before[name]
                new += int(born.sum())
                assert not any(value[part_of(born, layer.parameter)].any() for value in values_of(layer))
            optimizer.zero_grad()
        found[kind.__name__] = new
    return found


def gathered() -> bool:
    """A sharded network's weights and masks in a whole one, which gives the same outputs and can be saved."""
    net = train(sharded(plain_net()), growfx.methods.create("rigl", density=0.2), parts_of(data()))
    x = data()[0][0]
    outputs = net.eval()(x)
    state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    whole = plain_net()
    whole.load_state_dict(state)
    assert whole.mask_digest() == net.mask_digest()
    model = growfx.unwrap(whole.eval())
    assert torch.allclose(model(x), outputs, atol=1e-12)
    return all(not model.get_parameter(f"{name}.weight")[~layer.mask].any() for name, layer in whole.layers.items())


def mixed_precision() -> tuple[str, list[bool]]:
    """Weights gathered in bfloat16, gradients accumulated over two parts of a batch."""
    net = growfx.wrap(plain_model().float(), torch.randn(1, 1, 8, 8))
    sharded(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    method, optimizer = growfx.methods.create("rigl", density=0.3, update_every=1, update_until=1.0), sgd(net)
    method.attach(net, optimizer, total_steps=4, steps_per_epoch=2)
    changed = []
    for x, y in parts_of(data(batches=4)):
        for number, (half, targets) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            net.set_requires_gradient_sync(number == 1)
            nn.functional.cross_entropy(net(half), targets).backward()
        optimizer.step()
        net.verify()
        changed.append(method.step())
        optimizer.zero_grad()
    return net.mask_digest(), changed


class Direct(nn.Module):
    """Reads a parameter of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(nn.functional.linear(x, self.first.weight, self.first.bias).relu())


def direct_use() -> float:
    """Weights that a block reads without calling their layer, in inputs of a shape that was not recorded."""
    torch.manual_seed(1)
    model = nn.Sequential(Direct(), nn.Linear(4, 4))
    net = growfx.wrap(model, torch.randn(1, 6), density=0.4)
    expected = growfx.unwrap(net)
    fully_shard(net.get_submodule("0"))
    fully_shard(net)
    worst = 0.0
    for shape in ((2, 6), (2, 3, 6)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        output = net(x)
        worst = max(worst, float((output - expected(x)).detach().abs().max()))
        output.sum().backward()
        for layer in net.layers.values():
            assert not local_shard(layer.parameter.grad)[~part_of(layer.mask, layer.parameter)].any()
        net.zero_grad()
    with pytest.raises(TraceError, match="which modules that gather their own weights"):
        net.graph_at(torch.randn(1, 2, 2, 6))
    return worst


def chosen_before() -> tuple[str, str]:
    """Masks chosen, and a step made, before sharding: they stay."""
    net = plain_net()
    growfx.methods.create("synflow", density=0.3, rounds=3).attach(net, sgd(net), total_steps=4, steps_per_epoch=2)
    before = net.mask_digest()
    net(data()[0][0]).sum().backward()
    net.zero_grad()
    sharded(net, one_by_one=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for x, y in parts_of(data(batches=3)):
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.verify()
    return before, net.mask_digest()


def steps_left_out() -> tuple[int, int]:
    """What a method counts when a loss scaler leaves out the first step, for a gradient of one rank's part alone."""
    net = sharded(plain_net())
    method = growfx.methods.create("rigl", density=0.3, update_every=1, update_until=1.0)
    optimizer = sgd(net)
    method.attach(net, optimizer, total_steps=4, steps_per_epoch=2)
    counted = []
    for number, (x, y) in enumerate(parts_of(data(batches=2))):
        nn.functional.cross_entropy(net(x), y).backward()
        if number:
            optimizer.step()
        elif ranks.rank() == 0:
            local_shard(net.layers["3"].parameter.grad).fill_(torch.inf)
        method.step()
        optimizer.zero_grad()
        counted.append(method.state_dict()["steps"])
    return counted[0], counted[1]


def continued() -> dict[str, bool]:
    """Whether a run goes on as it would have from the state dicts, in parts, of network, optimizer and method."""
    found = {}
    for name, steps in (("rigl", 3), ("gradient-growth", 2)):  # growth holds the gradients of a round that has ended
        runs = []
        for _ in range(2):
            net = sharded(plain_net(), one_by_one=True)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
            method = growfx.methods.create(name, **METHODS[name])
            method.attach(net, optimizer, total_steps=6, steps_per_epoch=2)
            runs.append((net, optimizer, method))

        def go_on(batches, net, optimizer, method):
            for x, y in batches:
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                method.step()
                optimizer.zero_grad()

        batches = parts_of(data())
        whole, again = runs
        go_on(batches[:steps], *whole)
        state = copy.deepcopy(get_state_dict(whole[0], whole[1]))
        memory = whole[2].state_dict()
        go_on(batches[steps:], *whole)
        go_on(batches[:1], *again)
        set_state_dict(again[0], again[1], model_state_dict=state[0], optim_state_dict=state[1])
        again[2].load_state_dict(memory)
        go_on(batches[steps:], *again)
        parts = zip(whole[0].parameters(), again[0].parameters(), strict=True)
        equal = all(torch.equal(local_shard(one), local_shard(other)) for one, other in parts)
        found[name] = equal and whole[0].mask_digest() == again[0].mask_digest() and len(memory) > 0
    return found


def refused(work) -> str:
    with pytest.raises((ConfigError, MaskError)) as caught:
        work()
    return str(caught.value)


def refusals() -> dict[str, str]:
    net, batches = sharded(plain_net()), data(batches=2)
    mesh = init_device_mesh("cpu", (ranks.world_size(),))
    around, partly, columns = nn.Sequential(plain_net()), plain_net(), plain_net()
    fully_shard(around, mesh=mesh)
    fully_shard(partly.layers["0"], mesh=mesh)
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda weight: Shard(int(tuple(weight.shape) == (5, 252))))
    differing = plain_net()
    if ranks.rank() == 1:
        differing.set_masks({"3": torch.zeros_like(differing.layers["3"].mask)})
    sharded(differing)

    def attach(name, to):
        return lambda: train(to, growfx.methods.create(name), batches)

    return {
        "wrap": refused(lambda: growfx.wrap(fully_shard(plain_model(), mesh=mesh), batches[0][0])),
        "unwrap": refused(lambda: growfx.unwrap(net)),
        "save": refused(lambda: growfx.save(net, "nowhere")),
        "train": refused(lambda: growfx.train(net, *loaders(), epochs=1, progress=False)),
        "paths": refused(lambda: growfx.path_products(net)),
        "weight": refused(lambda: net.layers["0"].effective_weight),
        **{name: refused(attach(name, net)) for name in ("snip", "rigl-sg", "synflow", "grow-prune")},
        "around": refused(attach("gmp", around[0])),
        "partly": refused(attach("gmp", partly)),
        "columns": refused(attach("gmp", columns)),
        "differing": refused(lambda: differing(batches[0][0])),
    }


def all_jobs() -> dict[str, Any]:
    return {
        "methods": spread_against_whole(*METHODS),
        "reports": growth_with_reports(),
        "edges": absent_and_new_edges(),
        "gathered": gathered(),
        "mixed precision": mixed_precision(),
        "direct": direct_use(),
        "chosen before": chosen_before(),
        "left out": steps_left_out(),
        "continued": continued(),
        "refusals": refusals(),
    }


@pytest.fixture(scope="module")
def results():
    found = run_ranks(all_jobs, 2)
    failures = [r for r in found if isinstance(r, BaseException)]
    if failures:
        raise failures[0]
    return found


@pytest.mark.slow
def test_masks_do_not_depend_on_the_number_of_ranks(results):
    of_two = same([r["methods"] for r in results])
    of_four = same(run_ranks(spread_against_whole, 4, "gmp", "rigl", "random-growth", "gradient-growth", "pwmpr"))
    for name, (parts, alone, nnz) in (of_two | of_four).items():
        assert parts == alone == of_two[name][0], name
        assert 0 < nnz < 1000
    assert len({digest for digest, *_ in of_two.values()}) == len(METHODS), "methods differ"


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_has_all_parts(group_of_one):
    for parts, alone, _ in spread_against_whole("rigl", "gmp", "gradient-growth").values():
        assert parts == alone
    assert absent_and_new_edges()["AdamW"] > 0
    net = sharded(plain_net())
    assert all(
        is_sharded(layer.parameter) and layer.parameter.numel() == layer.mask.numel() for layer in net.layers.values()
    )
    copied = growfx.wrap(plain_model(), torch.randn(1, 1, 8, 8).double())
    assert not any(is_sharded(layer.parameter) for layer in copied.layers.values())


class Drifting(torch.optim.SGD):
    """Adds something to every weight."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3)
        return loss


@pytest.mark.parametrize("kind", [torch.optim.Muon, Drifting, torch.optim.SGD])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_stored_weights_of_static_masks_stay_zero_under_any_optimizer_without_a_method(group_of_one, kind, one_by_one):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    net = sharded(growfx.wrap(model, torch.randn(2, 8), density=0.3), one_by_one)
    optimizer = kind(net.parameters(), lr=0.01)
    for _ in range(3):
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in net.layers.values():
            stored = local_shard(layer.parameter)
            assert not stored[~layer.mask].any()
            assert stored[layer.mask].any()
            for value in optimizer.state[layer.parameter].values():
                assert not local_shard(value)[~layer.mask].any()


def test_growth_by_reports_goes_back_to_an_earlier_round(results):
    assert same([r["reports"] for r in results])[0] == "plateau"


def test_absent_and_new_edges_are_zero_whatever_the_optimizer_does(results):
    new = same([r["edges"] for r in results])
    assert set(new) == {"AdamW", "Restless"}
    assert min(new.values()) > 10


def test_gathered_weights_make_a_plain_model(results):
    assert same([r["gathered"] for r in results])


def test_weights_gathered_in_another_precision_and_accumulated_gradients(results):
    _, changed = same([r["mixed precision"] for r in results])
    assert changed == [True, True, True, False]


def test_modules_inside_that_gather_their_own_weights(results):
    assert same([r["direct"] for r in results]) < 1e-6


def test_masks_chosen_before_sharding_stay(results):
    before, after = same([r["chosen before"] for r in results])
    assert before == after


def test_a_step_left_out_for_one_part_is_counted_by_no_rank(results):
    assert same([r["left out"] for r in results]) == (0, 1)


def test_a_run_goes_on_from_state_dicts_in_parts(results):
    assert same([r["continued"] for r in results]) == {"rigl": True, "gradient-growth": True}


REFUSED = {
    "wrap": "a recording needs it whole; wrap the model first, then call `fully_shard` on the result",
    "unwrap": "a plain model has whole ones; gather them with `torch.distributed.checkpoint.state_dict",
    "save": "an artifact has whole ones; gather them with `torch.distributed.checkpoint.state_dict",
    "train": "growfx.train keeps networks whole, in `DistributedDataParallel`; call it with the network as it was",
    "paths": "paths multiply whole ones; call `net.unshard()` before and `net.reshard()` after",
    "weight": "outside of a forward no rank has all of it; work between `net.unshard()` and `net.reshard()`",
    "snip": "method `snip` does not work with: it computes with whole weights; allowed are `acdc`, `gmp`, `gr",
    "rigl-sg": "it shares growth out by sums over a layer's edges, whose last bits depend on the number of ranks",
    "synflow": "which method `synflow` does not work with: it computes with whole weights",
    "grow-prune": "it ranks whole weights and path products together",
    "around": "a module around the network gathers it; call `fully_shard` on the network",
    "partly": "those of `3` are not; masked layers are all spread or none, so call `fully_shard` on the network",
    "columns": "over a mesh of (2,) of the 2 ranks; allowed is `fully_shard` over all ranks by rows: `init_device_",
    "differing": "the masks of `3` differ between ranks: rank 1 against rank 0; every rank needs the same model, seed",
}


@pytest.mark.parametrize(("what", "message"), list(REFUSED.items()))
def test_what_parts_of_weights_cannot_do_is_refused_with_the_reason(results, what, message):
    refused = same([r["refusals"] for r in results])
    assert message in refused[what]
    assert refused.keys() == REFUSED.keys()
