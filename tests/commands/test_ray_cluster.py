"""Comparisons on a Ray cluster: two nodes on loopback addresses of a network of their own."""

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
from growfx.commands.compare.ray_cluster import Cluster
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
        (["--address", "127.0.0.1:6379"], "are for `--launcher ray`"),
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


@pytest.mark.slow
def test_a_comparison_runs_on_two_nodes_and_survives_the_death_of_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    unshare = shutil.which("unshare")
    spaces = [str(unshare), "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c"]
    if unshare is None or subprocess.run([*spaces, "ip link set lo up"], capture_output=True, check=False).returncode:
        pytest.skip("needs `unshare` with the right to make network namespaces, and `ip`")
    arguments = [*COMPARE, "--epochs", "6", "--seeds", "0,1", "--out", str(tmp_path / "out"), "--resume"]
    words = [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), str(tmp_path), *arguments]
    script = "ip link set lo up; exec " + " ".join(f"'{word}'" for word in words)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([*spaces, script], env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["status"] == 0, facts["errors"]
    assert facts["killed"]
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert compared["failures"] == {}
    assert [run["epochs"] for run in compared["runs"]] == [6] * 4
