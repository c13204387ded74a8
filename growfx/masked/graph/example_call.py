"""The call that a model is known to accept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from growfx.masked.modules import chain_tensors, float_type
from growfx.recorded.inputs import Inputs, as_inputs

__all__ = ["ExampleCall"]


class ExampleCall:
    """What `growfx.wrap` was given to call the model with, on the device and in the type that the model has now.

    Args:
        inputs: the call.
        shell: the model, in the type that the call was made for.
    """

    def __init__(self, inputs: Inputs, shell: nn.Module) -> None:
        self.inputs, self._type = inputs, float_type(shell)

    def of(self, shell: nn.Module, batch: int | None) -> Inputs:
        """The call itself, with `batch` rows where that is a number."""
        return self.placed(self.inputs if batch is None else self.inputs.with_batch(batch), shell)

    def like(self, example_inputs: Any, shell: nn.Module, batch: int | None) -> Inputs:
        """Another call, that `example_inputs` stand for."""
        given = as_inputs(tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs)
        given = self.placed(given, shell)
        return given if batch is None else given.with_batch(batch)

    def placed(self, inputs: Inputs, shell: nn.Module) -> Inputs:
        """A copy of a call on the model's device, with tensors of the type it was made for converted to its own."""
        device = next(chain_tensors(shell), torch.empty(0)).device
        now = float_type(shell)

        def place(tensor: Tensor) -> Tensor:
            # a model may take inputs of a type that is not that of its weights; such inputs stay as they are
            dtype = now if tensor.dtype == self._type and now is not None else tensor.dtype
            if tensor.is_meta and device.type != "meta":  # the net got its values after it was wrapped
                return torch.zeros_like(tensor, dtype=dtype, device=device)
            return tensor.to(device, dtype)

        return inputs.copied(place)
