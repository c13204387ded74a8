"""Which layers a method may change: frozen layers, layers off path, optimizers of other networks."""

from typing import Any

import pytest
import torch
from breadth import representative, some
from method_nets import small_net, train_steps
from staged_runs import session, train_stage, train_step
from test_methods import GROWTH, NOT_STEPWISE, STEPWISE, short
from torch import nn
from torch.nn import functional as F

import growfx
from growfx import methods
from growfx.errors import CheckpointError, ConfigError
from growfx.methods.scope import find_scope

FROZEN = "block"


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "artifact"
    net = small_net()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    methods.create("static", density=0.2).attach(net, sgd, total_steps=1, steps_per_epoch=1)
    growfx.save(net, folder)
    return folder


def frozen_net(names=(FROZEN,), net_seed: int = 0) -> Any:
    net = small_net(net_seed)
    for name in names:
        net.layers[name].parameter.requires_grad_(False)
        net.layers[name].mask.bernoulli_(0.7, generator=torch.Generator().manual_seed(1))
        net.layers[name].settle()
    return net


def sgd(net) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def trained(net):
    return [layer for layer in net.layers.values() if layer.parameter.requires_grad]


def attached(name: str, net, source, **options):
    method, optimizer = short(name, source, **options), sgd(net)
    method.attach(net, optimizer, total_steps=24, steps_per_epoch=3)
    return method, optimizer


@pytest.mark.parametrize("name", some(STEPWISE, representative))
def test_frozen_layers_keep_masks_and_weights_and_stay_out_of_the_budget(name, source):
    net = frozen_net()
    mask, weight = net.layers[FROZEN].mask.clone(), net.layers[FROZEN].parameter.clone()
    method, optimizer = attached(name, net, source, density=0.23, budget="flops=0.9")
    for _ in range(8):
        train_steps(net, optimizer, method, 3)
        method.report(0.5, 0.01)
        assert torch.equal(net.layers[FROZEN].mask, mask)
    assert torch.equal(net.layers[FROZEN].parameter, weight)
    others = trained(net)
    if name not in GROWTH | {"channel-prune", "ticket"}:
        assert sum(layer.nnz for layer in others) == round(0.23 * sum(layer.numel for layer in others))
    assert net.nnz == sum(layer.nnz for layer in others) + int(mask.sum())


@pytest.mark.parametrize("name", some(sorted(NOT_STEPWISE), representative))
def test_frozen_layers_keep_masks_and_weights_through_whole_runs(name, source):
    net = frozen_net()
    mask, weight = net.layers[FROZEN].mask.clone(), net.layers[FROZEN].parameter.clone()
    run = session(net, epochs=6)
    method = short(name, source, density=0.23, rewind_epochs=0.0)
    method.begin(run)
    while method.next_stage() is not None:
        method.end_stage(train_stage(run, method))
        assert torch.equal(net.layers[FROZEN].mask, mask)
    assert torch.equal(net.layers[FROZEN].parameter, weight)
    others = trained(net)
    assert sum(layer.nnz for layer in others) == round(0.23 * sum(layer.numel for layer in others))


@pytest.mark.parametrize("name", some(methods.names(), representative))
def test_a_network_with_nothing_but_frozen_layers_is_refused_unchanged(name, source):
    net = frozen_net(("stem", "block", "wide", "head"))
    before = net.mask_digest()
    run = session(net, optimizer="sgd")
    with pytest.raises(ConfigError, match=rf"`{name}`.*frozen.*requires_grad"):
        short(name, source).begin(run)
    assert net.mask_digest() == before


@pytest.mark.parametrize("name", some(methods.names(), representative))
def test_a_network_without_masked_layers_is_refused_by_its_parameters(name, source):
    net = growfx.wrap(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), exclude="*")
    with pytest.raises(ConfigError, match=rf"`{name}`.*no masked layer.*`0\.weight` \(4, 4\)"):
        short(name, source).begin(session(net))


@pytest.mark.parametrize("name", some(sorted(set(STEPWISE) - {"channel-prune", "ticket"}), representative))
def test_a_density_that_leaves_no_weight_is_refused_unchanged(name, source):
    net = small_net()
    option = {"seed_density": 1e-7} if name in GROWTH else {"density": 1e-7}
    with pytest.raises(ConfigError, match=r"1e-07.*\d+ edges.*allowed are densities|narrowest network"):
        attached(name, net, source, **option)
    assert net.density == 1


@pytest.mark.parametrize("name", ["set", "mest", "gmp", "granet", "snfs", "rigl-sm", "acdc"])
def test_a_layer_frozen_in_the_middle_keeps_its_mask_from_then_on(name, source):
    net = small_net()
    method, optimizer = attached(name, net, source, density=0.3)
    train_steps(net, optimizer, method, 9)
    net.layers["wide"].parameter.requires_grad_(False)
    mask = net.layers["wide"].mask.clone()
    train_steps(net, optimizer, method, 15, start=9)
    assert torch.equal(net.layers["wide"].mask, mask)
    others = [layer for layer in net.layers.values() if layer.parameter.requires_grad]
    assert sum(layer.nnz for layer in others) == round(0.3 * sum(layer.numel for layer in others)) or name in (
        "set",
        "snfs",
        "rigl-sm",
    )
    net.verify()


@pytest.mark.parametrize("name", some(sorted(NOT_STEPWISE), representative))
def test_whole_runs_leave_a_layer_alone_that_is_frozen_in_the_middle(name, source):
    net = small_net()
    run = session(net, epochs=6)
    method = short(name, source, density=0.3, rewind_epochs=0.0)
    method.begin(run)
    stage = method.next_stage()
    assert stage is not None
    for number in range(9):
        train_step(run, method, number)
    net.layers["wide"].parameter.requires_grad_(False)
    mask, weight = net.layers["wide"].mask.clone(), net.layers["wide"].parameter.clone()
    for number in range(9, stage.epochs * 4):
        train_step(run, method, number)
    method.report(0.5)
    method.end_stage(stage)
    while method.next_stage() is not None:
        method.end_stage(train_stage(run, method))
    assert torch.equal(net.layers["wide"].mask, mask)
    assert torch.equal(net.layers["wide"].parameter, weight)
    assert all(layer.gate is None for layer in net.layers.values())
    others = trained(net)
    assert name == "grasp" or sum(layer.nnz for layer in others) == round(0.3 * sum(layer.numel for layer in others))
    net.verify()


def test_the_search_for_soft_masks_is_resumed_with_a_layer_frozen_since():
    digests = []
    for cut in (False, True):
        net = small_net()
        run = session(net, epochs=3)
        method = methods.create("continuous", density=0.3, rounds=1, rewind_epochs=0.0)
        method.begin(run)
        for number in range(12):
            if number == 5:
                net.layers["wide"].parameter.requires_grad_(False)
            if cut and number == 8:
                state, weights = method.state_dict(), {k: v.clone() for k, v in net.state_dict().items()}
                progress = run.optimizer.state_dict()
                method = methods.create("continuous", density=0.3, rounds=1, rewind_epochs=0.0)
                method.begin(run)
                net.load_state_dict(weights)
                run.optimizer.load_state_dict(progress)
                method.load_state_dict(state)
            train_step(run, method, number)
        method.report(0.5)
        method.end_stage(method.next_stage())
        digests.append(net.mask_digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["gmp", "mest", "acdc"])
def test_what_is_left_to_train_keeps_an_edge_where_most_layers_are_frozen_in_the_middle(name, source):
    net = small_net()
    method, optimizer = attached(name, net, source, density=0.005)
    train_steps(net, optimizer, method, 4)
    for layer in ("stem", "block", "wide"):
        net.layers[layer].parameter.requires_grad_(False)
    train_steps(net, optimizer, method, 20, start=4)
    assert net.layers["head"].nnz >= 1
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net.head.bias.requires_grad_(True)
    train_steps(net, optimizer, method, 4, start=24)


@pytest.mark.parametrize("name", ["pwmpr", "gradient-growth", "random-growth", "grow-prune"])
def test_growth_leaves_a_layer_alone_that_is_frozen_in_the_middle(name, source):
    net = small_net()
    method, optimizer = attached(name, net, source, seed_density=0.2)
    train_steps(net, optimizer, method, 4)
    net.layers["wide"].parameter.requires_grad_(False)
    mask, before = net.layers["wide"].mask.clone(), net.nnz
    for number in range(4, 20, 4):
        train_steps(net, optimizer, method, 4, start=number)
        method.report(0.5 + number / 100, 0.01)
        assert torch.equal(net.layers["wide"].mask, mask)
    assert net.nnz > before


@pytest.mark.parametrize("name", ["rigl", "mest", "gmp", "pwmpr", "gradient-growth"])
def test_a_run_with_frozen_layers_is_resumed_with_the_same_layers(name, source, tmp_path):
    def advance(net, optimizer, method, first, last):
        for number in range(first, last):
            train_steps(net, optimizer, method, 1, number)
            if number % 3 == 2:
                method.report(0.5 + number / 100, 0.002)

    whole = frozen_net()
    method, optimizer = attached(name, whole, source, seed=3)
    advance(whole, optimizer, method, 0, 18)
    cut = frozen_net()
    first, first_optimizer = attached(name, cut, source, seed=3)
    advance(cut, first_optimizer, first, 0, 10)
    state = [cut.state_dict(), first_optimizer.state_dict(), first.state_dict()]
    torch.save(state, tmp_path / "state.pt")
    net_state, optimizer_state, method_state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = frozen_net(net_seed=5)
    second, second_optimizer = attached(name, fresh, source, seed=3)
    fresh.load_state_dict(net_state)
    second_optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(method_state)
    advance(fresh, second_optimizer, second, 10, 18)
    assert fresh.mask_digest() == whole.mask_digest()
    assert second.trace == method.trace


@pytest.mark.parametrize("name", ["rigl", "pwmpr", "gmp", "imp"])
def test_a_state_of_another_version_is_a_checkpoint_error_and_changes_nothing(name, source):
    net = small_net()
    method = short(name, source)
    method.begin(session(net))
    state = method.state_dict()
    for broken in (
        {"method": name},
        {k: v for k, v in state.items() if k != "trace"},
        {**state, "steps": "many"},
        {**state, "trace": 3},
        {**state, "scope": {"layers": ["gone"], "left": {}}},
        ["rigl"],
    ):
        with pytest.raises(CheckpointError):
            method.load_state_dict(broken)
        assert {**method.state_dict(), "memory": None, "origin": None}.keys() >= {"method"}
    method.load_state_dict(state)


# -- layers off path ----------------------------------------------------------------------------------------------


class WithAuxiliary(nn.Module):
    """A head that training alone runs, larger than all the rest."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.aux = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def auxiliary_net():
    torch.manual_seed(0)
    return growfx.wrap(WithAuxiliary().eval(), torch.randn(2, 6))


WHOLE_UNITS = {"channel-growth", "channel-prune"}
PATH_METHODS = {
    "grow-prune", "gradient-growth", "phew", "pwmpr", "random-growth", "small-dense", "synflow", *WHOLE_UNITS
}  # fmt: skip


@pytest.mark.parametrize("name", some(sorted(set(STEPWISE) - PATH_METHODS - {"ticket"}), representative))
def test_methods_without_paths_spend_edges_on_large_layers_off_path_too(name, source):
    net = auxiliary_net()
    assert set(growfx.path_products(net).off_path) == {"aux.0", "aux.2"}
    method, optimizer = attached(name, net, source, density=0.2)
    net.train()
    for number in range(24):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        target = (x.sum(1) > 0).long()
        sum(F.cross_entropy(out, target) for out in net(x)).backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    assert net.nnz == round(0.2 * net.numel)
    assert 0 < net.layers["aux.0"].density < 1
    assert net.layers["stem"].nnz


@pytest.mark.parametrize("name", sorted(PATH_METHODS - GROWTH - WHOLE_UNITS))
def test_methods_that_need_paths_name_the_layers_off_path_and_how_to_exclude_them(name, source):
    with pytest.raises(ConfigError, match=r"`aux\.0`, `aux\.2`.*`exclude` \(`--exclude`"):
        attached(name, auxiliary_net(), source, density=0.2)


@pytest.mark.parametrize("name", sorted(GROWTH - WHOLE_UNITS))
def test_growth_starts_above_the_share_of_layers_off_path(name, source):
    net = auxiliary_net()
    attached(name, net, source)
    alone = net.layers["aux.0"].numel + net.layers["aux.2"].numel
    on_path = net.layers["stem"].nnz + net.layers["head"].nnz
    assert net.nnz == alone + on_path
    assert 0 < on_path <= round(0.11 * (net.numel - alone))
    with pytest.raises(ConfigError, match=r"`aux\.0`, `aux\.2`.*`exclude` \(`--exclude`"):
        attached(name, auxiliary_net(), source, seed_density=0.3)
    with pytest.raises(ConfigError, match=r"at most 0\.4.*`aux\.0`, `aux\.2`"):
        attached(name, auxiliary_net(), source, max_density=0.4)


def test_small_layers_off_path_keep_their_masks():
    net = auxiliary_net()
    scope = find_scope(methods.create("set"), net, 1.0)
    assert scope.names  # the auxiliary layers are more than half of all edges
    assert not scope.left
    net.layers["aux.0"].mask[:, 1:] = False
    net.layers["aux.2"].mask[1:] = False
    scope = find_scope(methods.create("set"), net, 1.0)
    assert set(scope.left) == {"aux.0", "aux.2"}
    assert scope.numel == net.numel


# -- optimizers and types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(STEPWISE, representative))
def test_an_optimizer_of_another_network_is_refused_unchanged(name, source):
    net, other = small_net(), small_net()
    before = net.mask_digest()
    for optimizer in (
        torch.optim.SGD(other.parameters(), 0.1),
        torch.optim.SGD([net.layers["stem"].bias or nn.Parameter(torch.zeros(3))], 0.1),
        torch.optim.SGD(list(net.bn.parameters()), 0.1),
    ):
        with pytest.raises(ConfigError, match=r"`SGD`, \d+ parameters.*none of the masked weights.*`stem`"):
            short(name, source).attach(net, optimizer, total_steps=8, steps_per_epoch=2)
    assert net.mask_digest() == before


def test_an_optimizer_that_trains_frozen_weights_alone_is_refused():
    net = frozen_net()
    optimizer = torch.optim.SGD([net.layers[FROZEN].parameter], 0.1)
    with pytest.raises(ConfigError, match="none of the masked weights"):
        methods.create("set").attach(net, optimizer, total_steps=8, steps_per_epoch=2)


def test_weights_of_a_second_optimizer_take_part():
    net = small_net()
    first = torch.optim.SGD([net.stem.weight, net.head.weight], 0.05, momentum=0.9)
    second = torch.optim.Adam([net.block.weight, net.wide.weight], 0.01)
    method = methods.create("set", density=0.3, update_every=2, update_until=1.0)
    method.attach(net, first, total_steps=12, steps_per_epoch=3)
    masks = {name: layer.mask.clone() for name, layer in net.layers.items()}
    net.train()
    for number in range(6):
        noise = torch.Generator().manual_seed(number)
        images = torch.randn(8, 3, 8, 8, generator=noise)
        F.cross_entropy(net(images), images.mean((1, 2, 3)).gt(0).long()).backward()
        first.step()
        second.step()
        method.step()
        first.zero_grad()
        second.zero_grad()
    assert not torch.equal(net.layers["wide"].mask, masks["wide"])
    assert net.nnz == round(0.3 * net.numel)
    moments = second.state[net.wide.weight]["exp_avg"]
    assert not moments[~net.layers["wide"].mask].any()
    assert method.state_dict()["steps"] == 6


def test_what_is_no_network_or_no_optimizer_is_refused_by_its_class(source):
    net = small_net()
    for name in STEPWISE:
        with pytest.raises(ConfigError, match=r"MaskedGraph.*got `Linear`"):
            short(name, source).attach(nn.Linear(2, 2), sgd(net), total_steps=8, steps_per_epoch=2)
        with pytest.raises(ConfigError, match=r"optimizer.*got str"):
            short(name, source).attach(net, "sgd", total_steps=8, steps_per_epoch=2)


def test_walks_run_through_frozen_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[4].weight.fill_(1.0)
        model[2].weight.zero_()
        model[2].weight[3] = 1.0  # every walk from the inputs comes out of this unit
    net = growfx.wrap(model, torch.randn(1, 6))
    net.layers["2"].parameter.requires_grad_(False)
    method = methods.create("phew", density=0.2)
    method.attach(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=4, steps_per_epoch=2)
    assert net.layers["2"].density == 1
    assert net.layers["4"].mask[:, 3].all()
    assert net.layers["0"].nnz + net.layers["4"].nnz == round(0.2 * 80)
