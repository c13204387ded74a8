"""Comparisons: which runs there are, what they are told, what is kept of them, and how they end."""

import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from training_nets import untimed

from growfx.cli import main
from growfx.commands.compare.comparison import Comparison, FinishedRun, _expected_epochs, _open, plan_controls
from growfx.commands.compare.pool import RunSpec, processes, run_all
from growfx.commands.compare.progress import LogTail, Meter, epochs_logged
from growfx.commands.compare.report import comparison_rows, comparison_text, summarise
from growfx.errors import CheckpointError, ConfigError
from growfx.reporting import plots
from growfx.runs.checkpoint import read

pytestmark = pytest.mark.slow

MODEL = ["test_resnet", "--data", "digits"]
OPTIONS = [
    "--epochs",
    "1",
    "--set",
    "img_size=16",
    "--set",
    "lr=0.05",
    "--set",
    "static.epochs=2",
    "--set",
    "kernels=dense",
]
# a density of one edge in ten million ends the run that is asked for it, and no other
COMPARED = ["--methods", "dense,static", "--densities", "0.2,0.0000001", "--seeds", "0,1", "--jobs", "2", *OPTIONS]


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def planned(*methods, **options) -> Comparison:
    return Comparison("test_resnet", "digits", methods, **options)


# -- which runs, and what they are told -----------------------------------------------------------------------


def test_excluded_layers_are_those_of_every_run_and_part_of_what_the_comparison_is():
    comparison = planned("dense", "static", "pwmpr", densities=(0.2,), exclude=("fc", "layer1*"))
    assert all(run.spec.exclude == ("fc", "layer1*") for run in comparison.runs())
    known = {run.name: FinishedRun(3, 0.2) for run in comparison.runs()}
    controls = plan_controls(comparison, comparison.runs(), known, Path("somewhere"))
    assert controls
    assert all(run.spec.exclude == ("fc", "layer1*") for run in controls)
    assert comparison.config()["exclude"] == ["fc", "layer1*"] != planned("static").config()["exclude"]


def test_methods_that_are_given_a_density_run_at_each_and_others_once_for_every_seed():
    comparison = planned("dense", "static", "pwmpr", densities=(0.1, 0.05), seeds=(0, 3))
    assert [run.name for run in comparison.runs()] == [
        *("dense-s0", "dense-s3"),
        *("static-d0.1-s0", "static-d0.1-s3", "static-d0.05-s0", "static-d0.05-s3"),
        *("pwmpr-s0", "pwmpr-s3"),
    ]
    by_name = {run.name: run for run in comparison.runs()}
    run = by_name["static-d0.05-s3"]
    assert (run.label, run.asked) == ("static", 0.05)
    assert run.spec.method_options == {"seed": 3, "density": 0.05}
    assert run.spec.train_options.seed == 3
    assert by_name["pwmpr-s3"].asked is None
    assert by_name["dense-s0"].spec.make_method() is None


def test_methods_of_whole_units_read_densities_as_budgets_of_parameters():
    runs = planned("static", "channel-prune", "channel-growth", densities=(0.5, 0.3)).runs()
    found = [(run.spec.method, run.asked, run.spec.method_options.get("budget")) for run in runs]
    assert found[2:] == [
        ("channel-prune", 0.5, "params=0.5"),
        ("channel-prune", 0.3, "params=0.3"),
        ("channel-growth", None, None),
    ]
    (run,) = planned("channel-prune", assignments=("channel-prune.budget=time=0.7",)).runs()
    assert (run.asked, run.spec.method_options["budget"]) == (None, "time=0.7")
    with pytest.raises(ConfigError, match="`--densities`, which are budgets of parameters"):
        planned("channel-prune", densities=(0.5,), sweeps={"channel-prune.budget": ("flops=0.5",)})


def test_without_densities_methods_run_at_their_default_and_the_table_says_which():
    (run,) = planned("static").runs()
    assert (run.name, run.asked) == ("static-s0", 0.1)


def test_set_reaches_every_class_with_the_key_and_only_the_method_before_the_dot():
    texts = ("lr=0.3", "batch_size=32", "growth_ratio=2", "distribution=er", "pwmpr.lr=0.7", "static.epochs=9")
    texts = (*texts, "pwmpr.tolerance=0.01", "model.num_classes=4")
    runs = {run.spec.method: run.spec for run in planned("dense", "static", "pwmpr", assignments=texts).runs()}
    assert [runs[name].train_options.lr for name in ("dense", "static", "pwmpr")] == [0.3, 0.3, 0.7]
    assert [runs[name].train_options.epochs for name in ("dense", "static", "pwmpr")] == [30, 9, 30]
    assert {spec.data_options.batch_size for spec in runs.values()} == {32}
    assert {spec.model_kwargs["num_classes"] for spec in runs.values()} == {4}
    assert runs["static"].method_options == {"seed": 0, "distribution": "er"}
    assert runs["pwmpr"].method_options == {"seed": 0, "growth_ratio": 2.0, "tolerance": 0.01}


def test_a_sweep_runs_a_method_with_every_value_and_combines_with_others():
    sweeps = {"static.distribution": ("erk", "er"), "static.init": ("dense", "sparse-aware"), "dense.lr": ("1", "2")}
    runs = planned("dense", "static", densities=(0.2,), sweeps=sweeps).runs()
    assert [run.name for run in runs[:2]] == ["dense-lr=1-s0", "dense-lr=2-s0"]
    assert len(runs) == 2 + 4
    last = runs[-1]
    assert last.name == "static-d0.2-distribution=er-init=sparse-aware-s0"
    assert last.label == "static distribution=er init=sparse-aware"
    assert last.spec.method_options == {"seed": 0, "density": 0.2, "distribution": "er", "init": "sparse-aware"}
    assert [run.spec.train_options.lr for run in runs[:2]] == [1.0, 2.0]


def test_a_value_for_an_option_that_is_swept_is_a_contradiction():
    with pytest.raises(ConfigError, match=r"`--set static\.lr=3` contradicts `--sweep static\.lr=1,2`; give one"):
        planned("static", assignments=("static.lr=3",), sweeps={"static.lr": ("1", "2")})
    runs = planned("static", assignments=("lr=3",), sweeps={"static.lr": ("1", "2")}).runs()
    assert [run.spec.train_options.lr for run in runs] == [1.0, 2.0]


def test_folders_have_plain_names_that_differ():
    (run,) = planned("static", sweeps={"static.distribution": ("erk",)}, densities=(0.125,)).runs()
    assert run.name == "static-d0.125-distribution=erk-s0"
    (run,) = planned("dense", sweeps={"dense.auto_augment": ("rand/../m9",)}).runs()
    assert run.name == "dense-auto_augment=rand_.._m9-s0"
    with pytest.raises(ConfigError, match=r"would share the folder `dense-auto_augment=a_b-s0`"):
        planned("dense", sweeps={"dense.auto_augment": ("a/b", "a:b")}).runs()


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ((), {}, "at least one method"),
        (("static",), {"seeds": ()}, "at least one method and one seed"),
        (("statical",), {}, "method `statical` is unknown; allowed: `dense`, `acdc`"),
        (("dense", "pwmpr"), {"densities": (0.1,)}, "`--densities` would do nothing"),
        (("static",), {"densities": (1.5,)}, r"`density` = 1\.5 is out of range"),
        (("static",), {"assignments": ("learning=1",)}, "option `learning` is unknown"),
        (("static",), {"assignments": ("growth_ratio=2",)}, "option `growth_ratio` is unknown"),
        (("static",), {"assignments": ("lr",)}, "has no value"),
        (
            ("static",),
            {"assignments": ("pwmpr.growth_ratio=2",)},
            "for `pwmpr`, which is not compared; allowed.*static",
        ),
        (("static",), {"assignments": ("static.growth_ratio=2",)}, "option `growth_ratio` is unknown"),
        (("static",), {"assignments": ("seed=2",)}, "same for all runs; give it by `--seeds`"),
        (("static",), {"assignments": ("static.density=0.2",)}, "give it by `--densities`"),
        (("static",), {"sweeps": {"static.density": ("0.1", "0.2")}}, "give it by `--densities`"),
        (("static",), {"sweeps": {"distribution": ("er",)}}, r"write `--sweep METHOD\.KEY=v1,v2`"),
        (("static",), {"sweeps": {"model.num_classes": ("4", "5")}}, r"write `--sweep METHOD\.KEY=v1,v2`"),
        (("static",), {"sweeps": {"static.distribution": ("er", "ernie")}}, "`distribution` = 'ernie' is unknown"),
    ],
)
def test_what_makes_no_sense_together_is_refused_by_name(methods, options, message):
    with pytest.raises(ConfigError, match=message):
        planned(*methods, **options).runs()


def test_a_method_whose_density_is_an_outcome_may_be_given_one_by_set():
    (run,) = planned("continuous", assignments=("continuous.density=0.2",)).runs()
    assert (run.name, run.asked) == ("continuous-s0", None)
    assert run.spec.method_options["density"] == 0.2
    with pytest.raises(ConfigError, match="`--densities` would do nothing"):
        planned("continuous", densities=(0.2,))


def test_run_specs_are_values_that_processes_can_be_given():
    import pickle

    spec = RunSpec.parse("test_resnet", "digits", "pwmpr", ["lr=0.2"], seed=4, epochs=3)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert spec != RunSpec.parse("test_resnet", "digits", "pwmpr", ["lr=0.2"], seed=5, epochs=3)


def test_jobs_are_the_cores_unless_given_and_have_one_thread_each():
    jobs, threads = processes(None, "cpu")
    assert (jobs >= 1, threads) == (True, 1)
    assert processes(5, "cpu") == (5, 1)
    with pytest.raises(ConfigError, match="`--jobs` is 0"):
        processes(0, "cpu")


# -- controls -------------------------------------------------------------------------------------------------


def test_controls_are_dense_as_long_phew_as_dense_and_tickets_of_the_masks():
    comparison = planned("dense", "static", "pwmpr", densities=(0.2,), seeds=(0, 1), epochs=4, controls=True)
    runs = comparison.runs()
    known = {run.name: FinishedRun(4, 0.2) for run in runs if run.spec.method == "static"}
    known |= {run.name: FinishedRun(4, 1.0) for run in runs if run.spec.method == "dense"}
    known |= {"pwmpr-s0": FinishedRun(20, 0.25), "pwmpr-s1": FinishedRun(11, 0.5)}
    found = {run.name: run for run in plan_controls(comparison, runs, known, Path("out/runs"))}
    # the mean of 20 and 11 epochs; static is as long as the dense runs that are there
    assert {name for name in found if name.startswith("dense")} == {"dense-e16-s0", "dense-e16-s1"}
    assert found["dense-e16-s1"].spec.train_options.epochs == 16
    assert found["dense-e16-s1"].spec.train_options.seed == 1
    assert found["dense-e16-s0"].label == "dense, 16 epochs"
    assert {name for name in found if name.startswith("phew")} == {"phew-of-pwmpr-s0", "phew-of-pwmpr-s1"}
    phew = found["phew-of-pwmpr-s1"].spec
    assert (phew.method, phew.method_options) == ("phew", {"density": 0.5, "seed": 1})
    assert phew.train_options.epochs == 4
    fresh, shuffled = (found[f"ticket-{kind}-of-static-d0.2-s1"].spec for kind in ("fresh", "shuffled"))
    source = str(Path("out/runs/static-d0.2-s1/artifact").resolve())
    assert shuffled.method_options == {"source": source, "shuffle": True, "seed": 1}
    assert shuffled.train_options.seed == 1
    assert fresh.method_options == {"source": source, "shuffle": False, "seed": 1001}
    assert fresh.train_options.seed == 1001
    assert fresh.data_options == runs[0].spec.data_options
    assert all(run.control for run in found.values())
    assert not [name for name in found if "of-dense" in name]


def test_a_dense_control_is_made_once_for_all_rows_of_its_length_and_none_of_runs_without_result():
    comparison = planned("static", "set", densities=(0.2,), epochs=4, controls=True)
    runs = comparison.runs()
    both = plan_controls(comparison, runs, {run.name: FinishedRun(4, 0.2) for run in runs}, Path())
    assert [run.name for run in both if run.spec.method == "dense"] == ["dense-e4-s0"]
    assert plan_controls(comparison, runs, {}, Path()) == []


# -- a comparison, interrupted and continued ------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison stopped by Ctrl-C, then continued: folder, the first process, and the status of the second."""
    out = tmp_path_factory.mktemp("compare") / "out"
    command = [sys.executable, "-m", "growfx", "compare", *MODEL, *COMPARED, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/checkpoint/latest.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    results = list(out.glob("runs/*/result.json"))
    status = call("compare", *MODEL, *COMPARED, "--out", out, "--resume", "--quiet", "--json")
    return out, (process.returncode, errors, len(results)), status


def facts_of(out: Path) -> dict:
    return json.loads((out / "compare.json").read_text())


def test_ctrl_c_ends_all_processes_with_one_line(compared):
    _, (status, errors, results), _ = compared
    assert status == 130
    assert "growfx: interrupted; `--resume` continues" in errors
    assert "Traceback" not in errors
    assert "resource_tracker" not in errors
    assert results < 4  # there was something to continue


def test_a_failing_run_is_in_the_table_and_stops_no_other(compared):
    out, _, status = compared
    assert status == 1
    facts = facts_of(out)
    assert set(facts["failures"]) == {"static-d1e-07-s0", "static-d1e-07-s1"}
    assert all(error.startswith("ConfigError: a density of 1e-07") for error in facts["failures"].values())
    table = (out / "table.txt").read_text()
    assert "0 (2 failed)" in table
    assert "static-d1e-07-s1: ConfigError: a density of 1e-07 is 0 of" in table
    assert len([run for run in facts["runs"] if run["error"] is None]) == 4


def test_a_run_of_a_comparison_is_the_run_that_train_makes(compared, tmp_path, capsys):
    out, _, _ = compared
    torch.set_num_threads(1)
    options = [
        "--method",
        "static",
        "--density",
        "0.2",
        "--seed",
        "1",
        "--epochs",
        "2",
        *OPTIONS[2:6],
        "--set",
        "kernels=dense",
    ]
    assert call("train", *MODEL, *options, "--out", tmp_path / "run", "--quiet", "--json") == 0
    ours = json.loads((out / "runs" / "static-d0.2-s1" / "result.json").read_text())
    assert untimed(json.loads(capsys.readouterr().out)) == untimed(ours)
    configs = [json.loads((p / "config.json").read_text()) for p in (tmp_path / "run", out / "runs/static-d0.2-s1")]
    assert configs[0] == configs[1]
    assert call("inspect", out / "runs" / "static-d0.2-s1" / "artifact", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nnz"] == ours["nnz"]


def test_rows_are_means_over_seeds_of_what_the_run_folders_say(compared):
    out, _, _ = compared
    facts = facts_of(out)
    row = next(row for row in facts["rows"] if row["label"] == "static" and row["asked_density"] == 0.2)
    folders = [out / "runs" / f"static-d0.2-s{seed}" for seed in (0, 1)]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    accuracies = [result["test_accuracy"] for result in results]
    assert row["accuracy"] == pytest.approx(statistics.fmean(accuracies))
    assert row["spread"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert (row["seeds"], row["failed"], row["epochs"]) == (2, 0, 2)
    assert row["density"] == pytest.approx(results[0]["density"])
    sizes = [(folder / "artifact" / "sparse.safetensors").stat().st_size for folder in folders]
    assert row["artifact_bytes"] == pytest.approx(statistics.fmean(sizes))
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in folders]
    seconds = [sum(record["seconds"] for record in log if record["event"] == "epoch") for log in logs]
    assert row["seconds"] == pytest.approx(statistics.fmean(seconds), abs=1e-3)
    dense = next(row for row in facts["rows"] if row["label"] == "dense")
    assert dense["dense_equivalent_epochs"] == pytest.approx(1)
    assert {"torch", "growfx", "timm"} <= set(facts["versions"])
    assert facts["machine"]["cores"] == os.cpu_count()
    assert facts["set"]["static.epochs"] == "2"


def test_finished_runs_are_not_trained_again(compared, capsys):
    out, _, _ = compared
    times = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/result.json")}
    only = [text.replace("0.2,0.0000001", "0.2") for text in COMPARED]
    assert call("compare", *MODEL, *COMPARED, "--out", out) == 1
    assert "exists; continue it with `--resume`" in capsys.readouterr().err
    assert call("compare", *MODEL, *only, "--out", out, "--resume") == 1
    assert "was started with `densities` = [0.2, 1e-07], now it is [0.2]" in capsys.readouterr().err
    assert call("compare", *MODEL, *COMPARED, "--out", out, "--resume", "--quiet") == 1
    assert "0 (2 failed)" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in out.glob("runs/*/result.json")} == times


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--epochs", "5"], "was started with `epochs` = 1, now it is 5"),
        (["--set", "lr=0.5"], "was started with `set` = "),
        (["--seeds", "1"], r"was started with `seeds` = [0, 1], now it is [1]"),
        (["--sweep", "static.distribution=er"], "was started with `sweep` = {}"),
        (["--overwrite"], "`resume` and `overwrite` exclude each other"),
    ],
)
def test_another_comparison_is_not_continued(compared, capsys, extra, message):
    out, _, _ = compared
    assert call("compare", *MODEL, *COMPARED, "--out", out, "--resume", "--quiet", *extra) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_the_folder_of_a_run_is_not_taken_for_that_of_a_comparison(compared, capsys):
    out, _, _ = compared
    run = out / "runs" / "dense-s0"
    for flag in ("--resume", "--overwrite"):
        assert call("compare", *MODEL, *COMPARED, "--out", run, flag) == 1
        assert "is not the folder of a comparison" in capsys.readouterr().err
    assert (run / "result.json").exists()


def test_what_no_run_could_do_is_said_at_once_and_leaves_nothing(tmp_path, capsys):
    for model, data, message in (
        ("test_resnte", "digits", "did you mean"),
        ("test_resnet", "nowhere", "`nowhere` was not found"),
    ):
        assert call("compare", model, "--data", data, "--methods", "dense", "--out", tmp_path / "out") == 1
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
    assert call("compare", *MODEL, "--methods", "dense", "--out", tmp_path / "out", "--sweep", "dense.lr") == 1
    assert "has no values" in capsys.readouterr().err
    assert call("compare", *MODEL, "--methods", "dense", "--out", tmp_path / "out", "--seeds", "zero") == 2
    assert "is not a list of numbers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def children() -> set[int]:
    """Processes that multiprocessing knows; other tests may have left some of their own."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def test_a_run_whose_process_dies_is_a_failure_with_its_signal(tmp_path):
    before = children()
    spec = RunSpec.parse("test_resnet", "digits", "dense", ["img_size=16"], epochs=500)
    reports = run_all([("a run", spec, tmp_path / "run")], tmp_path / "logs", jobs=1)
    first = next(reports)
    assert (first.name, first.ended, first.epochs >= 1) == ("a run", False, True)
    (child,) = children() - before
    os.kill(child, signal.SIGKILL)
    last = list(reports)[-1]
    assert (last.ended, last.error) == (True, "killed by SIGKILL (out of memory?)")
    assert (tmp_path / "logs" / "a run.log").exists()


def test_closing_ends_the_processes_and_keeps_the_checkpoint(tmp_path):
    before = children()
    spec = RunSpec.parse("test_resnet", "digits", "dense", ["img_size=16"], epochs=500)
    latest = tmp_path / "run" / "checkpoint" / "latest.pt"
    reports = run_all([("a run", spec, tmp_path / "run")], tmp_path / "logs", jobs=1)
    while not latest.is_file():  # a busy machine may end a run before it wrote its first one
        next(reports)
    (number,) = children() - before
    reports.close()
    assert number not in children()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    assert read(latest)["position"]["epoch"] >= 1


@pytest.mark.filterwarnings("always::growfx.GrowfxWarning")
def test_what_runs_warn_of_is_passed_on_once(tmp_path, capsys):
    given = [*OPTIONS, "--set", "round_lr=0.5", "--set", "hflip=0.1"]
    assert call("compare", *MODEL, "--methods", "dense,static", *given, "--out", tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert sorted(line.partition("` = ")[0].rpartition("`")[2] for line in lines) == ["hflip", "round_lr"]
    assert all(line.startswith("growfx: ") for line in lines)


def test_overwriting_replaces_a_comparison_and_nothing_else(tmp_path):
    old, new = planned("dense", seeds=(0, 1)), planned("dense", seeds=(5,))
    _open(tmp_path, old, resume=False, overwrite=False).close()
    (tmp_path / "runs" / "dense-s0").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "table.txt").write_text("old")
    _open(tmp_path, new, resume=False, overwrite=True).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert json.loads((tmp_path / "config.json").read_text())["seeds"] == [5]


def test_a_comparison_under_way_is_neither_replaced_nor_continued_by_another(tmp_path):
    pytest.importorskip("fcntl", reason="the system has no such locks")
    with closing(_open(tmp_path, planned("dense"), resume=False, overwrite=False)):
        (tmp_path / "runs" / "dense-s0").mkdir(parents=True)
        for how in ({"resume": False, "overwrite": True}, {"resume": True, "overwrite": False}):
            with pytest.raises(CheckpointError, match="is in use"):
                _open(tmp_path, planned("dense"), **how)
        assert (tmp_path / "runs" / "dense-s0").is_dir()
    _open(tmp_path, planned("dense"), resume=True, overwrite=False).close()


def test_ranks_of_torchrun_do_not_each_start_the_same_comparison(tmp_path, monkeypatch, capsys):
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert call("compare", *MODEL, *COMPARED, "--out", tmp_path / "out") == 1
    assert "torchrun" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("hold_every", "rounds"), [(0, 6), (1, 10), (2, 8), (4, 7), (5, 6)])
def test_held_rounds_are_among_the_epochs_expected_up_to_the_last_that_grows(hold_every, rounds):
    options = {
        "seed_density": 0.1,
        "max_density": 0.3,
        "seed_epochs": 4,
        "epochs_per_round": 1,
        "hold_every": hold_every,
    }
    comparison = planned("pwmpr", assignments=[f"pwmpr.{name}={value}" for name, value in options.items()])
    (run,) = comparison.runs()
    # 0.1, 0.13, 0.169, 0.22, 0.286 and 0.3, and those held between
    assert _expected_epochs(run.spec) == run.spec.train_options.epochs + 4 + rounds - 1


# -- tables and plots -----------------------------------------------------------------------------------------


def fact(label: str = "static", asked=0.1, test=0.5, error=None, **more) -> dict:
    own = {"name": f"{label}-{asked}", "label": label, "method": label, "asked_density": asked, "control": False}
    if error:
        return {**own, "error": error}
    figures = {"density": 0.1, "epochs": 3, "dense_equivalent_epochs": 0.4, "seconds": 75.0, "artifact_bytes": 1234}
    return {**own, "error": None, "test_accuracy": test, "val_accuracy": 0.25, **figures, **more}


def test_a_spread_needs_two_seeds_and_is_the_sample_standard_deviation():
    one, three = summarise([fact(asked=0.2), *(fact(test=value) for value in (0.5, 0.6, 0.7))])
    assert (one["seeds"], one["spread"]) == (1, None)
    assert three["accuracy"] == pytest.approx(0.6)
    assert three["spread"] == pytest.approx(0.1)
    cells = comparison_rows([one, three])
    assert [row["+-"] for row in cells] == ["-", "10.00"]
    assert cells[0]["asked"] == "20 %"
    assert cells[0]["wall time"] == "1:15"
    assert cells[0]["bytes"] == "1,234"


def test_validation_accuracy_stands_in_only_where_there_is_no_test():
    assert summarise([fact(), fact(test=None)])[0]["split"] == "val"
    row = summarise([fact(), fact(error="GrowfxError: the loss is not finite")])[0]
    assert (row["split"], row["accuracy"], row["seeds"], row["failed"]) == ("test", 0.5, 1, 1)
    assert "val accuracy" in comparison_rows(summarise([fact(test=None)]))[0]


def test_a_row_of_failures_shows_why_in_the_place_of_its_accuracy():
    text = "GrowfxError: " + "long " * 30
    (row,) = comparison_rows(summarise([fact(error=text)]))
    assert row["test accuracy"].startswith("GrowfxError: long")
    assert len(row["test accuracy"]) == 60
    assert (row["seeds"], row["density"], row["wall time"]) == ("0 (1 failed)", "-", "-")
    about = {"model": "m", "data": "d", "jobs": 1, "machine": {"accelerator": None, "cpu": "a cpu"}}
    shown = comparison_text({**about, "rows": summarise([fact(error=text)]), "failures": {"run-1": text}})
    assert f"run-1: {text}".strip() in shown


@pytest.mark.parametrize(("key", "factor"), [("density", 100), ("dense_equivalent_epochs", 1)])
def test_methods_are_drawn_as_lines_over_density_or_cost(tmp_path, monkeypatch, key, factor):
    kept = []
    original = plots._axes
    monkeypatch.setattr(plots, "_axes", lambda **size: kept.append(original(**size)) or kept[-1])
    rows = summarise([fact(density=0.3, asked=0.3, test=0.7), fact(), fact("dense", None, 0.8, density=1.0)])
    assert plots.draw_methods(tmp_path / "plot.png", "m", rows, key, "test accuracy, %")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    handles, labels = kept[0].get_legend_handles_labels()
    assert labels == ["static", "dense"]
    x, y = (axis.tolist() for axis in handles[0].lines[0].get_data())
    assert sorted(x) == x
    assert x == pytest.approx(sorted(factor * row[key] for row in rows if row["label"] == "static"))
    assert sorted(y) == pytest.approx([50.0, 70.0])
    assert kept[0].get_ylabel() == "test accuracy, %"


def test_the_names_of_many_lines_stand_in_columns_beside_the_plot(tmp_path, monkeypatch):
    kept = []
    original = plots._axes
    monkeypatch.setattr(plots, "_axes", lambda **size: kept.append(original(**size)) or kept[-1])
    rows = summarise([fact(f"method {number}") for number in range(60)])
    assert plots.draw_methods(tmp_path / "plot.png", "m", rows, "density", "test accuracy, %")
    figure = kept[0].figure
    (legend,) = figure.legends
    area, box = kept[0].get_window_extent(), legend.get_window_extent()
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1 + 1
    assert area.x1 <= box.x0
    assert area.width > 0.3 * figure.bbox.width


# -- progress -------------------------------------------------------------------------------------------------


def test_the_bar_learns_from_finished_runs_how_long_the_others_of_their_row_take(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.jsonl").write_text(
        '{"event": "epoch", "epoch": 1}\n{"event": "round", "round": 0}\n{"event": "epoch", "epoch": 2}\n{"event": "ep'
    )
    assert epochs_logged(tmp_path / "old") == 2
    meter = Meter(tmp_path, shown=True)
    for name, row in (("old", "a"), ("second", "a"), ("third", "b")):
        meter.expect(name, row, 10)
    meter.show()
    assert (meter.total, meter.bar.total, meter.bar.n, meter.bar.initial) == (30, 30, 2, 2)
    meter.take("old", 4, ended=True, failed=False)
    assert (meter.bar.total, meter.bar.n) == (4 + 4 + 10, 4)
    meter.take("second", 5, ended=False, failed=True)
    assert meter.bar.total == 4 + 5 + 10
    assert "1/3 runs, 1 failed" in str(meter.bar.postfix)
    meter.keep(["old", "second"])
    assert meter.total == 9
    meter.close()
    assert "compare:" in capsys.readouterr().err
    with closing(Meter(tmp_path, shown=False)) as silent:
        silent.expect("old", "a", 10)
        silent.show()
    assert capsys.readouterr().err == ""


def test_a_log_that_grows_is_read_from_where_the_last_look_ended(tmp_path, monkeypatch):
    read_lines = []
    own = LogTail._take
    monkeypatch.setattr(LogTail, "_take", lambda self, line: (read_lines.append(line), own(self, line)))
    log, tail = tmp_path / "log.jsonl", LogTail(tmp_path)
    assert tail.epochs() == 0
    with log.open("w") as stream:
        for epoch in range(1, 51):
            stream.write(json.dumps({"event": "epoch", "epoch": epoch}) + "\n")
            stream.flush()
            assert tail.epochs() == epoch
    assert len(read_lines) == 50
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"event": "epo')
    assert tail.epochs() == 50
    log.write_bytes(whole + b'{"event": "round"}\n{"event": "epoch", "epoch": 51}\n')
    assert tail.epochs() == 51
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:30]))  # set back to a checkpoint
    assert tail.epochs() == epochs_logged(tmp_path) == 30
    log.unlink()
    assert tail.epochs() == 0
