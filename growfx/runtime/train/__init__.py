"""Sparse kernels for training: built on first use, chosen for each layer from a table of times."""

from growfx.runtime.train.network import choices_of, dense_meanwhile, kernels_taken, take_choices
from growfx.runtime.train.report import KernelReport
from growfx.runtime.train.switch import use_kernels

__all__ = ["KernelReport", "choices_of", "dense_meanwhile", "kernels_taken", "take_choices", "use_kernels"]
