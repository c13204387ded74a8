"""One run of `growfx.train`: stages, epochs, validation, log and checkpoints.

The order of everything random is that of `growfx.training`'s docstring.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, nullcontext
from typing import Any, cast

import torch

from growfx.analysis.cost import CostMeter
from growfx.data.batches import batches_from, pair_of
from growfx.distributed import ranks
from growfx.errors import DataError, GrowfxError
from growfx.masked.graph import MaskedGraph
from growfx.masked.present.optimizer_state import check_pointwise
from growfx.masked.present.storage import follow_masks, set_storage, storage_of
from growfx.methods.base import Method
from growfx.methods.session import Session, Stage
from growfx.notices import warn_once
from growfx.options import TrainOptions
from growfx.reporting.run import write_report
from growfx.runs.folder import RunFolder, finite
from growfx.runs.result import Result
from growfx.runtime.train import dense_meanwhile, kernels_taken, use_kernels
from growfx.training.config import model_name
from growfx.training.evaluation import Score, count_classes, evaluate, paired_noise
from growfx.training.images import check_last_batch
from growfx.training.interrupts import Interrupts, Stopped
from growfx.training.progress import Progress
from growfx.training.recipe import (
    make_average,
    make_loss,
    make_mixup,
    make_optimizer,
    pick_device,
    schedule_of,
    seed_globally,
    steps_of,
)
from growfx.training.scalars import Scalars
from growfx.training.state import EpochPart, RunState
from growfx.training.step import TrainStep, windows
from growfx.training.training_data import warn_of_batches_left

__all__ = ["Run"]


class Run:
    """One `growfx.train` call: what it was given, and the state it has reached."""

    def __init__(
        self,
        net: MaskedGraph,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        test_loader: Iterable[Any] | None,
        method: Method,
        options: TrainOptions,
        progress: bool,
    ) -> None:
        self.net, self.method, self.options = net, method, options
        self.train_loader, self.val_loader, self.test_loader = train_loader, val_loader, test_loader
        for part, loader in (("training", train_loader), ("validation", val_loader), ("test", test_loader or ())):
            if not isinstance(loader, Iterable):
                raise DataError(
                    f"the {part} loader expects batches (images, class numbers), got {type(loader).__name__}; give a "
                    "torch.utils.data.DataLoader, or anything that can be iterated over"
                )
            if part != "test" and _runs_once(loader):  # a look at its first batch would be the last
                raise DataError(
                    f"the {part} loader can be iterated over once only ({type(loader).__name__}); give a "
                    "torch.utils.data.DataLoader, or a list of batches"
                )
        self.folder: RunFolder | None = None
        self.scalars: Scalars | None = None
        self.progress = Progress(progress and ranks.rank() == 0)
        self.device = pick_device(options.device)
        self.epoch_steps = math.ceil(steps_of(train_loader) / options.accumulate)
        self.interrupts, self._saved_at = Interrupts(), time.monotonic()
        self._kernels: dict[str, Any] = {}  # of the last training step
        self._notes: list[str] = []
        self._looked_beyond = False  # whether the loader has more than its length says

    def all(self) -> Result:
        """The whole run, or what is left of it."""
        self._restore()
        self._saved_at = time.monotonic()
        if self.folder and self.options.tensorboard:
            self.scalars = Scalars(self.folder.path, self.state.at.steps)
        try:
            with self.progress, closing(self.scalars) if self.scalars else nullcontext():
                while (stage := self.method.next_stage()) is not None:
                    self._train_stage(stage)
            with self.interrupts.at_once():
                return self._finish()
        except Stopped as stop:
            self._put_away(stop)
            raise

    # -- beginning ------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Bring network, optimizer, method and averages together, on whole weights; keep these as asked for."""
        stored = storage_of(self.net)
        set_storage(self.net, "dense")
        try:
            self._bring_together()
        except BaseException:
            set_storage(self.net, stored)
            raise

    def _bring_together(self) -> None:
        self.net.to(self.device)
        if self.options.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self._take_kernels()
        seed_globally(self.options.seed, -1)
        optimizer = make_optimizer(self.net, self.options)
        if self.options.storage == "present":
            check_pointwise(optimizer)
        loss = make_loss(self.options).to(self.device)
        step = TrainStep(self.net, optimizer, self.method, loss, self.options)
        self.method.begin(
            Session(
                net=self.net,
                optimizer=optimizer,
                options=self.options,
                steps_per_epoch=self.epoch_steps,
                batches=lambda: (self._moved(*pair_of(batch)) for batch in self.train_loader),
                loss=step.loss,
            )
        )
        first = next(iter(self.val_loader), None)
        if first is None:
            raise DataError("the validation loader gives no images")
        example = pair_of(first)[0][:1].to(self.device)
        check_last_batch(self.net, self.train_loader, example)
        step.mix = make_mixup(self.options, count_classes(self.net, example))
        meter = CostMeter(self.net, example)
        if self.options.storage == "present":
            whole = set_storage(self.net, "present", [optimizer])
            if self.net.kernels is not None:
                self.net.kernels.whole = whole
        self.state = RunState(self.net, optimizer, self.method, step, meter, self._average)

    def _take_kernels(self) -> None:
        """Let the layers choose their kernels; "auto" leaves networks that are not on a CPU alone."""
        kernels, shared = self.options.kernels, ranks.world_size() > 1
        on_cpu = torch.device(self.device).type == "cpu"
        if kernels != "auto" or on_cpu:
            # Ranks that time for themselves could choose differently.
            use_kernels(self.net, kernels, deterministic=self.options.deterministic or shared)

    def _moved(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layout = torch.channels_last if self.options.channels_last and images.ndim == 4 else torch.preserve_format
        images = images.to(self.device, non_blocking=True, memory_format=layout)
        return images, targets.to(self.device, non_blocking=True)

    # -- one stage ------------------------------------------------------------------------------------------

    def _train_stage(self, stage: Stage) -> None:
        schedule = schedule_of(self.state.optimizer, self.options, stage, self.epoch_steps)
        self.state.begin_stage(stage)
        done = max(self.state.at.stage_step, stage.first_step)
        self.progress.begin_stage(stage, done // self.epoch_steps)
        total = stage.epochs * self.epoch_steps
        while done < total:
            # an epoch that rewinding enters in the middle is a shorter one
            steps = self.epoch_steps - done % self.epoch_steps
            with self.state.clock.training():
                loss = self._epoch(stage, schedule, done, steps)
            done += steps
            scores = self._measure(stage, last=done == total)
            self.state.close_epoch(steps)
            accuracy = self._report(stage, scores)
            self._log_epoch(stage, loss, accuracy)
            self.state.at.stage_step = done
            if done == total:
                self._end_stage(stage)
            self._checkpoint(best=stage.kind == "final" and self.state.is_best())
            self.interrupts.check()
        self.progress.end_stage()

    def _end_stage(self, stage: Stage) -> None:
        before = [parameter._version for parameter in self.net.parameters()]
        with self.state.clock.training(), self.net.whole_weights():
            self.method.end_stage(stage)
        self.state.meter.read_masks()
        self.state.at.stage, self.state.at.stage_step = self.state.at.stage + 1, 0
        changed = before != [parameter._version for parameter in self.net.parameters()]
        if changed and self.method.next_stage() is None:
            # what was validated is not what the run ends with (an average of tickets, say)
            self.state.val_accuracy = self._evaluate(self.net, self.val_loader).accuracy
            self._log({"event": "replaced", "epoch": self.state.at.epoch, "val_accuracy": self.state.val_accuracy})

    def _average(self, stage: Stage) -> Any:
        """Return an average of the network over a stage that is about to begin, or to be taken up again."""
        average = make_average(self.net, self.options, stage.epochs * self.epoch_steps)
        set_storage(average.module, storage_of(self.net))
        return average

    def _measure(self, stage: Stage, last: bool) -> list[Score]:
        """Validate as the stage asks for: nothing, the network, or at the end of a round its average, then itself."""
        nets = [self.net]
        if stage.averaged:
            assert self.state.ema is not None
            nets = [self.state.ema.module, self.net] if last else []
        with self.interrupts.at_once():
            return [self._evaluate(net, self.val_loader) for net in nets]

    def _evaluate(self, net: Any, loader: Iterable[Any]) -> Score:
        with self.state.clock.evaluating():
            return evaluate(net, loader, self.device)

    def _report(self, stage: Stage, scores: Sequence[Score]) -> float | None:
        """Tell the method what was measured; returns an accuracy for the log."""
        if not scores:
            return None
        if stage.averaged:
            self._report_round(*scores)
            return None
        accuracy = self.state.val_accuracy = scores[0].accuracy
        self.method.report(accuracy)
        self.progress.stage_epoch(accuracy, self.net.density)
        return accuracy

    def _report_round(self, averaged: Score, raw: Score) -> None:
        # The first round has no other to be paired with; its raw weights are too much alike to stand in.
        before, self.state.last_score = self.state.last_score, averaged
        noise = averaged.standard_error if before is None else paired_noise(averaged, before)
        self.method.report(averaged.accuracy, noise)
        entry = self.method.trace[-1]
        record = {
            "event": "round",
            **entry,
            "raw_accuracy": raw.accuracy,
            "noise": noise,
            "standard_error": averaged.standard_error,
            "growing": self.method.growing,
            "stop_reason": self.method.stop_reason,
        }
        self._log(record)
        self.progress.round(record)

    def _finish(self) -> Result:
        test = None
        if self.test_loader is not None:
            with dense_meanwhile(self.net):  # what the artifact will give
                test = self._evaluate(self.net, self.test_loader).accuracy
        method, net = self.method, self.net
        result = Result(
            method=method.name if method.changes_masks else "dense" if net.nnz == net.numel else "fixed masks",
            model=model_name(net),
            density=net.density,
            nnz=net.nnz,
            numel=net.numel,
            mask_digest=net.mask_digest(),
            val_accuracy=self.state.val_accuracy,
            test_accuracy=test,
            dense_equivalent_epochs=self.state.meter.dense_equivalent_epochs,
            epochs=self.state.at.epoch,
            steps=self.state.at.steps,
            stop_reason=method.stop_reason or "end of the schedule",
            trace=[finite(entry) for entry in method.trace],
            kernels=self._kernels or kernels_taken(net),
            **self.state.clock.seconds(),
            weights_from=self.folder.config.get("weights_from") if self.folder else None,
        )
        if self.folder:
            notice = write_report(self.folder, net, dataclasses.asdict(result))
            if notice:
                self.progress.say(notice)
        return result

    # -- one epoch ------------------------------------------------------------------------------------------

    def _epoch(self, stage: Stage, schedule: Any, first: int, steps: int) -> float:
        """Train `steps` steps from step `first` of the stage, or what is left of them; the mean loss."""
        seed_globally(self.options.seed, self.state.at.epoch, self.train_loader)
        self.net.train()
        part = self.state.open_epoch()
        self._started = time.perf_counter() - part.seconds
        if part.done == steps:  # only its validation is missing
            part.resume_random(self.train_loader)
            return part.mean_loss()
        length, dense_gradient = self.options.accumulate, False
        batches = batches_from(self.train_loader, part.done * length, part.resume_random)
        with self.progress.epoch(stage, first + part.done, self.epoch_steps) as tick:
            for window in windows(batches, length):
                schedule.step_update(first + part.done)
                dense_gradient = self.method.needs_dense_gradient
                loss, changed = self.state.step(*(self._moved(*pair_of(batch)) for batch in window))
                part.loss += loss
                if self.state.ema is not None:
                    follow_masks(self.state.ema.module, self.net)
                    self.state.ema.update(self.net, step=first + part.done)
                part.done, part.uncounted = part.done + 1, part.uncounted + 1
                if changed or dense_gradient or part.done == steps:
                    self._count(part, dense_gradient)
                # A look at the value waits for the device: now and then is enough to stop in time.
                if part.done % 20 == 0 or part.done == steps:
                    self.state.step.watch.tell()
                    self._require_finite(part.loss)
                tick()
                if part.done == steps:
                    break
                self._between_steps(part)
        if part.done != steps:
            raise DataError(
                f"the training loader gave batches for {part.done} steps; its length says {self.epoch_steps}"
            )
        self._kernels = kernels_taken(self.net)
        if not dense_gradient:  # a step of the gradient of absent edges is dense
            self._warn_of_kernels()
        part.mark(self.train_loader, time.perf_counter() - self._started)
        if not self._looked_beyond and steps * length >= len(cast(Sized, self.train_loader)):
            self._looked_beyond = True
            warn_of_batches_left(self.train_loader, batches)
        return part.mean_loss()

    def _warn_of_kernels(self) -> None:
        """Warn where sparse kernels were asked for and the last step took none."""
        report = self.net.kernel_report
        if self.options.kernels != "sparse" or self._kernels["sparse"] or report is None or not report.layers:
            return
        reasons = [*report.notes, *(choice.reason for choice in report.layers.values())]
        warn_once(f"`kernels` = 'sparse' has no effect: all layers take dense kernels ({reasons[0]})", self._notes)

    def _count(self, part: EpochPart, dense_gradient: bool) -> None:
        """Book the steps since the last time, all but the last without the gradient of absent edges."""
        self.state.meter.add_steps(part.uncounted - 1, self.epoch_steps)
        self.state.meter.add_steps(1, self.epoch_steps, dense_gradient=dense_gradient)
        part.uncounted = 0
        self.state.meter.read_masks()

    def _between_steps(self, part: EpochPart) -> None:
        """Write a checkpoint if one is due; end the run if it was asked to."""
        minutes = self.options.checkpoint_minutes
        late = self.folder is not None and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        due, asked = ranks.largest(late, self.interrupts.pending or 0)
        if not due and not asked:
            return
        self._require_finite(part.loss)
        part.mark(self.train_loader, time.perf_counter() - self._started)
        if asked:
            raise Stopped(asked)  # which writes it too
        self._checkpoint()

    def _require_finite(self, total: torch.Tensor) -> None:
        if not ranks.finite(total):
            written = self.folder is not None and self.folder.checkpoints.exists()
            kept = "; the last checkpoint is kept" if written else ""
            if self.state.step.watch.saw_empty_batch():
                raise DataError(
                    f"the loss is not finite in epoch {self.state.at.epoch + 1}: all images of a batch have class "
                    "number -100, which the loss leaves out, so that none is left to average; leave them out of the "
                    f"data set, or give them a class{kept}"
                )
            rate = self.state.optimizer.param_groups[0]["lr"]
            raise GrowfxError(
                f"the loss is not finite in epoch {self.state.at.epoch + 1} (`{self.options.optimizer}`, learning "
                f"rate {rate:.3g}); lower `lr`, lengthen `warmup_epochs` or set `clip_grad`{kept}"
            )

    def _log_epoch(self, stage: Stage, loss: float, accuracy: float | None) -> None:
        record = {
            "event": "epoch",
            "phase": stage.kind,
            "stage": self.state.at.stage,
            "epoch": self.state.at.epoch,
            "steps": self.state.at.steps,
            "lr": self.state.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "val_accuracy": accuracy,
            "density": self.net.density,
            "nnz": self.net.nnz,
            "dense_equivalent_epochs": self.state.meter.dense_equivalent_epochs,
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        self._log(record)

    def _log(self, record: Mapping[str, Any]) -> None:
        if self.folder:
            self.folder.log(record)
        if self.scalars:
            self.scalars.write(record, self.state.at.steps)

    # -- checkpoints ----------------------------------------------------------------------------------------

    def _checkpoint(self, *, best: bool = False) -> None:
        self._saved_at = time.monotonic()
        parts = ranks.everyone(self.state.part and self.state.part.state_dict())
        ranks.on_first(lambda: self._save(parts, best))

    def _save(self, parts: Sequence[dict[str, Any] | None], best: bool) -> None:
        if self.folder is not None:
            steps = self.state.steps
            content = {
                "config": self.folder.config,
                **self.state.state_dict(parts),
                "log_position": self.folder.log_position(),
            }
            self.folder.checkpoints.save(content, steps=steps, best=best)

    def _put_away(self, stop: Stopped) -> None:
        """Keep the done part of an interrupted epoch, and say so; without one the last checkpoint has it all."""
        if self.state.part is not None and self.state.part.random is not None:
            self._checkpoint()
        if self.folder is not None:
            self.progress.say(
                f"{stop}: stopped after step {self.state.steps} of the run; "
                f"the checkpoint in `{self.folder.checkpoints.folder}` is up to date, resume continues from it"
            )

    def _restore(self) -> None:
        found = ranks.from_first(self._newest)
        if found is not None:
            self.state.load_state_dict(*found)
        if self.folder is not None:
            self.folder.rewind_log(0 if found is None else found[0]["log_position"])

    def _newest(self) -> tuple[dict[str, Any], str] | None:
        """Read the newest checkpoint, if there is one; and say where it is."""
        if self.folder is None or not self.folder.checkpoints.exists():
            return None
        state, notice = self.folder.checkpoints.load()
        self.folder.checkpoints.finish_save()
        if notice:
            self.progress.say(notice)
        where = f"the checkpoint in `{self.folder.checkpoints.folder}`"
        if state.get("config") is not None:
            self.folder.require_same(state["config"], where)
        return state, where


def _runs_once(loader: Iterable[Any]) -> bool:
    """Whether a loader surely gives its batches once only; an iterator of a class of its own may begin again."""
    kinds = ("builtins", "itertools", "torch.utils.data.dataloader")
    return isinstance(loader, Iterator) and type(loader).__module__ in kinds
