"""Threads that do the same thing at the same moment: each gets what it would get alone, and nothing global is left."""

import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.models.build import identity_of
from growfx.quiet import ignored_warnings
from growfx.runtime import choice_cache, kernel_build
from growfx.runtime.sparse_kernel import kernel_status

THREADS, ROUNDS = 4, 2
PATIENCE = 120.0  # seconds: a hang is a failure, a busy machine is none
T = TypeVar("T")


def together(work: Callable[[int], T], count: int = THREADS) -> list[T]:
    """`work(number)` in `count` threads that begin at the same moment; the first error of any is raised here."""
    barrier, results, errors = threading.Barrier(count), dict[int, T](), list[BaseException]()

    def run(number: int) -> None:
        try:
            barrier.wait(PATIENCE)
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return [results[number] for number in range(count)]


def settings() -> dict[str, Any]:
    """What belongs to the whole process."""
    return {
        # imports of other libraries add filters of other kinds
        "warnings": [found for found in warnings.filters if found[0] == "ignore"],
        "logging": logging.getLogger("torch.utils.cpp_extension").level,
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "call": nn.Module.__call__,
    }


@pytest.fixture(autouse=True)
def _nothing_global_is_left() -> Iterator[None]:
    before = settings()
    yield
    assert settings() == before


def network(seed: int) -> growfx.MaskedGraph:
    torch.manual_seed(seed)
    model = growfx.create_model("test_resnet", num_classes=3 + seed)
    return growfx.wrap(model, torch.randn(1, 3, 32, 32), density=0.2, seed=seed)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_networks_saved_at_once_load_as_each_of_them(tmp_path: Path) -> None:
    nets = [network(seed) for seed in range(THREADS)]
    before = [bits(net) for net in nets]
    for number in range(ROUNDS):
        together(lambda i, number=number: growfx.save(nets[i], tmp_path / f"{number}-{i}"))
        for i, net in enumerate(nets):
            assert_equal(bits(net), before[i])
            assert net.training is nets[0].training
            assert_equal(bits(growfx.load(tmp_path / f"{number}-{i}")), bits(growfx.unwrap(net)))


def test_one_network_saved_by_several_threads_gives_the_same_files(tmp_path: Path) -> None:
    net = network(0).train()
    before, modes = bits(net), [module.training for module in net.modules()]
    together(lambda i: growfx.save(net, tmp_path / str(i)))
    assert_equal(bits(net), before)
    assert [module.training for module in net.modules()] == modes
    files = [{file.name: file.read_bytes() for file in (tmp_path / str(i)).iterdir()} for i in range(THREADS)]
    assert files[0]
    assert all(found == files[0] for found in files)


def test_one_folder_written_by_several_threads_holds_one_of_the_networks_whole(tmp_path: Path) -> None:
    nets = [network(seed) for seed in range(2)]
    expected = [bits(growfx.unwrap(net)) for net in nets]
    together(lambda i: growfx.save(nets[i % 2], tmp_path / "out"))
    found = bits(growfx.load(tmp_path / "out"))
    (which,) = [e for e in expected if e["fc.weight"].shape == found["fc.weight"].shape]
    assert_equal(found, which)
    assert not list(tmp_path.glob(".*"))


def test_one_artifact_loaded_by_several_threads_is_the_same_network_in_each(tmp_path: Path) -> None:
    net = network(1).eval()
    growfx.save(net, tmp_path / "out")
    expected = bits(growfx.unwrap(net))
    for loaded in together(lambda _: growfx.load(tmp_path / "out")):
        assert_equal(bits(loaded), expected)
        assert not any(module.training for module in loaded.modules())


@pytest.mark.skipif(bool(kernel_status()), reason=kernel_status() or "the kernel is there")
def test_an_artifact_loaded_by_several_threads_for_the_sparse_runtime_computes_as_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(1).eval()
    growfx.save(net, tmp_path / "out")
    monkeypatch.setenv("GROWFX_CACHE", str(tmp_path / "cache"))
    images = torch.randn(2, 3, 32, 32)
    expected = growfx.load(tmp_path / "out")(images)

    def work(_: int) -> Tensor:
        kernel_build._load.cache_clear()  # as in a process that has not loaded it
        torch.set_num_threads(1)
        loaded = growfx.load(tmp_path / "out", runtime="sparse", example_inputs=torch.randn(2, 3, 32, 32))
        return loaded(images)

    for outputs in together(work, 2):
        torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-4)
    kept = list((tmp_path / "cache" / "lowering").rglob("*"))
    assert [file for file in kept if file.suffix == ".json"]
    assert all(json.loads(file.read_bytes()) for file in kept if file.is_file())
    assert not [file for file in kept if file.name.startswith(".")]


def test_a_kernel_asked_for_by_several_threads_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, calls = 0, 0, []
    guard = threading.Lock()

    def build(folder: Path, name: str, source: Path) -> str:
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)
        calls.append(name)
        threading.Event().wait(0.05)
        with guard:
            inside -= 1
        return "no compiler in this test"

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(kernel_build.OFF, raising=False)
    monkeypatch.setattr(kernel_build, "_load_from", build)
    kernel_build._load.cache_clear()
    try:
        assert together(lambda _: kernel_status()) == ["no compiler in this test"] * THREADS
    finally:
        kernel_build._load.cache_clear()
    assert most == 1
    assert len(calls) == 1


def test_a_choice_written_and_read_by_several_threads_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROWFX_CACHE", str(tmp_path))
    key = {"network": "n", "threads": 1}
    values = [{"kernels": [number] * 2000} for number in range(THREADS)]

    def work(number: int) -> list[Any]:
        seen = []
        for _ in range(20):
            assert choice_cache.write_choices(key, values[number]) == ""
            seen.append(choice_cache.read_choices(key))
        return seen

    assert all(seen in values for found in together(work) for seen in found)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert not list(tmp_path.rglob(".*"))


SPECS: dict[str, dict[str, Any]] = {
    "test_resnet": {"num_classes": 5, "in_chans": 1},
    "test_vit": {"num_classes": 7},
    "torchvision/squeezenet1_1": {"num_classes": 4},
    "torchvision/googlenet": {"num_classes": 3, "aux_logits": False, "init_weights": False},
}


def test_models_made_at_once_are_those_asked_for_and_remember_their_names() -> None:
    names = sorted(SPECS)
    for _ in range(ROUNDS):
        models = together(lambda i: growfx.create_model(names[i], **SPECS[names[i]]))
        for name, model in zip(names, models, strict=True):
            identity = identity_of(model)
            assert identity.spec == name
            assert identity.kwargs == SPECS[name]
            alone = growfx.create_model(name, **SPECS[name])
            assert {k: v.shape for k, v in model.state_dict().items()} == {
                k: v.shape for k, v in alone.state_dict().items()
            }
            assert not any(value.is_meta for value in model.state_dict().values())


def test_warnings_are_ignored_until_the_last_thread_leaves_and_heard_again_after_it() -> None:
    inside, left = threading.Barrier(2), threading.Event()
    before = list(warnings.filters)

    def work(number: int) -> None:
        with ignored_warnings(FutureWarning, "nothing to act"):
            inside.wait(PATIENCE)
            if number == 1:
                assert left.wait(PATIENCE)
                warnings.warn("nothing to act on", FutureWarning, stacklevel=1)
                with pytest.raises(UserWarning, match="another"):  # warnings are errors in these tests
                    warnings.warn("another", UserWarning, stacklevel=1)
        left.set()

    together(work, 2)
    assert list(warnings.filters) == before
    with pytest.warns(FutureWarning, match="nothing to act"):
        warnings.warn("nothing to act on", FutureWarning, stacklevel=1)


def test_ignored_warnings_are_heard_again_after_an_error() -> None:
    before = list(warnings.filters)
    with pytest.raises(ValueError, match="stop"), ignored_warnings():
        raise ValueError("stop")
    assert list(warnings.filters) == before
