"""Compare the outputs of a changed model with those of the model it was made of."""

from growfx.passes.trials.comparison import Trial, difference, example_of, trials_of, with_rows, working_copy

__all__ = ["Trial", "difference", "example_of", "trials_of", "with_rows", "working_copy"]
