"""`growfx export`: what a run leaves, in the forms asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growfx.commands.job import reopen
from growfx.deploy.native.export import export_native, native_target
from growfx.deploy.onnx import export_onnx, onnx_target, require_onnx
from growfx.deploy.saving import SmallNetwork, check_options, save, save_small, small_network
from growfx.deploy.web.export import export_web
from growfx.errors import ConfigError
from growfx.masked.graph import MaskedGraph
from growfx.reporting.run import percent, provenance

__all__ = ["Targets", "export_run"]


@dataclass(frozen=True)
class Targets:
    """Where to write what; see `growfx export --help`.

    Raises:
        ConfigError: there is nothing to write, or options without the target that they are about.
    """

    out: Path | None = None
    native: Path | None = None
    web: Path | None = None
    onnx: Path | None = None
    dense: bool = False
    compact: bool = False
    fixed_batch: bool = False

    def __post_init__(self) -> None:
        if all(target is None for target in (self.out, self.native, self.web)):
            raise ConfigError("`growfx export` has nothing to write; give `--out DIR`, `--native DIR` or `--web DIR`")
        about_out = [name for name in ("dense", "compact", "onnx") if getattr(self, name)]
        if self.out is None and about_out:
            raise ConfigError(f"`--{about_out[0]}` goes with `--out DIR`, which is missing")
        if self.fixed_batch and self.onnx is None:
            raise ConfigError("`--fixed-batch` is about the file of `--onnx FILE`, which is missing")

    def check(self) -> None:
        """Refuse targets that cannot be written, before anything is."""
        if self.out is not None:
            check_options(self.out, dense=self.dense, compact=self.compact)
        if self.onnx is not None:
            require_onnx()
            onnx_target(self.onnx)
        if self.native is not None:
            native_target(self.native, "growfx export --native")
        if self.web is not None:
            native_target(self.web, "growfx export --web")


def export_run(run: Path, targets: Targets, *, best: bool = False) -> tuple[dict[str, Any], str]:
    """Write the network of a run's checkpoint; returns the facts and the text to print.

    Raises:
        CheckpointError: no run, or no checkpoint.
        ArtifactError: a target cannot be written.
        UnsupportedOperatorError: `native` or `web` has no kernel for an operator; nothing is written.
        ConfigError: `web` is for a network that takes images and gives classes.
    """
    targets.check()
    net, folder = reopen(run, best=best)
    # The result's figures are those of the last epoch, not of the best one.
    origin = provenance(folder, None if best else folder.read_json("result.json"))
    facts: dict[str, Any] = {}
    lines: list[str] = []
    # First what may be refused; a page more often than a program.
    if targets.web is not None:
        web = export_web(net, targets.web, provenance=origin)
        facts["web"] = web.to_json()
        lines.append(str(web))
    if targets.native is not None:
        native = export_native(net, targets.native)
        facts["native"] = native.to_json()
        lines.append(str(native))
    small = small_network(net) if targets.compact else None
    if targets.onnx is not None:
        export_onnx(net if small is None else small.net, targets.onnx, batch=not targets.fixed_batch)
    if targets.out is not None:
        written, text = _write_artifact(net, small, targets.out, origin, dense=targets.dense)
        facts |= written
        lines.insert(0, text)
    return facts, "\n".join(lines)


def _write_artifact(
    net: MaskedGraph, small: SmallNetwork | None, out: Path, origin: Mapping[str, Any], *, dense: bool
) -> tuple[dict[str, Any], str]:
    if small is None:
        info = save(net, out, dense=dense, provenance=origin)
    else:
        info = save_small(net, small, out, provenance=origin)
    facts = {
        "path": str(out),
        "nnz": info.nnz,
        "numel": info.numel,
        "density": info.density,
        "bytes": info.bytes,
        **({} if small is None else {"compaction": small.to_json()}),
    }
    line = f"{out}: density {percent(info.density)}, {info.nnz:,} active weights, {info.bytes:,} bytes"
    return facts, line if small is None else f"{small}\n{line}"
