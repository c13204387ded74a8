"""The masks that methods start from: drawn, given, or those of the largest weights."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from breadth import representative, some
from method_nets import OPTIMIZERS, small_net, train_steps
from staged_runs import session, train_stage
from test_methods import GROWTH, short
from torch import nn
from training_nets import QUICK, fresh_net, loaders

import growfx
from growfx import methods
from growfx.errors import ConfigError, GrowfxWarning, TraceError
from growfx.selection.density import layer_counts
from growfx.training.foreign_loop import ForeignLoop


def options_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(methods.kind_of(name)) if field.init}


CHOOSING = [name for name in methods.names() if "masks" in options_of(name)]
STAGED = {"imp", "sup-tickets"}
PRUNING = {"acdc", "channel-prune", "gmp", "granet", "imp"}
WHOLE_UNITS = {"channel-growth", "channel-prune"}  # their numbers of edges follow from units
WITH_MAGNITUDE = [name for name in CHOOSING if name not in {"acdc", "gmp", "imp", *WHOLE_UNITS}]


def sparse_net(density: float = 0.4, seed: int = 0) -> Any:
    """Uneven masks that no method would draw."""
    net = small_net(seed)
    noise = torch.Generator().manual_seed(11)
    shares = dict(zip(net.layers, (0.9, 0.3, 0.4, 0.7), strict=True))
    net.set_masks({n: torch.rand(x.mask.shape, generator=noise) < shares[n] for n, x in net.layers.items()})
    return net


def begun(name: str, net: Any, optimizer: str = "sgd", **options: Any) -> Any:
    method = short(name, "", **options)
    if name in STAGED:
        method.begin(session(net, epochs=6))
    else:
        method.attach(net, OPTIMIZERS[optimizer](net), total_steps=24, steps_per_epoch=3)
    return method


def test_the_methods_that_start_from_masks_have_the_option():
    growth = {"gradient-growth", "grow-prune", "pwmpr", "random-growth"}
    assert {"set", "rigl", "rigl-sg", "rigl-sm", "snfs", "mest", "static", *growth, *PRUNING} <= set(CHOOSING)


@pytest.mark.parametrize("name", some(CHOOSING, representative))
def test_given_masks_and_their_weights_are_kept_without_a_word(name):
    net = sparse_net()
    digest, weights = net.mask_digest(), {n: x.parameter.clone() for n, x in net.layers.items()}
    begun(name, net, masks="given")
    assert net.mask_digest() == digest
    assert all(torch.equal(net.layers[n].parameter, weight) for n, weight in weights.items())


@pytest.mark.parametrize("name", some([name for name in CHOOSING if name != "channel-prune"], representative))
def test_a_density_beside_given_masks_is_theirs_or_refused_naming_both(name):
    net = sparse_net()
    option = "seed_density" if name in GROWTH else "density"
    for same in (None, net.density, round(net.density, 4)):
        begun(name, net, masks="given", **{option: same})
        assert net.mask_digest() == sparse_net().mask_digest()
    digest = net.mask_digest()
    with pytest.raises(ConfigError, match=rf"`{option}` is 0\.9,.*\({net.nnz} of {net.numel} edges\)"):
        begun(name, net, masks="given", **{option: 0.9})
    assert net.mask_digest() == digest
    if name not in PRUNING:
        with pytest.raises(ConfigError, match=rf"`{option}` is 0\.05,.*{net.density:.6g}"):
            begun(name, net, masks="given", **{option: 0.05})


@pytest.mark.parametrize("name", some(CHOOSING, representative))
def test_drawing_anew_where_masks_are_lost_is_told_once_and_names_the_option(name):
    net = sparse_net()
    with pytest.warns(GrowfxWarning, match=r"replaced the masks.*density 0\.\d+.*`masks=\"given\"`") as told:
        begun(name, net)
    assert len(told) == 1
    assert told[0].message.args[0] in net.trace_report.notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(name, small_net())


@pytest.mark.parametrize("name", ["small-dense"])
def test_methods_without_the_option_name_one_that_has_it(name):
    with pytest.warns(GrowfxWarning, match=r"such as `static`"):
        begun(name, sparse_net(), density=0.5)


@pytest.mark.parametrize("name", some(WITH_MAGNITUDE, representative))
def test_magnitude_takes_the_largest_weights(name):
    net = small_net()
    weights = {n: x.parameter.detach().abs().clone() for n, x in net.layers.items()}
    option = "seed_density" if name in GROWTH else "initial_density" if name == "granet" else "density"
    begun(name, net, masks="magnitude", **{option: 0.3})
    assert net.nnz == round(0.3 * net.numel)
    if name in GROWTH:
        threshold = torch.cat([w.flatten() for w in weights.values()]).sort(descending=True).values[net.nnz - 1]
        assert all(torch.equal(net.layers[n].mask, w >= threshold) for n, w in weights.items())
        return
    counts = layer_counts({n: tuple(w.shape) for n, w in weights.items()}, net.nnz / net.numel)
    for n, weight in weights.items():
        assert net.layers[n].nnz == counts[n]
        mask = net.layers[n].mask
        assert mask.all() or weight[mask].min() >= weight[~mask].max()


def test_magnitude_of_a_sparse_network_never_counts_what_is_stored_outside_its_masks():
    net = sparse_net()
    before = {n: x.mask.clone() for n, x in net.layers.items()}
    begun("pwmpr", net, masks="magnitude", seed_density=0.1)
    assert all(not (x.mask & ~before[n]).any() for n, x in net.layers.items())


class WithoutRule(nn.Module):
    """An operator between input and output that has no path rule."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.cumprod(self.first(x), 1))


@pytest.mark.parametrize("masks", ["drawn", "given", "magnitude"])
def test_growth_refuses_a_network_without_paths_at_once_whatever_it_starts_from(masks):
    net = growfx.wrap(WithoutRule(), torch.randn(2, 6))
    net.layers["first"].mask[1:] = False
    digest = net.mask_digest()
    with pytest.raises(TraceError, match="cumprod"):
        begun("pwmpr", net, masks=masks)
    assert net.mask_digest() == digest


@pytest.mark.parametrize("name", ["gmp", "acdc", "granet"])
def test_pruning_goes_on_from_given_masks(name):
    net = sparse_net()
    before = {n: x.mask.clone() for n, x in net.layers.items()}
    extra = {"drop_fraction": 0.0, "last_drop_fraction": 0.0} if name == "granet" else {}
    optimizer = OPTIMIZERS["sgd"](net)
    method = short(name, "", masks="given", density=0.1, **extra)
    method.attach(net, optimizer, total_steps=24, steps_per_epoch=3)
    nnz = []
    for number in range(24):
        train_steps(net, optimizer, method, 1, number)
        nnz.append(net.nnz)
        assert all(not (x.mask & ~before[n]).any() for n, x in net.layers.items())
    assert nnz[-1] == round(0.1 * net.numel)
    assert (max(nnz) == sum(int(m.sum()) for m in before.values())) or name != "acdc"


def test_levels_go_on_from_given_masks():
    net = sparse_net()
    before, first = {n: x.mask.clone() for n, x in net.layers.items()}, net.nnz
    run = session(net, epochs=2)
    method = methods.create("imp", masks="given", density=0.1, levels=3, rewind_epochs=0.0)
    method.begin(run)
    while method.next_stage() is not None:
        method.end_stage(train_stage(run, method))
        assert all(not (x.mask & ~before[n]).any() for n, x in net.layers.items())
    assert method.trace[0]["nnz"] == first
    assert method.trace[-1]["nnz"] == net.nnz == round(0.1 * net.numel)


@pytest.mark.parametrize("name", ["rigl", "set", "snfs"])
def test_an_exchange_keeps_the_counts_of_given_masks(name):
    net = sparse_net()
    optimizer = OPTIMIZERS["sgd"](net)
    method = short(name, "", masks="given")
    digest, nnz = net.mask_digest(), net.nnz
    method.attach(net, optimizer, total_steps=24, steps_per_epoch=3)
    train_steps(net, optimizer, method, 24)
    assert net.mask_digest() != digest
    assert net.nnz == nnz


def test_a_soft_memory_bound_keeps_the_layer_counts_of_given_masks_in_the_end():
    net = sparse_net()
    optimizer = OPTIMIZERS["sgd"](net)
    counts = {n: x.nnz for n, x in net.layers.items()}
    method = short("mest", "", masks="given")
    method.attach(net, optimizer, total_steps=24, steps_per_epoch=3)
    most = 0
    for number in range(24):
        train_steps(net, optimizer, method, 1, number)
        most = max(most, net.nnz)
    assert most > sum(counts.values())
    assert {n: x.nnz for n, x in net.layers.items()} == counts


@pytest.mark.parametrize("name", some([n for n in CHOOSING if n not in STAGED], representative))
def test_given_masks_are_resumed_bit_for_bit(name, tmp_path):
    def advance(net, optimizer, method, first, last):
        for number in range(first, last):
            train_steps(net, optimizer, method, 1, number)
            if number % 3 == 2:
                method.report(0.5 + number / 100, 0.002)

    whole = sparse_net()
    optimizer, method = OPTIMIZERS["adamw"](whole), short(name, "", masks="given")
    method.attach(whole, optimizer, total_steps=24, steps_per_epoch=3)
    advance(whole, optimizer, method, 0, 24)
    cut = sparse_net()
    first_optimizer, first = OPTIMIZERS["adamw"](cut), short(name, "", masks="given")
    first.attach(cut, first_optimizer, total_steps=24, steps_per_epoch=3)
    advance(cut, first_optimizer, first, 0, 13)
    torch.save([cut.state_dict(), first_optimizer.state_dict(), first.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    # a loop that has restored masks and optimizer before the method is attached
    fresh = small_net(seed=9)
    second_optimizer = OPTIMIZERS["adamw"](fresh)
    fresh.load_state_dict(states[0])
    second_optimizer.load_state_dict(states[1])
    loop = ForeignLoop(short(name, "", masks="given"))
    loop.start(fresh, second_optimizer, total_steps=24, steps_per_epoch=3, state=states[2])
    loop.stop()
    advance(fresh, second_optimizer, loop.method, 13, 24)
    assert fresh.mask_digest() == whole.mask_digest()
    assert loop.method.trace == method.trace


def test_a_loop_that_resumes_is_not_told_of_masks_that_it_restores():
    net = small_net()
    method, optimizer = short("rigl", ""), OPTIMIZERS["sgd"](net)
    method.attach(net, optimizer, total_steps=24, steps_per_epoch=3)
    train_steps(net, optimizer, method, 5)
    digest, state = net.mask_digest(), method.state_dict()
    loop = ForeignLoop(short("rigl", ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.start(net, optimizer, total_steps=24, steps_per_epoch=3, state=state)
    loop.stop()
    assert net.mask_digest() == digest


def test_a_run_keeps_given_masks_and_says_so_in_its_config(tmp_path):
    net = fresh_net()
    methods.create("static", density=0.3).attach(
        net, torch.optim.SGD(net.parameters(), 0.1), total_steps=1, steps_per_epoch=1
    )
    digest = net.mask_digest()
    method = methods.create("static", masks="given")
    growfx.train(net, *loaders(), method=method, options=QUICK, out=tmp_path / "run", epochs=1, progress=False)
    assert net.mask_digest() == digest
    text = (tmp_path / "run" / "config.json").read_text()
    assert '"masks": "given"' in text
    assert method.density is None


def test_a_default_density_is_a_plain_number_and_gives_way_to_given_masks():
    assert type(methods.create("rigl").density) is float
    assert methods.create("rigl").density == 0.1
    assert methods.create("rigl", masks="given").density is None
    assert methods.create("rigl", masks="given", density=0.1).density == 0.1
    with pytest.raises(ConfigError, match=r"`density` is None.*`masks` = \"given\""):
        methods.create("rigl", density=None)
    with pytest.raises(ConfigError, match=r"`masks` = 'mine' is unknown; allowed: `drawn`, `given`, `magnitude`"):
        methods.create("rigl", masks="mine")


def test_a_base_without_the_option_is_refused():
    with pytest.raises(ConfigError, match="`masks` has no effect with `base` = 'snip'"):
        methods.create("sup-tickets", base="snip", masks="magnitude")
