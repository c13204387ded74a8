"""The plain model of a masked network, at full size or without the units its outputs do not need."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from growfx.artifact import reader
from growfx.errors import ArtifactError, ConfigError
from growfx.masked.doors import as_masked_graph
from growfx.masked.graph import MaskedGraph
from growfx.notices import warn_once
from growfx.passes.compact.network import compact as leave_out
from growfx.passes.mask import swap

__all__ = ["load_to_export", "unwrap"]


def unwrap(net: MaskedGraph, compact: bool = False) -> nn.Module:
    """The plain model of the original class, a copy, with weights outside the masks +0.0.

    Args:
        net: a masked network; nothing of it is changed.
        compact: leave out the units that the outputs can do without (`growfx.passes.compact`): a smaller model of the
            same class in evaluation mode, equal to the network in that mode, with its norms; it can be trained on. What
            cannot be left out stays as zeros.

    Warns:
        GrowfxWarning: with `compact`, units were left out, and a norm's scale or a layer's weight is zero throughout.

    Raises:
        ConfigError: the weights are spread over processes (`fully_shard`).
        MaskError: a masked layer was replaced since the model was wrapped.
        TraceError: with `compact`, a network without values.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> model = growfx.unwrap(net)
        >>> type(model).__name__, int(model[0].weight.count_nonzero())
        ('Sequential', 4)
    """
    net = as_masked_graph(net, "growfx.unwrap")
    if not isinstance(compact, bool):
        raise ConfigError(f"`compact` is {compact!r}; allowed are True and False")
    if not compact:
        return swap.unwrap(net)
    compacted = leave_out(net)
    if compacted.report.removed:
        _warn_of_zeros(net, compacted.report.removed)
    return compacted.net


def _warn_of_zeros(net: MaskedGraph, left_out: int) -> None:
    """Tell of scales and weights that are zero throughout, as many are before training, and silence what they scale."""
    layers = {id(layer.parameter): layer for layer in net.layers.values()}
    zero = [
        name
        for name, parameter in net.named_parameters()
        if name.rpartition(".")[2] in ("weight", "in_proj_weight")
        and parameter.numel() > 1
        # a matrix without a mask may be a table of positions
        and (parameter.ndim == 1 or (id(parameter) in layers and bool(layers[id(parameter)].mask.any())))
        and not bool(parameter.any())
    ]
    if zero:
        listed = ", ".join(f"`{name}`" for name in zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
        warn_once(
            f"{listed} {'is' if len(zero) == 1 else 'are'} zero throughout, as scales often are before training; "
            f"compaction also left out what they silence ({left_out} units in all), which training cannot bring back: "
            "if the result is to be trained, set them to other values before compaction",
            net.trace_report.notes,
        )


def load_to_export(path: str | Path, door: str) -> nn.Module:
    """The network of an artifact, for a door that has no `model=`.

    Raises:
        ArtifactError: as `growfx.load`; where the artifact does not tell how its model is built, with what to give.
    """
    info = reader.inspect(path)
    if why := reader.why_no_builder(info.model, info.notes):
        raise ArtifactError(
            f"`{path}`: {why}; give {door} the network itself, or what `growfx.load(path, model=instance)` returns"
        )
    return reader.load(path)
