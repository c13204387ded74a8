"""Comparisons and the zoo on a Ray cluster: two nodes on loopback addresses of a network of their own."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from growfx.cli import main
from growfx.commands.ray_cluster import Cluster, Outcome, Progress
from growfx.commands.zoo.cluster import check_all_on
from growfx.commands.zoo.coverage import Results, check_zoo
from growfx.commands.zoo.inputs import model_names
from growfx.commands.zoo.pool import Limits
from growfx.errors import ConfigError

COMPARE = [
    *("compare", "test_resnet", "--data", "digits", "--methods", "static,dense", "--epochs", "1", "--densities", "0.2"),
    *("--set", "img_size=16", "--lr", "0.05", "--kernels", "dense", "--quiet"),
]


def call(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--address", "127.0.0.1:6379"], "`--address` can only be given with `--launcher ray`"),
        (["--gpus-per-run", "0.5"], "`--gpus-per-run` can only be given with `--launcher ray`"),
        (["--launcher", "ray", "--cpus-per-run", "0"], "`--cpus-per-run` is 0"),
        (["--launcher", "ray", "--gpus-per-run", "-1"], "`--gpus-per-run` is -1.0"),
    ],
)
def test_flags_of_a_cluster_are_checked_by_name(tmp_path, capsys, flags, words):
    assert call(*COMPARE, "--out", tmp_path / "out", *flags) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_it_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the package `ray`: pip install"):
        Cluster().connect()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "127.0.0.1:port"])
def test_what_is_not_an_address_is_refused(monkeypatch, address):
    monkeypatch.setitem(sys.modules, "ray", object())
    with pytest.raises(ConfigError, match="write HOST:PORT"):
        Cluster(address).connect()


def test_an_address_where_nobody_listens_is_given_up(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", object())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"no Ray cluster answers at `127.0.0.1:{port}`"):
        Cluster(f"127.0.0.1:{port}").connect()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--cpus-per-run", "2"], "`--cpus-per-run` can only be given with `--launcher ray`"),
        (["--launcher", "ray", "--cpus-per-run", "0"], "`--cpus-per-run` is 0"),
        (["--launcher", "ray"], "needs the package `ray`"),
        (["--launcher", "ray", "--jobs", "0"], "the limit of jobs is 0"),
    ],
)
def test_the_zoo_has_the_flags_of_a_cluster(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call("zoo", "test_resnet", "--json", tmp_path / "zoo.json", "--quiet", *flags) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "zoo.json").exists()


class HereAndNow(Cluster):
    """A cluster whose tasks are done here one by one; `lost` are those whose nodes die again and again."""

    lost = "zoo_nets:dying"

    def connect(self) -> None:
        pass

    def execute(self, function, tasks, *, jobs=None):
        assert jobs == 3
        for name, arguments in tasks.items():
            done = Outcome(error="lost by the cluster") if name == self.lost else Outcome(function(*arguments))
            yield Progress(frozenset(), {name: done})


@pytest.mark.slow
def test_rows_of_the_zoo_come_from_nodes_and_a_lost_one_is_checked_again(tmp_path):
    results = Results(tmp_path / "zoo.json")
    limits = Limits(jobs=3)
    good, dead = check_zoo(
        ["zoo_nets:good", "zoo_nets:dying"], results, limits, progress=False, cluster=HereAndNow(cpus=2)
    )
    assert (good.ended, good.problems) == ("done", {})
    assert (dead.ended, dead.cause) == ("crash", "lost by the cluster")
    assert Results(tmp_path / "zoo.json").missing(["zoo_nets:good", "zoo_nets:dying"]) == ["zoo_nets:dying"]


@pytest.mark.slow
def test_a_limit_holds_on_a_node():
    found = check_all_on(HereAndNow(), ["zoo_nets:hanging"], Limits(seconds=6, jobs=3), {})
    assert [(facts.ended, facts.cause) for facts in found] == [("timeout", "not done after 6 s")]


def test_a_node_with_other_versions_is_named():
    installed = importlib.metadata.version("torch")
    found = check_all_on(HereAndNow(), ["zoo_nets:good"], Limits(jobs=3), {"torch": "1.0", "nobody-has-this": "2"})
    (facts,) = found
    assert facts.ended == "crash"
    assert f"has other versions: torch {installed}, here 1.0, nobody-has-this unknown, here 2" in facts.cause


def on_a_cluster_that_loses_a_node(folder: Path, arguments: list[str]) -> None:
    """Execute a command in a network of its own on two nodes, one of which is killed while it has work."""
    pytest.importorskip("ray")
    unshare = shutil.which("unshare")
    spaces = [str(unshare), "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c"]
    if unshare is None or subprocess.run([*spaces, "ip link set lo up"], capture_output=True, check=False).returncode:
        pytest.skip("needs `unshare` with the right to make network namespaces, and `ip`")
    words = [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), str(folder), *arguments]
    script = "ip link set lo up; exec " + " ".join(f"'{word}'" for word in words)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([*spaces, script], env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["status"] == 0, facts["errors"]
    assert facts["killed"]


@pytest.mark.slow
def test_a_comparison_runs_on_two_nodes_and_survives_the_death_of_one(tmp_path: Path) -> None:
    arguments = [*COMPARE, "--epochs", "6", "--seeds", "0,1", "--out", str(tmp_path / "out"), "--resume"]
    on_a_cluster_that_loses_a_node(tmp_path, arguments)
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert compared["failures"] == {}
    assert [run["epochs"] for run in compared["runs"]] == [6] * 4


@pytest.mark.slow
def test_the_zoo_is_checked_on_two_nodes_and_survives_the_death_of_one(tmp_path: Path, capsys) -> None:
    file = tmp_path / "zoo.json"
    command = ["zoo", "test_*net", "--json", str(file), "--quiet"]
    on_a_cluster_that_loses_a_node(tmp_path, command)
    rows = json.loads(file.read_text())["models"]
    assert [row["model"] for row in rows] == model_names("test_*net")
    assert len(rows) > 3
    assert {row["ended"] for row in rows} == {"done"}
    # nothing is left to do, so no cluster is needed
    assert call(*command, "--launcher", "ray", "--address", "127.0.0.1:1") == 0
    assert json.loads(file.read_text())["models"] == rows
