"""Shared parts of growth methods: the seed, the size of the next round, and restoring an earlier round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from growfx.analysis.paths import PathProducts
from growfx.distributed.sharded import local_shard, part_of
from growfx.errors import CheckpointError, ConfigError
from growfx.masked.mask_bits import pack, unpack
from growfx.masked.optimizers import forget_state
from growfx.methods.growth.price import Price
from growfx.methods.scope import Scope, is_frozen, listed
from growfx.methods.starting import given_masks, is_resuming, start_density
from growfx.notices import warn_once
from growfx.passes.path_products.products import check_path_rules, path_gradients
from growfx.passes.seed import seed_masks

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["DRAWS", "Origin", "Snapshot", "counted_where_zero", "grown_density", "next_nnz", "seeded"]

DRAWS = ("sampled", "top")  # in proportion to a score, or the largest scores


def next_nnz(nnz: int, numel: int, growth_ratio: float, max_density: float) -> int:
    """Return how many edges the next round has: `growth_ratio` times as many, at least one more, within the
    limit.

    Equal to `nnz` (or less) where `max_density` (of `numel` edges) is reached.
    """
    limit = round(max_density * numel)
    return min(max(round(growth_ratio * nnz), nnz + 1), limit)


def seeded(
    scope: Scope, masks: str, density: float | None, largest: float, seed: int, price: Price
) -> Mapping[str, Tensor]:
    """Return the masks that growth starts from: "drawn", "given" or of "magnitude".

    `density`: of the seed, `largest`: where growth ends, both over the layers that a density counts for `scope`, and
    shares of what all their edges cost by `price`.
    Raises `ConfigError` where the layers off every path, or the given masks, have another density or a larger one, and
    `TraceError` for a network without path products.
    """
    if masks != "given":
        frozen = [name for name in scope.net.layers if name not in scope.budget]
        which: dict[str, Any] = {"layers": scope.names, "frozen": frozen, "by_magnitude": masks == "magnitude"}
        which["price"] = price.per_edge
        return seed_masks(scope.net, density, seed=seed, largest=largest, **which).masks
    if not price.counts_weights:
        _check_given_cost(price.share(scope), density, largest)
    own = start_density(scope, density if price.counts_weights else None, "seed_density")
    if price.counts_weights and scope.nnz > round(largest * scope.numel) and not is_resuming():
        raise ConfigError(
            f"the given masks have density {own:.4g}, above `max_density` {largest}; growth starts at the one and ends "
            "at the other"
        )
    check_path_rules(scope.net)  # a network without paths is refused now, not after the first round
    return given_masks(scope.layers)


def _check_given_cost(own: float, density: float | None, largest: float) -> None:
    """Raise `ConfigError` unless given masks cost what a seed of `density` does, and no more than growth may."""
    if is_resuming():
        return
    if density is not None and abs(density - own) > 5e-4 * own:
        raise ConfigError(
            f'`seed_density` is {density:.6g}, but `masks` = "given" keeps masks that cost {own:.6g} of the dense '
            'multiply-accumulates; allowed is that, or None, or `masks` = "magnitude" to choose masks of that cost'
        )
    if own > largest:
        raise ConfigError(
            f"the given masks cost {own:.4g} of the dense multiply-accumulates, above `max_density` {largest}; growth "
            "starts at the one and ends at the other"
        )


def counted_where_zero(net: MaskedGraph, paths: PathProducts) -> PathProducts:
    """Return `paths`, with scores that count paths (all factors one) where the product of every path is zero.

    A head or a gain that starts at zero makes all products zero, and with them every score but its own; which edges
    connect inputs to outputs is known all the same. Where the masks leave no path there is nothing to count either.
    """
    if paths.log_total > -math.inf:
        return paths
    masks = {name: layer.mask for name, layer in net.layers.items()}
    counts = path_gradients(net, masks, norm="identity", unit_scales=True)
    if counts.log_total == -math.inf:
        return paths
    zero = [name for name, layer in net.layers.items() if not bool((layer.parameter.detach() * layer.mask).any())]
    cause = f"the weights of {listed(zero)} are" if zero else "a norm or learned scale on every path is"
    warn_once(
        f"every path product is zero, as {cause} zero: growth takes the number of paths through an edge as its score "
        "until some product is not; train for longer before the first round, or start these at other values",
        net.trace_report.notes,
    )
    return replace(paths, scores=counts.scores, log_scale=counts.log_scale)


def grown_density(entry: Mapping[str, Any]) -> float:
    """Return the share that growth pays for, of a round in the trace, over the layers that count: frozen ones do not.

    Where multiply-accumulates are the price that is the round's cost, elsewhere its density.
    """
    return entry.get("cost", entry.get("budget_density", entry["density"]))


@dataclass(frozen=True)
class Snapshot:
    """The masks and weights of a round, kept on the CPU; of sharded weights (`fully_shard`) this rank's part.

    masks: packed bits (uint8) by layer. active: the active weights by layer, in index order.
    rest: every other entry of the state dict (biases, norms and their statistics, unmasked layers).
    """

    masks: Mapping[str, Tensor]
    active: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]

    @classmethod
    def take(cls, net: MaskedGraph) -> Snapshot:
        """Copy the present state of `net`."""
        masks, active = {}, {}
        for name, layer in net.layers.items():
            masks[name] = pack(layer.mask)
            active[name] = local_shard(layer.parameter)[part_of(layer.mask, layer.parameter)].cpu()
        return cls(masks, active, {name: local_shard(value).cpu().clone() for name, value in _rest(net).items()})

    def restore(self, net: MaskedGraph, optimizer: Optimizer) -> None:
        """Restore `net`, and clear the optimizer's state, which belongs to another network.

        Frozen layers keep the weights and masks they have now.
        """
        layers = {name: layer for name, layer in net.layers.items() if not is_frozen(layer)}
        masks = {name: unpack(self.masks[name], layer.mask) for name, layer in layers.items()}
        net.set_masks(masks)
        with torch.no_grad():
            for name, layer in layers.items():
                own, mask = local_shard(layer.parameter), part_of(masks[name], layer.parameter)
                own.zero_().masked_scatter_(mask, self.active[name].to(own))
            for name, value in _rest(net).items():
                local_shard(value).copy_(self.rest[name])
        net.settle()
        forget_state(optimizer, net.layers.values())

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the three parts as plain dicts of tensors."""
        return {"masks": dict(self.masks), "active": dict(self.active), "rest": dict(self.rest)}

    @classmethod
    def from_state(cls, state: Mapping[str, Mapping[str, Tensor]], net: MaskedGraph) -> Snapshot:
        """Read `state_dict()`; raises `CheckpointError` where it does not fit `net`."""
        names = set(net.layers)
        fits = set(state["masks"]) == set(state["active"]) == names and set(state["rest"]) == set(_rest(net))
        packed = {name: math.ceil(layer.numel / 8) for name, layer in net.layers.items()}
        if not fits or any(state["masks"][name].numel() != size for name, size in packed.items()):
            raise CheckpointError(
                "the rounds kept in this state are of a network with other layers; resume with the model it came from"
            )
        return cls(*({k: v.cpu() for k, v in state[part].items()} for part in ("masks", "active", "rest")))


@dataclass(frozen=True)
class Origin:
    """Everything in a network but its masks (weights, biases, norm statistics) at one moment, kept on the CPU.

    tensors: by name, as in the state dict.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def take(cls, net: MaskedGraph) -> Origin:
        """Copy the present state of `net`."""
        return cls({name: local_shard(value).cpu().clone() for name, value in _unmasked(net).items()})

    def restore(self, net: MaskedGraph, optimizer: Optimizer) -> None:
        """Put all of it back under the masks that `net` has now, and forget the optimizer's state.

        Frozen layers keep the weights they have now.
        """
        frozen = {id(layer.parameter) for layer in net.layers.values() if is_frozen(layer)}
        with torch.no_grad():
            for name, value in _unmasked(net).items():
                if id(value) in frozen:
                    continue
                local_shard(value).copy_(self.tensors[name])
        net.settle()
        forget_state(optimizer, net.layers.values())

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], net: MaskedGraph) -> Origin:
        """Read `tensors`; raises `CheckpointError` where they are not those of `net`."""
        if {k: v.shape for k, v in tensors.items()} != {k: local_shard(v).shape for k, v in _unmasked(net).items()}:
            raise CheckpointError(
                "the initial weights in this state are of a network with other layers; resume with the model it came "
                "from"
            )
        return cls({name: value.cpu() for name, value in tensors.items()})


def _rest(net: MaskedGraph) -> dict[str, Tensor]:
    """Return the live tensors of the state dict that are neither masked weights nor masks; tied names too."""
    weights = {id(layer.parameter) for layer in net.layers.values()}
    return {name: value for name, value in _unmasked(net).items() if id(value) not in weights}


def _unmasked(net: MaskedGraph) -> dict[str, Tensor]:
    """Return the live tensors of the state dict that are not masks."""
    masks = {id(layer.mask) for layer in net.layers.values()}
    state = net.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and id(value) not in masks}
