"""The report of runs: one HTML file that holds every figure, loads nothing, and shows what can be read."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import growfx
from growfx.cli import main
from growfx.errors import GrowfxWarning
from growfx.reporting.html.charts import Axis, Series, chart, thinned
from growfx.reporting.html.elements import Markup, tag
from growfx.reporting.html.paths import network_paths

VOID = {"meta"}


def words(seed: int = 0) -> DataLoader:
    """Two classes that a linear layer tells apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long()), batch_size=16)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2))


def train_into(path: Path, name: str, **options: Any) -> Path:
    net = growfx.wrap(small_net(), torch.randn(1, 8))
    method = growfx.methods.create(name, **options)
    growfx.train(net, words(), words(1), method=method, epochs=2, lr=0.1, out=path, progress=False)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A grown network and a static one, trained once; tests that change a run copy it."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("runs")
    grown = {"seed_density": 0.1, "epochs_per_round": 1, "growth_rounds": "published", "max_density": 0.7}
    return {
        "grown": train_into(place / "grown", "pwmpr", **grown),
        "static": train_into(place / "static", "static", density=0.4),
    }


class Page(HTMLParser):
    """What a browser would make of a page: its text, its attributes, and whether every element is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.tips = [a["data-tip"] or "" for _, a in self.elements if "data-tip" in a]
        self.classes = [c for _, a in self.elements for c in (a.get("class") or "").split()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += " " if self.open[-1:] in (["script"], ["style"]) else f"{data} "


def reported(paths: Any, out: Path, *, warns: str | None = None) -> Page:
    if warns is None:
        growfx.report(paths, out)
    else:
        with pytest.warns(GrowfxWarning, match=warns):
            growfx.report(paths, out)
    return Page(out)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def numbers(value: Any) -> Iterator[float]:
    """Every number in nested lists and dictionaries, but the parts of fits and cohorts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("fit", "cohorts"):
                yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def forms(value: float) -> set[str]:
    """The ways in which a page may write a number."""
    return {f"{100 * value:.2f} %", f"{value:,.0f}", f"{value:,.1f}", f"{value:.4g}", f"{value:,.4g}"}


def test_the_page_of_a_run_is_well_formed_html_and_xml(runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(runs["grown"], tmp_path / "r.html")
    root = ElementTree.fromstring(page.source.removeprefix("<!DOCTYPE html>"))
    assert len(root.findall(".//svg")) == page.source.count("<svg ") > 10
    places = [float(v) for circle in root.iter("circle") for v in (circle.get("cx", ""), circle.get("cy", ""))]
    assert places
    assert min(places) >= 0
    assert max(places) <= 640


def test_the_page_loads_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(list(runs.values()), tmp_path / "r.html")
    assert not re.findall(r"https?:|url\(|@import|//cdn", page.source)
    loading = {"src", "srcset", "data", "action", "poster", "xlink:href"}
    assert not [a for _, a in page.elements if loading & set(a)]
    assert {name for name, _ in page.elements} & {"link", "iframe", "img", "object", "embed"} == set()
    assert all((a["href"] or "").startswith("#") for _, a in page.elements if "href" in a)
    assert any("default-src 'none'" in (a.get("content") or "") for name, a in page.elements if name == "meta")


@pytest.mark.parametrize("name", ["grown", "static"])
def test_every_figure_of_the_result_is_on_the_page(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(runs[name], tmp_path / "r.html")
    result = json.loads((runs[name] / "result.json").read_text())
    missing = [v for v in numbers({**result, "trace": []}) if not any(form in page.text for form in forms(v))]
    assert missing == []
    assert result["mask_digest"] in page.text
    assert result["stop_reason"] in page.text
    assert all(layer in page.text and kernel in page.text for layer, kernel in result["kernels"]["layers"].items())


def test_every_epoch_and_every_round_can_be_pointed_at(runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(runs["grown"], tmp_path / "r.html")
    log = [json.loads(line) for line in (runs["grown"] / "log.jsonl").read_text().splitlines()]
    rounds, epochs = ([r for r in log if r["event"] == event] for event in ("round", "epoch"))
    assert len(rounds) > 3
    for r in rounds:
        told = [tip for tip in page.tips if tip.startswith(f"round {r['round']}\n")]
        assert any(f"{100 * r['density']:.2f} %" in tip and f"{100 * r['val_accuracy']:.2f} %" in tip for tip in told)
        for layer, density in r["layer_density"].items():
            assert any(
                tip.startswith(layer) and f"round {r['round']}: {100 * density:.2f} %" in tip for tip in page.tips
            )
    for r in epochs:
        assert f"epoch {r['epoch']}\nTraining loss: {r['train_loss']:.5g}" in page.tips


def test_the_growth_chart_has_fit_band_stop_and_operating_round(runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(runs["grown"], tmp_path / "r.html")
    result = json.loads((runs["grown"] / "result.json").read_text())
    fit = next(entry["fit"] for entry in reversed(result["trace"]) if entry["fit"])
    assert f"fit: {fit['curve']}, 95 % band" in page.text
    assert "band" in page.classes
    assert any(tip.startswith(f"stop: {result['stop_reason']}") for tip in page.tips)
    assert any(tip.startswith(f"operating round {fit['operating_round']}") for tip in page.tips)
    for family, kept in fit["curves"].items():
        assert (f"{family}, weight {100 * kept['weight']:.2f} %" in page.text) == (kept["weight"] >= 0.05)


def test_edges_by_birth_add_up_to_the_active_ones(runs: dict[str, Path], tmp_path: Path) -> None:
    trace = json.loads((runs["grown"] / "result.json").read_text())["trace"]
    assert all(sum(cohort["edges"] for cohort in entry["cohorts"]) == entry["nnz"] for entry in trace)
    page = reported(runs["grown"], tmp_path / "r.html")
    born = [tip for tip in page.tips if tip.startswith("born in round")]
    assert 2 <= len(born) <= min(len(trace), 10)


def test_all_path_mass_goes_through_every_layer_of_a_chain() -> None:
    net = growfx.wrap(small_net(), torch.randn(1, 8), density=0.5)
    masses = [layer.mass for layer in network_paths(net).values()]
    assert masses == pytest.approx([1.0, 1.0])


def test_path_mass_of_parallel_branches_is_that_of_their_products() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    net = growfx.wrap(Branches(), torch.randn(1, 3))
    sizes = {name: layer.weight.detach().abs().sum().item() for name, layer in net.layers.items()}
    found = network_paths(net)
    assert {name: layer.mass for name, layer in found.items()} == pytest.approx(
        {name: size / sum(sizes.values()) for name, size in sizes.items()}, rel=1e-6
    )


def test_units_without_a_path_are_dead_and_a_network_without_paths_has_no_mass() -> None:
    net = growfx.wrap(small_net(), torch.randn(1, 8))
    mask = torch.ones(12, 8, dtype=torch.bool)
    mask[:5] = False
    net.set_masks({"0": mask})
    assert network_paths(net)["0"].alive_out == (7, 12)
    net.set_masks({"0": torch.zeros(12, 8, dtype=torch.bool)})
    assert {layer.mass for layer in network_paths(net).values()} == {None}


def test_a_model_that_cannot_be_built_here_is_said_and_the_rest_shown(runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(runs["static"], tmp_path / "r.html")  # an own class, which no recipe builds
    assert "path mass and alive units are not known: ArtifactError" in page.text
    assert "Final density of each layer" in page.text


def test_a_run_of_a_named_model_has_path_mass_and_alive_units(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", "test_resnet", "--data", "digits", "--method", "static", "--density", "0.2", "--epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--set", "img_size=16", "--set", "kernels=dense", "--quiet", "--out", str(out)])
    assert not ended.value.code
    page = reported(out, tmp_path / "r.html")
    assert "not known" not in page.text
    assert any(re.fullmatch(r"conv1\.0\npath mass \d+\.\d\d %", tip) for tip in page.tips)
    facts = json.loads((out / "config.json").read_text())
    assert facts["data"]["fingerprint"] in page.text
    assert "test_resnet(num_classes=10), of timm" in page.text
    assert "1x3x16x16 F32" in page.text


def test_several_runs_are_in_one_table_with_every_figure(runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(list(runs.values()), tmp_path / "r.html")
    for name, path in runs.items():
        result = json.loads((path / "result.json").read_text())
        assert sum(tip.startswith(f"{name}\n{result['method']}\n") for tip in page.tips) == 3
        for key in ("density", "val_accuracy"):
            assert f"{100 * result[key]:.2f} %" in page.text
        assert f"{result['dense_equivalent_epochs']:.2f}" in page.text
        assert f"{result['train_seconds']:,.1f}" in page.text
    assert "different data" not in page.text


def test_sorting_keys_are_numbers_and_each_head_is_a_button(runs: dict[str, Path], tmp_path: Path) -> None:
    page = reported(list(runs.values()), tmp_path / "r.html")
    root = ElementTree.fromstring(page.source.removeprefix("<!DOCTYPE html>"))
    tables = [table for table in root.iter("table") if table.get("class") == "sort"]
    assert tables
    for table in tables:
        heads = table.findall("thead/tr/th")
        assert all(head.find("button") is not None for head in heads)
        assert {len(row.findall("td")) for row in table.findall("tbody/tr")} <= {len(heads)}
        for cell in table.iter("td"):
            assert cell.get("data-value") is None or float(cell.get("data-value", "")) is not None


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLICKS = """<script>
const head = Array.from(document.querySelectorAll("table.sort")[0].tHead.rows[0].cells);
const body = document.querySelectorAll("table.sort")[0].tBodies[0], seen = [];
const click = cell => {
  cell.firstElementChild.click();
  seen.push(Array.from(body.rows, row => row.cells[0].textContent));
};
const density = head.find(cell => cell.textContent === "density");
[density, density, head[0], head[0]].forEach(click);
document.querySelector("circle[data-tip]").dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
const tip = document.getElementById("tip");
body.querySelector("a").click();
const open = Array.from(document.querySelectorAll("details[id]"), part => part.open);
const note = document.createElement("pre");
note.textContent = JSON.stringify({seen: seen, tip: tip.textContent, hidden: tip.hidden, open: open});
note.id = "seen"; document.body.append(note);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser_tables_sort_points_tell_and_the_console_is_empty(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    growfx.report(list(runs.values()), out)
    out.write_text(out.read_text().replace("</body>", f"{CLICKS}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/p"]
    shown = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", out.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert "CONSOLE" not in shown.stderr
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout)
    assert found
    seen = json.loads(html.unescape(found.group(1)))
    densities = {name: json.loads((path / "result.json").read_text())["density"] for name, path in runs.items()}
    upward = sorted(densities, key=densities.__getitem__)
    assert len(set(densities.values())) == 2
    assert seen["seen"] == [upward, upward[::-1], sorted(runs), sorted(runs)[::-1]]
    assert not seen["hidden"]
    assert sum(seen["open"]) == 1  # the run whose link was clicked
    assert seen["tip"].startswith(("grown\n", "static\n"))


def test_lines_join_the_means_of_seeds_whatever_their_times(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for name, density, seconds, accuracy in (("a", 0.1, 9, 0.5), ("b", 0.4, 1, 0.9), ("c", 0.1, 1, 0.7)):
        run = copied(runs["static"], tmp_path / name)
        result = json.loads((run / "result.json").read_text())
        result |= {"density": density, "train_seconds": seconds, "val_accuracy": accuracy, "test_accuracy": None}
        (run / "result.json").write_text(json.dumps(result))
        folders.append(run)
    page = reported(folders, tmp_path / "r.html")
    root = ElementTree.fromstring(page.source.removeprefix("<!DOCTYPE html>"))
    figure = next(f for f in root.iter("figure") if f.findtext("figcaption") == "Accuracy over seconds of training")
    y = {(c.get("data-tip") or "")[0]: float(c.get("cy", "")) for c in figure.iter("circle")}
    (line,) = (path for path in figure.iter("path") if "line" in (path.get("class") or ""))
    ends = [float(v) for v in re.findall(r"[\d.]+", line.get("d") or "")]
    assert ends[1::2] == pytest.approx([(y["a"] + y["c"]) / 2, y["b"]], abs=0.2)


def test_the_folder_of_a_comparison_stands_for_its_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "compared" / "runs").mkdir(parents=True)
    (tmp_path / "compared" / "config.json").write_text('{"format": "growfx comparison 1"}')
    inside = [copied(path, tmp_path / "compared" / "runs" / name) for name, path in runs.items()]
    made = growfx.report([tmp_path / "compared", inside[0]], tmp_path / "r.html")
    assert sorted(made.runs) == sorted(inside)


def test_runs_of_different_data_are_said_on_the_page(runs: dict[str, Path], tmp_path: Path) -> None:
    both = [copied(runs["static"], tmp_path / name) for name in ("a", "b")]
    for run, spec in zip(both, ("digits", "torch/cifar10"), strict=True):
        config = json.loads((run / "config.json").read_text())
        config["data"] = {"spec": spec, "fingerprint": spec, "classes": ["0", "1"]}
        (run / "config.json").write_text(json.dumps(config))
    page = reported(both, tmp_path / "r.html", warns="different data.*digits.*cifar10")
    assert "digits (`a`)" in page.text
    assert "torch/cifar10 (`b`)" in page.text


EVIL = "<script>alert(1)</script>&\"'\x1b</td>"


def test_names_and_paths_are_escaped(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["static"], tmp_path / EVIL.replace("/", "|").replace("\x1b", ""))
    for file in ("config.json", "result.json"):
        facts = json.loads((run / file).read_text())
        facts.update(model={"name": EVIL} if file == "config.json" else EVIL, method=EVIL, stop_reason=EVIL)
        facts[EVIL] = EVIL
        (run / file).write_text(json.dumps(facts))
    out = tmp_path / "r.html"
    growfx.report([run, runs["static"]], out)
    page = Page(out)
    ElementTree.fromstring(page.source.removeprefix("<!DOCTYPE html>"))
    assert page.source.count("<script>") == 1
    assert "alert(1)" in page.text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_an_undecodable_file_name_is_written(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["static"], tmp_path / os.fsdecode(b"run\xff"))
    assert "run\ufffd" in reported(run, tmp_path / "r.html").text


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda line: line[:-20], "line 3: not JSON"),
        (lambda _: "[1, 2]", "line 3: not a record"),
        (lambda _: '{"event": "epoch", "epoch": 3}', "line 3: `density` is None"),
        (lambda _: '{"event": "epoch", "epoch": 3, "density": NaN}', "line 3: `density` is nan"),
        (lambda _: '{"event": "epoch", "epoch": 3, "density": 0.1, "train_loss": "much"}', "`train_loss` is 'much'"),
        (lambda _: '{"event": "epoch", "epoch": 3, "density": 3}', "line 3: `density` is 3, expected a fraction"),
        (lambda _: '{"event": "epoch", "epoch": 3, "density": 0.1, "train_loss": 1e308}', "`train_loss` is 1e+308"),
        (lambda _: '{"event": "epoch", "epoch": 1' + "0" * 400 + ', "density": 0.1}', "line 3: `epoch` is 1000"),
        (lambda _: "[" * 100_000, "line 3: not JSON"),
        (lambda _: "\udcff\x00", "line 3: not JSON"),
    ],
)
def test_a_damaged_line_of_the_log_is_named_and_the_others_shown(
    damage: Callable[[str], str], named: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = copied(runs["grown"], tmp_path / "run")
    lines = (run / "log.jsonl").read_text().splitlines()
    before = reported(runs["grown"], tmp_path / "whole.html")
    lines[2] = damage(lines[2])
    (run / "log.jsonl").write_bytes(("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    page = reported(run, tmp_path / "r.html", warns="line 3")
    assert named in page.text
    kept = [tip for tip in before.tips if tip.startswith("epoch ") and tip in page.tips]
    assert len(kept) > 10


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", "{"),
        ("result.json", "[]"),
        ("config.json", "{"),
        ("config.json", None),
        ("log.jsonl", None),
        ("log.jsonl", ""),
        ("artifact/sparse.safetensors", "rubbish"),
        ("artifact", None),
    ],
)
def test_what_is_damaged_or_missing_is_named_and_the_rest_shown(
    file: str, content: str | None, runs: dict[str, Path], tmp_path: Path
) -> None:
    run = copied(runs["grown"], tmp_path / "run")
    if content is None:
        shutil.rmtree(run / file) if (run / file).is_dir() else (run / file).unlink()
    else:
        (run / file).write_text(content)
    if content == "":
        assert "Accuracy over density" in reported(run, tmp_path / "r.html").text  # from the trace
        return
    page = reported(run, tmp_path / "r.html", warns=Path(file).parts[0])
    assert f"`{Path(file).parts[0]}" in page.text
    assert "Accuracy over density" in page.text


def test_wrong_values_in_a_result_and_its_trace_do_not_end_the_report(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["grown"], tmp_path / "run")
    result = json.loads((run / "result.json").read_text())
    result |= {"density": "x", "val_accuracy": [1], "trace": 3, "kernels": [], "train_seconds": {}, "steps": 10**400}
    (run / "result.json").write_text(json.dumps(result))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in log:
        if record["event"] == "round":
            record |= {
                "fit": {"curve": 3, "curves": {"none": {}}, "gain": "x"},
                "cohorts": [{"born": 0, "edges": 10**400}],
            }
            record["layer_density"] = {"0": None}
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    page = reported(run, tmp_path / "r.html")
    assert "the fit of round" in page.text
    assert page.text.count("cannot be read") > 1
    reported([run, runs["static"]], tmp_path / "two.html")


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["grown"], tmp_path / "run")
    (run / "result.json").unlink()
    shutil.rmtree(run / "artifact")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:6]) + lines[6][:30])
    page = reported(run, tmp_path / "r.html", warns="has not ended")
    assert "line 7: cut short, or being written" in page.text
    assert "density (so far)" in page.text


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "other", "artifact", "no runs"])
def test_a_folder_that_is_not_a_run_is_refused_by_name(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "it"
    if kind == "file":
        path.write_text("{}")
    elif kind == "artifact":
        path = runs["static"] / "artifact"
    elif kind != "missing":
        path.mkdir()
        if kind == "other":
            (path / "config.json").write_text('{"architectures": ["BertModel"]}')
        if kind == "no runs":
            (path / "runs").mkdir()
    with pytest.raises(growfx.ConfigError, match=re.escape(f"`{path}`")) as refused:
        growfx.report([runs["static"], path], tmp_path / "r.html")
    assert (f"the run is `{runs['static']}`" in str(refused.value)) == (kind == "artifact")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("paths", [[], 3, [3], "", b"run", None, "a\0b"])
def test_what_is_not_a_path_is_refused(paths: Any, tmp_path: Path) -> None:
    with pytest.raises(growfx.ConfigError):
        growfx.report(paths, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_replaced_only_when_asked_and_only_a_page(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    growfx.report(runs["static"], out)
    before = out.read_bytes()
    with pytest.raises(growfx.ConfigError, match=r"r\.html.*overwrite"):
        growfx.report(runs["grown"], out)
    assert out.read_bytes() == before
    growfx.report(runs["grown"], out, overwrite=True)
    assert out.read_bytes() != before
    kept = copied(runs["static"], tmp_path / "run") / "log.jsonl"
    log = kept.read_bytes()
    with pytest.raises(growfx.ConfigError, match="not an HTML file"):
        growfx.report(runs["static"], kept, overwrite=True)
    assert kept.read_bytes() == log
    with pytest.raises(growfx.ConfigError, match="is a folder"):
        growfx.report(runs["static"], tmp_path, overwrite=True)
    with pytest.raises(growfx.ConfigError, match="cannot be"):
        growfx.report(runs["static"], kept / "below.html")


def test_the_command_writes_the_file_and_answers_faults_in_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        return int(ended.value.code or 0)

    out = tmp_path / "deep" / "r.html"
    assert call("report", *runs.values(), "--out", out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == out.stat().st_size
    assert facts["runs"] == [str(path) for path in runs.values()]
    assert call("report", runs["static"], "--out", out) == 1
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert "--overwrite" in refused
    assert call("report", runs["static"], "--out", out, "--overwrite") == 0
    assert call("report", "--out", out) == 2


# -- size ----------------------------------------------------------------------------------------------------------


def test_a_run_as_large_as_a_resnet50_stays_below_3_mb(runs: dict[str, Path], tmp_path: Path) -> None:
    """54 layers, 300 rounds (cohorts grow with their square) and 2,000 epochs: more than anyone has run."""
    run = copied(runs["grown"], tmp_path / "run")
    names = [f"layer{i // 9}.{i % 9}.conv{i % 3}" for i in range(54)]
    cohort = {"age": 0, "edges": 1000, "survival": 0.5, "magnitude": 0.1, "gradient_share": 0.01}
    fit = json.loads((run / "result.json").read_text())["trace"][-1]["fit"]
    with (run / "log.jsonl").open("w") as stream:
        for epoch in range(2000):
            facts = {"epoch": epoch, "density": 0.1, "train_loss": 1 / (epoch + 1), "val_accuracy": 0.5, "lr": 0.1}
            stream.write(
                json.dumps({"event": "epoch", **facts, "seconds": 9.87, "dense_equivalent_epochs": epoch}) + "\n"
            )
        for number in range(300):
            facts = {"round": number, "density": 0.01 * 1.01**number, "val_accuracy": 0.7, "noise": 0.01, "nnz": 1000}
            cohorts = [{"born": i, **cohort} for i in range(number + 1)]
            densities = dict.fromkeys(names, 0.01 * 1.01**number)
            record = {"event": "round", **facts, "fit": fit, "cohorts": cohorts, "layer_density": densities}
            stream.write(json.dumps(record) + "\n")
    page = reported(run, tmp_path / "r.html")
    assert page.classes.count("small") == 54
    assert len(page.source.encode()) < 3_000_000


# -- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.0, 1.0, False), (-3.0, 1e6, False), (1e-4, 100.0, True), (2.1, 2.9, True), (5, 5.1, True)],
)
def test_ticks_are_few_distinct_and_within_the_axis(low: float, high: float, log: bool) -> None:
    ticks = Axis("", low, high, log).ticks()
    assert 2 <= len(ticks) <= 10
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0] <= ticks[-1] <= high


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, -2.0], [1e-12, 1e12], [0.5, 0.5], [1e-320, 1e-310]])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_holds_what_it_is_made_around(values: list[float], log: bool) -> None:
    axis = Axis.around("", values, log=log)
    assert all(0 < axis.share(v) < 1 for v in values)
    shares = [axis.share(v) for v in sorted(values)]
    assert shares == sorted(shares)
    ElementTree.fromstring(chart("t", axis, axis, [Series("s", values, values, ["tip"] * len(values))]))


def test_a_curve_that_leaves_the_plane_is_cut_off_there_and_keeps_its_slope() -> None:
    axis = Axis("", 0.0, 1.0)
    drawn = ElementTree.fromstring(chart("t", axis, axis, [Series("s", [0.0, 1.0], [0.5, 1.5], marks=False)]))
    (plane,) = drawn.findall("svg/svg")
    x, y, width, height = (float(part) for part in (plane.get("viewBox") or "").split())
    ends = re.findall(r"[\d.-]+", (plane.findall("path")[0]).get("d") or "")
    assert [float(v) for v in ends] == pytest.approx([x, y + height / 2, x + width, y - height / 2], abs=0.1)


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 2), (1000, 200)])
def test_thinning_keeps_the_ends_and_the_order(count: int, most: int) -> None:
    kept = thinned(count, most)
    assert len(kept) == min(count, most)
    assert kept == sorted(set(kept))
    assert not count or (kept[0], kept[-1]) == (0, count - 1)


def test_only_markup_is_left_unescaped_and_never_in_an_attribute() -> None:
    made = tag("p", "<b>", Markup("<i>x</i>"), title=Markup('"><b>'))
    element = ElementTree.fromstring(made)
    assert element.text == "<b>"
    assert element.get("title") == '"><b>'
    assert [child.tag for child in element] == ["i"]
