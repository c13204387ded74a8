"""Growth in rounds: clock, stop at the plateau, restoring the operating round, final training.

A sparse seed is trained for a round and then given new edges, whose weights start at zero. A fit of accuracy over
density (or over cost) ends growth (`growfx.methods.growth.plateau`), the operating round's masks and weights are put
back, and the full training follows. Which edges are new is all that methods differ in.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from growfx.analysis.paths import PathProducts
from growfx.distributed import ranks
from growfx.errors import CheckpointError, ConfigError
from growfx.masked.agreement import share_buffers
from growfx.masked.shared import is_shared, unsharded
from growfx.methods.base import Method, check_accuracy, check_clock, check_net, check_state, not_attached, reading_state
from growfx.methods.growth.newborn import Births
from growfx.methods.growth.plateau import AccuracyFit, Decision, PlateauRule, Point
from growfx.methods.growth.price import PRICES, price_of
from growfx.methods.growth.snapshots import Origin, Snapshot, grown_density, next_nnz, seeded
from growfx.methods.growth.state import Growth
from growfx.methods.masks import change_masks, collect_gradients, dense_gradients, find_shards
from growfx.methods.scope import check_optimizer, find_scope
from growfx.methods.session import Attachment, Session, Stage
from growfx.methods.sign_in import SignIn, check_sign_in
from growfx.methods.starting import MASKS, warn_if_replaced
from growfx.methods.unused import Use, warn_of_unused
from growfx.options import Unused, check_ranges, option
from growfx.selection.budget import largest_within
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Growing", "Growth"]

FINAL_WEIGHTS = ("current", "initial")
ROUNDS = ("adaptive", "published")
_SEED = "the smallest of 0.01, 0.02, 0.05, 0.1 where every unit is alive"


@dataclass(frozen=True)
class Growing(Method):
    """Growth in rounds with a stop at the plateau.

    Attributes:
        masks: of the seed: "drawn" by expected visits of random walks, ignoring the network's masks (a
            `GrowfxWarning` where that loses some); "given" grows from those it has; "magnitude" from its largest
            weights, over all layers at once.
        seed_density: density of the seed; None takes the smallest of 1, 2, 5, 10 % where every unit is alive (with
            given masks, theirs). Layers that no path crosses stay dense: where they alone are more than 10 %, these are
            fractions of the others.
        growth_ratio: edges of a round over those of the round before.
        price: what growth pays in. With "weights" every edge costs the same. With "flops" an edge costs the
            multiply-accumulates it takes in a forward pass, one for each position it is applied at: edges are chosen by
            score over price, in that order until the next would exceed the round's budget, and `seed_density`,
            `growth_ratio`, `max_density` and the stop rule are about the share of dense multiply-accumulates of the
            layers that a density counts (biases, norms and what no mask touches left out). The trace then has `cost`,
            that share; `density` stays about weights.
        epochs_per_round: length of a growth round, by the clock of `step()`.
        growth_rounds: "adaptive" trains the seed until density is what the next rounds gain by: for as long as the
            final training lasts. "published" trains it for a round like the others; a short one leaves the seed far
            from trained, so that the next rounds gain by training as well as by density, and the fit takes the end of
            that rise for a plateau. None is "adaptive" in `growfx.train`, and "published" in other loops, whose
            `total_steps` may count growth too.
        seed_epochs: length of the first round, in which the seed is trained; None takes what `growth_rounds` says.
        hold_every: after so many growth rounds follows one that adds no edges, so that the fit can tell what accuracy
            gains by density from what it gains by being trained on; 0 for no such rounds.
        max_density: growth ends here at the latest.
        tolerance: accuracy (fraction) full density may still gain when growth stops; 0.003 is 0.3 points.
        final_weights: what the final training starts from under the grown masks: "current" takes the weights of the
            operating round, "initial" everything (weights, biases, norm statistics) as it was before the seed.
        seed: of the starting masks and of every draw.
        sign_in: train each present weight as a product whose scale is reset every so many epochs until the end of
            training, so that signs can flip (`growfx.methods.sign_in`); 0 trains weights as they are. Schedulers of
            learning rates are made after `attach`, which adds the scales to the optimizer.
    """

    off_path: ClassVar[str] = "left"
    stages: ClassVar[tuple[str, ...] | None] = ("round", "final")
    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            ("growth_rounds",), lambda use: "beside `seed_epochs`, which overrides it" if use.method.seed_epochs else ""
        ),
    )
    reads_gradient: ClassVar[bool]  # whether `_grown` reads `Growth.gradients`

    masks: str = option("drawn", choices=MASKS)
    seed_density: float | None = option(None, low=0, high=1, open_low=True, unset=_SEED)
    growth_ratio: float = option(1.3, low=1, high=10, open_low=True)
    price: str = option("weights", choices=PRICES)
    epochs_per_round: int = option(2, low=1)
    growth_rounds: str | None = option(None, choices=ROUNDS, unset="adaptive; published in your own loop")
    seed_epochs: int | None = option(None, low=1, unset="by growth_rounds")
    hold_every: int = option(0, low=0)
    max_density: float = option(1.0, low=0, high=1, open_low=True)
    tolerance: float = option(0.003, low=0, high=1, open_low=True, open_high=True)
    final_weights: str = option("current", choices=FINAL_WEIGHTS)
    seed: int = option(0, low=0, high=2**63 - 1)
    sign_in: int = option(0, low=0)
    _attachment: Attachment[Growth] = field(default_factory=Attachment[Growth], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.seed_density is not None and self.seed_density > self.max_density:
            raise ConfigError(
                f"`seed_density` {self.seed_density} is above `max_density` {self.max_density}; "
                "growth starts at the one and ends at the other"
            )

    # -- what a subclass says -------------------------------------------------------------------------------

    @abstractmethod
    def _paths(self, net: MaskedGraph) -> PathProducts:
        """Return the path products of the moment: which layers grow, and which units are dead."""

    @abstractmethod
    def _grown(self, growth: Growth, paths: PathProducts, count: int, keys: EdgeKeys) -> Mapping[str, Tensor]:
        """Return the masks with `count` (above 0) edges more; with fewer where no more can be chosen.

        Masks are those of layers in `paths.scores`; `keys` are of this round. May add facts to the round's entry in
        the trace.
        """

    # -- what a subclass may say otherwise ------------------------------------------------------------------

    def _seed_masks(self, growth: Growth) -> Mapping[str, Tensor]:
        """Return the masks that growth starts from, of layers of `growth.scope`."""
        return seeded(growth.scope, self.masks, self.seed_density, self.max_density, self.seed, growth.price)

    def _start_new_edges(self, growth: Growth, before: Mapping[str, Tensor]) -> None:
        """Give edges that are absent in the masks `before` and present now their first weights; they are zero."""

    # -- clock ----------------------------------------------------------------------------------------------

    def attach(self, net: MaskedGraph, optimizer: Optimizer, *, total_steps: int, steps_per_epoch: int) -> None:
        """Draw the seed. `total_steps` are of the final training: the length of the seed's with adaptive rounds.

        Raises `ConfigError` where layers off path alone are denser than the seed, or cost that cannot be counted is the
        price, and `TraceError` for a network without path products.
        """
        net = check_net(self, net)
        total_steps, steps_per_epoch = check_clock(total_steps, steps_per_epoch)
        find_shards(self, net)
        scope = find_scope(self, net)
        check_optimizer(self, net, optimizer)
        if self.sign_in:
            check_sign_in(net, optimizer)
        warn_of_unused(Use(self))
        adaptive = self.growth_rounds == "adaptive"
        training = math.ceil(total_steps / steps_per_epoch) if adaptive else self.epochs_per_round
        growth = Growth(net, optimizer, scope, steps_per_epoch, first_epochs=self.seed_epochs or training)
        with unsharded(net), net.whole_weights():
            growth.price = price_of(self.price, net, scope)
            masks = self._seed_masks(growth)
        warn_if_replaced(self, scope, masks)
        if self.final_weights == "initial":
            with net.whole_weights():
                growth.origin = Origin.take(net)
        change_masks(net, optimizer, masks)
        growth.births = Births.of_seed(net.layers)
        if self.sign_in:
            growth.sign_in = SignIn(net, optimizer, self.sign_in * steps_per_epoch)
        self._attachment.state = growth
        self._look_ahead()

    def step(self) -> bool:
        """Count a step. Where a round ended without a report, growth goes on by the clock.

        A step that a loss scaler left out is not counted.
        """
        growth = self._attached()
        if not growth.growing:
            return False
        if not growth.watch.stepped():
            self._look_ahead()
            return False
        gradients = dense_gradients(growth.net, growth.unfilled) if self.needs_dense_gradient else {}
        changed = False
        if growth.steps >= self._round_steps:
            changed = self._finish_round(None, None)
        if growth.growing:
            growth.steps += 1
            growth.gradients = gradients
            if growth.steps == self._round_steps:
                growth.cohort_gradients = growth.births.gradients(growth.net.layers)
        self._look_ahead()
        return changed

    def report(self, accuracy: float, noise: float | None = None) -> None:
        """Record the accuracy of a finished round and decide: grow, or stop and go back.

        Reports within a round and after growth are ignored. Ranks that train the network together all report, and the
        mean of their accuracies counts. Raises `ConfigError` for values out of range.
        """
        growth = self._attached()
        check_accuracy(accuracy, noise)
        if growth.growing and growth.steps >= self._round_steps:
            if is_shared(growth.net):
                accuracy = ranks.average_float(float(accuracy))
                noise = None if noise is None else ranks.average_float(float(noise))
            self._finish_round(float(accuracy), None if noise is None else float(noise))
            self._look_ahead()

    def begin(self, session: Session) -> None:
        """Attach to the run's network; its growth rounds anneal as `TrainOptions` says."""
        epochs, steps = session.options.epochs, session.steps_per_epoch
        self.attach(session.net, session.optimizer, total_steps=epochs * steps, steps_per_epoch=steps)
        growth = self._attached()
        growth.options = session.options
        if self.seed_epochs is None and self.growth_rounds is None:
            growth.first_epochs = epochs

    def next_stage(self) -> Stage | None:
        """Return a growth round while growth goes on, then the final training."""
        growth = self._attached()
        assert growth.options is not None
        if growth.growing:
            epochs, number = self._round_epochs, len(growth.trace)
            warmup = growth.options.round_warmup * epochs
            return Stage("round", epochs, number, peak=growth.options.round_lr, warmup=warmup, averaged=True)
        return None if growth.finished else Stage("final", growth.options.epochs)

    def end_stage(self, stage: Stage) -> None:
        """Rounds end with their report; after the final stage training is over."""
        self._attached().finished = stage.kind == "final"

    @property
    def needs_dense_gradient(self) -> bool:
        """True in the last step of a round, for methods that grow by gradient and while there is room to grow."""
        growth = self._attachment.state
        if not self.reads_gradient or growth is None or not growth.growing:
            return False
        over = growth.steps >= self._round_steps  # without a report: the next step is the first of another round
        number, done = len(growth.trace) + over, 0 if over else growth.steps
        last = done + 1 == self._epochs_of(number) * growth.steps_per_epoch
        return last and self._has_room() and not self._is_held(number + 1)

    @property
    def _round_epochs(self) -> int:
        """Length of the round under way."""
        return self._epochs_of(len(self._attached().trace))

    def _epochs_of(self, number: int) -> int:
        return self.epochs_per_round if number else self._attached().first_epochs

    @property
    def _round_steps(self) -> int:
        return self._round_epochs * self._attached().steps_per_epoch

    def _epochs_until(self, number: int) -> int | None:
        """Epochs of all rounds up to the end of this one; None without held rounds, as nobody asks."""
        return self._attached().first_epochs + self.epochs_per_round * number if self.hold_every else None

    def _is_held(self, number: int) -> bool:
        """Whether the round of this number adds no edges."""
        return self.hold_every > 0 and number > 0 and number % (self.hold_every + 1) == 0

    def _held_facts(self, number: int) -> dict[str, Any]:
        return {"held": self._is_held(number), "epochs": self._epochs_until(number)} if self.hold_every else {}

    def _look_ahead(self) -> None:
        """Collect dense gradients in the next step, if it is one that growth reads."""
        if self.reads_gradient:
            collect_gradients(self._attached().net.layers.values(), self.needs_dense_gradient)

    # -- rounds ---------------------------------------------------------------------------------------------

    def _finish_round(self, accuracy: float | None, noise: float | None) -> bool:
        """Record the round, then grow or stop. Returns True when masks changed."""
        with self._attached().net.whole_weights():
            return self._finish_whole_round(accuracy, noise)

    def _finish_whole_round(self, accuracy: float | None, noise: float | None) -> bool:
        growth = self._attached()
        if is_shared(growth.net):
            share_buffers(growth.net)  # norms count in paths
        with unsharded(growth.net):
            paths = self._paths(growth.net)
        entry: dict[str, Any] = {
            "round": len(growth.trace),
            "density": growth.net.density,
            "nnz": growth.net.nnz,
            **self._held_facts(len(growth.trace)),
            "val_accuracy": accuracy,
            "noise": noise,
            "fit": None,
            "dead_units": sum(int((~alive).sum()) for alive in paths.alive_out.values()),
            "off_path": sum(growth.net.layers[name].numel for name in paths.off_path),
            "layer_density": {name: layer.density for name, layer in growth.net.layers.items()},
            **({} if growth.scope.is_whole else {"budget_density": growth.scope.density}),
            **({} if growth.price.counts_weights else {"cost": growth.price.share(growth.scope)}),
        }
        with unsharded(growth.net):
            entry["cohorts"] = growth.births.cohorts(entry["round"], growth.net.layers, growth.cohort_gradients)
        growth.trace.append(entry)
        decision = None
        if accuracy is not None:
            growth.snapshots[entry["round"]] = Snapshot.take(growth.net)
            decision = self._decide()
        if decision is not None and decision.stop:
            return self._stop("plateau", decision)
        held = self._is_held(len(growth.trace)) and self._has_room()
        added = 0 if held else self._grow(paths)  # which reads the gradients
        growth.steps, growth.gradients, growth.cohort_gradients = 0, {}, []
        if held:
            return False
        return True if added else self._stop(self._why_no_growth(decision), decision)

    def _points(self) -> list[tuple[int, Point]]:
        measured = [entry for entry in self._attached().trace if entry["val_accuracy"] is not None]
        return [
            (e["round"], Point(grown_density(e), e["val_accuracy"], e["noise"], self._epochs_until(e["round"])))
            for e in measured
        ]

    def _decide(self) -> Decision:
        """Fit the rounds so far and write the decision to the trace, rounds by their number."""
        growth = self._attached()
        rounds, points = zip(*self._points(), strict=True)
        before = growth.trace[-2]["fit"] if len(growth.trace) > 1 else None
        rule = PlateauRule(tolerance=self.tolerance)
        decision = rule.decide(points, before["streak"] if before else 0)
        fit = decision.to_json()
        if fit is not None and decision.fit is not None:
            self._forget_hopeless(decision.fit, rule)
            fit["operating_round"] = self._kept(rounds[decision.operating_round])
        growth.trace[-1]["fit"] = fit
        return decision

    def _kept(self, wanted: int) -> int:
        """Return the first round kept that is not before `wanted`; the latest round always is."""
        return min(number for number in self._attached().snapshots if number >= wanted)

    def _forget_hopeless(self, fit: AccuracyFit, rule: PlateauRule) -> None:
        """Drop rounds that are surely too far from the plateau: a snapshot is as large as the network."""
        growth = self._attached()
        for number in list(growth.snapshots)[:-1]:
            gain, error = fit.gain(grown_density(growth.trace[number]))
            if gain[0] - rule.errors * error[0] > rule.margin * rule.tolerance:
                del growth.snapshots[number]

    def _has_room(self) -> bool:
        """Whether the next round may have another edge within `max_density`."""
        growth = self._attached()
        if growth.price.counts_weights:
            return self._wanted_edges() > 0
        cheapest, limit = growth.price.cheapest(growth.scope), self.max_density * growth.price.total(growth.scope)
        return cheapest is not None and growth.price.spent(growth.scope) + cheapest <= limit

    def _wanted_edges(self) -> int:
        """Return how many edges more the next round has, where each costs the same."""
        scope = self._attached().scope
        return max(next_nnz(scope.nnz, scope.numel, self.growth_ratio, self.max_density) - scope.nnz, 0)

    def _grow(self, paths: PathProducts) -> int:
        """Give the network its next edges; returns how many more it has."""
        growth = self._attached()
        net, before, layers = growth.net, growth.net.nnz, growth.scope.layers
        # what is not among the scores does not grow
        paths = replace(paths, scores={name: score for name, score in paths.scores.items() if name in layers})
        if paths.scores and self._has_room():
            keys = EdgeKeys(self.seed, f"growth round {len(growth.trace)}")
            masks = self._bought(growth, paths, keys)
            old = {name: net.layers[name].mask.clone() for name in masks}
            change_masks(net, growth.optimizer, masks)
            growth.births.note(len(growth.trace), old, net.layers)
            self._start_new_edges(growth, old)
        return net.nnz - before

    def _bought(self, growth: Growth, paths: PathProducts, keys: EdgeKeys) -> Mapping[str, Tensor]:
        """Return the masks with the edges that the round's budget buys, in the order of the draw."""
        if growth.price.counts_weights:
            return self._grown(growth, paths, self._wanted_edges(), keys)
        scope, price = growth.scope, growth.price
        limit = self.max_density * price.total(scope)
        budget = min(self.growth_ratio * price.spent(scope), limit)

        def cost_of(count: int) -> float:
            return price.spent(scope, self._grown(growth, paths, count, keys))

        most = sum(int((~layer.mask).sum()) for layer in scope.layers.values())
        count = largest_within(cost_of, budget, most)
        # a round has one edge more at least, as long as growth may go on at all
        if not count and (not most or cost_of(1) > limit):
            return {}
        return self._grown(growth, paths, max(count, 1), keys)

    def _why_no_growth(self, decision: Decision | None) -> str:
        growth = self._attached()
        if self._has_room() and growth.price.counts_weights:
            return "no absent edge lies on a path"
        if decision is None:
            return "max_density"
        return PlateauRule(tolerance=self.tolerance).verdict(decision, [point for _, point in self._points()])

    def _stop(self, reason: str, decision: Decision | None) -> bool:
        """End growth; with a measured last round, put the operating round back. Returns True when masks
        changed."""
        growth = self._attached()
        growth.growing, growth.stop_reason, growth.gradients = False, reason, {}
        last = growth.trace[-1]
        back = last["fit"]["operating_round"] if last["fit"] else last["round"]
        changed = False
        if decision is not None:
            before = growth.net.nnz
            growth.snapshots[back].restore(growth.net, growth.optimizer)
            changed = growth.net.nnz != before
        growth.operating_round = back
        growth.snapshots.clear()
        if growth.origin is not None:
            growth.origin.restore(growth.net, growth.optimizer)
            growth.origin = None
        if growth.sign_in is not None:
            growth.sign_in.forget()
        return changed

    # -- state ----------------------------------------------------------------------------------------------

    def _attached(self) -> Growth:
        if self._attachment.state is None:
            raise not_attached(self.name)
        return self._attachment.state

    @property
    def trace(self) -> list[dict[str, Any]]:
        """One entry a round: round, density, nnz, val_accuracy, noise, fit (curve and decision), dead_units,
        off_path, layer_density, cohorts; with `hold_every` also held (no edges were added for this round) and epochs
        (of all rounds until its end); with frozen layers also budget_density, over the others, which the fit is
        about; with `price` = "flops" also cost, the share of dense multiply-accumulates, which the fit is about then.

        dead_units: output units that no path of non-zero weights crosses, at the end of the round (edges just
        grown are zero). off_path: edges in layers that no path can cross. layer_density: of each layer by its name.
        cohorts: how the edges of each earlier growth fare (`growfx.methods.growth.newborn.Births.cohorts`).
        """
        return [] if self._attachment.state is None else self._attachment.state.trace

    @property
    def growing(self) -> bool:
        """True from the start until growth stops."""
        return self._attachment.state is None or self._attachment.state.growing

    @property
    def stop_reason(self) -> str:
        """Why growth ended, or "" while it goes on.

        "plateau"; "max_density" (reached before the rule was sure); "no plateau below max_density";
        "no absent edge lies on a path".
        """
        return "" if self._attachment.state is None else self._attachment.state.stop_reason

    @property
    def operating_round(self) -> int | None:
        """The round whose masks the final training has; None while growth goes on."""
        return None if self._attachment.state is None else self._attachment.state.operating_round

    def state_dict(self) -> dict[str, Any]:
        """Return clock, trace, kept rounds and gradients. Masks and weights of the moment are in the network's
        state dict."""
        growth = self._attached()
        return {
            "method": self.name,
            "scope": growth.scope.state_dict(),
            "steps": growth.steps,
            "growing": growth.growing,
            "stop_reason": growth.stop_reason,
            "operating_round": growth.operating_round,
            "finished": growth.finished,
            "trace": copy.deepcopy(growth.trace),
            "snapshots": {str(number): kept.state_dict() for number, kept in growth.snapshots.items()},
            "gradients": {name: value.clone() for name, value in growth.gradients.items()},
            "origin": None if growth.origin is None else dict(growth.origin.tensors),
            "initial": None if growth.initial is None else dict(growth.initial.tensors),
            "first_epochs": growth.first_epochs,
            "births": growth.births.state_dict(),
            "cohort_gradients": list(growth.cohort_gradients),
            "sign_in": None if growth.sign_in is None else growth.sign_in.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, on the network and optimizer attached to; load the network's
        own state before.

        Raises `CheckpointError` for the state of another method or network.
        """
        own = self._attached()
        check_state(state, self.name)
        with reading_state(self.name), own.net.whole_weights():
            scope = own.scope.restored(state.get("scope"))  # states of version 0.1 have none
            snapshots = {int(k): Snapshot.from_state(v, own.net) for k, v in state["snapshots"].items()}
            gradients = {name: _fitting(own.net, name, value) for name, value in state["gradients"].items()}
            found = state.get("origin")  # states of version 0.1 have none
            origin = None if found is None else Origin.from_state(found, own.net)
            found = state.get("initial")  # older states have none
            initial = None if found is None else Origin.from_state(found, own.net)
            steps, growing, finished = int(state["steps"]), bool(state["growing"]), bool(state["finished"])
            reason, operating = str(state["stop_reason"]), state["operating_round"]
            trace = list(copy.deepcopy(state["trace"]))
            # older states have neither: their first round is as long as the others, unless an option says otherwise
            first_epochs = int(state.get("first_epochs", self.seed_epochs or self.epochs_per_round))
            born, sums = state.get("births"), [float(value) for value in state.get("cohort_gradients", [])]
            layers = own.net.layers
            births = Births.of_seed(layers) if born is None else Births.from_state(born, layers)
            if own.sign_in is not None:
                own.sign_in.load_state_dict(state["sign_in"])
        own.scope, own.steps, own.growing, own.finished = scope, steps, growing, finished
        own.stop_reason, own.operating_round, own.trace = reason, operating, trace
        own.snapshots, own.gradients, own.origin, own.initial = snapshots, gradients, origin, initial
        own.first_epochs, own.births, own.cohort_gradients = first_epochs, births, sums
        self._look_ahead()


def _fitting(net: MaskedGraph, name: str, gradient: Tensor) -> Tensor:
    """Return a copy of a kept gradient on the device of its layer."""
    if name not in net.layers or net.layers[name].mask.shape != gradient.shape:
        raise CheckpointError(
            f"the state holds a gradient of shape {tuple(gradient.shape)} for layer `{name}`, which this network does "
            "not have; resume with the model it came from"
        )
    return gradient.to(net.layers[name].mask.device, copy=True)
