"""`growfx.load(path, runtime="sparse")` with a kernel for each layer: outputs, choice, cache, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import some
from lower_nets import NETS, Picky, Residual, make, same, saved
from torch import Tensor, nn

import growfx
from growfx.deploy.loading import SparseRuntime
from growfx.errors import ArtifactError, ConfigError
from growfx.passes.lower import native as lower_native
from growfx.passes.lower import network as lower_network
from growfx.passes.lower import timing as lower_timing
from growfx.runtime import sparse_kernel
from growfx.runtime.choice_cache import cache_folder, ignored_choices
from growfx.runtime.report import LayerLowering

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setenv("GROWFX_CACHE", str(tmp_path / "cache"))
    # The whole network in one call has tests of its own, in `test_native_runtime.py`.
    monkeypatch.setattr(lower_native, "library_status", lambda: "switched off")
    # What is fastest is not what these tests are about.
    monkeypatch.setattr(lower_timing, "_SECONDS", 0.0)
    monkeypatch.setattr(lower_network, "_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(folder: Path, kind: str = "residual", **options: Any) -> Any:
    options = {"example_inputs": X[:1], **options}
    return growfx.load(folder, model=NETS[kind](), runtime="sparse", **options)


def prefer(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    """Let every timing say that a choice is the fastest, and the lowered network faster than others."""

    def minima(calls: Any, **_: Any) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: 1.0 if name in (choice, "lowered") else 2.0 for name in calls}

    monkeypatch.setattr(lower_timing, "interleaved_minima", minima)
    monkeypatch.setattr(lower_network, "interleaved_minima", minima)


CHOICES = list(itertools.product(NETS, ["dense", "csr", "direct"]))


@pytest.mark.parametrize(("kind", "choice"), some(CHOICES, lambda case: case in (*CHOICES[::4], ("picky", "csr"))))
def test_outputs_are_those_of_the_dense_network(
    kind: str, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, choice)
    folder, dense = saved(kind, tmp_path / "net")
    net = load(folder, kind)
    assert isinstance(net, SparseRuntime)
    assert net.lowering.taken == "lowered"
    with torch.no_grad():
        for x in (X[:1], X, torch.randn(3, 3, 16, 20), X[:, :, :8, :8]):
            same(net(x.clone()), dense(x.clone()))
    with torch.inference_mode():
        same(net(X), dense(X))


def test_the_report_tells_what_was_chosen_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    folder, dense = saved("mixed", tmp_path / "net")
    report = load(folder, "mixed").lowering
    assert report.choices == dict.fromkeys(("left", "right", "gate", "twice", "head"), "csr") | {"depthwise": "dense"}
    by_name = {layer.name: layer for layer in report.layers}
    assert list(by_name) == ["left", "right", "depthwise", "gate", "twice", "head"]
    assert by_name["depthwise"].reason == "it has 8 groups"
    left = by_name["left"]
    assert (left.weight, left.input) == ((4, 3, 3, 3), (1, 3, 12, 12))
    assert left.density == pytest.approx(float((dense.get_submodule("left").weight != 0).float().mean()))
    assert left.reason.startswith("2.0x as fast as dense")
    assert left.microseconds["csr"] == 1.0
    assert by_name["twice"].microseconds["csr"] == 2.0  # it is called twice
    assert report.inputs == ((1, 3, 12, 12),)
    assert report.threads == torch.get_num_threads()
    shown = str(report)
    assert "5 layers csr, 1 layers dense" in shown
    assert "whole network on 1x3x12x12, float32" in shown
    assert json.loads(json.dumps(report.to_json()))["layers"][0]["choice"] == "csr"


def test_packed_weights_take_the_place_of_dense_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    folder, dense = saved("residual", tmp_path / "net", density=0.05)
    net = load(folder)
    before, after = net.lowering.nbytes
    layers = [m for m in dense.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert before == sum(t.nbytes for m in layers for t in m.parameters())
    assert after < before / 3
    stored = {id(t): t.nbytes for t in (*net.parameters(), *net.buffers()) if not t.is_meta}
    assert sum(stored.values()) == after
    assert sum(layer.nbytes for layer in net.lowering.layers) == after


def test_a_margin_decides_for_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved("residual", tmp_path / "net")
    times = {"dense": 100.0, "csr": 98.0, "direct": 99.0}
    monkeypatch.setattr(lower_timing, "interleaved_minima", lambda calls, **_: {name: times[name] for name in calls})
    report = load(folder).lowering
    assert set(report.choices.values()) == {"dense"}
    assert report.layers[0].reason.startswith("csr is faster by less than 3%")


@pytest.mark.skipif(bool(sparse_kernel.kernel_status()), reason=sparse_kernel.kernel_status() or "the kernel is there")
def test_layers_whose_density_makes_the_choice_clear_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network() -> nn.Module:
        return nn.Sequential(*[nn.Linear(128, 128) for _ in range(3)], nn.Linear(128, 2)).eval()

    prefer(monkeypatch, "csr")
    x = torch.randn(80, 128)
    net = growfx.wrap(network(), x).eval()
    densities = {"0": 0.05, "1": 0.3, "2": 0.58, "3": 0.05}
    net.set_masks({name: torch.rand(net.layers[name].mask.shape) < d for name, d in densities.items()})
    growfx.save(net, tmp_path)
    got: Any = growfx.load(tmp_path, model=network(), runtime="sparse", example_inputs=x)
    assert got.lowering.choices == {"0": "direct", "1": "csr", "2": "dense", "3": "csr"}
    assert [bool(layer.microseconds) for layer in got.lowering.layers] == [False, True, False, True]
    assert [layer.input for layer in got.lowering.layers] == [(80, 128)] * 4
    with torch.no_grad():
        same(got(x), net(x))
    in_16_bits: Any = growfx.load(tmp_path, model=network(), runtime="sparse", example_inputs=x, dtype=torch.bfloat16)
    assert all(layer.microseconds for layer in in_16_bits.lowering.layers)


@pytest.mark.parametrize("slow", [("lowered",), ("lowered", "dense")])
def test_a_lowered_network_that_is_not_faster_is_not_taken(
    slow: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "csr")
    named = lambda calls, **_: {name: 2.0 if name in slow else 1.0 for name in calls}  # noqa: E731
    monkeypatch.setattr(lower_network, "interleaved_minima", named)
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    assert net.lowering.taken == ("dense" if len(slow) == 1 else "plain")
    assert set(net.lowering.choices.values()) == {"dense"}
    with torch.no_grad():
        same(net(X), dense(X))


def test_a_network_that_would_compute_something_else_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "csr")
    right = lower_network.make_kernel
    monkeypatch.setattr(lower_network, "make_kernel", lambda plain, mask, choice: right(plain, ~mask, choice))
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    assert net.lowering.taken == "plain"
    assert "so the network runs unchanged" in str(net.lowering)
    with torch.no_grad():
        same(net(X), dense(X))


def test_parts_that_are_recorded_whole_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    folder, _ = saved("picky", tmp_path / "net")
    report = load(folder, "picky").lowering
    assert report.choices == {"conv": "csr", "head": "csr"}
    assert any(note.startswith("`part` runs unchanged, since it was recorded whole: ") for note in report.notes)


def test_a_network_that_cannot_be_recorded_runs_as_it_is(tmp_path: Path) -> None:
    folder, dense = saved("picky", tmp_path / "net")

    class Whole(Picky):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) != 0 else x

    net: Any = growfx.load(folder, model=Whole(), runtime="sparse", example_inputs=X)
    assert net.lowering.taken == "plain"
    assert any("could not be recorded" in note for note in net.lowering.notes)
    with torch.no_grad():
        same(net(X), dense(X))


def test_weights_that_the_model_reads_itself_or_asks_for_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.read, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.first.weight.device, self.last.weight.dtype)
            return self.last(self.first(x) + nn.functional.linear(self.read(x), self.read.weight))

    prefer(monkeypatch, "csr")
    x = torch.randn(2, 6)
    dense = Reader().eval()
    net = growfx.wrap(dense, x, density=0.4)
    growfx.save(net, tmp_path / "net")
    got: Any = growfx.load(tmp_path / "net", model=Reader(), runtime="sparse", example_inputs=x)
    assert got.lowering.choices == {"first": "csr", "read": "dense", "last": "csr"}
    with torch.no_grad():
        same(got(x), net.eval()(x))
        longer = torch.randn(2, 3, 6)  # recorded anew, from the packed layers
        same(got(longer), net(longer))


# -- the cache ---------------------------------------------------------------------------------------------------------


def cached_files() -> list[Path]:
    return sorted((cache_folder() / "lowering").iterdir())


def test_what_was_timed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    folder, dense = saved("residual", tmp_path / "net")
    first = load(folder)
    assert not first.lowering.cached
    (file,) = cached_files()
    prefer(monkeypatch, "dense")
    second = load(folder)
    assert second.lowering.cached
    assert second.lowering.layers == first.lowering.layers
    assert second.lowering.microseconds == first.lowering.microseconds
    assert cached_files() == [file]
    with torch.no_grad():
        same(second(X), dense(X))


@pytest.mark.slow
def test_other_threads_batches_masks_and_kernels_are_timed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "csr")
    folder, _ = saved("residual", tmp_path / "net")
    other, _ = saved("residual", tmp_path / "other", density=0.2)
    load(folder)
    assert not load(other).lowering.cached
    assert not load(folder, batch=2).lowering.cached
    assert load(folder, example_inputs=X).lowering.cached
    torch.set_num_threads(torch.get_num_threads() % 2 + 1)
    assert not load(folder).lowering.cached
    monkeypatch.setattr(sparse_kernel, "kernel_status", lambda: "switched off")
    assert not load(folder).lowering.cached
    assert len(cached_files()) == 5


def _row(value: Any) -> Any:
    return value["value"]["layers"][0]


DAMAGE = {
    "no JSON": lambda value: None,
    "no object": lambda value: value.clear(),
    "another key": lambda value: value["key"].update(threads=99),
    "no layers": lambda value: value["value"].pop("layers"),
    "a layer less": lambda value: value["value"]["layers"].pop(),
    "a layer twice": lambda value: value["value"]["layers"].append(_row(value)),
    "an unknown layer": lambda value: _row(value).update(name="nothing"),
    "an unknown choice": lambda value: _row(value).update(choice="magic"),
    "a time that is none": lambda value: _row(value).update(microseconds={"csr": "fast"}),
    "a time that is not finite": lambda value: value["value"]["network"].update(lowered=float("nan")),
    "no time of the network": lambda value: value["value"]["network"].pop("plain"),
    "another field": lambda value: _row(value).update(more=1),
}


@pytest.mark.slow
def test_a_damaged_cache_is_timed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    folder, dense = saved("residual", tmp_path / "net")
    load(folder)
    (file,) = cached_files()
    good = file.read_text()
    for case, change in DAMAGE.items():
        value = json.loads(good)
        change(value)
        file.write_text(good[:100] if case == "no JSON" else json.dumps(value))
        net = load(folder)
        assert not net.lowering.cached, case
        assert json.loads(file.read_text()) == json.loads(good), case
        with torch.no_grad():
            same(net(X), dense(X))


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GROWFX_CACHE", str(tmp_path / "file"))
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    assert any(note.startswith("the choice was not kept: ") for note in net.lowering.notes)
    with torch.no_grad():
        same(net(X), dense(X))


def test_the_folder_follows_the_conventions_of_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROWFX_CACHE", "/named")
    assert cache_folder() == Path("/named")
    monkeypatch.delenv("GROWFX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/growfx")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/somebody")
    assert cache_folder() == Path("/somebody/.cache/growfx")


def test_a_row_of_the_cache_is_what_was_written_or_nothing() -> None:
    row = LayerLowering("a", (2, 3), 0.5, (1, 3), "csr", {"csr": 1.0}, "why", 7)
    value = json.loads(json.dumps(row.__dict__))
    assert LayerLowering.from_json(value) == row
    for wrong in ({**value, "density": -1}, {**value, "weight": [2, "3"]}, {**value, "nbytes": None}, [], None):
        assert LayerLowering.from_json(wrong) is None


# -- without a compiler, in other types, and what is refused ----------------------------------------------------------


def test_without_a_compiler_the_choice_narrows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    monkeypatch.setattr(sparse_kernel, "kernel_status", lambda: "no C++ compiler: `c++` cannot be run")
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    assert set(net.lowering.choices.values()) == {"csr"}
    assert "no direct: no C++ compiler" in net.lowering.layers[0].reason
    assert "no direct kernel: no C++ compiler: `c++` cannot be run" in str(net.lowering)
    with torch.no_grad():
        same(net(X), dense(X))


def test_bfloat16_has_no_sparse_product_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "direct")
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder, dtype=torch.bfloat16)
    assert net.lowering.dtype == "bfloat16"
    assert "csr" not in net.lowering.layers[0].microseconds
    with torch.no_grad():
        y = net(X.bfloat16())
        assert y.dtype == torch.bfloat16
        same(y.float(), dense(X), tolerance=0.05)
        with torch.autocast("cpu", dtype=torch.float16):
            assert net(X.bfloat16()).dtype == torch.bfloat16


def test_a_compacted_artifact_loads_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    net = make("residual")
    mask = net.layers["first"].mask.clone()
    mask[:4] = False
    other = net.layers["shortcut"].mask.clone()
    other[:4] = False
    net.set_masks({"first": mask, "shortcut": other})
    net.layers["shortcut"].bias.data[:4] = 0
    growfx.save(net, tmp_path / "net", compact=True)
    small = load(tmp_path / "net")
    with torch.no_grad():
        same(small(X), net(X), tolerance=1e-4)


def test_it_only_infers(tmp_path: Path) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    assert not any(module.training for module in net.modules())
    assert net.eval() is net
    assert not any(parameter.requires_grad for parameter in net.parameters())
    refused = {
        "only infers; to train, load with": lambda: net.train(),
        "computes no gradients": lambda: net.requires_grad_(),
        "an input requires a gradient": lambda: net(X.clone().requires_grad_()),
        "keeps its weights packed": lambda: net.load_state_dict({}),
        "stays torch.float32 on `cpu`": lambda: net.half(),
    }
    for message, call in refused.items():
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(TypeError, match="is not pickled"):
        pickle.dumps(net)
    assert net.to("cpu") is net
    assert net.float() is net
    with torch.no_grad():
        same(net(X.clone().requires_grad_()), dense(X))
    assert not net(X).requires_grad


def test_a_copy_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    twin = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.zero_()
    with torch.no_grad():
        same(twin(X), dense(X))
        same(twin(X[:, :, :9]), dense(X[:, :, :9]))
    assert twin.lowering == net.lowering


def test_threads_may_change_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "direct")
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            same(net(X), dense(X))


def test_the_models_own_attributes_are_there(tmp_path: Path) -> None:
    class Named(Residual):
        answer = 42

    folder, _ = saved("residual", tmp_path / "net")
    net = growfx.load(folder, model=Named(), runtime="sparse", example_inputs=X)
    assert net.answer == 42
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        net.nothing  # noqa: B018


def test_a_network_loaded_in_inference_mode_is_used_anywhere(tmp_path: Path) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    model, other = Residual(), Residual()
    with torch.inference_mode():
        plain = growfx.load(folder, model=model)
        net: Any = growfx.load(folder, model=other, runtime="sparse", example_inputs=X)
        foreign = Residual()
    with pytest.raises(ArtifactError, match=r"of `model=` was made inside `torch\.inference_mode`; build it outside"):
        growfx.load(folder, model=foreign)
    assert torch.equal(plain(X), dense(X))
    plain(X).sum().backward()
    same(net(X), dense(X).detach())
    assert not any(value.is_inference() for value in (*net.parameters(), *net.buffers()))


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    folder, _ = saved("residual", tmp_path / "net")
    for options, message in (
        ({"runtime": "fast"}, "`runtime=fast` is unknown; allowed: dense, sparse"),
        ({"runtime": "dense"}, '`example_inputs` is for `runtime="sparse"`'),
        ({"runtime": "dense", "example_inputs": None, "batch": 2}, '`batch` is for `runtime="sparse"`'),
        ({"dtype": torch.float16}, "`dtype=torch.float16` has no sparse runtime; allowed: torch.float32"),
        ({"device": "meta"}, "`device=meta` holds no weights"),
        ({"device": "toaster"}, "`device=toaster` cannot be used here"),
        ({"batch": 0}, "`batch=0` is not a number of rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            growfx.load(folder, model=Residual(), **{"runtime": "sparse", "example_inputs": X, **options})
    net = make("residual").to(torch.float64)
    growfx.save(net, tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"its tensors are torch.float64; pass `dtype=torch.float32`"):
        load(tmp_path / "wide")
    assert load(tmp_path / "wide", dtype=torch.float32)(X).dtype == torch.float32
    with pytest.raises(ArtifactError, match="there is no artifact"):
        growfx.load(tmp_path / "nothing", runtime="sparse")
    with pytest.raises(growfx.TraceError, match="fails on inputs of shape"):
        load(folder, example_inputs=X[:, :2])


def noisy(monkeypatch: pytest.MonkeyPatch, choice: str, spread: float, times: float = 1.0) -> None:
    """As `prefer`, with a spread, and all but the best so many times as slow."""

    def minima(calls: Any, *, spreads: list[float] | None = None, **_: Any) -> dict[str, float]:
        if spreads is not None:
            spreads += [spread] * len(calls)
        return {name: times if name in (choice, "lowered") else 2.0 * times for name in calls}

    monkeypatch.setattr(lower_timing, "interleaved_minima", minima)
    monkeypatch.setattr(lower_network, "interleaved_minima", minima)


def test_what_was_timed_on_a_busy_machine_is_timed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved("residual", tmp_path / "net")
    noisy(monkeypatch, "dense", spread=2.0, times=10.0)
    assert set(load(folder).lowering.choices.values()) == {"dense"}
    noisy(monkeypatch, "csr", spread=0.01)
    again = load(folder).lowering
    assert not again.cached
    assert "csr" in again.choices.values()
    noisy(monkeypatch, "dense", spread=0.01)
    kept = load(folder).lowering
    assert kept.cached
    assert kept.choices == again.choices
    assert json.loads(cached_files()[0].read_text())["value"]["spread"] == 0.01


def test_the_least_of_noisy_runs_counts_and_there_is_an_end_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved("residual", tmp_path / "net")
    noisy(monkeypatch, "csr", spread=1.0, times=1.0)
    load(folder)
    noisy(monkeypatch, "dense", spread=1.0, times=50.0)
    cached = [load(folder).lowering for _ in range(6)]
    assert [report.cached for report in cached] == [False] * 4 + [True] * 2
    timed = [layer for layer in cached[-1].layers if layer.microseconds]
    assert timed
    assert all(layer.microseconds["csr"] == 1.0 and layer.choice == "csr" for layer in timed)


@pytest.mark.parametrize("field", some(["runs", "spread"], lambda field: field == "spread"))
def test_a_cache_that_does_not_say_how_noisy_it_was_is_timed_anew(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "csr")
    folder, _ = saved("residual", tmp_path / "net")
    load(folder)
    (file,) = cached_files()
    value = json.loads(file.read_text())
    for wrong in (None, "much", -1, True):
        value["value"].pop(field, None)
        if wrong is not None:
            value["value"][field] = wrong
        if wrong is True and field == "spread":
            continue  # a number as good as 1
        file.write_text(json.dumps(value))
        assert not load(folder).lowering.cached


def test_fresh_ignores_what_was_kept_and_writes_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "csr")
    folder, _ = saved("residual", tmp_path / "net")
    load(folder)
    prefer(monkeypatch, "dense")
    with ignored_choices():
        assert not load(folder).lowering.cached
    after = load(folder).lowering
    assert after.cached
    assert set(after.choices.values()) == {"dense"}


# -- models that write into tensors ------------------------------------------------------------------------------------


class Writing(nn.Module):
    """Writes into its input, into what a layer returned, and into what it keeps from an earlier call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 4, 1)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        y = self.a(x)
        y += 1
        if self.kept is None:
            self.kept = torch.zeros(1)
        self.kept.fill_(2.0)
        return self.b(y.clamp_(min=0)) * self.kept


@pytest.mark.parametrize("choice", ["dense", "csr", "direct"])
def test_a_model_may_write_into_what_it_was_given_and_what_layers_return(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Writing().eval(), X.clone(), density=0.3)
    growfx.save(net, tmp_path / "net")
    prefer(monkeypatch, choice)
    given = X[:1].clone()
    runtime = growfx.load(tmp_path / "net", model=Writing(), runtime="sparse", example_inputs=given)
    assert torch.equal(given, X[:1])
    dense = growfx.load(tmp_path / "net", model=Writing())
    with torch.no_grad():
        for _ in range(2):
            same(runtime(X.clone()), dense(X.clone()))
    with torch.inference_mode():
        same(runtime(X.clone()), dense(X.clone()))
