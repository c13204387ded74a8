"""PWMPR: grow a sparse seed by path products until accuracy stops paying for density.

Yao & Dovrolis, "Growing Winning Subnetworks, Not Pruning Them" (arXiv 2509.25665). A sparse seed is trained
for a short round and then given new edges, drawn at random in proportion to their path score so that growth
does not pile up on bottlenecks; new weights start at zero. A logistic fit of accuracy over density ends
growth (`growfx.plateau`), the operating round's masks and weights are put back, and the full training
follows.

What the paper leaves open is decided here: one edge is one scalar weight; layers that no path crosses stay
dense and are counted; the draw is without replacement, over all layers at once; optimizer state is kept while
growing and cleared when an earlier round is put back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch.optim import Optimizer

from growfx.edge_keys import EdgeKeys
from growfx.errors import ConfigError
from growfx.methods.base import Method, change_masks, check_accuracy, check_clock, check_state, not_attached
from growfx.methods.growth import Snapshot, next_nnz
from growfx.options import TrainOptions, check_ranges, option
from growfx.passes.path_products import path_products
from growfx.passes.seed import seed_masks
from growfx.paths import PathProducts
from growfx.plateau import Decision, LogisticFit, PlateauRule, Point
from growfx.selection import draw
from growfx.session import Session, Stage

if TYPE_CHECKING:
    from growfx.graph import MaskedGraph

__all__ = ["PWMPR"]


@dataclass
class _State:
    """One growth. `steps` counts in the round under way; `snapshots` holds rounds that may be gone back
    to. In a run `options` are those of the run, and `finished` says that the final training is over."""

    net: Any
    optimizer: Optimizer
    steps_per_round: int
    steps: int = 0
    growing: bool = True
    stop_reason: str = ""
    operating_round: int | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    options: TrainOptions | None = None
    finished: bool = False


@dataclass(frozen=True)
class PWMPR(Method):
    """Growth by path products with a stop at the plateau.

    Attributes:
        seed_density: density of the seed; None takes the smallest of 1, 2, 5, 10 % where every unit is alive.
        growth_ratio: edges of a round over those of the round before.
        epochs_per_round: length of a growth round, by the clock of `step()`.
        max_density: growth ends here at the latest.
        tolerance: accuracy (fraction) full density may still gain when growth stops; 0.003 is 0.3 points.
        norm: what a norm layer counts in a path, as in `growfx.path_products`: "fold" or "identity".
        power: exponent of the magnitudes in a path, as in `growfx.path_products`.
        seed: of the starting masks and of every draw.
    """

    name: ClassVar[str] = "pwmpr"

    seed_density: float | None = option(None, low=0, high=1, open_low=True)
    growth_ratio: float = option(1.3, low=1, high=10, open_low=True)
    epochs_per_round: int = option(2, low=1)
    max_density: float = option(1.0, low=0, high=1, open_low=True)
    tolerance: float = option(0.003, low=0, high=1, open_low=True, open_high=True)
    norm: str = option("fold", choices=("fold", "identity"))
    power: float = option(1.0, low=0, high=8, open_low=True)
    seed: int = option(0, low=0, high=2**63 - 1)
    _state: _State | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.seed_density is not None and self.seed_density > self.max_density:
            raise ConfigError(
                f"`seed_density` {self.seed_density} is above `max_density` {self.max_density}; "
                "growth starts at the one and ends at the other"
            )

    # -- clock ----------------------------------------------------------------------------------------------

    def attach(self, net: MaskedGraph, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> None:
        """Draw the seed. Growth has a clock of its own, so `total_steps` (of the final training) does not
        matter.

        Raises `ConfigError` where layers off path alone are denser than the seed, and `TraceError` for a
        network without path products.
        """
        check_clock(total_steps, steps_per_epoch)
        start = seed_masks(net, self.seed_density, seed=self.seed, largest=self.max_density)
        change_masks(net, optimizer, start.masks)
        object.__setattr__(self, "_state", _State(net, optimizer, self.epochs_per_round * steps_per_epoch))

    def step(self) -> bool:
        """Count a step. Where a round ended without a report, growth goes on by the clock."""
        state = self._attached()
        if not state.growing:
            return False
        changed = False
        if state.steps >= state.steps_per_round:
            changed = self._finish_round(None, None)
        if state.growing:
            state.steps += 1
        return changed

    def report(self, accuracy: float, noise: float | None = None) -> None:
        """Record the accuracy of a finished round and decide: grow, or stop and go back.

        Reports within a round and after growth are ignored. Raises `ConfigError` for values out of range.
        """
        state = self._attached()
        check_accuracy(accuracy, noise)
        if state.growing and state.steps >= state.steps_per_round:
            self._finish_round(float(accuracy), None if noise is None else float(noise))

    def begin(self, session: Session) -> None:
        """Attach to the run's network; its growth rounds anneal as `TrainOptions` says."""
        epochs, steps = session.options.epochs, session.steps_per_epoch
        self.attach(session.net, session.optimizer, total_steps=epochs * steps, steps_per_epoch=steps)
        self._attached().options = session.options

    def next_stage(self) -> Stage | None:
        """Return a growth round while growth goes on, then the final training."""
        state = self._attached()
        assert state.options is not None
        if state.growing:
            warmup = state.options.round_warmup * self.epochs_per_round
            peak, number = state.options.round_lr, len(state.trace)
            return Stage("round", self.epochs_per_round, number, peak=peak, warmup=warmup, averaged=True)
        return None if state.finished else Stage("final", state.options.epochs)

    def end_stage(self, stage: Stage) -> None:
        """Rounds end with their report; after the final stage training is over."""
        self._attached().finished = stage.kind == "final"

    @property
    def needs_dense_gradient(self) -> bool:
        """False: path products need no gradient."""
        return False

    # -- rounds ---------------------------------------------------------------------------------------------

    def _finish_round(self, accuracy: float | None, noise: float | None) -> bool:
        """Record the round, then grow or stop. Returns True when masks changed."""
        state = self._attached()
        paths = path_products(state.net, norm=self.norm, power=self.power)
        entry: dict[str, Any] = {
            "round": len(state.trace),
            "density": state.net.density,
            "nnz": state.net.nnz,
            "val_accuracy": accuracy,
            "noise": noise,
            "fit": None,
            "dead_units": sum(int((~alive).sum()) for alive in paths.alive_out.values()),
            "off_path": sum(state.net.layers[name].numel for name in paths.off_path),
        }
        state.trace.append(entry)
        decision = None
        if accuracy is not None:
            state.snapshots[entry["round"]] = Snapshot.take(state.net)
            decision = self._decide()
        if decision is not None and decision.stop:
            return self._stop("plateau", decision)
        added = self._grow(paths)
        state.steps = 0
        return True if added else self._stop(self._why_no_growth(decision), decision)

    def _points(self) -> list[tuple[int, Point]]:
        measured = [entry for entry in self._attached().trace if entry["val_accuracy"] is not None]
        return [(e["round"], Point(e["density"], e["val_accuracy"], e["noise"])) for e in measured]

    def _decide(self) -> Decision:
        """Fit the rounds so far and write the decision to the trace, rounds by their number."""
        state = self._attached()
        rounds, points = zip(*self._points(), strict=True)
        before = state.trace[-2]["fit"] if len(state.trace) > 1 else None
        rule = PlateauRule(tolerance=self.tolerance)
        decision = rule.decide(points, before["streak"] if before else 0)
        fit = decision.to_json()
        if fit is not None and decision.fit is not None:
            self._forget_hopeless(decision.fit, rule)
            fit["operating_round"] = self._kept(rounds[decision.operating_round])
        state.trace[-1]["fit"] = fit
        return decision

    def _kept(self, wanted: int) -> int:
        """Return the first round kept that is not before `wanted`; the latest round always is."""
        return min(number for number in self._attached().snapshots if number >= wanted)

    def _forget_hopeless(self, fit: LogisticFit, rule: PlateauRule) -> None:
        """Drop rounds that are surely too far from the plateau: a snapshot is as large as the network."""
        state = self._attached()
        for number in list(state.snapshots)[:-1]:
            gain, error = fit.gain(state.trace[number]["density"])
            if gain[0] - rule.errors * error[0] > rule.margin * rule.tolerance:
                del state.snapshots[number]

    def _grow(self, paths: PathProducts) -> int:
        """Draw the next edges; returns how many there were."""
        net = self._attached().net
        wanted = next_nnz(net.nnz, net.numel, self.growth_ratio, self.max_density) - net.nnz
        if wanted <= 0:
            return 0
        keys = EdgeKeys(self.seed, f"growth round {len(self.trace)}")
        absent = {name: ~net.layers[name].mask for name in paths.scores}
        drawn = draw(paths.scores, wanted, keys, absent)
        masks = {name: net.layers[name].mask | drawn.masks[name] for name in paths.scores}
        return change_masks(net, self._attached().optimizer, masks)

    def _why_no_growth(self, decision: Decision | None) -> str:
        net = self._attached().net
        if next_nnz(net.nnz, net.numel, self.growth_ratio, self.max_density) > net.nnz:
            return "no absent edge lies on a path"
        if decision is None:
            return "max_density"
        return PlateauRule(tolerance=self.tolerance).verdict(decision, [point for _, point in self._points()])

    def _stop(self, reason: str, decision: Decision | None) -> bool:
        """End growth; with a measured last round, put the operating round back. Returns True when masks
        changed."""
        state = self._attached()
        state.growing, state.stop_reason = False, reason
        last = state.trace[-1]
        back = last["fit"]["operating_round"] if last["fit"] else last["round"]
        changed = False
        if decision is not None:
            before = state.net.nnz
            state.snapshots[back].restore(state.net, state.optimizer)
            changed = state.net.nnz != before
        state.operating_round = back
        state.snapshots.clear()
        return changed

    # -- state ----------------------------------------------------------------------------------------------

    def _attached(self) -> _State:
        if self._state is None:
            raise not_attached(self.name)
        return self._state

    @property
    def trace(self) -> list[dict[str, Any]]:
        """One entry a round: round, density, nnz, val_accuracy, noise, fit (curve and decision), dead_units,
        off_path.

        dead_units: output units that no path of non-zero weights crosses, at the end of the round (edges just
        grown are zero). off_path: edges in layers that no path can cross.
        """
        return [] if self._state is None else self._state.trace

    @property
    def growing(self) -> bool:
        """True from the start until growth stops."""
        return self._state is None or self._state.growing

    @property
    def stop_reason(self) -> str:
        """Why growth ended, or "" while it goes on.

        "plateau"; "max_density" (reached before the rule was sure); "no plateau below max_density";
        "no absent edge lies on a path".
        """
        return "" if self._state is None else self._state.stop_reason

    @property
    def operating_round(self) -> int | None:
        """The round whose masks the final training has; None while growth goes on."""
        return None if self._state is None else self._state.operating_round

    def state_dict(self) -> dict[str, Any]:
        """Return clock, trace and kept rounds. Masks and weights of the moment are in the network's state
        dict."""
        state = self._attached()
        return {
            "method": self.name,
            "steps": state.steps,
            "growing": state.growing,
            "stop_reason": state.stop_reason,
            "operating_round": state.operating_round,
            "finished": state.finished,
            "trace": copy.deepcopy(state.trace),
            "snapshots": {str(number): kept.state_dict() for number, kept in state.snapshots.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, on the network and optimizer attached to.

        Raises `CheckpointError` for the state of another method or network.
        """
        own = self._attached()
        check_state(state, self.name)
        snapshots = {int(k): Snapshot.from_state(v, own.net) for k, v in state["snapshots"].items()}
        own.steps, own.growing = int(state["steps"]), bool(state["growing"])
        own.stop_reason, own.operating_round = str(state["stop_reason"]), state["operating_round"]
        own.finished = bool(state["finished"])
        own.trace, own.snapshots = copy.deepcopy(state["trace"]), snapshots
