"""Weights of which each process has a part, and why growfx does not mask them."""

from torch import nn

from growfx.errors import ConfigError

__all__ = ["require_whole"]


def require_whole(parameter: nn.Parameter) -> None:
    """Raise `ConfigError` for a parameter that `fully_shard`, or another plan, has spread over processes."""
    if type(parameter) is nn.Parameter:  # the import below takes as long as a third of torch's own
        return
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        raise ConfigError(
            f"a weight of shape {tuple(parameter.shape)} is spread over processes (`fully_shard` or another DTensor "
            "plan), and growfx has no masks of parts: a layer's mask is whole on every rank, and methods order all "
            "edges of the network; train it in `DistributedDataParallel`, which keeps weights whole, and spread the "
            "optimizer's state instead (`torch.distributed.optim.ZeroRedundancyOptimizer`)"
        )
