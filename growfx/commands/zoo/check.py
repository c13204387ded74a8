"""Check one model of a library from end to end: recorded, faithful, every weight masked, scored, grown, stored.

Every check ends in a verdict: "yes", "no: why", or "n/a: why" where there is nothing to check (the model itself
refuses, or has no values on the meta device). A check that fails does not stop others that can still be made.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import _get_qualified_name
from torch.optim import SGD

import growfx
from growfx.analysis.paths import PathProducts
from growfx.commands.zoo.facts import REAL_BELOW, Facts, one_line, scrubbed
from growfx.commands.zoo.gradients import Step, reached_matrices, step, step_difference
from growfx.commands.zoo.guest import GuestForm, Package
from growfx.commands.zoo.guests import GUESTS, guest, is_guest
from growfx.commands.zoo.inputs import arguments_of, family_of, forms, identity_of, library_of
from growfx.commands.zoo.native import check_native
from growfx.commands.zoo.outputs import difference, enliven, run_seeded, split, weight_layers
from growfx.commands.zoo.reference import CALLS, Reference, observe
from growfx.errors import GrowfxError
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.methods.growth.pwmpr import PWMPR
from growfx.methods.growth.snapshots import next_nnz
from growfx.methods.masks import change_masks
from growfx.models.build import blueprint, create_model
from growfx.passes.path_products.products import check_path_rules
from growfx.quiet import ignored_warnings
from growfx.selection.choose import draw
from growfx.selection.density import random_masks
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["DENSITY", "check_model"]

DENSITY = 0.1
# Seeds of torch, numpy and `random` that steps of a model and its graph are compared under. Layer drop and the like
# need several to show; no model of timm or torchvision decides by chance what it runs.
_SEEDS = {GUESTS: (1, 2, 3)}
_ROWS = 2  # of the inputs of such a step: batch norm needs more than one
_GAMMA, _VARIANCE = 10.0, 1e-3


def check_model(spec: str, tell: Callable[[Facts], None] = lambda _: None, real_below: float = REAL_BELOW) -> Facts:
    """Build the model `spec` names and check all that can be checked.

    Args:
        spec: as for `growfx.create_model`.
        tell: called with the facts so far before each stage, so that they outlive a killed process.
        real_below: number of parameters from which on a model is checked without values.
    """
    facts = Facts(spec, library=GUESTS if is_guest(spec) else library_of(spec))
    begun = time.perf_counter()
    with ignored_warnings():
        try:
            check = _Check(facts, tell, real_below)
            if facts.library == GUESTS:
                check.build_guest(*guest(spec))
            else:
                check.build()
            check.wrap()
            if facts.device == "real":
                check.graph_steps()
            check.graph()
            if facts.device == "real":
                original = check.original()
                check.own_forward(original)
                check.gradients(original)
                check.extremes()
                check.sparse()
                check.artifact()
                check.native()
        except _CannotGoOnError:
            pass
    facts.seconds["whole"] = _rounded(time.perf_counter() - begun)
    facts.ended = "done"
    return facts


class _CannotGoOnError(Exception):
    """The rest of the checks needs what has just failed."""


class _Check:
    """The check of one model under way."""

    model: nn.Module
    net: MaskedGraph
    reference: Reference

    def __init__(self, facts: Facts, tell: Callable[[Facts], None], real_below: float):
        self.facts, self.tell, self.real_below = facts, tell, real_below
        self.rebuild: Callable[[], nn.Module] | None = None  # of guests: the same model, never called before
        self.steps: list[Step] = []  # of the model itself
        self.options: dict[str, Any] = {}  # of `growfx.wrap`

    @contextmanager
    def _stage(self, name: str, *checks: str, fatal: bool = False) -> Generator[None]:
        """A stage and the checks it makes; its error is the verdict of those that have none yet."""
        self.facts.stage = name
        self.tell(self.facts)
        begun = time.perf_counter()
        try:
            yield
        except Exception as error:
            for check in checks:
                self.facts.checks.setdefault(check, f"no: {one_line(error)}")
            if fatal:
                raise _CannotGoOnError from error
        finally:
            spent = self.facts.seconds.get(name, 0.0) + time.perf_counter() - begun
            self.facts.seconds[name] = _rounded(spent)

    def _verdict(self, check: str, problem: str) -> None:
        self.facts.checks[check] = f"no: {scrubbed(problem)}" if problem else "yes"

    # -- stages -----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Build the model: without values to count and probe it, then, if it is small enough, for real."""
        facts = self.facts
        with self._stage("build", "recorded", fatal=True):
            facts.family, facts.arguments = family_of(facts.model), arguments_of(facts.model)
            plan = blueprint(identity_of(facts.model, facts.arguments)).to("meta")
            facts.parameters = sum(p.numel() for p in plan.parameters())
            large, tried = facts.parameters >= self.real_below, forms(facts.model, plan)
            with contextlib.suppress(ValueError):  # some models (detection) need values to run at all
                if large:
                    self.reference = observe(plan, tried, "meta")
                    facts.device, self.model = "meta", plan
            if not facts.device:
                facts.device = "real"
                torch.manual_seed(0)
                self.model = create_model(facts.model, **facts.arguments)
                enliven(self.model)
        with self._stage("eager", "recorded", fatal=True):
            if facts.device == "real":
                self.reference = observe(self.model, tried, "cpu")
            facts.input = self.reference.form.to_json()
            facts.other_input = self.reference.other.to_json() if self.reference.other else []

    def build_guest(self, package: Package, name: str) -> None:
        """Build a model of another package: one to look at, later one to wrap and others to compare with."""
        facts = self.facts
        with self._stage("build", "recorded", fatal=True):
            facts.family, facts.device = package.module, "real"

            def rebuild() -> nn.Module:
                model = package.build(name)
                enliven(model)
                return model

            probe = rebuild()
            facts.parameters = sum(p.numel() for p in probe.parameters())
        with self._stage("eager", "recorded", fatal=True):
            self.reference = observe(probe, [GuestForm(package.models[name])], "cpu")
            facts.input = self.reference.form.to_json()
            facts.other_input = self.reference.other.to_json() if self.reference.other else []
            self.rebuild, self.model = rebuild, rebuild()
            if package.models[name].masked:
                self.options["masked"] = package.models[name].masked

    def original(self) -> nn.Module:
        """The model itself, of guests one that nothing was done to: some keep state between calls."""
        return self.rebuild() if self.rebuild else self.model

    def wrap(self) -> None:
        """Wrap at the model's own input size, which must not change the model."""
        facts = self.facts
        with self._stage("wrap", "recorded", fatal=True):
            before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            try:
                self.net = growfx.wrap(self.model, self._inputs(self.reference.form, 1), **self.options)
            except GrowfxError as refusal:
                facts.checks["eval"] = f"n/a: growfx refuses: {one_line(refusal)}"  # and so computes nothing wrong
                raise
        with self._stage("wrap", "untouched"):
            if facts.device == "real":
                self._verdict("untouched", _changed(before, self.model.state_dict(), "by wrap"))
        report = self.net.trace_report
        self._verdict("recorded", report.opaque.get("", ""))
        facts.notes = [scrubbed(note) for note in report.notes]
        facts.layers = {
            "masked": len(report.layers),
            "tied": len(report.tied),
            "opaque": {name: scrubbed(reason) for name, reason in report.opaque.items()},
            "unmasked": {name: scrubbed(reason) for name, reason in report.unmasked.items()},
            "off_path": {},
        }

    def graph(self) -> None:
        """What the recording holds: all weights, which operators, and a path rule for each of them."""
        facts = self.facts
        with self._stage("graph", "weights found"):
            missed = facts.missed = self._missed()
            self._verdict("weights found", f"{len(missed)} missed, the first is `{missed[0]}`" if missed else "")
        with self._stage("graph"):
            args, kwargs = split(self._inputs(self.reference.form, 1))
            graph = self.net.graph_at(*args, **kwargs)
            facts.operators = sorted({_operator(node, self.net.shell) for node in graph.nodes} - {""})
        if facts.device == "meta":
            with self._stage("path products", "path rules"):
                off_path = check_path_rules(self.net)
                facts.layers["off_path"] = {name: scrubbed(reason) for name, reason in off_path.items()}
                self._verdict("path rules", "")

    def graph_steps(self) -> None:
        """Outputs and gradients of the recorded graphs against the model's own."""
        for mode in ("eval", "train"):
            check = f"graph {mode}"
            if mode in self.reference.refusals:
                self.facts.checks[check] = self._refused(mode)
                continue
            with self._stage(check, check):
                self._verdict(check, self._graph_differs(training=mode == "train"))

    def own_forward(self, original: nn.Module) -> None:
        """Outputs of the net against the model's own, with the model's values, call after call."""
        for check in CALLS:
            with self._stage(check, check):
                self.facts.checks[check] = self._compared(check, original)

    def gradients(self, original: nn.Module) -> None:
        """Outputs and gradients of the net in training against the model's own, which was called as often."""
        if "train" in self.reference.refusals:
            self.facts.checks["gradients"] = self._refused("train")
            return
        with self._stage("gradients", "gradients"):
            parameters = dict(self.net.named_parameters())
            problems: list[str] = []
            for seed in self._seeds():
                try:
                    expected = self._own_step(original, seed, training=True)
                except RuntimeError as error:
                    if not problems:
                        self.facts.checks["gradients"] = f"n/a: the model itself refuses: {one_line(error)}"
                        return
                    break  # what it keeps from one call to the next holds the graph of the one before
                got = step(self.net, parameters, self._inputs(self._step_form, _ROWS), seed, training=True)
                problems.append(step_difference(expected, got))
            self._verdict("gradients", next(filter(None, problems), ""))

    def extremes(self) -> None:
        """Path products of the dense network with norm scales of 10 and running variances of 0.001."""
        with self._stage("path products", "extreme paths"), _extreme_norms(self.model):
            paths = growfx.path_products(self.net.eval(), example_inputs=self._path_inputs())
            self._verdict("extreme paths", _not_finite(paths))

    def sparse(self) -> None:
        """Path products and dead units at random masks, and one round of growth from there."""
        net, facts = self.net.eval(), self.facts
        with self._stage("path products", "paths", "growth"):
            net.set_masks(random_masks({n: tuple(m.mask.shape) for n, m in net.layers.items()}, DENSITY, seed=0))
            paths = growfx.path_products(net, example_inputs=self._path_inputs())
            self._verdict("paths", _not_finite(paths))
            alive = list(paths.alive_out.values())
            facts.dead_units = [sum(int((~units).sum()) for units in alive), sum(units.numel() for units in alive)]
            facts.layers["off_path"] = {name: scrubbed(reason) for name, reason in paths.off_path.items()}
            facts.stage = "growth"
            self._verdict("growth", _grow(net, paths))

    def artifact(self) -> None:
        """Saved and loaded again, every number is the same bit for bit, and so, up to rounding, are the outputs."""
        with self._stage("artifact", "artifact"), tempfile.TemporaryDirectory() as folder:
            growfx.save(self.net, folder)
            own = create_model(self.facts.model) if self.facts.library == "python" else None
            own = self.rebuild() if self.rebuild else own
            loaded = growfx.load(folder, model=own)
            state, own_names = self.net.state_dict(), self.model.state_dict().keys()
            tensors = {name: value for name, value in state.items() if name in own_names or not name.endswith("mask")}
            problem = _changed(tensors, loaded.state_dict(), "after loading")
            if not problem:
                # Kernels may be chosen by where tensors lie in memory, so bits of outputs say nothing of the file.
                inputs = self._inputs(self.reference.smaller(), 1)
                expected = run_seeded(self.net, inputs, training=False)
                # At a tenth of their weights some networks are silent: spiking ones, detectors of extrema.
                problem = difference(expected, run_seeded(loaded, inputs, training=False), blank=True)
            self._verdict("artifact", problem)

    def native(self) -> None:
        """The native runtime, whose kernels may lack an operator, computes the same."""
        with self._stage("native", "native"):
            self.facts.checks["native"] = scrubbed(check_native(self.net).verdict)

    # -- steps ------------------------------------------------------------------------------------------------------

    def _inputs(self, form: Any, batch: int, seed: int | None = None) -> Any:
        device = "cpu" if self.facts.device == "real" else "meta"
        return form.inputs(batch, seed=batch if seed is None else seed, device=device)

    def _path_inputs(self) -> Any:
        """Example inputs of path products: as few pixels as the model takes; of guests those it was wrapped with."""
        return None if self.rebuild else self._inputs(self.reference.smaller(), 1)

    @cached_property
    def _step_form(self) -> Any:
        """Inputs of steps: as few pixels as the model takes in both modes, for steps take most of the time."""
        form, smaller = self.reference.form, self.reference.smaller()
        if smaller is form or "train" in self.reference.refusals:
            return smaller
        try:
            run_seeded(self.original(), self._inputs(smaller, _ROWS), training=True)
        except Exception:  # as the model likes: too few values for a norm, a window larger than the map
            return form
        return smaller

    def _seeds(self) -> tuple[int, ...]:
        return _SEEDS.get(self.facts.library, (1,))

    def _refused(self, check: str) -> str:
        return f"n/a: the model itself refuses: {self.reference.refusals[check]}"

    def _own_step(
        self, original: nn.Module, seed: int, training: bool, values: int = _ROWS, without: Collection[str] = ()
    ) -> Step:
        given = self._inputs(self._step_form, _ROWS, values)
        self.steps.append(step(original, dict(original.named_parameters()), given, seed, training, without))
        return self.steps[-1]

    def _graph_differs(self, training: bool) -> str:
        """How steps of the graph differ from the model's, under several seeds and with other values.

        Objects that a note of the report names (caches, which a graph leaves out) are left out of the outputs.
        """
        form, net, report = self._step_form, self.net, self.net.trace_report
        noted = {name for note in report.notes for name in re.findall(r"`(\w+)`", note)}
        pairs = [(seed, _ROWS) for seed in self._seeds()]
        if not report.opaque:  # else a graph holds for the values it was recorded with
            pairs = [*pairs[1:], (pairs[0][0], 9)]  # what is right for other values is so for these
        # Before anything else runs: what the model does is known even where there is no graph.
        own = [self._own_step(self.original(), seed, training, values, noted) for seed, values in pairs]
        args, kwargs = split(self._inputs(form, _ROWS))
        net.train(training)
        graph = fx.GraphModule(net.shell, net.graph_at(*args, training=training, **kwargs))
        parameters = dict(net.named_parameters())
        for (seed, values), expected in zip(pairs, own, strict=True):
            got = step(graph, parameters, self._inputs(form, _ROWS, values), seed, without=noted)
            problem = step_difference(expected, got)
            if problem:
                said = f"the report says {'' if report.faithful else 'not '}faithful"
                return f"{problem}{'' if values == _ROWS else ' with other values'}; {said}"
        return ""

    def _compared(self, check: str, original: nn.Module) -> str:
        """The verdict on the net's outputs."""
        reference, (batch, training) = self.reference, CALLS[check]
        if check in reference.refusals:
            return self._refused(check)
        if check == "other size" and reference.other is None:
            return "n/a: the inputs have one size"
        if check not in reference.outputs:
            check = "other size"  # three images of another size were compared already
        form = reference.other if check == "other size" else reference.form
        assert form is not None
        got = self.facts.checks.get(check)
        if got is None:
            expected = reference.outputs[check]
            if self.rebuild:
                expected = run_seeded(original, self._inputs(form, batch), training)
            problem = difference(expected, run_seeded(self.net, self._inputs(form, batch), training))
            got = f"no: {scrubbed(problem)}" if problem else "yes"
        return got

    def _missed(self) -> list[str]:
        """Layers and weights that are neither masked nor reported."""
        net, report = self.net, self.net.trace_report
        reported = {*net.layers, *report.tied, *report.unmasked}
        missed = [name for name in weight_layers(self.model) if name not in reported]
        masked = {id(layer.parameter) for layer in net.layers.values()}
        for name in sorted(self.reference.used | reached_matrices(self.model, self.steps)):
            # A report names layers, and parameters that belong to none.
            layer = name.partition(".parametrizations.")[0]
            named = {name, name.rpartition(".")[0], layer, layer.rpartition(".")[0]} & set(report.unmasked)
            if not named and id(self.model.get_parameter(name)) not in masked:
                missed.append(name)
        return missed


def _operator(node: fx.Node, root: nn.Module) -> str:
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        kind = module.twin_of if isinstance(module, MaskedLayer) else type(module)
        return f"module {kind.__name__}"
    if node.op == "call_method":
        return f"method {node.target}"
    if node.op == "call_function" and callable(node.target):
        return f"function {_get_qualified_name(node.target)}"
    return ""


def _not_finite(paths: PathProducts) -> str:
    for name, score in paths.scores.items():
        low, high = torch.aminmax(score)
        if not 0 <= float(low) <= float(high) < math.inf:
            return f"scores of `{name}` are negative or not finite"
    if not math.isfinite(paths.log_total):
        return f"the logarithm of the sum over all paths is {paths.log_total}"
    return ""


@contextmanager
def _extreme_norms(model: nn.Module) -> Generator[None]:
    """Norm scales of 10 and running variances of 0.001, for a while."""
    changed: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for module in model.modules():
            scale, variance = getattr(module, "weight", None), getattr(module, "running_var", None)
            if "Norm" in type(module).__name__ and isinstance(scale, Tensor):
                changed.append((scale, scale.detach().clone()))
                scale.fill_(_GAMMA)
            if isinstance(variance, Tensor):
                changed.append((variance, variance.detach().clone()))
                variance.fill_(_VARIANCE)
        try:
            yield
        finally:
            for tensor, value in changed:
                tensor.copy_(value)


def _changed(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], when: str) -> str:
    """Which tensor of a state dict is not the same bit for bit."""
    if expected.keys() != got.keys():
        return f"other tensors {when}: {sorted(expected.keys() ^ got.keys())[:3]}"
    for name, tensor in expected.items():
        if tensor.dtype != got[name].dtype or not torch.equal(*(_bits(t) for t in (tensor, got[name]))):
            return f"`{name}` is another {when}"
    return ""


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


def _grow(net: MaskedGraph, paths: PathProducts) -> str:
    """One growth round as `growfx.methods.growth.pwmpr` makes it; returns what is wrong with it."""
    before = {name: layer.mask.clone() for name, layer in net.layers.items()}
    absent = {name: ~before[name] for name in paths.scores}
    wanted = next_nnz(net.nnz, net.numel, PWMPR().growth_ratio, 1.0) - net.nnz
    drawn = draw(paths.scores, wanted, EdgeKeys(0, "growth round 1"), absent)
    masks = {name: before[name] | drawn.masks[name] for name in paths.scores}
    added = change_masks(net, SGD(net.parameters(), lr=0.1), masks)
    expected = wanted
    if added < wanted:  # then every absent edge on a path must have been taken
        candidates = sum(int((absent[name] & (score > 0)).sum()) for name, score in paths.scores.items())
        expected = min(wanted, candidates)
    lost = any(bool((mask & ~net.layers[name].mask).any()) for name, mask in before.items())
    if lost or added != expected or net.nnz != sum(int(mask.sum()) for mask in before.values()) + expected:
        return f"{added} edges added instead of {expected}{', others lost' if lost else ''}"
    return "" if added else "no absent edge lies on a path"


def _rounded(seconds: float) -> float:
    return round(seconds, 3)
