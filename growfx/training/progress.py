"""Progress bars of a training run, on standard error."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from growfx.methods.session import Stage

__all__ = ["Progress"]


class Progress:
    """Bars for growth rounds, epochs and steps; silent when not `shown`.

    tqdm gives the remaining time of the bar it shows: of the round while growing (how many rounds
    follow is for the data to say), of the whole stage otherwise.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._epochs: tqdm[Any] | None = None
        self._steps: tqdm[Any] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in (self._steps, self._epochs):
            if bar is not None:
                bar.close()
        self._steps = self._epochs = None

    def say(self, text: str) -> None:
        """Print one line above the bars; shown always, because it reports what the user has to know."""
        tqdm.write(text, file=_stderr())

    def round(self, record: Mapping[str, Any]) -> None:
        """Report a scored growth round: its density, accuracy, noise and what the method decided."""
        if not self.shown:
            return
        unsure = (record.get("fit") or {}).get("unsure")
        going = "growing: a plateau is likely, but not sure" if unsure else "growing"
        verdict = going if record["growing"] else f"stop: {record['stop_reason']}"
        self.say(
            f"round {record['round']}: density {100 * record['density']:.2f} %, accuracy "
            f"{100 * record['val_accuracy']:.2f} +- {100 * record['noise']:.2f} %, {verdict}"
        )

    def begin_stage(self, stage: Stage, done: int) -> None:
        """Show the bar over the epochs of a stage, `done` of which are over; a growth round has none."""
        if not stage.averaged:
            self._epochs = tqdm(
                total=stage.epochs,
                initial=done,
                desc=stage.title,
                unit="epoch",
                disable=not self.shown,
                file=_stderr(),
            )

    def stage_epoch(self, accuracy: float, density: float) -> None:
        """Advance the bar of the stage."""
        if self._epochs is not None:
            self._epochs.set_postfix_str(
                f"accuracy {100 * accuracy:.2f} %, density {100 * density:.2f} %", refresh=False
            )
            self._epochs.update()

    def end_stage(self) -> None:
        """Keep the bar of the stage."""
        if self._epochs is not None:
            self._epochs.close()
            self._epochs = None

    @contextmanager
    def epoch(self, stage: Stage, first: int, steps: int) -> Generator[Callable[[], Any]]:
        """A bar over the steps of one epoch of `steps` (over those of the whole round while growing).

        `first` is the step of the stage that training goes on with.
        """
        whole = stage.averaged
        name = f"growing, {stage.title}" if whole else f"epoch {first // steps + 1}/{stage.epochs}"
        with tqdm(
            total=steps * stage.epochs if whole else steps,
            initial=first if whole else first % steps,
            desc=name,
            unit="step",
            leave=False,
            position=0 if whole else 1,
            disable=not self.shown,
            file=_stderr(),
        ) as bar:
            self._steps = bar
            yield bar.update
        self._steps = None


def _stderr() -> Any:
    import sys

    return sys.stderr
