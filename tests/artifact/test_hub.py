import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from artifact_nets import Tied, make_net, plain, same_bits
from huggingface_hub import errors
from torch import nn

import growfx
from growfx.commands.inspection import accuracy_of, facts_of
from growfx.errors import ArtifactError, ConfigError, GrowfxError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "sparse.safetensors", "README.md")


@pytest.fixture(scope="module")
def zoo_net() -> growfx.MaskedGraph:
    model = growfx.create_model("test_resnet", num_classes=4, in_chans=1)
    return growfx.wrap(model, torch.rand(2, 1, 32, 32), density=0.1)


@pytest.fixture(scope="module")
def saved(zoo_net: growfx.MaskedGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "out"
    growfx.save(zoo_net, folder, dense=True)
    return folder


def cache(root: Path, source: Path, *, shared: bool = False) -> Path:
    """A cache as huggingface_hub lays it out; returns the snapshot."""
    repository = root / "models--some--net"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for i, name in enumerate(FILES):
        blob = repository / "blobs" / (f"{i:040x}" if name != "sparse.safetensors" else f"{i:064x}")
        shutil.copy(source / name, blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        if shared and name == "sparse.safetensors":
            digest = "ab" + "0" * 62
            store = root / "blobs" / "ab" / digest
            store.parent.mkdir(parents=True)
            (root / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
            blob.rename(store)
            blob.symlink_to(f"../../blobs/ab/{digest}")
    return snapshot


def test_the_config_has_the_keys_and_values_that_timm_itself_writes(saved: Path, tmp_path: Path):
    own = json.loads((saved / "config.json").read_text())
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    timm.models.save_for_hf(model, str(tmp_path / "theirs"), safe_serialization=True)
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for key in ("architecture", "num_classes", "num_features"):
        assert own[key] == theirs[key]
    assert own["model_args"].items() <= theirs["model_args"].items()
    assert own["pretrained_cfg"].keys() >= {"input_size", "mean", "std", "interpolation", "crop_pct", "num_classes"}
    assert own.keys() - theirs.keys() == {"growfx"}


def test_timm_builds_and_fills_the_network_from_the_dense_folder(saved: Path, zoo_net: growfx.MaskedGraph):
    by_folder = timm.create_model(f"local-dir:{saved}", pretrained=True)
    by_file = timm.create_model(
        "test_resnet", num_classes=4, in_chans=1, checkpoint_path=str(saved / "model.safetensors")
    )
    assert same_bits(by_folder, plain(zoo_net))
    assert same_bits(by_file, plain(zoo_net))
    for key in ("mean", "std", "interpolation", "crop_pct"):
        ours, theirs = growfx.load(saved).pretrained_cfg[key], by_folder.pretrained_cfg[key]
        assert ours == (tuple(theirs) if isinstance(theirs, list) else theirs)


def test_a_folder_of_timm_itself_holds_no_artifact(tmp_path: Path):
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "theirs"), safe_serialization=True)
    with pytest.raises(ArtifactError, match="has no `growfx` block, so the folder holds no artifact"):
        growfx.load(tmp_path / "theirs")
    with pytest.raises(ArtifactError, match=r"no entry `growfx`. A plain safetensors file is read by safetensors"):
        growfx.load(tmp_path / "theirs" / "model.safetensors")


@pytest.mark.parametrize("shared", [False, True])
def test_a_snapshot_in_the_cache_of_the_hub_loads(
    tmp_path: Path, saved: Path, zoo_net: growfx.MaskedGraph, shared: bool
):
    snapshot = cache(tmp_path, saved, shared=shared)
    assert same_bits(growfx.load(snapshot), plain(zoo_net))
    assert growfx.inspect(snapshot).nnz == zoo_net.nnz
    (tmp_path / "link").symlink_to(snapshot)
    assert same_bits(growfx.load(tmp_path / "link"), plain(zoo_net))


def relink(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(target)


def moved(folder: Path, name: str) -> Path:
    return folder.rename(folder.with_name(name))


def broken_layouts(root: Path, snapshot: Path) -> dict[str, Path]:
    """Layouts a step away from huggingface_hub's, each made in a cache of its own."""
    weights, repository = snapshot / "sparse.safetensors", snapshot.parent.parent
    blob = repository / "blobs" / f"{1:064x}"
    changes: dict[str, Any] = {
        "absolute link": lambda: relink(weights, str(blob)),
        "another spelling": lambda: relink(weights, f"../../blobs/./{blob.name}"),
        "to the snapshot's neighbour": lambda: (snapshot.parent / "f").touch() or relink(weights, "../f"),
        "no digest": lambda: blob.rename(blob.with_name("weights")) and relink(weights, "../../blobs/weights"),
        "upper case": lambda: (
            blob.rename(blob.with_name("A" * 64)) and relink(weights, f"../../blobs/{blob.with_name('A' * 64).name}")
        ),
        "blob is a link": lambda: blob.rename(root / "elsewhere") and blob.symlink_to(root / "elsewhere"),
        "blobs is a link": lambda: moved(blob.parent, "real") and (repository / "blobs").symlink_to("real"),
        "blob is a folder": lambda: (blob.unlink(), blob.mkdir()),
        "no commit": lambda: moved(snapshot, "main"),
        "no snapshots": lambda: moved(snapshot.parent, "versions"),
        "no repository": lambda: moved(repository, "net"),
    }
    return changes


LAYOUTS = [
    "absolute link",
    "another spelling",
    "to the snapshot's neighbour",
    "no digest",
    "upper case",
    "blob is a link",
    "blobs is a link",
    "blob is a folder",
    "no commit",
    "no snapshots",
    "no repository",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_other_link_out_of_a_folder_is_refused(tmp_path: Path, saved: Path, layout: str):
    snapshot = cache(tmp_path / "cache", saved)
    changes = broken_layouts(tmp_path, snapshot)
    assert sorted(changes) == sorted(LAYOUTS)
    changes[layout]()
    (moved_snapshot,) = (tmp_path / "cache").glob("*/*/*/sparse.safetensors")
    with pytest.raises(ArtifactError, match=r"is a link out of the folder|not a regular file"):
        growfx.load(moved_snapshot.parent)


@pytest.mark.parametrize("change", ["no marker", "another place", "store is a link", "entry is a link"])
def test_a_shared_blob_must_lie_where_the_hub_puts_it(tmp_path: Path, saved: Path, change: str):
    root = tmp_path / "cache"
    snapshot = cache(root, saved, shared=True)
    digest = "ab" + "0" * 62
    entry, blob = root / "blobs" / "ab" / digest, snapshot.parent.parent / "blobs" / f"{1:064x}"
    if change == "no marker":
        (root / "blobs" / ".huggingface-shared-blobs").unlink()
    elif change == "another place":
        entry.rename(root / "elsewhere")
        relink(blob, "../../elsewhere")
    elif change == "store is a link":
        (root / "blobs").rename(tmp_path / "store")
        (root / "blobs").symlink_to(tmp_path / "store")
    else:
        entry.rename(root / "elsewhere")
        entry.symlink_to("../../elsewhere")
    with pytest.raises(ArtifactError, match="is a link out of the folder"):
        growfx.load(snapshot)


def test_a_config_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path, saved: Path):
    folder = Path(shutil.copytree(saved, tmp_path / "out"))
    (folder / "config.json").rename(tmp_path / "elsewhere.json")
    (folder / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ArtifactError, match=r"its `config.json` is a link out of the folder"):
        growfx.load(folder)


@pytest.mark.slow
def test_a_name_on_the_hub_loads_from_the_cache_when_offline(tmp_path: Path, saved: Path, zoo_net: growfx.MaskedGraph):
    cache(tmp_path / "cache", saved)
    code = (
        "import growfx\n"
        "print(growfx.inspect('hf-hub:some/net').nnz, growfx.inspect('hf-hub:some/net@main').nnz)\n"
        f"print(growfx.inspect('hf-hub:some/net@{COMMIT}').nnz, sum(x.nnz for x in "
        "growfx.to_scipy('hf-hub:some/net').values()))\n"
        "for spec in ('hf-hub:other/net', 'hf-hub:some/net@v2'):\n"
        "    try:\n"
        "        growfx.load(spec)\n"
        "    except growfx.ArtifactError as error:\n"
        "        print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    *found, unknown, revision = run.stdout.splitlines()
    assert " ".join(found).split() == [str(zoo_net.nnz)] * 4
    for line in (unknown, revision):
        assert "is not in the local cache and the Hub cannot be reached: connect (or unset HF_HUB_OFFLINE)" in line


class Hub:
    """Stands for huggingface_hub.snapshot_download and notes what it is asked for."""

    def __init__(self, result: Path | Exception) -> None:
        self.result, self.asked = result, []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, allow_patterns))
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    def serve(result: Path | Exception) -> Hub:
        fake = Hub(result)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return fake

    return serve


def test_two_files_of_one_commit_are_fetched_and_nothing_else(
    tmp_path: Path, saved: Path, zoo_net: growfx.MaskedGraph, hub: Any
):
    fake = hub(cache(tmp_path, saved))
    assert same_bits(growfx.load("hf-hub:some/net@v1.0"), plain(zoo_net))
    assert fake.asked == [
        ("some/net", "v1.0", ["config.json"]),
        ("some/net", COMMIT, ["sparse.safetensors"]),
    ]


def test_the_commands_take_a_name_on_the_hub(tmp_path: Path, saved: Path, zoo_net: growfx.MaskedGraph, hub: Any):
    snapshot = cache(tmp_path, saved)
    hub(snapshot)
    facts, local = facts_of("hf-hub:some/net"), facts_of(str(snapshot))
    assert facts == local
    assert (facts["kind"], facts["nnz"]) == ("artifact", zoo_net.nnz)
    assert growfx.inspect(Path("hf-hub:some/net")).nnz == zoo_net.nnz
    hub(errors.LocalEntryNotFoundError("x"))
    for command in (facts_of, lambda path: accuracy_of(Path(path), "digits", "test")):
        with pytest.raises(ArtifactError, match=r"^`hf-hub:some/net`: .*is not in the local cache"):
            command("hf-hub:some/net")


def test_a_config_from_the_hub_cannot_ask_for_other_files(tmp_path: Path, saved: Path, hub: Any):
    snapshot = cache(tmp_path, saved)
    config = json.loads((saved / "config.json").read_text())
    for name in ("../../secret", "*", "a[bc]"):
        config["growfx"]["weights"] = name
        (snapshot / "config.json").write_text(json.dumps(config))
        fake = hub(snapshot)
        with pytest.raises(ArtifactError, match=r"only a plain file name is allowed|is missing"):
            growfx.load("hf-hub:some/net")
        assert all(pattern != "*" for _, _, patterns in fake.asked for pattern in patterns)


@pytest.mark.parametrize(
    "spec", ["net", "a/b/c", "a/b@", "@main", "", "../b", "a/..", "a/b@../c", "a b/c", "ä/b", "a/b\n", "/etc/passwd"]
)
def test_what_is_no_name_of_the_hub_is_refused_before_anything_is_fetched(spec: str, hub: Any):
    fake = hub(RuntimeError("must not be called"))
    with pytest.raises(ArtifactError, match="names no Hub model; expected `hf-hub:USER/NAME`"):
        growfx.load(f"hf-hub:{spec}")
    assert fake.asked == []


def http(kind: type[Exception]) -> Exception:
    return kind.__new__(kind, "message")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (http(errors.RepositoryNotFoundError), "the Hub knows no model `some/net`, or it is private"),
        (http(errors.GatedRepoError), "`some/net` is gated: ask for access on its page"),
        (http(errors.RevisionNotFoundError), "has no such revision; allowed: a branch, a tag or a full commit hash"),
        (errors.LocalEntryNotFoundError("x"), "is not in the local cache and the Hub cannot be reached"),
        (errors.OfflineModeIsEnabled("x"), "`some/net` cannot be fetched .OfflineModeIsEnabled: x"),
        (http(errors.HfHubHTTPError), "`some/net` cannot be fetched"),
        (OSError(28, "No space left on device"), "cannot be fetched .*No space left on device"),
        (errors.HFValidationError("bad name"), "cannot be fetched .HFValidationError: bad name"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "text",
)
def test_an_error_of_the_hub_says_what_to_do(hub: Any, error: Exception, text: str):
    hub(error)
    with pytest.raises(ArtifactError, match=text) as caught:
        growfx.load("hf-hub:some/net")
    assert str(caught.value).startswith("`hf-hub:some/net`: ")
    assert caught.value.__cause__ is error


def test_values_are_cast_after_exact_decoding_as_torch_casts(saved: Path, zoo_net: growfx.MaskedGraph):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = growfx.load(saved, dtype=dtype, device="cpu")
        assert same_bits(model, plain(zoo_net).to(dtype))
        assert {t.dtype for t in model.buffers()} == {dtype, torch.int64}
        assert not model.training


def test_casting_an_own_instance_keeps_its_parameters(tmp_path: Path):
    growfx.save(make_net(0.3), tmp_path / "out")
    model = Tied()
    before = dict(model.named_parameters())
    assert growfx.load(tmp_path / "out", model=model, dtype=torch.bfloat16) is model
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.second.weight is model.first.weight
    assert model.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": torch.int8}, "`dtype=torch.int8` is not a floating dtype; expected e.g. torch.float32"),
        ({"dtype": "float16"}, "`dtype=float16` is not a floating dtype"),
        ({"device": "toaster"}, "`device=toaster` cannot be used here"),
        ({"device": "meta"}, "`device=meta` holds no weights"),
    ],
)
def test_a_dtype_or_device_that_cannot_be_is_refused_first(tmp_path: Path, options: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        growfx.load(tmp_path / "nothing", **options)


def test_a_default_device_without_memory_is_refused(saved: Path):
    with torch.device("meta"), pytest.raises(ConfigError, match="the default device is `meta`, which holds no"):
        growfx.load(saved)


def test_a_loaded_network_exports_to_a_graph_of_torch(saved: Path):
    model = growfx.load(saved)
    x = torch.rand(2, 1, 32, 32)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    for batch in (2, 5):
        x = torch.rand(batch, 1, 32, 32)
        assert torch.allclose(exported.module()(x), model(x), atol=1e-6)


def test_errors_of_loading_are_all_of_one_tree(tmp_path: Path):
    assert issubclass(ArtifactError, GrowfxError)
    for wrong in (tmp_path / "x", "hf-hub:", str(tmp_path / "a\0b")):
        with pytest.raises(GrowfxError):
            growfx.load(wrong, model=nn.Linear(1, 1))
