"""One run of `growfx.train`: stages, epochs, validation, log and checkpoints.

The order of everything random is that of `growfx.training`'s docstring.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from growfx.cost import CostMeter
from growfx.errors import CheckpointError, DataError, GrowfxError
from growfx.evaluation import Score, count_classes, evaluate, paired_noise
from growfx.graph import MaskedGraph
from growfx.options import TrainOptions
from growfx.progress import Progress
from growfx.recipe import (
    make_average,
    make_loss,
    make_mixup,
    make_optimizer,
    pick_device,
    schedule_of,
    seed_globally,
    steps_of,
)
from growfx.report import write_report
from growfx.run_config import model_name
from growfx.run_folder import RunFolder, finite
from growfx.run_result import Result
from growfx.scalars import Scalars
from growfx.session import Session, Stage
from growfx.train_step import TrainStep, windows

if TYPE_CHECKING:
    from growfx.methods.base import Method

__all__ = ["Run"]


@dataclass
class _Position:
    """Where a run is, between two epochs. `epoch` and `steps` count from its beginning; `stage` counts the stages
    done, and `stage_step` the steps into the next."""

    stage: int = 0
    stage_step: int = 0
    epoch: int = 0
    steps: int = 0


class Run:
    """The mutable state of one `growfx.train` call."""

    def __init__(
        self,
        net: MaskedGraph,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        test_loader: Iterable[Any] | None,
        method: "Method",
        options: TrainOptions,
        progress: bool,
    ) -> None:
        self.net, self.method, self.options = net, method, options
        self.train_loader, self.val_loader, self.test_loader = train_loader, val_loader, test_loader
        self.folder: RunFolder | None = None
        self.scalars: Scalars | None = None
        self.progress = Progress(progress)
        self.device = pick_device(options.device)
        self.epoch_steps = math.ceil(steps_of(train_loader) / options.accumulate)
        self.at = _Position()
        self.best, self.best_nnz = -1.0, net.numel + 1
        self.last_score: Score | None = None
        self.val_accuracy = math.nan

    def all(self) -> Result:
        """The whole run, or what is left of it."""
        self._restore()
        if self.folder and self.options.tensorboard:
            self.scalars = Scalars(self.folder.path, self.at.steps)
        with self.progress, closing(self.scalars) if self.scalars else nullcontext():
            while (stage := self.method.next_stage()) is not None:
                self._train_stage(stage)
        return self._finish()

    # -- beginning ------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Bring network, optimizer, method and averages together."""
        self.net.to(self.device)
        if self.options.channels_last:
            self.net.to(memory_format=torch.channels_last)
        seed_globally(self.options.seed, -1)
        self.optimizer = make_optimizer(self.net, self.options)
        loss = make_loss(self.options).to(self.device)
        self.step = TrainStep(self.net, self.optimizer, self.method, loss, self.options)
        self.ema = None
        self.method.begin(
            Session(
                net=self.net,
                optimizer=self.optimizer,
                options=self.options,
                steps_per_epoch=self.epoch_steps,
                batches=lambda: (self._moved(*batch) for batch in self.train_loader),
                loss=self.step.loss,
            )
        )
        images, _ = next(iter(self.val_loader), (None, None))
        if images is None:
            raise DataError("the validation loader gives no images")
        example = images[:1].to(self.device)
        self.meter = CostMeter(self.net, example)
        self.step.mix = make_mixup(self.options, count_classes(self.net, example))

    def _moved(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layout = torch.channels_last if self.options.channels_last and images.ndim == 4 else torch.preserve_format
        images = images.to(self.device, non_blocking=True, memory_format=layout)
        return images, targets.to(self.device, non_blocking=True)

    # -- one stage ------------------------------------------------------------------------------------------

    def _train_stage(self, stage: Stage) -> None:
        schedule = schedule_of(self.optimizer, self.options, stage, self.epoch_steps)
        if not stage.averaged:
            self.ema = None
        elif self.ema is None or self.averaged_epochs != stage.epochs:
            self.ema = self._average(stage)
        done = max(self.at.stage_step, stage.first_step)
        self.progress.begin_stage(stage, done // self.epoch_steps)
        total = stage.epochs * self.epoch_steps
        while done < total:
            # an epoch that rewinding enters in the middle is a shorter one
            steps = self.epoch_steps - done % self.epoch_steps
            loss = self._epoch(stage, schedule, done, steps)
            done += steps
            accuracy = self._score(stage, last=done == total)
            self._log_epoch(stage, loss, accuracy)
            self.at.stage_step = done
            if done == total:
                self._end_stage(stage)
            self._checkpoint(best=stage.kind == "final" and self._is_best())
        self.progress.end_stage()

    def _is_best(self) -> bool:
        """Whether no epoch with as few edges was as accurate: a method may still be on its way to its density."""
        better = (-self.net.nnz, self.val_accuracy) > (-self.best_nnz, self.best)
        if better:
            self.best, self.best_nnz = self.val_accuracy, self.net.nnz
        return better

    def _end_stage(self, stage: Stage) -> None:
        before = [parameter._version for parameter in self.net.parameters()]
        self.method.end_stage(stage)
        self.meter.read_masks()
        self.at.stage, self.at.stage_step = self.at.stage + 1, 0
        changed = before != [parameter._version for parameter in self.net.parameters()]
        if changed and self.method.next_stage() is None:
            # what was validated is not what the run ends with (an average of tickets, say)
            self.val_accuracy = evaluate(self.net, self.val_loader, self.device).accuracy
            self._log({"event": "replaced", "epoch": self.at.epoch, "val_accuracy": self.val_accuracy})

    def _average(self, stage: Stage) -> Any:
        self.averaged_epochs = stage.epochs  # its memory is a part of the stage
        return make_average(self.net, self.options, stage.epochs * self.epoch_steps)

    def _score(self, stage: Stage, last: bool) -> float | None:
        """Validate as the stage asks for, and tell the method."""
        if stage.averaged:
            if last:
                self._score_round()
            return None
        accuracy = self.val_accuracy = evaluate(self.net, self.val_loader, self.device).accuracy
        self.method.report(accuracy)
        self.progress.stage_epoch(accuracy, self.net.density)
        return accuracy

    def _score_round(self) -> None:
        assert self.ema is not None
        averaged = evaluate(self.ema.module, self.val_loader, self.device)
        raw = evaluate(self.net, self.val_loader, self.device)
        # The first round has no other to be paired with; its raw weights are too much alike to stand in.
        before, self.last_score = self.last_score, averaged
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
            test = evaluate(self.net, self.test_loader, self.device).accuracy
        method, net = self.method, self.net
        result = Result(
            method=method.name if method.changes_masks else "dense" if net.nnz == net.numel else "fixed masks",
            model=model_name(net),
            density=net.density,
            nnz=net.nnz,
            numel=net.numel,
            mask_digest=net.mask_digest(),
            val_accuracy=self.val_accuracy,
            test_accuracy=test,
            dense_equivalent_epochs=self.meter.dense_equivalent_epochs,
            epochs=self.at.epoch,
            steps=self.at.steps,
            stop_reason=method.stop_reason or "end of the schedule",
            trace=[finite(entry) for entry in method.trace],
        )
        if self.folder:
            notice = write_report(self.folder, net, dataclasses.asdict(result))
            if notice:
                self.progress.say(notice)
        return result

    # -- one epoch ------------------------------------------------------------------------------------------

    def _epoch(self, stage: Stage, schedule: Any, first: int, steps: int) -> float:
        """Train `steps` steps from step `first` of the stage; the mean loss."""
        seed_globally(self.options.seed, self.at.epoch, self.train_loader)
        self.net.train()
        total = torch.zeros((), device=self.device)
        self._started = time.perf_counter()
        done = uncounted = 0
        with self.progress.epoch(stage, first, self.epoch_steps) as tick:
            for window in windows(self.train_loader, self.options.accumulate):
                schedule.step_update(first + done)
                dense_gradient = self.method.needs_dense_gradient
                loss, changed = self.step(*(self._moved(*batch) for batch in window))
                total += loss
                if self.ema is not None:
                    self.ema.update(self.net, step=first + done)
                done, uncounted = done + 1, uncounted + 1
                if changed or dense_gradient or done == steps:
                    self.meter.add_steps(uncounted - 1, self.epoch_steps)
                    self.meter.add_steps(1, self.epoch_steps, dense_gradient=dense_gradient)
                    uncounted = 0
                    self.meter.read_masks()
                # A look at the value waits for the device: now and then is enough to stop in time.
                if done % 20 == 0 or done == steps:
                    self._require_finite(total)
                tick()
                if done == steps:
                    break
        if done != steps:
            raise DataError(f"the training loader gave batches for {done} steps; its length says {self.epoch_steps}")
        self.at.epoch += 1
        self.at.steps += done
        return float(total) / done

    def _require_finite(self, total: torch.Tensor) -> None:
        if not bool(torch.isfinite(total)):
            kept = f"; the checkpoint of epoch {self.at.epoch} is kept" if self.folder else ""
            rate = self.optimizer.param_groups[0]["lr"]
            raise GrowfxError(
                f"the loss is not finite in epoch {self.at.epoch + 1} (`{self.options.optimizer}`, learning "
                f"rate {rate:.3g}); lower `lr`, lengthen `warmup_epochs` or set `clip_grad`{kept}"
            )

    def _log_epoch(self, stage: Stage, loss: float, accuracy: float | None) -> None:
        record = {
            "event": "epoch",
            "phase": stage.kind,
            "stage": self.at.stage,
            "epoch": self.at.epoch,
            "steps": self.at.steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "val_accuracy": accuracy,
            "density": self.net.density,
            "nnz": self.net.nnz,
            "dense_equivalent_epochs": self.meter.dense_equivalent_epochs,
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        self._log(record)

    def _log(self, record: Mapping[str, Any]) -> None:
        if self.folder:
            self.folder.log(record)
        if self.scalars:
            self.scalars.write(record, self.at.steps)

    # -- checkpoints ----------------------------------------------------------------------------------------

    def _checkpoint(self, *, best: bool = False) -> None:
        if self.folder is None:
            return
        state = {
            "position": dataclasses.asdict(self.at),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "step": self.step.state_dict(),
            "cost": self.meter.state_dict(),
            "best": self.best,
            "best_nnz": self.best_nnz,
            "val_accuracy": self.val_accuracy,
            "last_score": None if self.last_score is None else self.last_score.correct,
            "log_position": self.folder.log_position(),
        }
        self.folder.checkpoints.save(state, best=best)

    def _restore(self) -> None:
        if self.folder is None or not self.folder.checkpoints.exists():
            return
        state, notice = self.folder.checkpoints.load()
        if notice:
            self.progress.say(notice)
        try:
            self.at = _Position(**state["position"])
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.method.load_state_dict(state["method"])
            stage = self.method.next_stage()
            if state["ema"] is not None and stage is not None and stage.averaged:
                self.ema = self._average(stage)
                self.ema.module.load_state_dict(state["ema"])
            self.step.load_state_dict(state["step"])
            self.meter.load_state_dict(state["cost"])
            self.meter.read_masks()
            self.best, self.best_nnz = state["best"], state["best_nnz"]
            self.val_accuracy = state["val_accuracy"]
            self.last_score = None if state["last_score"] is None else Score(state["last_score"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[:1]
            raise CheckpointError(
                f"the checkpoint in `{self.folder.checkpoints.folder}` does not fit this run ({' '.join(reason)})"
            ) from error
        self.folder.rewind_log(state["log_position"])
