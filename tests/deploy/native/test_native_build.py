"""The exported folder on a machine without Python: built, run, sanitized, cross-compiled."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from native_nets import Classifier

import growfx
from growfx.masked.graph import MaskedGraph

FUZZ = Path(__file__).parents[2] / "runtime" / "native" / "fuzz.cpp"
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=env)


def needs(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, which are not installed")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[MaskedGraph, Path, torch.Tensor]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("native")
    net = growfx.wrap(Classifier(), torch.randn(1, 3, 16, 16), density=0.3).eval()
    growfx.export_native(net, folder / "out")
    x = torch.randn(3, 3, 16, 16)
    x.numpy().tofile(folder / "x.f32")
    return net, folder, x


def check_outputs(text: str, net: MaskedGraph, x: torch.Tensor) -> None:
    got = np.array(text.split(), dtype=np.float32)
    with torch.no_grad():
        assert np.allclose(got, net(x).flatten().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("c", "cxx"), [("gcc", "g++"), ("clang", "clang++")])
def test_cmake_builds_the_example_without_warnings_and_it_prints_the_outputs(
    c: str, cxx: str, exported: tuple[MaskedGraph, Path, torch.Tensor]
) -> None:
    needs("cmake", c, cxx)
    net, folder, x = exported
    build = folder / f"by_{c}"
    for command in (["cmake", "-S", folder / "out", "-B", build], ["cmake", "--build", build]):
        made = run(*command, CC=c, CXX=cxx)
        assert made.returncode == 0, made.stderr
        assert "warning" not in made.stdout + made.stderr
    example, network = build / "growfx_example", folder / "out" / "network.gfx"
    for threads in ([], ["2"]):
        ran = run(example, network, folder / "x.f32", *threads)
        assert (ran.returncode, ran.stderr) == (0, "")
        check_outputs(ran.stdout, net, x)
    (folder / "short.f32").write_bytes(b"\0" * 40)
    (folder / "empty.f32").touch()
    for arguments, words in [
        ((network, folder / "short.f32"), "expected a multiple of 768 numbers, the file has 10"),
        ((network, folder / "empty.f32"), "float32 numbers"),
        ((network, folder / "missing.f32"), "cannot be read"),
        ((folder / "x.f32", folder / "x.f32"), "GFX1"),
        ((folder / "missing.gfx", folder / "x.f32"), "missing.gfx"),
        ((network, folder / "x.f32", "0"), "threads"),
        ((network,), "usage"),
    ]:
        ran = run(example, *arguments)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert words in ran.stderr


@pytest.mark.slow
def test_no_mutation_of_a_network_makes_the_sanitizers_speak(exported: tuple[MaskedGraph, Path, torch.Tensor]) -> None:
    needs("g++")
    net, folder, x = exported
    out = folder / "out"
    flags = ["-std=c++17", *SANITIZED, "-pthread", f"-I{out}"]
    objects = [folder / f"{source.stem}.o" for source in sorted(out.glob("*.cpp"))]
    for made_file in objects:
        made = run("g++", *flags, "-c", out / f"{made_file.stem}.cpp", "-o", made_file)
        assert made.returncode == 0, made.stderr
    for program, source in (("fuzz", FUZZ), ("example", out / "example.c")):
        made = run("g++", *flags, source, *objects, "-o", folder / program)
        if "cannot find" in made.stderr:
            pytest.skip("needs the sanitizers' libraries, which are not installed")
        assert made.returncode == 0, made.stderr
    ran = run(folder / "example", out / "network.gfx", folder / "x.f32")
    assert ran.stderr == ""
    check_outputs(ran.stdout, net, x)
    ran = run(folder / "fuzz", out / "network.gfx", "2000", ASAN_OPTIONS="max_allocation_size_mb=1100")
    assert (ran.returncode, ran.stderr) == (0, "")
    refused, accepted = (int(part.split()[0]) for part in ran.stdout.split(", "))
    assert refused > 1000
    assert accepted > 100


@pytest.mark.slow
def test_aarch64_computes_the_same(exported: tuple[MaskedGraph, Path, torch.Tensor]) -> None:
    needs("aarch64-linux-gnu-g++", "qemu-aarch64")
    net, folder, x = exported
    out = folder / "out"
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-static", "-pthread"]
    made = run("aarch64-linux-gnu-g++", *flags, *sorted(out.glob("*.cpp")), out / "example.c", "-o", folder / "arm")
    assert made.returncode == 0, made.stderr
    ran = run("qemu-aarch64", folder / "arm", out / "network.gfx", folder / "x.f32")
    assert ran.returncode == 0, ran.stderr
    check_outputs(ran.stdout, net, x)
