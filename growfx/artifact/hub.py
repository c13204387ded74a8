"""Find artifacts by name: `hf-hub:USER/NAME`, as timm spells it, or `hf-hub:USER/NAME@REVISION`; `growfx:NAME`.

From the Hugging Face Hub are fetched `config.json` and the one weights file it names, at one commit; nothing of them is
run. `huggingface_hub` keeps them in its own cache and gives them from there when the Hub cannot be reached.
"""

import glob
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growfx.artifact.folder import CONFIG, is_plain_name, read_config
from growfx.errors import ArtifactError, did_you_mean
from growfx.file_paths import as_path

__all__ = ["HUB_PREFIX", "INCLUDED_PREFIX", "included_names", "local_path"]

HUB_PREFIX = "hf-hub:"
INCLUDED_PREFIX = "growfx:"
_INCLUDED = Path(__file__).with_name("included-networks")  # a name that no package can have

_SPEC = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def local_path(path: str | Path) -> Path:
    """`path` itself, the folder into which a `hf-hub:` artifact was fetched, or that of a `growfx:` one.

    Raises:
        ArtifactError: no network of that name comes with growfx; no spec of the Hub, no such repository or revision,
            no artifact in it, or the Hub cannot be reached and the artifact is not in the cache.
    """
    place = as_path(path, "an artifact", ArtifactError)
    text = place.as_posix()
    if text.startswith(INCLUDED_PREFIX):
        return _included(text.removeprefix(INCLUDED_PREFIX))
    if not text.startswith(HUB_PREFIX):
        return place
    spec = _SPEC.fullmatch(text.removeprefix(HUB_PREFIX))
    if spec is None or ".." in text:
        raise ArtifactError("it names no Hub model; expected `hf-hub:USER/NAME` or `hf-hub:USER/NAME@REVISION`")
    name, revision = spec["name"], spec["revision"]
    with _explained(name):
        folder = _fetch(name, revision, CONFIG)
        weights = read_config(folder)["growfx"].get("weights")
        if not is_plain_name(weights):
            raise ArtifactError(f"its `{CONFIG}` names the weights file `{weights}`; only a plain file name is allowed")
        # The folder's name is the commit: both files are of one version, whoever pushes in between.
        return _fetch(name, folder.name, weights)


def included_names() -> list[str]:
    """Return the names of the networks that come with growfx, as `growfx:NAME` takes them.

    >>> "digits-resnet10t-grown" in included_names()
    True
    """
    return sorted(folder.name for folder in _INCLUDED.iterdir() if (folder / CONFIG).is_file())


def _included(name: str) -> Path:
    names = included_names()
    if name not in names:
        listed = ", ".join(f"`{INCLUDED_PREFIX}{known}`" for known in names)
        raise ArtifactError(f"no network `{name}` comes with growfx; allowed: {listed}{did_you_mean(name, names)}")
    return _INCLUDED / name


def _fetch(name: str, revision: str | None, file: str) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file)]))


@contextmanager
def _explained(name: str) -> Generator[None]:
    """Turn an error of huggingface_hub into an `ArtifactError` that says what to do."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise ArtifactError("the Hub needs `huggingface_hub`: pip install huggingface_hub") from error
    # The HTTP client's own error and OSError; the client differs between releases of huggingface_hub.
    transport: Any = errors.HfHubHTTPError.__bases__
    try:
        yield
    except ArtifactError:
        raise
    except errors.GatedRepoError as error:
        raise ArtifactError(f"`{name}` is gated: ask for access on its page, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ArtifactError(
            f"the Hub knows no model `{name}`, or it is private: check the name, or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ArtifactError(f"`{name}` has no such revision; allowed: a branch, a tag or a full commit hash") from error
    except errors.LocalEntryNotFoundError as error:
        raise ArtifactError(
            f"`{name}` is not in the local cache and the Hub cannot be reached: connect (or unset HF_HUB_OFFLINE), or "
            "copy its folder here and give that path"
        ) from error
    except (ValueError, *transport) as error:
        raise ArtifactError(f"`{name}` cannot be fetched ({type(error).__name__}: {error})") from error
