"""When each edge was grown, and how those of each round fare: survival, share of the gradient, magnitude.

New connections take part in the forward pass but may get small gradients (arXiv 2605.15435); these figures show whether
they do. An edge belongs to the cohort of the round it is first trained in; those of the seed to that of round 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from growfx.distributed.sharded import is_sharded
from growfx.errors import CheckpointError
from growfx.masked.layers import MaskedLayer

__all__ = ["Births", "newest_cohorts"]

_DTYPE = torch.int16
_MOST_ROUNDS = 2**15 - 1  # later cohorts are counted as one


@dataclass
class Births:
    """The round in which each edge of each layer was first trained.

    `born`: by layer, int16 on the CPU, of the mask's shape, meaningless at absent edges. `sizes`: edges of each cohort
    when it was born.
    """

    born: dict[str, Tensor] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    @classmethod
    def of_seed(cls, layers: Mapping[str, MaskedLayer]) -> Births:
        """Return those of a network whose edges are all of the seed."""
        born = {name: torch.zeros(layer.mask.shape, dtype=_DTYPE, device="cpu") for name, layer in layers.items()}
        return cls(born, [sum(layer.nnz for layer in layers.values())])

    def note(self, number: int, before: Mapping[str, Tensor], layers: Mapping[str, MaskedLayer]) -> None:
        """Note that edges absent in the masks `before` and present now are first trained in round `number`."""
        cohort = min(number, _MOST_ROUNDS)
        count = 0
        for name, old in before.items():
            new = (layers[name].mask & ~old).cpu()
            self.born[name][new] = cohort
            count += int(new.sum())
        self.sizes += [0] * (cohort + 1 - len(self.sizes))
        self.sizes[cohort] += count

    def gradients(self, layers: Mapping[str, MaskedLayer]) -> list[float]:
        """Return the sum of gradient magnitudes of each cohort's edges; empty without gradients.

        Weights that are spread over ranks have only a part of it here, and give none.
        """
        found = {name: layer.gradient for name, layer in layers.items()}
        values = {name: gradient for name, gradient in found.items() if gradient is not None}
        if not values or any(is_sharded(layers[name].trained) for name in values):
            return []
        return self._sums(values, layers).tolist()

    def cohorts(
        self, number: int, layers: Mapping[str, MaskedLayer], gradients: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Return how each cohort fares at the end of round `number`, the seed's first.

        `born`: the round. `age`: rounds since. `edges`: those still there. `survival`: over those at birth.
        `magnitude`: mean of the weights' (0 where none is left). `gradient_share`: of the sum of gradient magnitudes in
        the round's last step, None where it is not known.
        """
        edges = self._sums({name: torch.ones((), device="cpu") for name in layers}, layers)
        sizes = self._sums({name: layer.parameter.detach() for name, layer in layers.items()}, layers)
        total = sum(gradients)
        facts: list[dict[str, Any]] = []
        for cohort, size in enumerate(self.sizes):
            count = int(edges[cohort])
            facts.append(
                {
                    "born": cohort,
                    "age": number - cohort,
                    "edges": count,
                    "survival": count / size if size else None,
                    "magnitude": float(sizes[cohort]) / count if count else 0.0,
                    "gradient_share": gradients[cohort] / total if total and cohort < len(gradients) else None,
                }
            )
        return facts

    def _sums(self, values: Mapping[str, Tensor], layers: Mapping[str, MaskedLayer]) -> Tensor:
        """Return the sum of the values' magnitudes over the present edges of each cohort, float64."""
        sums = torch.zeros(len(self.sizes), dtype=torch.float64, device="cpu")
        for name, value in values.items():
            mask = layers[name].mask
            born = self.born[name][mask.cpu()].int()
            weights = value.detach().abs().expand(mask.shape)[mask].double().cpu().nan_to_num(0.0, 0.0, 0.0)
            sums += torch.bincount(born, weights, minlength=len(self.sizes))
        return sums

    def state_dict(self) -> dict[str, Any]:
        """Return both parts as plain values."""
        return {"born": dict(self.born), "sizes": list(self.sizes)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], layers: Mapping[str, MaskedLayer]) -> Births:
        """Read `state_dict()`; raises `CheckpointError` where it is not of these layers."""
        born = {name: value.cpu().clone() for name, value in state["born"].items()}
        if {k: v.shape for k, v in born.items()} != {k: v.mask.shape for k, v in layers.items()}:
            raise CheckpointError(
                "the births of edges in this state are of a network with other layers; resume with the model it came "
                "from"
            )
        return cls(born, [int(size) for size in state["sizes"]])


def newest_cohorts(trace: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each round in which edges grown before it were trained, how they fare beside older ones.

    `gradient_ratio`, `magnitude_ratio`: of a newborn edge over an older one, means; None where not known. `survival`:
    of the cohort when growth ended.
    """
    rows: list[dict[str, Any]] = []
    for entry in trace:
        cohorts = entry.get("cohorts") or []
        if len(cohorts) < 2 or not cohorts[-1]["edges"] or entry.get("held"):  # then the last cohort is an older one
            continue
        newborn, older = cohorts[-1], cohorts[:-1]
        count = sum(cohort["edges"] for cohort in older)
        shares = [cohort["gradient_share"] for cohort in cohorts]
        known = all(share is not None for share in shares) and sum(shares[:-1]) > 0 and count
        size = sum(cohort["magnitude"] * cohort["edges"] for cohort in older)
        last = trace[-1]["cohorts"]
        rows.append(
            {
                "round": entry["round"],
                "edges": newborn["edges"],
                "gradient_ratio": shares[-1] / newborn["edges"] * count / sum(shares[:-1]) if known else None,
                "magnitude_ratio": newborn["magnitude"] * count / size if size else None,
                "survival": last[newborn["born"]]["survival"] if newborn["born"] < len(last) else None,
            }
        )
    return rows
