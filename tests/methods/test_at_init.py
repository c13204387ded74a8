"""Pruning at initialisation: scores against brute force, and no trace of the look at the data."""

import copy
import itertools
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from connect_nets import Attention
from method_nets import OPTIMIZERS, small_net, train_steps
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from training_nets import QUICK, Tiny, fresh_net, loaders

import growfx
from growfx import methods
from growfx.errors import ConfigError, DataError
from growfx.methods.base import Method
from growfx.methods.session import Session


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(2)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=bias), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def mlp_batches(count: int, width: int = 5, classes: int = 3) -> list:
    made = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, width, generator=made, dtype=torch.float64), torch.randint(classes, (6,), generator=made))
        for _ in range(count)
    ]


def begin(name: str, net, batches: Iterable, **options) -> Method:
    """Start a method as a run would, over `batches`."""
    method = methods.create(name, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    held = list(batches)
    method.begin(Session(net, optimizer, QUICK, max(1, len(held)), lambda: iter(held), F.cross_entropy))
    return method


def loss_of(model: nn.Module, batches: Iterable, temperature: float = 1.0):
    """The summed loss as a function of the weights."""
    return lambda weights: sum(
        F.cross_entropy(functional_call(model, weights, (images,)) / temperature, targets)
        for images, targets in batches
    )


def smallest(scores: dict, count: int) -> dict:
    """Masks of the `count` smallest scores of all layers together, by sorting."""
    edge = torch.cat([s.flatten() for s in scores.values()]).sort().values[count - 1]
    return {name: score <= edge for name, score in scores.items()}


def weights_of(model: nn.Module) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("weight")}


def assert_masks(net, expected: dict) -> None:
    assert {f"{name}.weight" for name in net.layers} == set(expected)
    for name, layer in net.layers.items():
        assert torch.equal(layer.mask, expected[f"{name}.weight"]), name


# -- SNIP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [1, 3])
def test_snip_keeps_the_edges_whose_multiplier_the_loss_feels_most(taken):
    model, batches = mlp(5, 8, 6, 3), mlp_batches(4)
    weights = weights_of(model)
    multipliers = {name: torch.ones_like(w, requires_grad=True) for name, w in weights.items()}
    loss = loss_of(model, batches[:taken])({name: weights[name] * c for name, c in multipliers.items()})
    felt = torch.autograd.grad(loss, list(multipliers.values()))
    net = growfx.wrap(model, batches[0][0])
    begin("snip", net, batches, density=0.3, score_batches=taken)
    count = round(0.3 * net.numel)
    assert_masks(net, smallest({name: -g.abs() for name, g in zip(weights, felt, strict=True)}, count))
    assert net.nnz == count


def test_snip_takes_what_batches_there_are_and_refuses_none():
    batches = mlp_batches(2)
    few, all_of_them = (growfx.wrap(mlp(5, 8, 3), batches[0][0]) for _ in range(2))
    begin("snip", few, batches, score_batches=2)
    begin("snip", all_of_them, batches, score_batches=9)
    assert few.mask_digest() == all_of_them.mask_digest()
    with pytest.raises(DataError, match="gives no batches to score edges by"):
        begin("snip", growfx.wrap(mlp(5, 8, 3), batches[0][0]), [])


@pytest.mark.parametrize("name", ["snip", "grasp"])
@pytest.mark.parametrize("training", [True, False])
def test_the_look_at_the_data_leaves_nothing_but_masks(name, training):
    torch.manual_seed(3)
    model = Tiny()
    model.norm2.eval()
    net = growfx.wrap(model, torch.randn(1, 1, 8, 8))
    net.train(training)
    net.norm1.training = not training

    def batches():
        random.random(), np.random.rand()  # noqa: NPY002 - what augmentations draw from
        yield from loaders()[0]

    before = copy.deepcopy(net.state_dict())
    modes = {n: m.training for n, m in net.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    method = methods.create(name, density=0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method.begin(Session(net, optimizer, QUICK, 6, batches, F.cross_entropy))
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert all(p.grad is None for p in net.parameters())
    assert not optimizer.state
    after = net.state_dict()
    for key, value in before.items():
        if key.endswith(".mask"):
            continue
        mask = after.get(f"{key.removesuffix('.weight')}.mask")
        assert torch.equal(after[key], value if mask is None else torch.where(mask, value, 0)), key


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_snip_in_a_loop_of_ones_own_takes_its_first_step_back(optimizer_name):
    torch.manual_seed(3)
    net = growfx.wrap(Tiny(), torch.randn(1, 1, 8, 8))
    images, targets = next(iter(loaders()[0]))
    reference = copy.deepcopy(net)
    torch.manual_seed(5)
    begin("snip", reference, [(images, targets)], density=0.25, init="sparse-aware")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = OPTIMIZERS[optimizer_name](net)
    method = methods.create("snip", density=0.25, init="sparse-aware")
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
    assert net.density == 1
    assert method.needs_dense_gradient
    torch.manual_seed(5)  # dropout
    net.train()
    F.cross_entropy(net(images), targets).backward()
    optimizer.step()
    assert not torch.equal(net.conv1.weight, before["conv1.weight"])
    optimizer.param_groups[0]["lr"] = 0.0123
    assert method.step()
    optimizer.zero_grad()
    assert net.mask_digest() == reference.mask_digest()
    assert net.nnz == round(0.25 * net.numel)
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.0123
    assert method.exploration == net.density
    assert train_on(net, optimizer, method, images, targets) is False
    assert not method.needs_dense_gradient
    net.verify()


def train_on(net, optimizer, method, images, targets, scale: float = 1.0) -> bool:
    (scale * F.cross_entropy(net(images), targets)).backward()
    optimizer.step()
    changed = method.step()
    optimizer.zero_grad()
    return changed


def test_snip_puts_the_optimizers_earlier_state_back():
    net = small_net()
    optimizer = OPTIMIZERS["adamw"](net)
    train_steps(net, optimizer, methods_idle(), 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    method = methods.create("snip", density=0.3)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
    assert train_steps(net, optimizer, method, 1) == [True]
    by_index = dict(enumerate(net.parameters()))
    masks = {id(layer.parameter): layer.mask for layer in net.layers.values()}
    for index, state in optimizer.state_dict()["state"].items():
        mask = masks.get(id(by_index[index]), torch.ones(()).bool())
        assert float(state["step"]) == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], torch.where(mask, before[index][key], 0))


class methods_idle:
    def step(self) -> bool:
        return False


def test_snip_waits_for_a_gradient_that_is_finite():
    nets = [fresh_net() for _ in range(2)]
    images, targets = next(iter(loaders()[0]))
    for net, scales in zip(nets, ([float("inf"), 1.0], [1.0]), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        method = methods.create("snip", density=0.25)
        method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
        for scale in scales:
            torch.manual_seed(5)
            net.train()
            assert train_on(net, optimizer, method, images, targets, scale) is (scale == 1.0)
    assert nets[0].mask_digest() == nets[1].mask_digest()


def test_snip_resumes_before_its_first_step(tmp_path):
    def started(seed: int):
        net = small_net(seed)
        optimizer, method = OPTIMIZERS["adamw"](net), methods.create("snip", density=0.2)
        method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
        return net, optimizer, method

    whole, cut, fresh = started(0), started(0), started(8)
    torch.save([part.state_dict() for part in cut], tmp_path / "state.pt")
    for part, state in zip(fresh, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    for run in (whole, fresh):
        assert train_steps(*run, 3) == [True, False, False]
    assert whole[0].mask_digest() == fresh[0].mask_digest()
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), fresh[0].parameters(), strict=True))


def test_methods_by_gradient_leave_layers_alone_that_have_none():
    for name in ("snip", "grasp"):
        net = growfx.wrap(mlp(5, 8, 3), mlp_batches(1)[0][0])
        net.layers["0"].parameter.requires_grad_(False)
        begin(name, net, mlp_batches(1), density=0.5)
        assert net.layers["0"].density == 1
        assert net.nnz == net.layers["0"].numel + round(0.5 * (net.numel - net.layers["0"].numel))
    dead = growfx.wrap(mlp(5, 8, 3), mlp_batches(1)[0][0])
    for layer in dead.layers.values():
        nn.init.zeros_(layer.parameter)
    for name in ("snip", "grasp"):
        with pytest.raises(ConfigError, match=f"`{name}` finds a score of zero for every edge: no gradient passes"):
            begin(name, dead, mlp_batches(1))


# -- GraSP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1.0, 0.5])
def test_grasp_removes_the_largest_of_minus_w_times_hessian_times_gradient(start):
    model, batches = mlp(5, 6, 4, 3), mlp_batches(3)
    net = growfx.wrap(model, batches[0][0], density=start)
    masks = {f"{name}.weight": layer.mask.clone() for name, layer in net.layers.items()}
    weights = {name: torch.where(masks[name], w, 0) for name, w in weights_of(mlp(5, 6, 4, 3)).items()}
    sizes = [w.numel() for w in weights.values()]
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    loss = loss_of(mlp(5, 6, 4, 3), batches[:2], temperature=50.0)

    def flat_loss(flat):
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        return loss({name: part.view_as(w) for (name, w), part in parts})

    flat = torch.cat([w.flatten() for w in weights.values()])
    gradient = torch.autograd.functional.jacobian(flat_loss, flat) * kept
    hessian = torch.autograd.functional.hessian(flat_loss, flat) * kept[:, None] * kept
    scores = -flat * (hessian @ gradient)
    begin("grasp", net, batches, density=0.3, score_batches=2, temperature=50.0)
    count = round(0.3 * net.numel)
    expected = {name: s.view_as(weights[name]) for name, s in zip(weights, scores.split(sizes), strict=True)}
    if start == 1.0:
        assert_masks(net, smallest(expected, count))
    else:  # absent edges have a score of zero, and tie
        present = {name: torch.where(masks[name], s, torch.inf) for name, s in expected.items()}
        negative = int((scores < 0).sum())
        for name, mask in smallest(present, min(count, negative)).items():
            assert not (mask & ~net.layers[name.removesuffix(".weight")].mask).any()
    assert net.nnz == count


def test_grasp_differentiates_attention_twice_fused_or_written_out():
    digests = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = growfx.wrap(Attention(fused).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64))
        made = torch.Generator().manual_seed(1)
        images = torch.randn(6, 3, 4, 4, generator=made, dtype=torch.float64)
        begin("grasp", net, [(images, torch.arange(6) % 3)], density=0.3)
        digests.append(net.mask_digest())
    assert digests[0] == digests[1]


def test_grasp_names_what_has_no_second_derivative():
    net = growfx.wrap(mlp(5, 8, 3), mlp_batches(1)[0][0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    session = Session(net, optimizer, QUICK, 1, lambda: iter(mlp_batches(1)), F.multi_margin_loss)
    message = "needs second derivatives, and an operator of this network or its loss has none .*multi_margin_loss"
    with pytest.raises(ConfigError, match=message):
        methods.create("grasp").begin(session)
    assert net.density == 1


def test_grasp_in_a_loop_of_ones_own_points_to_train():
    net = small_net()
    with pytest.raises(ConfigError, match=r"`grasp` takes second derivatives .*: run it through growfx\.train"):
        methods.create("grasp").attach(net, OPTIMIZERS["sgd"](net), total_steps=4, steps_per_epoch=2)
    assert net.density == 1


# -- SynFlow ------------------------------------------------------------------------------------------------------


def chain_flow(weights: list[np.ndarray]) -> list[np.ndarray]:
    """Products of magnitudes through every edge of a chain of linear layers, counted layer by layer."""
    sizes = [np.abs(w) for w in weights]
    scores = []
    for at, size in enumerate(sizes):
        into = np.ones(sizes[0].shape[1])
        for earlier in sizes[:at]:
            into = earlier @ into
        out_of = np.ones(sizes[-1].shape[0])
        for later in reversed(sizes[at + 1 :]):
            out_of = out_of @ later
        scores.append(out_of[:, None] * size * into[None, :])
    return scores


@pytest.mark.parametrize("rounds", [1, 7])
def test_synflow_keeps_what_its_rounds_keep_by_hand(rounds):
    model = mlp(6, 9, 7, 4, bias=False)
    names = ["0.weight", "2.weight", "4.weight"]
    weights = [weights_of(model)[name].numpy() for name in names]
    shapes = [w.shape for w in weights]
    total = sum(w.size for w in weights)
    count = round(0.15 * total)
    for number in range(1, rounds + 1):
        kept = round(total * (count / total) ** (number / rounds))
        scores = chain_flow(weights)
        assert np.ptp([score.sum() for score in scores]) < 1e-9  # every layer carries the whole flow
        edge = np.sort(np.concatenate([s.ravel() for s in scores]))[-kept]
        weights = [np.where(s >= edge, w, 0) for s, w in zip(scores, weights, strict=True)]
    net = growfx.wrap(model, torch.randn(2, 6, dtype=torch.float64))
    method = methods.create("synflow", density=0.15, rounds=rounds)
    method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4, steps_per_epoch=2)
    assert [w.shape for w in weights] == shapes
    assert_masks(net, {name: torch.from_numpy(w != 0) for name, w in zip(names, weights, strict=True)})
    assert net.nnz == count


def attached(net, name: str = "synflow", **options):
    method = methods.create(name, **options)
    method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4, steps_per_epoch=2)
    return net


def test_a_hundred_rounds_of_synflow_keep_the_layers_that_one_round_empties():
    narrow = lambda: growfx.wrap(mlp(30, 40, 40, 40, 3), torch.randn(1, 30, dtype=torch.float64))  # noqa: E731
    one, hundred = (attached(narrow(), density=0.012, rounds=rounds) for rounds in (1, 100))
    assert one.nnz == hundred.nnz == round(0.012 * one.numel)
    assert min(layer.nnz for layer in one.layers.values()) == 0
    paths = growfx.path_products(hundred, norm="identity")
    assert paths.log_total > -np.inf
    assert min(layer.nnz for layer in hundred.layers.values()) > 0


class Branch(nn.Module):
    """A residual branch that starts at zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.norm(self.branch(x))).mean((2, 3)))


def test_synflow_counts_norms_as_one_or_as_they_are():
    made = {}
    for norm in ("identity", "fold"):
        torch.manual_seed(0)
        made[norm] = attached(growfx.wrap(Branch(), torch.randn(1, 3, 6, 6)), density=0.2, rounds=20, norm=norm)
    assert made["fold"].layers["branch"].nnz == 0 < made["identity"].layers["branch"].nnz
    assert made["fold"].nnz == made["identity"].nnz == round(0.2 * made["fold"].numel)


def test_synflow_sees_through_a_head_that_starts_at_zero():
    made = []
    for zero in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
        nn.init.constant_(model[2].weight, 0.0 if zero else 1.0)
        made.append(attached(growfx.wrap(model, torch.randn(1, 6)), density=0.3, rounds=5))
    assert torch.equal(made[0].layers["0"].mask, made[1].layers["0"].mask)


def test_synflow_above_the_density_of_the_network_adds_edges():
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(1, 6), density=0.3)
    before = {name: layer.mask.clone() for name, layer in net.layers.items()}
    attached(net, density=0.5)
    assert net.nnz == round(0.5 * net.numel)
    assert all((net.layers[name].mask | ~mask).all() for name, mask in before.items())


# -- all ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_a_run_has_its_density_and_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    def run(out, resume=False):
        net = fresh_net()
        train_loader, val_loader = loaders()
        method = methods.create(name, density=0.2, seed=1, **({"rounds": 3} if name == "synflow" else {}))
        result = growfx.train(
            net, train_loader, val_loader, method=method, options=QUICK, out=out, resume=resume, progress=False
        )
        return net, result

    from training_nets import interrupt_at

    whole, result = run(tmp_path / "whole")
    assert result.nnz == round(0.2 * whole.numel)
    assert [entry["nnz"] for entry in result.trace] == [result.nnz] * QUICK.epochs
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    resumed, again = run(tmp_path / "cut", resume=True)
    assert again.mask_digest == result.mask_digest
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snip", {"score_batches": 0}, r"`score_batches` = 0 is out of range; allowed: \[1"),
        ("grasp", {"temperature": 0.0}, r"`temperature` = 0\.0 is out of range; allowed: \(0"),
        ("synflow", {"rounds": 0}, r"`rounds` = 0 is out of range"),
        ("synflow", {"norm": "eval"}, "`norm` = 'eval' is unknown; allowed: `identity`, `fold`"),
        ("snip", {"init": "he"}, "`init` = 'he' is unknown; allowed: `dense`, `sparse-aware`"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options, message):
    with pytest.raises(ConfigError, match=message):
        methods.create(name, **options)
