"""The exception classes of growfx, in one tree.

    GrowfxError
    ├── TraceError                  a model that cannot be recorded
    │   └── UnsupportedOperatorError    an operator without a path rule
    ├── MaskError                   a mask of the wrong name, shape or dtype; ranks that differ
    ├── CheckpointError             a checkpoint or run folder that cannot be continued
    ├── ArtifactError               an artifact that is damaged, newer, or of another model
    ├── DataError                   an empty, corrupt or missing data set
    └── ConfigError                 an option out of its range, or options that exclude each other

A message says what was expected, what was given and what to do, with names in backticks. A condition that is not an
error but affects the result is a `GrowfxWarning` (see `growfx.notices`).
"""

import difflib
from collections.abc import Iterable

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
    "did_you_mean",
    "one_line",
]


class GrowfxError(Exception):
    """Base class of the errors that a caller can cause.

    >>> try:
    ...     growfx.create_model("resnet18", depth=-1)
    ... except growfx.GrowfxError as error:
    ...     print(type(error).__name__)
    ConfigError
    """


class TraceError(GrowfxError):
    """A model could not be recorded; names the module, the operator and the source line.

    >>> class Broken(torch.nn.Module):
    ...     def forward(self, x):
    ...         return self.missing(x)
    >>> try:
    ...     growfx.wrap(Broken(), torch.randn(1, 4))
    ... except growfx.TraceError as error:
    ...     print("missing" in str(error))
    True
    """


class UnsupportedOperatorError(TraceError):
    """An operator on a path has no path rule; names node, operator and source line.

    >>> class Products(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc = torch.nn.Linear(4, 4)
    ...     def forward(self, x):
    ...         return torch.cumprod(self.fc(x), 1)
    >>> try:
    ...     growfx.path_products(growfx.wrap(Products(), torch.randn(1, 4)))
    ... except growfx.UnsupportedOperatorError as error:
    ...     print("cumprod" in str(error))
    True
    """


class MaskError(GrowfxError):
    """A mask has an unknown layer name, a wrong shape or a wrong dtype, or masks differ between ranks.

    >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4))
    >>> try:
    ...     net.set_masks({"0": torch.ones(3, 4, dtype=torch.bool)})
    ... except growfx.MaskError as error:
    ...     print("(2, 4)" in str(error))
    True
    """


class CheckpointError(GrowfxError):
    """A checkpoint or run folder is damaged, of another model, or of other options.

    >>> method = growfx.methods.create("static", density=0.5)
    >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4))
    >>> method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=10, steps_per_epoch=5)
    >>> try:
    ...     method.load_state_dict({"method": "rigl"})
    ... except growfx.CheckpointError as error:
    ...     print(error)
    the state is of method `rigl`, not `static`
    """


class ArtifactError(GrowfxError):
    """An artifact is damaged, written by a newer version, or does not fit the model.

    >>> try:
    ...     growfx.load("nowhere")
    ... except growfx.ArtifactError as error:
    ...     print("nowhere" in str(error))
    True
    """


class DataError(GrowfxError):
    """A data set is missing, empty or corrupt.

    >>> from growfx.data.sources import open_data
    >>> from growfx.options import DataOptions
    >>> try:
    ...     open_data("nowhere", DataOptions())
    ... except growfx.DataError as error:
    ...     print("nowhere" in str(error))
    True
    """


class ConfigError(GrowfxError):
    """An option is out of its range, unknown, or excluded by another one.

    >>> try:
    ...     growfx.methods.create("rigl", density=2)
    ... except growfx.ConfigError as error:
    ...     print("density" in str(error))
    True
    """


class GrowfxWarning(UserWarning):
    """A condition that is not an error but affects the result; the returned object carries its text too.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", growfx.GrowfxWarning)  # make an error of what must be known
    ...     net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4))
    """


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean `NAME`?" with the known name nearest to `name`, or "" when none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def one_line(error: BaseException) -> str:
    """Return class and text of an error in one line.

    One raised in a loading process carries that process's traceback before its own text, which is left out.
    """
    kind, text = type(error).__name__, str(error)
    if "Traceback" in text:
        text = text.rpartition(f"{kind}: ")[2]
    return f"{kind}: {' '.join(text.split())}"
