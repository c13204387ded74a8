"""The result of a training run (the contents of `result.json`)."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """The result of a training run; `result.json` holds the same fields. Accuracies are fractions in [0, 1].

    Attributes:
        dense_equivalent_epochs: training FLOPs the sparse network needs over those of one dense epoch.
        epochs: all epochs run, growth included; `steps` the optimizer steps in them.
        test_accuracy: None without a test loader.
        kernels: `asked` for ("auto", "dense" or "sparse"), the number of layers that took `sparse` and `dense` ones in
            their last call, and `layers`, name -> kernel.
        train_seconds, train_cpu_seconds: wall time and processor time (summed over threads) of training, without
            validation, over all resumes; results are compared without them.
        eval_seconds: wall time of validation and test.
        trace: one `{round, density, nnz, val_accuracy, fit}` a growth round.
        weights_from: `kind`, `name` and `sha256` of the weights the run started from; None for initial ones.
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
    kernels: dict[str, Any] = field(compare=False)
    train_seconds: float = field(compare=False)
    train_cpu_seconds: float = field(compare=False)
    eval_seconds: float = field(compare=False)
    weights_from: dict[str, Any] | None = None
