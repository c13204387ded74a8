import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from places import TESTS

import growfx
from growfx.cli import main
from growfx.commands.zoo.check import check_model
from growfx.commands.zoo.coverage import Results, check_zoo, versions
from growfx.commands.zoo.facts import CHECKS, Facts, scrubbed
from growfx.commands.zoo.inputs import model_names
from growfx.commands.zoo.pool import Limits, check_all, resident_bytes
from growfx.commands.zoo.table import census, census_text, coverage_text, summary_markdown
from growfx.errors import ConfigError, TraceError


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


# -- one model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good() -> Facts:
    return check_model("zoo_nets:good")


def test_every_check_of_a_sound_model_says_yes(good):
    assert good.checks == dict.fromkeys([c for c in CHECKS if c != "path rules"], "yes")
    assert not good.problems
    assert (good.ended, good.device, good.parameters) == ("done", "real", 3 * 8 * 9 + 8 + 16 + 32 + 4)
    assert good.layers == {"masked": 2, "tied": 0, "opaque": {}, "unmasked": {}, "off_path": {}}
    assert good.dead_units[1] == 12
    assert {"module Conv2d", "module BatchNorm2d", "module Linear", "method mean"} <= set(good.operators)
    assert {"build", "wrap", "path products", "whole"} <= set(good.seconds)


def test_the_facts_are_told_before_every_stage_so_that_they_outlive_the_process():
    told = []
    check_model("zoo_nets:good", lambda facts: told.append((facts.stage, len(facts.checks))))
    stages = [stage for stage, _ in told]
    assert stages[:3] == ["build", "eager", "wrap"]
    assert stages[-1] == "native"
    assert [count for _, count in told] == sorted(count for _, count in told)
    assert told[-1][1] == 14


def test_a_model_that_takes_one_size_only_is_no_exception():
    facts = check_model("zoo_nets:fixed_size")
    assert facts.checks["other size"] == "n/a: the model itself refuses: AssertionError: 32 x 32 only"
    assert facts.other_input == []
    assert not facts.problems


def test_a_weight_that_is_no_modules_has_to_be_reported(monkeypatch):
    wrap = growfx.wrap

    def silent(*args):
        net = wrap(*args)
        net.trace_report.unmasked.clear()
        return net

    assert not check_model("zoo_nets:own_weight").missed
    monkeypatch.setattr(growfx, "wrap", silent)
    facts = check_model("zoo_nets:own_weight")
    assert facts.missed == ["matrix"]
    assert facts.problems["weights found"] == "1 missed, the first is `matrix`"


def test_a_layer_the_wrapper_forgets_is_found(monkeypatch):
    wrap = growfx.wrap

    def forgetful(*args):
        net = wrap(*args)
        dict.__delitem__(net.layers, "head")
        return net

    monkeypatch.setattr(growfx, "wrap", forgetful)
    assert check_model("zoo_nets:good").missed == ["head", "head.weight"]


def test_a_net_that_computes_something_else_is_found(monkeypatch):
    wrap = growfx.wrap

    def careless(*args):
        net = wrap(*args)
        net.head.register_forward_hook(lambda module, inputs, output: output * 1.001)
        return net

    monkeypatch.setattr(growfx, "wrap", careless)
    facts = check_model("zoo_nets:good")
    assert {"eval", "batch 3", "train", "other size", "gradients", "artifact"} <= set(facts.problems)
    assert not {"recorded", "untouched", "weights found", "paths", "growth"} & set(facts.problems)
    assert facts.verdict("eval", "train").startswith("no: output 0 differs by")


def test_growth_that_misses_its_count_is_found(monkeypatch):
    import growfx.commands.zoo.check as module

    monkeypatch.setattr(module, "next_nnz", lambda nnz, *rest: nnz + 3)
    assert check_model("zoo_nets:good").checks["growth"] == "yes"
    draw = module.draw
    monkeypatch.setattr(module, "draw", lambda scores, k, *rest: draw(scores, k - 1, *rest))
    assert check_model("zoo_nets:good").problems == {"growth": "2 edges added instead of 3"}


def test_scores_that_are_not_finite_are_found(monkeypatch):
    path_products = growfx.path_products

    def broken(*args, **kwargs):
        paths = path_products(*args, **kwargs)
        paths.scores["head"][0, 0] = torch.nan
        return paths

    monkeypatch.setattr(growfx, "path_products", broken)
    facts = check_model("zoo_nets:good")
    assert facts.problems["paths"] == facts.problems["extreme paths"] == "scores of `head` are negative or not finite"


def test_a_model_that_refuses_its_own_inputs_ends_with_its_error():
    facts = check_model("zoo_nets:refusing")
    assert facts.problems == {"recorded": "ValueError: the model itself refuses: ValueError: not today"}
    assert facts.ended == "done"


def test_a_model_that_growfx_refuses_to_wrap_computes_nothing_wrong(monkeypatch):
    def refuse(*args):
        raise TraceError("not this one")

    monkeypatch.setattr(growfx, "wrap", refuse)
    facts = check_model("zoo_nets:good")
    assert facts.problems == {"recorded": "TraceError: not this one"}
    assert facts.verdict("eval", "train") == "n/a: growfx refuses: TraceError: not this one"


def test_a_graph_that_computes_something_else_is_found(monkeypatch):
    from torch.nn import functional

    from growfx.masked.graph import MaskedGraph

    graph_at = MaskedGraph.graph_at

    def wrong(self, *args, **kwargs):
        graph = copy.deepcopy(graph_at(self, *args, **kwargs))
        for node in graph.nodes:
            if "relu" in str(node.target):
                node.target, node.op = functional.silu, "call_function"
                node.kwargs = {}
        return graph

    monkeypatch.setattr(MaskedGraph, "graph_at", wrong)
    facts = check_model("zoo_nets:good")
    assert {"graph eval", "graph train"} & set(facts.problems)
    assert not {"eval", "train", "gradients"} & set(facts.problems)


def test_large_models_are_recorded_without_values():
    facts = check_model("zoo_nets:good", real_below=0)
    assert facts.device == "meta"
    assert facts.checks["recorded"] == facts.checks["weights found"] == "yes"
    assert not {"eval", "paths", "artifact"} & set(facts.checks)


# -- many models, in processes ----------------------------------------------------------------------------------------


def ends(*names, **limits):
    found = list(check_all([f"zoo_nets:{n}" for n in names], Limits(**limits)))
    return {facts.model.partition(":")[2]: facts for facts in found}


def test_a_crash_costs_its_own_row_and_names_its_cause():
    found = ends("dying", "good", jobs=2)
    assert found["good"].ended == "done"
    assert not found["good"].problems
    dead = found["dying"]
    assert (dead.ended, dead.stage) == ("crash", "eager")
    assert dead.cause == "the process ended with status 7; its last words: no way on from here"
    assert dead.parameters > 0  # what was known by then
    assert "crash in stage `eager`" in dead.problems["ended"]


def test_a_model_over_its_time_is_ended():
    begun = time.monotonic()
    facts = ends("hanging", seconds=6)["hanging"]
    assert time.monotonic() - begun < 60
    assert (facts.ended, facts.cause) == ("timeout", "not done after 6 s")


@pytest.mark.skipif(resident_bytes(os.getpid()) is None, reason="memory cannot be told here")
def test_a_model_over_its_memory_is_ended():
    facts = ends("greedy", memory=1.25, seconds=60)["greedy"]
    assert facts.ended == "memory"
    assert facts.cause.endswith("GiB in use, 1.25 GiB allowed")


def test_what_models_print_stays_out_of_the_output(capfd):
    assert ends("loud")["loud"].ended == "done"
    assert capfd.readouterr() == ("", "")


def test_closing_early_ends_all_processes():
    import multiprocessing

    running = check_all(["zoo_nets:hanging", "zoo_nets:good"], Limits(jobs=2))
    assert next(running).model == "zoo_nets:good"
    assert multiprocessing.active_children()
    running.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory": -1}, {"jobs": 0}])
def test_limits_are_above_zero(limits):
    with pytest.raises(ConfigError, match="allowed are numbers above 0"):
        Limits(**limits)


# -- results, kept and continued --------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """Checks nothing; which models were to be checked."""
    asked: list[str] = []

    def check(specs, limits, real_below):
        for spec in specs:
            asked.append(spec)
            if spec == "stop":
                raise KeyboardInterrupt
            facts = Facts(spec, "timm", ended="timeout" if spec == "slow" else "done", parameters=100)
            facts.device = "real" if real_below > 100 else "meta"
            yield facts

    monkeypatch.setattr("growfx.commands.zoo.coverage.check_all", check)
    return asked


def run(file, *specs, **options):
    overwrite = options.pop("overwrite", False)
    return check_zoo(specs, Results(file, overwrite=overwrite), again=overwrite, progress=False, **options)


def test_a_second_run_checks_what_is_missing_or_was_cut_short(tmp_path, checked):
    file = tmp_path / "zoo.json"
    run(file, "a", "slow")
    assert set(checked) == {"a", "slow"}
    checked.clear()
    found = run(file, "a", "b", "slow")
    assert set(checked) == {"b", "slow"}
    assert [facts.model for facts in found] == ["a", "b", "slow"]


def test_a_run_with_a_higher_limit_checks_with_values_what_had_none(tmp_path, checked):
    file = tmp_path / "zoo.json"
    run(file, "a", real_below=0)
    run(file, "a", real_below=0)
    assert checked == ["a"]
    assert [facts.device for facts in run(file, "a", real_below=101)] == ["real"]
    run(file, "a", real_below=0)
    assert checked == ["a", "a"]


def test_overwriting_checks_again_and_keeps_the_models_not_asked_for(tmp_path, checked):
    file = tmp_path / "zoo.json"
    run(file, "a", "b")
    checked.clear()
    run(file, "b", overwrite=True)
    assert checked == ["b"]
    assert set(Results(file).facts) == {"a", "b"}


def test_an_interrupted_run_keeps_what_was_done(tmp_path, checked):
    file = tmp_path / "zoo.json"
    with pytest.raises(KeyboardInterrupt):
        run(file, "a", "b", "c", "d", "stop")
    done = checked[: checked.index("stop")]
    assert set(Results(file).facts) == set(done)
    checked.clear()
    run(file, "a", "b", "c", "d")
    assert set(checked) == {"a", "b", "c", "d"} - set(done)


def test_a_file_of_other_versions_is_refused_unless_overwritten(tmp_path, checked):
    file = tmp_path / "zoo.json"
    run(file, "a", "b")
    file.write_text(file.read_text().replace(f'"torch": "{versions()["torch"]}"', '"torch": "1.0"'))
    with pytest.raises(ConfigError, match=r"of other versions \(torch 1\.0, installed: .*--overwrite"):
        Results(file)
    run(file, "a", overwrite=True)
    assert set(Results(file).facts) == {"a"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "another"}'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    file = tmp_path / "notes.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="results"):
        Results(file, overwrite=True)
    assert file.read_text() == text


def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        Results(tmp_path / "nowhere" / "zoo.json")


def test_the_file_has_one_line_a_model_and_the_census(tmp_path, checked, good):
    results = Results(tmp_path / "zoo.json")
    results.add(good)
    results.save()
    content = json.loads((tmp_path / "zoo.json").read_text())
    assert set(content) == {"format", "versions", "census", "models"}
    assert content["census"]["module Conv2d"] == 1
    assert Facts.from_json(content["models"][0]) == good
    lines = (tmp_path / "zoo.json").read_text().splitlines()
    assert sum('"zoo_nets:good"' in line for line in lines) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "zoo.json"]


# -- names and tables -------------------------------------------------------------------------------------------------


def test_the_zoo_is_all_of_timm_and_of_torchvision_but_its_quantized_models():
    import timm
    from torchvision.models import list_models, quantization

    names = model_names()
    assert set(timm.list_models()) <= set(names)
    theirs = {n.removeprefix("torchvision/") for n in names if n.startswith("torchvision/")}
    assert theirs == set(list_models()) - set(list_models(quantization))
    assert model_names("raft*") == ["torchvision/raft_large", "torchvision/raft_small"]
    assert model_names("resnet18") == ["resnet18", "torchvision/resnet18"]
    assert model_names("resnet18", "timm") == ["resnet18"]
    assert model_names("mine.nets:net") == ["mine.nets:net"]


def some_results() -> list[Facts]:
    made = ("recorded", "weights found", "eval", "train", "graph eval", "graph train", "paths", "growth", "artifact")
    yes = dict.fromkeys(made, "yes")
    layers = {"masked": 10, "tied": 0, "opaque": {}, "unmasked": {}, "off_path": {}}
    one = Facts("a1", "timm", "alpha", device="real", checks={**yes}, layers=layers, ended="done")
    one.seconds, one.dead_units, one.operators = {"wrap": 0.2, "whole": 2.0}, [1, 10], ["module Conv2d", "method add"]
    two = Facts("a2", "timm", "alpha", device="real", checks={**yes}, layers=layers, ended="done")
    one.checks["native"], two.checks["native"] = "yes", "n/a: not exported: no kernel for `aten.sort`"
    two.checks |= {"train": "no: output 0 differs", "other size": "n/a: the model itself refuses: AssertionError: 7"}
    two.seconds, two.operators = {"wrap": 0.4, "whole": 9.0}, ["module Conv2d"]
    big = Facts("b", "timm", "beta", device="meta", checks={"recorded": "yes", "path rules": "yes"}, ended="done")
    big.layers = {**layers, "off_path": {"q": "fed by constants"}, "unmasked": {"aux": "never called"}}
    lost = Facts("torchvision/c", "torchvision", "video/c", stage="wrap", ended="memory", cause="9 GiB in use")
    return [one, two, big, lost]


def test_the_table_counts_by_family_and_lists_every_exception_with_its_cause():
    lines = coverage_text(some_results()).splitlines()
    cells = {tuple(line.split()[:2]): line.split()[2:] for line in lines if line.strip()}
    header = lines[0].split()
    assert header[:4] == ["library", "family", "models", "meta"]
    # models, meta, masked, missed, off path, net(x), recorded, faithful, paths, growth, artifact, native, dead, wrap,
    # slowest
    alpha = ["2", "0", "20", "0", "0", "1/2", *["2/2"] * 5, "1/2", "10.0%", "0.30", "s", "9", "s", "a2"]
    assert cells["timm", "alpha"] == alpha
    assert cells["timm", "beta"][:10] == ["1", "1", "10", "0", "1", "-", "1/1", "-", "1/1", "-"]
    assert cells["timm", "total"][:3] == ["3", "1", "30"]
    assert cells["all", "total"][0] == "4"
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "a2 train output 0 differs" in text
    assert "torchvision/c ended memory in stage `wrap`: 9 GiB in use" in text
    assert "unmasked never called 1 1 b: aux" in text
    assert "off path fed by constants 1 1 b: q" in text
    assert "other size the model itself refuses 1 a2" in text
    assert "native not exported: no kernel for `aten.sort` 1 a2" in text


def test_markdown_has_the_same_rows_and_the_exceptions_as_a_list():
    text = summary_markdown(some_results())
    assert sum(line.startswith("|") for line in text.splitlines()) == 2 + 3 + 2 + 1
    assert "* `a2`, train: output 0 differs" in text
    assert summary_markdown(some_results()[:1]).endswith("No exceptions.")


def test_the_census_counts_models_by_operator():
    assert census(some_results()) == {"module Conv2d": 2, "method add": 1}
    assert "modules (1 kinds): Conv2d 2 (a1)" in census_text(some_results())


def test_messages_name_files_from_their_package_on():
    text = "`bool` of a tensor, at /home/me/.venv/lib/python3/site-packages/timm/models/x.py:12 in\n forward"
    assert scrubbed(text) == "`bool` of a tensor, at timm/models/x.py:12 in forward"
    assert scrubbed(f"`{tempfile.gettempdir()}/tmp12ab`: damaged") == "`(a temporary folder)`: damaged"
    assert len(scrubbed("x" * 1000)) == 400


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_checks_real_models_and_continues(tmp_path, capsys):
    file = tmp_path / "zoo.json"
    assert call("zoo", "test_resnet", "--json", file, "--census", "--jobs", 1) == 0
    shown = capsys.readouterr()
    assert "no exceptions" in shown.out
    assert "modules (" in shown.out
    assert "1/1" in shown.err
    facts = json.loads(file.read_text())["models"][0]
    assert facts["checks"] == dict.fromkeys([c for c in CHECKS if c != "path rules"], "yes")
    assert call("zoo", "test_resnet", "--json", file, "--markdown", "--quiet") == 0
    assert json.loads(file.read_text())["models"][0] == facts  # its seconds among them: nothing was checked again
    shown = capsys.readouterr()
    assert "| resnet |" in " ".join(shown.out.split())
    assert shown.err == ""


@pytest.mark.slow
def test_a_command_that_is_done_leaves_nothing_behind_to_be_warned_of(tmp_path):
    command = [sys.executable, "-m", "growfx", "zoo", "test_resnet", "--json", str(tmp_path / "zoo.json"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_model_of_that_name_is_an_error(capsys):
    assert call("zoo", "restnet*") == 1
    assert "no model of timm or torchvision is named like `restnet*`" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(tmp_path):
    file = tmp_path / "zoo.json"
    command = [sys.executable, "-m", "growfx", "zoo", "zoo_nets:hanging", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    shown = b""
    while b"0/1" not in shown:  # the progress bar: checking has begun
        shown += os.read(process.stderr.fileno(), 100)
        assert process.poll() is None, shown
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert f"the same command continues from `{file}`" in said
    assert "Traceback" not in said
    assert json.loads(file.read_text())["models"] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hanging_check_ends_with_a_command_that_is_killed(tmp_path):
    told = tmp_path / "process"
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HANGING_NET": str(told)}
    command = [sys.executable, "-m", "growfx", "zoo", "zoo_nets:hanging", "--quiet"]
    with subprocess.Popen(command, env=environment) as process:
        while not (told.exists() and told.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{told.read_text()}"):
        assert time.monotonic() < deadline, "the check goes on"
        time.sleep(0.1)
