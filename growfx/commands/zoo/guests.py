"""The guests of the zoo: models of packages other than timm and torchvision, where those are installed.

A guest's name is `guests/PACKAGE/MODEL`. Packages are imported when a model is built, never before.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

from growfx.commands.zoo import guests_language as zoo_guests_language
from growfx.commands.zoo import guests_science as zoo_guests_science
from growfx.commands.zoo import guests_vision as zoo_guests_vision
from growfx.commands.zoo.guest import Package
from growfx.errors import ConfigError

__all__ = ["GUESTS", "go_offline", "guest", "guest_names", "guest_versions", "is_guest", "missing_packages", "packages"]

GUESTS: Final = "guests"  # their library, and what their names begin with
_PREFIX = f"{GUESTS}/"
_TABLES = (zoo_guests_vision.PACKAGES, zoo_guests_language.PACKAGES, zoo_guests_science.PACKAGES)
# Read when a package is imported: no model hub is asked, no package installs another.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
}


def packages() -> Sequence[Package]:
    """All packages of the tables, installed or not, in order of their names."""
    return sorted((p for table in _TABLES for p in table), key=lambda package: package.module)


def guest_names(pattern: str = "*") -> list[str]:
    """Names of the models of installed packages that a glob pattern, with or without `guests/`, matches."""
    names = [f"{_PREFIX}{p.module}/{name}" for p in packages() if p.installed for name in p.models]
    return sorted(n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.removeprefix(_PREFIX), pattern))


def is_guest(spec: str) -> bool:
    """Whether a name is `guests/PACKAGE/MODEL`."""
    return spec.startswith(_PREFIX)


def guest(spec: str) -> tuple[Package, str]:
    """The package of the model that `spec` (`guests/PACKAGE/MODEL`) names, and the model's name in it.

    Raises:
        ConfigError: no table has a model of that name.
    """
    module, _, name = spec.removeprefix(_PREFIX).partition("/")
    for package in packages():
        if package.module == module and name in package.models:
            return package, name
    raise ConfigError(f"`{spec}` is not a guest of the zoo; `growfx zoo --library guests` checks those there are")


def guest_versions() -> dict[str, str]:
    """Distribution -> version of the installed packages, "unknown" where nothing tells."""
    return {p.distribution: _version(p.distribution) for p in packages() if p.installed}


def missing_packages() -> list[str]:
    """Names by which to install the packages of the tables that are not installed."""
    return [p.distribution for p in packages() if not p.installed]


def go_offline() -> None:
    """Tell packages that are imported from now on, here and in child processes, to download nothing."""
    for name, value in _OFFLINE.items():
        os.environ.setdefault(name, value)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
