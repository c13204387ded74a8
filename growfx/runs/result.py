"""The result of a training run (the contents of `result.json`)."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """The result of a training run; `result.json` holds the same fields. Accuracies are fractions in [0, 1].

    Attributes:
        dense_equivalent_epochs: training FLOPs the sparse network needs over those of one dense epoch.
        epochs: all epochs run, growth included; `steps` the optimizer steps in them.
        test_accuracy: None without a test loader.
        trace: one `{round, density, nnz, val_accuracy, fit}` a growth round.
    """

    method: str
    model: str
    density: float
    nnz: int
    numel: int
    mask_digest: str
    val_accuracy: float
    test_accuracy: float | None
    dense_equivalent_epochs: float
    epochs: int
    steps: int
    stop_reason: str
    trace: list[dict[str, Any]]
