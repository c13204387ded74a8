"""The tables of `growfx zoo`: coverage by library and family, exceptions with their causes, the operators met."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from growfx.commands.zoo.facts import CHECKS, Facts
from growfx.commands.zoo.native import NOT_EXPORTED

__all__ = ["census", "census_text", "coverage_text", "summary_markdown"]

_EXAMPLES = 3
# Column -> the checks it is made of.
_COLUMNS = {
    "net(x)": ("eval", "batch 3", "train", "other size", "gradients", "untouched"),
    "recorded": ("recorded",),
    "faithful": ("graph eval", "graph train"),
    "paths": ("paths", "extreme paths", "path rules"),
    "growth": ("growth",),
    "artifact": ("artifact",),
}


def coverage_text(results: Sequence[Facts]) -> str:
    """All there is to say of the results: families, totals, exceptions, and what did not apply."""
    from tabulate import tabulate

    rows = _rows(results)
    parts = [tabulate(rows, headers="keys", stralign="right", disable_numparse=True)]
    problems = [(f.model, check, why) for f in results for check, why in f.problems.items()]
    if problems:
        parts.append(tabulate(problems, headers=["model", "check", "cause"]))
    else:
        parts.append("no exceptions")
    parts += [text for text in (_left_out(results), _not_applicable(results)) if text]
    return "\n\n".join(parts)


def summary_markdown(results: Sequence[Facts]) -> str:
    """The table by library and family in Markdown, and the exceptions as a list."""
    from tabulate import tabulate

    lines = [tabulate(_rows(results), headers="keys", tablefmt="github", stralign="right", disable_numparse=True)]
    problems = [f"* `{f.model}`, {check}: {why}" for f in results for check, why in f.problems.items()]
    return "\n\n".join([*lines, "\n".join(problems) or "No exceptions."])


def census(results: Iterable[Facts]) -> dict[str, int]:
    """Operator -> number of models whose evaluation graph holds it; modules, methods, functions, frequent first."""
    counts = Counter(operator for facts in results for operator in facts.operators)
    order = {"module": 0, "method": 1, "function": 2}
    return dict(sorted(counts.items(), key=lambda item: (order[item[0].split()[0]], -item[1], item[0])))


def census_text(results: Sequence[Facts]) -> str:
    """The census as text, with examples of rare operators."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for operator, count in census(results).items():
        kind, _, name = operator.partition(" ")
        models = [f.model for f in results if operator in f.operators]
        kinds[kind].append(f"{name} {count}{f' ({models[0]})' if count < _EXAMPLES else ''}")
    parts = [f"{kind}s ({len(entries)} kinds): {'; '.join(entries)}" for kind, entries in kinds.items()]
    return "\n\n".join(parts)


def _rows(results: Sequence[Facts]) -> list[dict[str, str]]:
    """One row a family, and one of totals for each library and, when there are several, for all."""
    groups: dict[tuple[str, str], list[Facts]] = defaultdict(list)
    for facts in results:
        groups[(facts.library, facts.family)].append(facts)
    libraries = sorted({facts.library for facts in results})
    rows = [_row(library, family, group) for (library, family), group in sorted(groups.items())]
    rows += [_row(name, "total", [f for f in results if f.library == name]) for name in libraries]
    return rows if len(libraries) < 2 else [*rows, _row("all", "total", results)]


def _row(library: str, family: str, group: Sequence[Facts]) -> dict[str, str]:
    layers = [f.layers for f in group if f.layers]
    wraps = [f.seconds["wrap"] for f in group if "wrap" in f.seconds]
    dead, units = (sum(f.dead_units[i] for f in group if f.dead_units) for i in (0, 1))
    slowest = max(group, key=lambda f: f.seconds.get("whole", 0.0))
    return {
        "library": library,
        "family": family or "(unknown)",
        "models": str(len(group)),
        "meta": str(sum(f.device == "meta" for f in group)),
        "masked layers": f"{sum(entry['masked'] for entry in layers):,}",
        "missed": str(sum(len(f.missed) for f in group)),
        "off path": str(sum(len(entry.get("off_path", {})) for entry in layers)),
        **{name: _share(group, checks) for name, checks in _COLUMNS.items()},
        "native": _native_share(group),
        "dead units": f"{dead / units:.1%}" if units else "-",
        "median wrap": f"{statistics.median(wraps):.2f} s" if wraps else "-",
        "slowest": f"{slowest.seconds.get('whole', 0.0):.0f} s {slowest.model.rpartition('/')[2]}",
    }


def _share(group: Sequence[Facts], checks: tuple[str, ...]) -> str:
    """How many models passed of those the checks apply to; "-" where they apply to none.

    A check that was not reached is not passed, unless it needs the values that a model was checked without.
    """
    verdicts = [facts.verdict(*checks) for facts in group if facts.device != "meta" or facts.verdict(*checks)]
    applies = [v for v in verdicts if not v.startswith("n/a")]
    passed = sum(v == "yes" for v in applies)
    return f"{passed}/{len(applies)}" if applies else "-"


def _native_share(group: Sequence[Facts]) -> str:
    """The same for the native runtime, of which a network that it refuses is one that it does not run."""
    verdicts = [facts.verdict("native") for facts in group if facts.device != "meta"]
    applies = [v for v in verdicts if v and (not v.startswith("n/a") or v.startswith(NOT_EXPORTED))]
    return f"{sum(v == 'yes' for v in applies)}/{len(applies)}" if applies else "-"


def _left_out(results: Sequence[Facts]) -> str:
    """Layers without a mask, modules left whole, and layers off path, by reason."""
    from tabulate import tabulate

    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for facts in results:
        for kind in ("unmasked", "opaque", "off_path"):
            for layer, reason in facts.layers.get(kind, {}).items():
                found[(kind.replace("_", " "), reason.split(", at ")[0])].append((facts.model, layer or "(the model)"))
    rows = [
        (kind, reason, len(places), len({m for m, _ in places}), "{}: {}".format(*places[0]))
        for (kind, reason), places in sorted(found.items())
    ]
    return tabulate(rows, headers=["left out", "reason", "layers", "models", "for example"]) if rows else ""


def _not_applicable(results: Sequence[Facts]) -> str:
    """Checks that a model gave nothing to check for, by reason."""
    from tabulate import tabulate

    found: dict[tuple[int, str], list[str]] = defaultdict(list)
    for facts in results:
        for check, verdict in facts.checks.items():
            if verdict.startswith("n/a: "):
                # What follows the first colon is the model's own wording, which differs from one to the next.
                reason = verdict.removeprefix("n/a: ")
                reason = reason if check == "native" else reason.split(": ")[0]
                found[(CHECKS.index(check), reason)].append(facts.model)
    rows = [(CHECKS[check], reason, len(models), models[0]) for (check, reason), models in sorted(found.items())]
    return tabulate(rows, headers=["not applicable", "reason", "models", "for example"]) if rows else ""
