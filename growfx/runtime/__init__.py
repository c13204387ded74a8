"""Sparse kernels: built on first use, chosen and timed per layer."""
