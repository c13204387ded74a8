"""Weights that are read without a call of their layer: whoever reads them finds where(mask, weight, 0)."""

import copy
import threading
from typing import Any

import pytest
import torch
from breadth import some
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import growfx

READS: dict[str, Any] = {
    "plain": lambda w: w,
    "T": lambda w: w.T.T,
    "t": lambda w: w.t().t(),
    "mT": lambda w: w.mT.mT,
    "H": lambda w: w.H.H,
    "transpose": lambda w: w.transpose(0, 1).transpose(0, 1),
    "view": lambda w: w.view(-1).view(w.shape),
    "reshape": lambda w: w.reshape(-1).reshape(w.shape),
    "flatten": lambda w: w.flatten().unflatten(0, w.shape),
    "index": lambda w: w[:],
    "chunk": lambda w: torch.cat(w.chunk(2, 0)),
    "unbind": lambda w: torch.stack(w.unbind(0)),
    "iteration": lambda w: torch.stack(list(w)),
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "cast": lambda w: w.double().float(),
}


class Block(nn.Module):
    """Reads the weight of its layer, which it never calls, and may be told to read it another way."""

    def __init__(self, read: Any = READS["plain"]) -> None:
        super().__init__()
        self.lin, self.read = nn.Linear(6, 6, bias=False), read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read(self.lin.weight))


class Around(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).relu())


def dirty(net: growfx.MaskedGraph) -> growfx.MaskedGraph:
    """The net with something other than zero stored outside its masks, written where nothing notices it."""
    torch.manual_seed(1)
    for layer in net.layers.values():
        layer.parameter.data.copy_(torch.randn_like(layer.parameter))
    return net


@pytest.mark.parametrize("gradients", some([True, False], bool))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("read", READS)
def test_a_weight_read_through_any_view_is_masked(read: str, training: bool, gradients: bool) -> None:
    net = dirty(growfx.wrap(Around(Block(READS[read])), torch.randn(2, 6), density=0.4).train(training))
    plain, x = growfx.unwrap(net), torch.randn(3, 6)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(net(x), plain(x), atol=0, rtol=0)


class Keeps(nn.Module):
    """Keeps a layer's weight elsewhere than under a name of a module."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.lin, self.read = nn.Linear(6, 6, bias=False), read
        self.kept = [self.lin.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read(self.kept[0]))


@pytest.mark.parametrize("training", some([True, False], bool))
@pytest.mark.parametrize("read", READS)
def test_a_weight_that_a_model_keeps_in_a_list_is_masked(read: str, training: bool) -> None:
    net = dirty(growfx.wrap(Around(Keeps(READS[read])), torch.randn(2, 6), density=0.4).train(training))
    plain, x = growfx.unwrap(net), torch.randn(3, 6)
    torch.testing.assert_close(net(x), plain(x), atol=0, rtol=0)


class Own(nn.Linear):
    """A layer whose forward reads its weight, and calls itself."""

    def forward(self, input: Tensor, depth: int = 2) -> Tensor:  # noqa: A002
        y = F.linear(input, self.weight.t().t(), self.bias)
        return self(y.tanh(), depth - 1) if depth else y


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_a_forward_of_its_own_reads_its_masked_weight_and_may_call_itself(training: bool) -> None:
    net = growfx.wrap(nn.Sequential(Own(6, 6), nn.Linear(6, 2)), torch.randn(2, 6), density=0.4).train(training)
    plain, x = growfx.unwrap(dirty(net)), torch.randn(3, 6)
    ours, theirs = net(x), plain(x)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward(), theirs.square().sum().backward()
    layer = net.layers["0"]
    torch.testing.assert_close(layer.parameter.grad, torch.where(layer.mask, plain[0].weight.grad, 0))
    assert "weight" not in vars(net.get_submodule("0"))
    dirty(net).eval()
    stored = layer.parameter.detach().clone()
    torch.testing.assert_close(net.get_submodule("0")(x), growfx.unwrap(net).eval()[0](x))
    assert torch.equal(layer.parameter, stored)  # looking changes nothing


ALONE: dict[str, Any] = {
    "submodule": lambda net, x: net.block(x),
    "get_submodule": lambda net, x: net.get_submodule("block")(x),
    "shell": lambda net, x: net.shell(x),
    "module of the shell": lambda net, x: net.shell.block(x),
}


@pytest.mark.parametrize("gradients", some([True, False], bool))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ALONE)
def test_a_part_of_the_net_that_is_called_alone_computes_with_masked_weights(
    way: str, training: bool, gradients: bool
) -> None:
    net = dirty(growfx.wrap(Around(Block()), torch.randn(2, 6), density=0.4).train(training))
    plain, x = copy.deepcopy(growfx.unwrap(net)), torch.randn(3, 6)
    expected = plain(x) if way == "shell" else plain.block(x)
    with torch.set_grad_enabled(gradients):
        assert torch.equal(ALONE[way](net, x), expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.emb(ids)).relu())


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_hold_a_masked_parameter_and_are_no_layers_read_it_masked_when_called_alone(
    training: bool,
) -> None:
    ids, x = torch.tensor([[1, 2, 3]]), torch.randn(3, 6)
    net = dirty(growfx.wrap(Tied(), ids, density=0.4).train(training))
    assert torch.equal(net.emb(ids), growfx.unwrap(net).emb(ids))
    other = dirty(growfx.wrap(Around(Conv1D()), x, masked=["block.weight"], density=0.4).train(training))
    plain = growfx.unwrap(other)
    assert torch.equal(other.block(x), plain.block(x))
    assert type(plain.block._parameters) is type(Conv1D()._parameters)
    assert torch.equal(dirty(copy.deepcopy(other)).block(x), growfx.unwrap(dirty(other)).block(x))


class Branch(Around):
    """Reads a weight in a branch that the example does not take."""

    def __init__(self) -> None:
        super().__init__(Block())
        self.extra = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y = self.extra(self.block(x).relu())
        return self.head(y + F.linear(y, self.extra.weight) if more else y)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_read_in_a_branch_that_was_not_taken_at_wrap_is_masked_with_its_gradient(training: bool) -> None:
    net = growfx.wrap(Branch(), torch.randn(2, 6), density=0.4).train(training)
    plain, x = growfx.unwrap(dirty(net)), torch.randn(3, 6)
    ours, theirs = net(x, more=True), plain(x, more=True)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward(), theirs.square().sum().backward()
    for name, layer in net.layers.items():
        gradient = plain.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(layer.parameter.grad, torch.where(layer.mask, gradient, 0))


class Recomputes(Around):
    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__(block)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant).relu())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("block", [Block, Conv1D])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_computed_anew_for_the_backward_pass_is_masked(training: bool, reentrant: bool, block: Any) -> None:
    masked = ["block.weight"] if block is Conv1D else []
    net = growfx.wrap(Recomputes(block(), reentrant), torch.randn(2, 6), masked=masked, density=0.4).train(training)
    plain, x = growfx.unwrap(dirty(net)), torch.randn(3, 6, requires_grad=True)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    net(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    for name, layer in net.layers.items():
        gradient = plain.get_parameter(name if name.endswith("weight") else f"{name}.weight").grad
        torch.testing.assert_close(layer.parameter.grad, torch.where(layer.mask, gradient, 0))


def test_looking_at_a_weight_gives_the_parameter_which_can_be_written_to_and_trained() -> None:
    net = growfx.wrap(Around(Block()), torch.randn(2, 6), density=0.4).eval()
    for name in ("block.lin", "head"):
        layer = net.layers[name]
        assert layer.weight is layer.parameter is net.get_parameter(f"{name}.weight")
        layer.weight.data.fill_(1.0)
        assert torch.equal(layer.weight, layer.mask.float())
        nn.init.ones_(layer.weight)
    assert torch.equal(net.block(torch.ones(1, 6))[0], net.layers["block.lin"].mask.float().sum(1))
    optimizer = torch.optim.SGD([net.layers["head"].weight], lr=0.1)
    net(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    net.verify()


def test_functional_calls_with_a_mask_in_the_mapping_use_it_and_write_to_nothing() -> None:
    net = growfx.wrap(Around(Block()), torch.randn(2, 6), density=0.4)
    x, before = torch.randn(3, 6), {k: v.clone() for k, v in net.state_dict().items()}
    for training in (True, False):
        net.train(training)
        mask = torch.rand(2, 6) < 0.5
        inner = torch.rand(6, 6) < 0.5
        given = {"head.mask": mask, "head.weight": torch.randn(2, 6), "block.lin.weight": torch.randn(6, 6)}
        kept = {k: v.clone() for k, v in given.items()}
        found = torch.func.functional_call(net, given, (x,))
        hidden = F.linear(x, torch.where(net.masks["block.lin"], given["block.lin.weight"], 0)).relu()
        head = torch.where(mask, given["head.weight"], 0)
        torch.testing.assert_close(found, F.linear(hidden, head, net.get_parameter("head.bias")))
        assert all(torch.equal(given[k], kept[k]) for k in kept)
        alone = torch.func.functional_call(net, {"head.mask": mask, "block.lin.mask": inner}, (x,))
        hidden = F.linear(x, torch.where(inner, before["block.lin.weight"], 0)).relu()
        head = torch.where(mask, before["head.weight"], 0)
        torch.testing.assert_close(alone, F.linear(hidden, head, net.get_parameter("head.bias")))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("kind", [Attends, Own])
def test_threads_through_layers_that_read_their_own_weight_leave_nothing_behind(kind: Any) -> None:
    example = torch.randn(2, 5, 8)
    model = Attends() if kind is Attends else nn.Sequential(Own(8, 8), nn.Linear(8, 2))
    net = dirty(growfx.wrap(model, example, density=0.4).eval())
    plain, wrong, barrier = growfx.unwrap(net), [], threading.Barrier(4)
    inside, both = threading.Event(), threading.Barrier(2)
    layer = next(iter(net.layers.values()))
    entered = layer._effective_parameters

    def work(number: int) -> None:
        barrier.wait(60)
        for turn in range(10):
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(10 * number + turn))
            with torch.no_grad():
                if not torch.allclose(net(x), plain(x), rtol=1e-4, atol=1e-5):
                    wrong.append(number)

    def overlapping(first: bool) -> None:
        # The first to come is the first to leave.
        if first:
            with entered():
                inside.set()
                both.wait(60)
        else:
            assert inside.wait(60)
            with entered():
                both.wait(60)
                threads[-2].join(60)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    threads += [threading.Thread(target=overlapping, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert layer.weight_name not in vars(layer)
    with torch.no_grad():
        layer.parameter.mul_(2)
    assert torch.equal(net(example), growfx.unwrap(net)(example))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_masks_changed_within_one_autocast_block_are_seen(training: bool, gradients: bool, cache: bool) -> None:
    net = growfx.wrap(Around(Block()), torch.randn(2, 6)).train(training)
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        net(x)
        for density in (0.5, 0.2):
            masks = {name: torch.rand(mask.shape) < density for name, mask in net.masks.items()}
            net.set_masks(masks)
            assert torch.equal(net(x), growfx.unwrap(net)(x))
            for name, layer in net.layers.items():
                layer.mask.copy_(masks[name] & (torch.rand(masks[name].shape) < 0.5))
            assert torch.equal(net(x), growfx.unwrap(net)(x))


def test_a_module_that_was_untied_reads_its_own_parameter_and_a_copy_of_the_model_its_own() -> None:
    ids = torch.tensor([[1, 2, 3]])
    net = growfx.wrap(Tied(), ids, density=0.4).eval()
    shell = copy.deepcopy(dirty(net).shell)
    with torch.no_grad():
        net.emb.weight.zero_()
        assert shell.emb(ids).any()
    net.emb.weight = nn.Parameter(torch.ones(9, 6))
    assert torch.equal(net.emb(ids), torch.ones(1, 3, 6))
    assert net.shell.emb.weight is net.get_parameter("emb.weight")


def test_a_forward_that_looks_at_a_weight_finds_a_parameter() -> None:
    class Looks(Around):
        seen: list[object] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            weight = self.head.weight
            self.seen.append((type(weight), weight.is_leaf, weight.dtype, weight is self.head.weight))
            return super().forward(x)

    for training in (True, False):
        net = growfx.wrap(Looks(Block()), torch.randn(2, 6), density=0.4).train(training)
        Looks.seen.clear()
        net(torch.randn(2, 6)).sum().backward()
        assert Looks.seen == [(nn.Parameter, True, torch.float32, True)]
        layer = net.layers["head"]
        assert not layer.parameter.grad[~layer.mask].any()
