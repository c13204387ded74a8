import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_nets import Tied, forge, make_net, plain, read_header, same_bits, write_header
from safetensors.torch import save_file
from torch import nn

import growfx
from growfx.artifact.writer import load_masks, load_state
from growfx.errors import ArtifactError

WEIGHTS = "sparse.safetensors"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    growfx.save(make_net(0.3), folder / "out")
    model = growfx.create_model("test_resnet", num_classes=4)
    growfx.save(growfx.wrap(model, torch.rand(1, 3, 32, 32), density=0.05), folder / "zoo")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(saved / "out", tmp_path / "out")


@pytest.fixture
def zoo_folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "zoo", tmp_path / "zoo")


def refuses(path: Path, text: str, **options: Any) -> None:
    """`load` fails with an ArtifactError that says `text`, and leaves the given instance alone."""
    if "model" not in options:
        options["model"] = Tied()
    model = options["model"]
    before = {k: v.clone() for k, v in model.state_dict().items()} if model is not None else {}
    with pytest.raises(ArtifactError, match=text):
        growfx.load(path, **options)
    if model is not None:
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def error_or_same(path: Path, expected: nn.Module) -> bool:
    """Whether `load` refuses; what it does not refuse must be bit by bit the network that was saved."""
    try:
        model = growfx.load(path, model=Tied())
    except ArtifactError:
        return True
    assert same_bits(model, expected)
    return False


def mutate(content: bytes, rng: random.Random) -> bytes:
    at, data = rng.randrange(len(content)), bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + rng.randrange(1, 9)]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    else:
        data[at : at + 8] = rng.randbytes(8)
    return bytes(data)


def test_four_hundred_mutations_are_refused_or_change_nothing(folder: Path):
    expected, rng = plain(make_net(0.3)), random.Random(1)
    content, alone = (folder / WEIGHTS).read_bytes(), folder / "alone.safetensors"
    refused = 0
    for _ in range(400):
        alone.write_bytes(mutate(content, rng))
        refused += error_or_same(alone, expected)
    assert refused >= 390


def test_bit_flips_in_the_header_are_refused_or_change_nothing(folder: Path):
    expected, rng = plain(make_net(0.3)), random.Random(2)
    content, alone = (folder / WEIGHTS).read_bytes(), folder / "alone.safetensors"
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(200):
        data = bytearray(content)
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        alone.write_bytes(data)
        error_or_same(alone, expected)


def test_any_change_of_the_weights_file_in_a_folder_is_refused(folder: Path):
    rng, content = random.Random(3), (folder / WEIGHTS).read_bytes()
    for _ in range(60):
        changed = mutate(content, rng)
        if changed != content:
            (folder / WEIGHTS).write_bytes(changed)
            refuses(folder, "is not the file that `config.json` describes")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in items for p in leaves(v, (*path, k)))]


def set_at(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.filterwarnings("ignore:`model=` is not the network")  # outputs may be forged, too
def test_a_forged_manifest_is_refused_or_changes_nothing(folder: Path):
    expected, rng = plain(make_net(0.3)), random.Random(4)
    content, alone = (folder / WEIGHTS).read_bytes(), folder / "alone.safetensors"
    odd: list[Any] = [None, True, -1, 0, 1, 2.5, 255, 2**34, 2**70, 10**400, "", "x", "F16", [], [0], [2**40], {}]
    refused = 0
    for _ in range(400):
        alone.write_bytes(content)

        def edit(manifest: Json) -> None:
            set_at(manifest, rng.choice(leaves(manifest)[1:]), rng.choice(odd))

        forge(alone, edit)
        refused += error_or_same(alone, expected)
        with suppress(ArtifactError):
            growfx.inspect(alone)
            load_masks(alone, max_bytes=10**6)
    assert refused > 300


def tensor(name: str, **changes: Any) -> Callable[[Json], None]:
    def edit(manifest: Json) -> None:
        for key, value in changes.items():
            set_at(manifest["tensors"][name], tuple(key.split("__")), value)

    return edit


def top(**changes: Any) -> Callable[[Json], None]:
    return lambda manifest: manifest.update(changes)


FORGERIES: list[tuple[Callable[[Json], None], str]] = [
    (top(version="2.0"), r"written in format version 2.0; this growfx reads versions up to 1.2: upgrade growfx"),
    (top(version="one"), "`one` is not a format version"),
    (top(format="other.sparse"), "format is `other.sparse`; this reads `growfx.sparse`"),
    (top(mask="inferred"), "field `mask` is not `explicit`"),
    (top(tensors=[]), "field `tensors` is missing or of the wrong type"),
    (top(layers=[["conv", "no.such"]]), "the masked layers do not agree with the tensors"),
    (top(layers=[]), "the masked layers do not agree with the tensors"),
    (top(layers=[["conv", "conv.weight"], ["conv", "conv.weight"]]), "listed twice"),
    (top(layers=["conv"]), "not a list of name pairs"),
    (top(aliases={"x": "no.such"}), "`x` is not a further name of a stored tensor"),
    (top(aliases={"conv.weight": "conv.bias"}), "`conv.weight` is not a further name"),
    (top(aliases={}), r"the artifact lacks `second.weight`"),
    (tensor("conv.weight", index__codec="lzma"), "codec `lzma` is unknown to this growfx; known: bitmask, gap8"),
    (tensor("conv.weight", values__codec="zstd"), "codec `zstd` is unknown to this growfx; known: planes, raw"),
    (tensor("conv.weight", dtype="C32"), "dtype `C32` is unknown; allowed: .*F32"),
    (tensor("conv.weight", dtype="C64"), "sparse tensors of dtype `C64` are unknown"),
    (tensor("conv.bias", dtype="C64"), "`tensors` and `requires` do not agree about complex tensors"),
    (top(requires=["complex"]), "`tensors` and `requires` do not agree about complex tensors"),
    (top(inputs={}), "field `inputs` is not a list"),
    (top(inputs=[]), "field `inputs` is not a list"),
    (top(inputs=[{"dtype": "F32", "keyword": None, "shape": [1]}] * 65), "field `inputs` is not a list of up to 64"),
    (top(inputs=[None]), "`inputs`: it has neither a shape and a dtype nor a value"),
    (top(inputs=[{"dtype": "F32", "keyword": None, "shape": [2**20, 2**20]}]), "`inputs`: its shape is none"),
    (top(inputs=[{"dtype": "F32", "keyword": None, "shape": [True]}]), "`inputs`: its shape is none"),
    (top(inputs=[{"dtype": "F32", "keyword": None, "shape": [1] * 65}]), "`inputs`: its shape is none"),
    (top(inputs=[{"dtype": "F99", "keyword": None, "shape": [1]}]), "`inputs`: its dtype is unknown"),
    (top(inputs=[{"dtype": ["F32"], "keyword": None, "shape": [1]}]), "`inputs`: its dtype is unknown"),
    (top(inputs=[{"dtype": "F32", "keyword": "a b", "shape": [1]}]), "`inputs`: its keyword is not a name"),
    (top(inputs=[{"keyword": "x", "value": 1}] * 2), "names a keyword twice"),
    (top(inputs=[{"keyword": "x", "value": 1}, {"keyword": None, "value": 1}]), "or has a positional input after it"),
    (top(inputs=[{"keyword": None, "value": [1]}]), "`inputs`: its value is not a number or a short text"),
    (top(inputs=[{"keyword": None, "value": "x" * 300}]), "`inputs`: its value is not a number or a short text"),
    (top(inputs=[{"keyword": None, "value": 2**70}]), "`inputs`: its value is not a number or a short text"),
    (top(identity_checked=1), "field `identity_checked` is neither true nor false"),
    (top(notes="because"), "field `notes` is not a list of a few short texts"),
    (top(notes=["x" * 3000]), "field `notes` is not a list of a few short texts"),
    (top(notes=["x"] * 17), "field `notes` is not a list of a few short texts"),
    (tensor("conv.weight", dtype="F16"), "4 byte planes instead of 2"),
    (tensor("conv.weight", nnz=10**6), "1000000 active weights in 648 elements"),
    (tensor("conv.weight", nnz=3), "positions instead of 3|longer than its values"),
    (tensor("conv.weight", nnz=True), "field `nnz` is missing or of the wrong type"),
    (tensor("conv.weight", nnz=-1), "field `nnz` is negative"),
    (tensor("conv.weight", shape=[2**40, 2**40]), "more elements than the format allows"),
    (tensor("conv.weight", shape=[24, -3, 3, 3]), "field `shape` is not a list of sizes"),
    (tensor("conv.weight", shape=[24, 3, 9]), r"`conv.weight` is \(24, 3, 3, 3\) in the model and \(24, 3, 9\)"),
    (tensor("conv.weight", index__raw=10**9), "of the wrong length|of impossible length"),
    (tensor("conv.weight", index__crc32=1), "mask of `conv.weight`: .*CRC-32 does not agree"),
    (tensor("conv.weight", values__crc32=1), "tensor `conv.weight`: .*CRC-32 does not agree"),
    (tensor("conv.weight", values__planes=[1, 2, 3, 4]), "`conv.weight`: .*more bytes than Huffman codes hold"),
    (tensor("norm.weight", crc32=1), "tensor `norm.weight`: .*CRC-32 does not agree"),
    (tensor("norm.weight", dtype="I32"), r"`norm.weight` is not the I32 \(24,\) of its manifest"),
    (lambda m: m["tensors"].pop("norm.bias"), "file and manifest disagree about `norm.bias`"),
    (lambda m: m["tensors"].update(extra=m["tensors"]["norm.bias"]), "file and manifest disagree about `extra`"),
]


@pytest.mark.parametrize(("edit", "text"), FORGERIES)
def test_a_forged_manifest_is_refused_by_name(folder: Path, edit: Callable[[Json], None], text: str):
    forge(folder / WEIGHTS, edit)
    refuses(folder / WEIGHTS, text)


def test_a_newer_minor_version_with_fields_not_known_here_is_read(folder: Path):
    def edit(manifest: Json) -> None:
        manifest.update(version="1.7", x_note="new")
        manifest["tensors"]["conv.weight"]["x_scale"] = 1

    forge(folder / WEIGHTS, edit)
    assert same_bits(growfx.load(folder / WEIGHTS, model=Tied()), plain(make_net(0.3)))
    assert growfx.inspect(folder / WEIGHTS).version == "1.7"


def test_a_manifest_that_was_edited_but_not_signed_is_refused(folder: Path):
    header, data = read_header(folder / WEIGHTS)
    header["__metadata__"]["growfx"] = header["__metadata__"]["growfx"].replace("conv", "cone")
    write_header(folder / WEIGHTS, header, data)
    refuses(folder / WEIGHTS, "does not agree with its SHA-256")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "no manifest"), ('{"manifest":1}', "no manifest")],
)
def test_metadata_without_a_manifest_is_refused(tmp_path: Path, text: str, complaint: str):
    write_header(tmp_path / "x.safetensors", {"__metadata__": {"growfx": text}}, b"")
    refuses(tmp_path / "x.safetensors", complaint)


def test_sizes_are_bounded_before_anything_is_decoded(folder: Path):
    refuses(folder, r"its tensors take \d+ bytes, more than max_bytes=100; raise max_bytes", max_bytes=100)
    with pytest.raises(ArtifactError, match=r"its masks take \d+ bytes, more than max_bytes=100"):
        load_masks(folder, max_bytes=100)
    with pytest.raises(ArtifactError, match=r"its tensors take \d+ bytes, more than max_bytes=100"):
        load_state(folder, max_bytes=100)
    need = growfx.inspect(folder).dense_bytes
    assert growfx.load(folder, model=Tied(), max_bytes=need)


CONFIGS: list[tuple[Callable[[Json], object], str]] = [
    (lambda c: c.pop("growfx"), "has no `growfx` block"),
    (lambda c: c["growfx"].update(version="2.0"), "upgrade growfx"),
    (lambda c: c["growfx"].update(format="x"), "format is `x`"),
    (lambda c: c["growfx"].update(weights="../out/sparse.safetensors"), "only a plain file name is allowed"),
    (lambda c: c["growfx"].update(weights="/etc/passwd"), "only a plain file name is allowed"),
    (lambda c: c["growfx"].update(weights=".."), "only a plain file name is allowed"),
    (lambda c: c["growfx"].update(weights=7), "only a plain file name is allowed"),
    (lambda c: c["growfx"].update(weights="other.safetensors"), "`other.safetensors` is missing"),
    (lambda c: c["growfx"].update(sha256="0" * 64), "is not the file that `config.json` describes"),
    (lambda c: c["growfx"].update(bytes=1), "is not the file that `config.json` describes"),
    (lambda c: c.update(num_classes=11), "was changed: `num_classes` differ"),
    (lambda c: c["growfx"].update(model={"library": "timm"}), "was changed: `growfx.model` differ"),
]


@pytest.mark.parametrize(("edit", "text"), CONFIGS)
def test_a_config_that_was_edited_is_refused(folder: Path, edit: Callable[[Json], object], text: str):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, text)


def test_a_folder_without_a_readable_config_is_refused(folder: Path):
    (folder / "config.json").write_text("{")
    refuses(folder, r"`config.json` cannot be read")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refuses(folder, r"`config.json` cannot be read")
    (folder / "config.json").unlink()
    refuses(folder, "has no `config.json`, so it holds no artifact")


def test_a_run_is_told_where_its_artifact_is(tmp_path: Path, folder: Path):
    (tmp_path / "config.json").write_text('{"growfx": "0.1.0"}')
    shutil.copytree(folder, tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="holds no artifact; that of a run is its folder `artifact`"):
        growfx.load(tmp_path)


def test_a_link_out_of_the_folder_is_refused(folder: Path):
    os.rename(folder / WEIGHTS, folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")
    refuses(folder, "is a link out of the folder; load that file by its own path")


def test_what_is_no_artifact_is_refused(tmp_path: Path):
    refuses(tmp_path / "nothing", "there is no artifact at this path")
    refuses(tmp_path, "has no `config.json`")
    (tmp_path / "text").write_text("hello")
    refuses(tmp_path / "text", "not a safetensors file, so not an artifact; or its first bytes are damaged")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    refuses(tmp_path / "plain.safetensors", "its metadata has no entry `growfx`")
    with pytest.raises(ArtifactError, match="there is no artifact at this path"):
        growfx.inspect(tmp_path / "nothing")


def test_a_network_of_another_architecture_is_named(folder: Path):
    wrong = Tied(23)
    refuses(folder, r"not the artifact's \(Tied\): `conv.bias` is \(23,\) in the model and \(24,\)", model=wrong)
    other = nn.Sequential(nn.Linear(2, 2))
    refuses(
        folder, r"\(Sequential\): the model lacks `conv.bias`.* and \d+ more; the artifact lacks `0.bias`", model=other
    )


def test_a_model_that_ties_what_the_artifact_keeps_apart_is_refused(tmp_path: Path):
    untied = Tied()
    untied.second.weight = nn.Parameter(torch.rand(24, 24))
    growfx.save(growfx.wrap(untied, torch.rand(1, 3, 6, 6)), tmp_path / "out")
    refuses(tmp_path / "out", "`first.weight` and `second.weight` are one tensor in the model and two in the artifact")


def test_a_model_without_storage_is_refused(folder: Path):
    with torch.device("meta"):
        model = Tied()
    with pytest.raises(ArtifactError, match="has no storage; move the model with `to_empty` first"):
        growfx.load(folder, model=model)


def test_an_own_class_needs_an_instance(folder: Path):
    refuses(folder, r"does not say how its model is built \(.*`Tied`\); pass an instance as `model=`", model=None)


def recipe(library: Any, name: Any, **kwargs: Any) -> Callable[[Json], None]:
    return top(model={"library": library, "name": name, "kwargs": kwargs})


RECIPES: list[tuple[Callable[[Json], None], str]] = [
    (recipe("python", "os:system", command="touch pwned"), "load runs no code named by a file"),
    (recipe("keras", "resnet"), "it names a model of `keras`; allowed: timm, torchvision"),
    (recipe("timm", "resnet10t", checkpoint_path="x.pth"), "`checkpoint_path` would fetch weights from elsewhere"),
    (recipe("timm", "resnet10t", pretrained=True), "`pretrained` would fetch weights from elsewhere"),
    (recipe("torchvision", "resnet18", weights="DEFAULT"), "`weights` would fetch weights from elsewhere"),
    (recipe("timm", "os:system"), "`os:system` is not a registered name of timm"),
    (recipe("timm", "hf-hub:some/model"), "is not a registered name of timm"),
    (recipe("timm", "no_such_model"), "cannot be built here: model `no_such_model` is unknown"),
    (recipe("timm", "test_resnet", num_classes=-5), "cannot be built here|not the artifact's"),
    (recipe("timm", "test_resnet", num_classes=10**6), "`fc.bias` is"),
    (
        recipe("timm", "test_resnet", num_classes=10**9),
        "it has a model argument of 1000000000; allowed are sizes up to",
    ),
    (recipe("timm", "test_vit"), r"not the artifact's \(VisionTransformer\)"),
    (top(model={"library": "timm", "name": 5, "kwargs": {}}), "it names a model of `timm`"),
]


@pytest.mark.parametrize(("edit", "text"), RECIPES)
def test_a_hostile_recipe_is_refused(zoo_folder: Path, edit: Callable[[Json], None], text: str):
    forge(zoo_folder / WEIGHTS, edit)
    refuses(zoo_folder / WEIGHTS, text, model=None)
