"""The page around a report: one HTML document that loads nothing, for screens, phones and paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from growfx.reporting.html.elements import Markup, tag

__all__ = ["page"]

_STYLE: Final = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2127; --soft: #5b6570; --rule: #d9dee3; --plane: #f4f6f8;
  --c0: #1b5e8c; --c1: #c4651a; --c2: #2c7a3f; --c3: #8a1c1c; --c4: #6b4fa0; --c5: #7a5230; --c6: #b13f86;
  --c7: #5f6368; --c8: #8a8500; --c9: #0b8091; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14181c; --text: #e4e8ec; --soft: #9aa5b0;
  --rule: #333b43; --plane: #1d2329; --c0: #6db3e3; --c1: #f0a05a; --c2: #74c98a; --c3: #f08080; --c4: #b9a3ec;
  --c5: #cfa27c; --c6: #ee92c9; --c7: #b0b5ba; --c8: #d6d04f; --c9: #5fd0df; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.3rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 0.3rem; }
p { margin: 0.4rem 0; } .soft { color: var(--soft); }
.notes { border-left: 4px solid var(--c1); background: var(--plane); padding: 0.5rem 0.8rem; margin: 0.8rem 0; }
.notes ul { margin: 0; padding-left: 1.1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0.6rem; }
figure { margin: 0; max-width: 44rem;
  break-inside: avoid; } figcaption { font-weight: 600; }
figure > svg, svg.bar { display: block; width: 100%; }
figure.small figcaption { font-size: 0.72rem; font-weight: 400; line-height: 1.25; }
.wide { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--rule); padding: 0.22rem 0.6rem; text-align: left; vertical-align: top;
  overflow-wrap: normal; }
.sort td { white-space: nowrap; } td.number { text-align: right; } .facts th { font-weight: 400; color: var(--soft); }
.facts td { overflow-wrap: anywhere; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--c0); }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
svg.bar { height: 5px; min-width: 5rem; } .trough { fill: var(--rule); } .fill { fill: var(--c0); }
.plane { fill: var(--plane); } .grid { stroke: var(--rule); } svg text { fill: var(--soft); font-size: 12px; }
text.x { text-anchor: middle; } text.y { text-anchor: end; dominant-baseline: middle; } text.name { fill: var(--text); }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; } .faint { stroke-width: 1.1; stroke-dasharray: 5 3; }
.error, .place { stroke: currentColor; stroke-width: 1.5; } .place { stroke-dasharray: 3 3; stroke-width: 2; }
.mark { fill: currentColor; } .band { fill: currentColor; opacity: 0.15; } .area { fill: currentColor; opacity: 0.8; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; font-size: 0.8rem; color: var(--soft); }
.legend i { display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.35em; background: currentColor; }
details { border-top: 1px solid var(--rule); margin-top: 1rem; } summary { cursor: pointer; font-weight: 600;
  font-size: 1.1rem; padding: 0.5rem 0; }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--text); color: var(--back);
  padding: 0.25rem 0.5rem; font-size: 0.8rem; white-space: pre-line; max-width: 20rem; border-radius: 3px; }
@media screen and (max-width: 40rem) { svg text { font-size: 18px; } .mark { r: 6px; } }
a { color: var(--c0); } #tip[hidden] { display: none; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; }
  * { print-color-adjust: exact; } table { font-size: 7.5pt; } h2, h3 { break-after: avoid; }
  th, td { padding: 0.15rem 0.3rem; } .sort td { white-space: normal; }
  tr { break-inside: avoid; } #tip { display: none; } }
""" + "".join(f".c{i} {{ color: var(--c{i}); }}\n" for i in range(10))

# No `<` and no `&` in it: the page is well-formed XML as well.
_SCRIPT: Final = """
"use strict";
(function () {
  const tip = document.getElementById("tip");
  function show(event) {
    const target = event.target.closest("[data-tip]");
    tip.hidden = !target;
    if (!target) return;
    tip.textContent = target.getAttribute("data-tip");
    const right = window.innerWidth - tip.offsetWidth - 8, lowest = window.innerHeight - tip.offsetHeight - 8;
    tip.style.left = Math.max(8, Math.min(event.clientX + 14, right)) + "px";
    tip.style.top = Math.max(8, Math.min(event.clientY + 14, lowest)) + "px";
  }
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", function () { tip.hidden = true; }, true);
  function order(a, b, sign) {
    if (a.known !== b.known) return a.known ? -1 : 1;
    if (a.key === b.key) return 0;
    return a.key > b.key ? sign : -sign;
  }
  function sort(table, heads, column) {
    const up = heads[column].getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
    heads.forEach(function (head) { head.removeAttribute("aria-sort"); });
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    const numbers = body.querySelector("td:nth-child(" + (column + 1) + ")[data-value]") !== null;
    Array.from(body.rows).map(function (row) {
      const cell = row.cells[column], value = cell.getAttribute("data-value");
      const key = numbers ? Number(value) : cell.textContent;
      return { row: row, known: numbers ? value !== null : true, key: key };
    }).sort(function (a, b) { return order(a, b, up ? 1 : -1); }).forEach(function (entry) { body.append(entry.row); });
  }
  document.querySelectorAll("table.sort").forEach(function (table) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      head.firstElementChild.addEventListener("click", function () { sort(table, heads, column); });
    });
  });
  document.addEventListener("click", function (event) {
    const link = event.target.closest("a[href]");
    if (link) document.getElementById(link.getAttribute("href").slice(1)).open = true;
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (part) { part.open = true; });
  });
}());
"""
# The page may load nothing, whatever a name in it looks like.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, parts: Sequence[Markup]) -> str:
    """Return the document of these parts; it is well-formed XML too."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8" />'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}" />'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1" />'),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    tip = tag("div", id="tip", role="tooltip", hidden="hidden")
    body = tag("body", tag("main", *parts), tip, tag("script", Markup(_SCRIPT)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"
