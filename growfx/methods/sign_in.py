"""Sign-In: train weights as products, so that signs can flip in a sparse network.

Gadhikar, Jacobs, Zhou & Burkholz, "Sign-In to the Lottery: Reparameterized Sparse Training" (NeurIPS 2025, arXiv
2504.12801). Each present weight is ``theta = m * w`` with an inner scale m that is trained too. By the chain rule

    dL/dw = dL/dtheta * m,    dL/dm = dL/dtheta * w,

so that w crosses zero at the speed of m, where a plain weight of a sparse network tends to stay on its side. Every N
epochs the scale is folded into the weight, w = theta and m = 1, which changes no output.

The network never sees the factors. Its parameter is the product throughout: forward, state dict, averages and artifacts
need nothing. Only for the time of an optimizer's step the parameter holds w, its gradient is that of w, and the
optimizer has the scales as separate parameters; afterwards the product is put back.

Deviations and decisions:

1. The scale is reset to 1 and the weight to theta. The paper's invariant is m^2 - w^2 = beta, reset to beta = 1 with
   the same theta, so m = sqrt((1 + sqrt(1 + 4 theta^2)) / 2): 1.005 at theta = 0.1. (As summarised by a third party;
   the paper's own text was not at hand.) Its flow is dtheta/dt = -(m^2 + w^2) dL/dtheta, with m^2 + w^2 =
   sqrt(4 theta^2 + beta^2).
2. Scales have no weight decay; that of the weights acts on w.
3. Edges that grow during training start with m = 1, as do weights that anything else than the optimizer has changed.
4. Weights that a mask change or a reset touches keep the optimizer's state of w; the scales' state goes with the edge.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from growfx.distributed.sharded import is_sharded
from growfx.errors import CheckpointError, ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.methods.scope import is_frozen

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["SignIn", "check_sign_in"]


@dataclass
class _Factors:
    """The factors of one layer's present weights, in the order of the mask.

    `scale`: m, a parameter of the optimizer. `inner`: w. `mask`: of the edges they belong to. `slope`: the gradient of
    the product, during a step.
    """

    layer: MaskedLayer
    scale: nn.Parameter
    inner: Tensor
    mask: Tensor
    slope: Tensor | None = None

    @property
    def where(self) -> Any:
        """Where the edges are in the layer's parameter and its gradient."""
        return self.mask if self.layer.present is None else slice(None)


class SignIn:
    """Trains the masked weights of `net` that `optimizer` holds as products, from now on.

    Args:
        net: its masks may change at any time.
        optimizer: gets a group of scales for each of its groups with masked weights.
        period: optimizer steps between resets of the scales.

    Raises:
        ConfigError: weights spread over processes, an optimizer that computes gradients within its step, or one that
            takes no further parameters.
    """

    def __init__(self, net: MaskedGraph, optimizer: Optimizer, period: int) -> None:
        check_sign_in(net, optimizer)
        self.period, self.steps = period, 0
        self._factors: dict[str, _Factors] = {}
        layers = {id(x.trained): (name, x) for name, x in net.layers.items() if not is_frozen(x)}
        for group in list(optimizer.param_groups):
            held = [layers[id(p)] for p in group["params"] if id(p) in layers]
            if held:
                self._add_group(optimizer, group, dict(held))
        self.work_in(optimizer)

    def work_in(self, optimizer: Optimizer) -> None:
        """Put the factors in the place of the weights around each step of `optimizer`, which has the scales."""
        own: weakref.ref[SignIn] = weakref.ref(self)
        # growfx's own hooks, of all optimizers, mask the gradient before this one and the weight after it
        handles = [
            optimizer.register_step_pre_hook(lambda opt, args, kwargs: _alive(own, SignIn._split, opt, args, kwargs)),
            optimizer.register_step_post_hook(lambda opt, args, kwargs: _alive(own, SignIn._join, opt)),
        ]
        self._release = weakref.finalize(self, lambda: [handle.remove() for handle in handles])

    def __deepcopy__(self, memo: dict[int, Any]) -> SignIn:
        """Return the same over the copies of the layers; see `work_in`."""
        copied = memo[id(self)] = object.__new__(SignIn)
        copied.period, copied.steps = self.period, self.steps
        copied._factors = copy.deepcopy(self._factors, memo)
        return copied

    def _add_group(self, optimizer: Optimizer, group: dict[str, Any], held: Mapping[str, MaskedLayer]) -> None:
        for name, layer in held.items():
            inner = layer.edges()
            scale = nn.Parameter(torch.ones_like(inner))
            self._factors[name] = _Factors(layer, scale, inner, layer.mask.clone())
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        scales = [self._factors[name].scale for name in held]
        try:
            optimizer.add_param_group({"params": scales, **options, "weight_decay": 0.0})
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f"`sign_in` expects an optimizer that takes a scale for each weight (vectors), got "
                f"`{type(optimizer).__name__}`, which refuses them ({error}); use another optimizer, or `sign_in` = 0"
            ) from error

    # -- around a step --------------------------------------------------------------------------------------

    def _split(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the optimizer w with its gradient in the place of each weight, and m with its own."""
        if kwargs.get("closure") is not None or (len(args) > 1 and callable(args[1])):
            raise ConfigError(
                "`sign_in` expects gradients that are there before the optimizer's step, got a step with a closure; "
                "call `optimizer.step()` after `loss.backward()`, or set `sign_in` = 0"
            )
        # groups are other objects after a state was loaded
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        for factors in self._factors.values():
            # a scheduler may know the weights' group only
            groups[id(factors.scale)]["lr"] = groups[id(factors.layer.trained)]["lr"]
        for factors in self._factors.values():
            self._follow(factors, optimizer)
            parameter, grad = factors.layer.trained, factors.layer.trained.grad
            if grad is None:
                factors.scale.grad = None
                continue
            slope = factors.slope = grad[factors.where].clone()
            factors.scale.grad = slope * factors.inner
            with torch.no_grad():
                grad[factors.where] = slope * factors.scale
                parameter.data[factors.where] = factors.inner

    def _follow(self, factors: _Factors, optimizer: Optimizer) -> None:
        """Make the factors those of the weights and the mask of the moment."""
        layer, mask = factors.layer, factors.layer.mask
        if not torch.equal(mask, factors.mask):
            old = factors.mask
            for key, value in optimizer.state.get(factors.scale, {}).items():
                if isinstance(value, Tensor) and value.shape == factors.inner.shape:
                    optimizer.state[factors.scale][key] = _moved(value, old, mask, 0.0)
            factors.scale.data = _moved(factors.scale.data, old, mask, 1.0)
            factors.inner = _moved(factors.inner, old, mask, 0.0)
            factors.mask = mask.clone()
        now = layer.edges()
        # the network may have been given another type, which rounds products and not what they are made of
        kept = now == (factors.inner * factors.scale.detach()).to(now.dtype)
        factors.inner = torch.where(kept, factors.inner.to(now.dtype), now)
        factors.scale.data = torch.where(kept, factors.scale.data.to(now.dtype), 1.0)

    def _join(self, optimizer: Optimizer) -> None:
        """Put the products back; every `period` steps begin anew from them."""
        self.steps += 1
        reset = self.steps % self.period == 0
        with torch.no_grad():
            for factors in self._factors.values():
                parameter = factors.layer.trained
                if parameter.grad is None or factors.slope is None:
                    continue
                parameter.grad[factors.where] = factors.slope  # as the backward pass left it, for whoever looks
                factors.slope = None
                factors.inner = parameter.data[factors.where].clone()
                product = factors.inner * factors.scale
                parameter.data[factors.where] = product
                factors.scale.grad = None
                if reset:
                    factors.inner = product
                    factors.scale.data = torch.ones_like(product)

    def forget(self) -> None:
        """Begin anew from the weights and masks of the moment."""
        with torch.no_grad():
            for factors in self._factors.values():
                factors.mask = factors.layer.mask.clone()
                factors.inner = factors.layer.edges()
                factors.scale.data = torch.ones_like(factors.inner)

    # -- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return steps and factors; the products are in the network's state dict."""
        factors = {
            name: {"scale": f.scale.detach().clone(), "inner": f.inner.clone(), "mask": f.mask.clone()}
            for name, f in self._factors.items()
        }
        return {"steps": self.steps, "factors": factors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; raises `CheckpointError` where it is not of this network."""
        found = state["factors"]
        shapes = {name: f.mask.shape for name, f in self._factors.items()}
        if {name: value["mask"].shape for name, value in found.items()} != shapes:
            raise CheckpointError("the scales in this state are of a network with other layers; resume with its model")
        for name, value in found.items():
            factors, device = self._factors[name], self._factors[name].inner.device
            factors.mask = value["mask"].to(device, copy=True)
            factors.inner = value["inner"].to(device, copy=True)
            factors.scale.data = value["scale"].to(device, copy=True)
        self.steps = int(state["steps"])


def check_sign_in(net: MaskedGraph, optimizer: object) -> None:
    """Raise `ConfigError` where weights cannot be trained as products."""
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "`sign_in` expects an optimizer that takes gradients as they are, got `LBFGS`, which computes them within "
            "its step; use another optimizer, or set `sign_in` = 0"
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"`sign_in` expects a torch.optim.Optimizer, got `{type(optimizer).__name__}`; use one, or `sign_in` = 0"
        )
    spread = next((name for name, layer in net.layers.items() if is_sharded(layer.trained)), None)
    if spread is not None:
        raise ConfigError(
            f"`sign_in` expects whole weights, got those of `{spread}` spread over processes (`fully_shard`); use "
            "`DistributedDataParallel`, or set `sign_in` = 0"
        )


def _moved(values: Tensor, old: Tensor, new: Tensor, fresh: float) -> Tensor:
    """Return values of the edges of the mask `old`, in its order, for those of `new`; others get `fresh`."""
    whole = torch.full(old.shape, fresh, dtype=values.dtype, device=values.device)
    whole[old] = values
    whole[~old] = fresh
    return whole[new]


def _alive(own: weakref.ref[SignIn], call: Any, *arguments: Any) -> None:
    """Call a method of the object, unless it is gone."""
    sign_in = own()
    if sign_in is not None:
        call(sign_in, *arguments)
