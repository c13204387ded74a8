"""Compare the outputs of a changed model with those of the model it was made of."""

from growfx.passes.trials.comparison import Trial, difference, example_of, trials_of, with_rows, working_copy
from growfx.passes.trials.result import PassResult

__all__ = ["PassResult", "Trial", "difference", "example_of", "trials_of", "with_rows", "working_copy"]
