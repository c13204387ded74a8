"""Data sets by name, their loaders and the batches of an epoch."""
