"""Other ranks that have the same network: that they are there, and that all have the same masks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from growfx.distributed import ranks
from growfx.distributed.sharded import fsdp_modules
from growfx.errors import ConfigError
from growfx.masked.agreement import require_same_masks
from growfx.masked.graph.layer_table import LayerTable

__all__ = ["Replicas"]


class Replicas:
    """What a network knows of the other ranks that train it.

    Attributes:
        found: whether `DistributedDataParallel` holds the network, so that all ranks must have the same masks.
    """

    def __init__(self, table: LayerTable) -> None:
        self._table = table
        self.found, self._compared = False, False
        self._edges: list[Tensor] | None = None  # that `DistributedDataParallel` was made for
        self._searched_as: type | None = None  # `fully_shard` gives what it is called on another class

    def note_ddp(self) -> None:
        """Remember that `DistributedDataParallel` asked what it need not send."""
        self.found, self._edges = True, self.kept_edges()

    def kept_edges(self) -> list[Tensor]:
        """Packed masks of the layers that keep values of present edges; others than before where edges are others."""
        layers = [layer for layer in self._table.layers.values() if layer.present is not None]
        for layer in layers:
            layer.settle()
        return [layer.present.bits for layer in layers if layer.present is not None]

    def mode_changed(self) -> None:
        """Look for shards anew before the next forward."""
        self._searched_as = None

    def before_forward(self, net: nn.Module, training: bool) -> None:
        """Find shards, compare masks once, and check that the exchange of gradients fits the edges of now.

        Raises:
            MaskError: the ranks have different masks.
            ConfigError: the exchange was set up for other edges, or shards and values of present edges meet.
        """
        if self._searched_as is not type(net):
            self.find_shards(net)
        if training and not self._compared:
            self._compare()
        if training and self.found:
            self._check_exchange()

    def find_shards(self, net: nn.Module) -> None:
        """Find out what `fully_shard` was called on: this network, or modules inside that gather their own weights."""
        self._searched_as = type(net)
        if not fsdp_modules(net):
            return
        self._table.check()
        for name, layer in self._table.layers.items():
            if layer.present is not None:
                raise ConfigError(
                    f"`fully_shard` spreads rows of whole weights over ranks, and `{name}` keeps values of present "
                    'edges only (`storage` = "present"), which have no rows; use `DistributedDataParallel`, or '
                    '`growfx.use_kernels(net, storage="dense")` before `fully_shard`'
                )
            layer.sharded = True

    def copied(self, table: LayerTable) -> Replicas:
        """What a copy of the network knows."""
        clone = Replicas(table)
        known: dict[str, Any] = {**self.__dict__, "_table": table}
        clone.__dict__.update(known)
        return clone

    def _compare(self) -> None:
        """Compare the masks once, in the first forward that all ranks make together."""
        if ranks.within_ddp():
            self.found = True  # also where something around this network was wrapped
        elif not any(layer.sharded for layer in self._table.layers.values()):
            return
        self._compared = True
        require_same_masks(self._table.layers)

    def _check_exchange(self) -> None:
        """Refuse a forward of ranks whose exchange of gradients was set up for other masks."""
        if not ranks.within_ddp():
            return
        now = self.kept_edges()
        known = self._edges or now
        if any(a is not b for a, b in zip(known, now, strict=False)):
            raise ConfigError(
                "`DistributedDataParallel` exchanges gradients of the edges it found; masks have changed since, with "
                'them the values that are kept (`storage` = "present"); put the network into a new '
                "`DistributedDataParallel` after every change of masks, as growfx.train does"
            )
        self._edges = now
