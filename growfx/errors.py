"""Every error a caller can cause, in one tree.

    GrowfxError
    ├── TraceError                  a model that cannot be recorded
    │   └── UnsupportedOperatorError    an operator without a path rule
    ├── MaskError                   a mask of the wrong name, shape or dtype; ranks that differ
    ├── CheckpointError             a checkpoint or run folder that cannot be continued
    ├── ArtifactError               an artifact that is damaged, newer, or of another model
    ├── DataError                   an empty, corrupt or missing data set
    └── ConfigError                 an option out of its range, or options that exclude each other

A message says what arrived, what is allowed and what to do; names stand in backticks. What is not an error but must
be known is a `GrowfxWarning` (see `growfx.notices`).
"""

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GrowfxError",
    "GrowfxWarning",
    "MaskError",
    "TraceError",
    "UnsupportedOperatorError",
    "one_line",
]


class GrowfxError(Exception):
    """Base of all errors that a caller can cause."""


class TraceError(GrowfxError):
    """A model could not be recorded; names the module, the operator and the source line."""


class UnsupportedOperatorError(TraceError):
    """An operator on a path has no path rule; names node, operator and source line."""


class MaskError(GrowfxError):
    """A mask has an unknown layer name, a wrong shape or a wrong dtype, or masks differ between ranks."""


class CheckpointError(GrowfxError):
    """A checkpoint or run folder is damaged, of another model, or of other options."""


class ArtifactError(GrowfxError):
    """An artifact is damaged, written by a newer version, or does not fit the model."""


class DataError(GrowfxError):
    """A data set is missing, empty or corrupt."""


class ConfigError(GrowfxError):
    """An option is out of its range, unknown, or excluded by another one."""


class GrowfxWarning(UserWarning):
    """What is not an error but must be known: it also stands on the object that was returned."""


def one_line(error: BaseException) -> str:
    """Return kind and text of an error without line breaks.

    One raised in a loading process carries that process's traceback before its own text, which is left out.
    """
    kind, text = type(error).__name__, str(error)
    if "Traceback" in text:
        text = text.rpartition(f"{kind}: ")[2]
    return f"{kind}: {' '.join(text.split())}"
