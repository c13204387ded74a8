import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import artifact_fuzz
import numpy as np
import pytest
import torch
from artifact_nets import Tied, forge, make_net, read_header, write_header
from hypothesis import given, settings
from hypothesis import strategies as st

import growfx
from growfx.artifact.codec import ValueStream, decode_index, decode_values, encode_index, encode_values
from growfx.artifact.file import ArtifactFile
from growfx.artifact.weights_file import MAX_HEADER
from growfx.errors import ArtifactError

WEIGHTS, CONFIG = "sparse.safetensors", "config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "out"
    growfx.save(make_net(0.3), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(saved, tmp_path / "out")


@pytest.mark.slow
def test_mutated_artifacts_are_refused_or_change_no_bit_in_bounded_time_and_memory(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-W", "error", artifact_fuzz.__file__, str(tmp_path), "1", "1"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report: Any = json.loads(run.stdout)
    assert sum(report["total"].values()) >= 2000
    for name, total in report["total"].items():
        assert report["refused"][name] > total / 2, name
    assert report["slowest"][1] < 5, report["slowest"]
    assert report["grown_kib"] < 150_000


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        growfx.load(path, **{"model": Tied(), **options})
    return str(caught.value)


FOREIGN = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, .*fetch that with `git lfs"),
    (b"<!DOCTYPE html><title>404</title>", "is a web page or XML, not the file itself; .*the `resolve` address"),
    (b"\r\n<html>", "is a web page or XML"),
    (b"\x80\x04\x95" + bytes(50), "is a pickle; growfx reads none, for loading one runs its code"),
    (b"PK\x03\x04" + bytes(50), "is a zip archive, as torch.save and numpy write; growfx reads no pickle"),
    (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x80", "seems to be an ONNX file"),
    (b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file"),
    (b"GGUF" + bytes(50), "is a GGUF file"),
    (b"\x1f\x8b\x08" + bytes(50), "is a gzip archive; unpack it first"),
]


@pytest.mark.parametrize(("content", "text"), FOREIGN, ids=[text.split(",")[0][:24] for _, text in FOREIGN])
def test_another_kind_of_file_is_named_wherever_it_stands(folder: Path, content: bytes, text: str):
    (folder / WEIGHTS).write_bytes(content)
    for path in (folder, folder / WEIGHTS):
        with pytest.raises(ArtifactError, match=text):
            growfx.load(path, model=Tied())
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"its `config.json` cannot be read: it {text}"):
        growfx.load(folder, model=Tied())


@pytest.mark.parametrize("kept", [0, 5, 8, 9, 500, 0.5, -1])
def test_a_download_cut_short_is_called_that(folder: Path, kept: float):
    content = (folder / WEIGHTS).read_bytes()
    size = int(len(content) * kept) if 0 < kept < 1 else kept % len(content)
    (folder / WEIGHTS).write_bytes(content[: int(size)])
    assert f"it has {int(size)} bytes instead of {len(content)}: the download is incomplete" in refusal(folder)
    alone = refusal(folder / WEIGHTS)
    assert "the download is incomplete" in alone or (size < 8 and "not a safetensors file" in alone)


@pytest.mark.parametrize("size", [5, 8])
def test_a_cut_within_the_length_of_the_header_is_no_pickle_whatever_the_length(tmp_path: Path, size: int):
    (tmp_path / WEIGHTS).write_bytes((0x1280).to_bytes(8, "little")[:size])
    assert "pickle" not in refusal(tmp_path / WEIGHTS)


def test_bytes_behind_the_last_tensor_are_refused(folder: Path):
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"hidden")
    assert "6 bytes follow its last tensor" in refusal(folder / WEIGHTS)


def test_a_newer_version_is_named_before_anything_else_of_it_is_believed(folder: Path):
    config = json.loads((folder / CONFIG).read_text())
    config["growfx"] = {"format": "growfx.sparse", "version": "3.1", "files": ["a", "b"]}
    (folder / CONFIG).write_text(json.dumps(config))
    assert "written in format version 3.1; this growfx reads versions up to 1.2: upgrade growfx" in refusal(folder)


def test_a_name_that_steers_a_terminal_is_escaped_in_the_message(folder: Path):
    forge(folder / WEIGHTS, lambda m: m["tensors"].update({"\x1b[2J\nconv\u202e": m["tensors"]["norm.bias"]}))
    message = refusal(folder / WEIGHTS)
    assert r"\x1b[2J\nconv\u202e" in message
    assert message.isprintable()


def test_an_endless_name_is_cut_in_the_message(folder: Path):
    forge(folder / WEIGHTS, lambda m: m["tensors"].update({"a" * 10**6: m["tensors"]["norm.bias"]}))
    assert len(refusal(folder / WEIGHTS)) < 2100


HEADERS = [
    (lambda h: h["conv.bias"].update(data_offsets=h["norm.bias"]["data_offsets"]), "overlaps another tensor"),
    (lambda h: h["conv.bias"].update(data_offsets=[8, 4]), "does not have the bytes of F32"),
    (lambda h: h["conv.bias"].update(data_offsets=[-96, 0]), "shape or offsets of `conv.bias` in its header"),
    (lambda h: h["conv.bias"].update(data_offsets=[True, 97]), "shape or offsets of `conv.bias` in its header"),
    (lambda h: h["conv.bias"].update(data_offsets=[0]), "shape or offsets of `conv.bias` in its header"),
    (lambda h: h["conv.bias"].update(shape=[2**61, 2**61]), "does not have the bytes of F32"),
    (lambda h: h["conv.bias"].update(shape=[1.5]), "shape or offsets of `conv.bias` in its header"),
    (lambda h: h["conv.bias"].update(shape=[1] * 65), "shape or offsets of `conv.bias` in its header"),
    (lambda h: h["conv.bias"].update(dtype="C128"), "dtype `C128` of `conv.bias` is none of F64, F32"),
    (lambda h: h["conv.bias"].update(dtype=["F32"]), "dtype .* of `conv.bias` is none of F64, F32"),
    (lambda h: h["conv.bias"].update(note=1), "says of `conv.bias` not dtype, shape and data_offsets"),
    (lambda h: h.update({"conv.bias": 7}), "says of `conv.bias` not dtype, shape and data_offsets"),
    (lambda h: h.update(__metadata__=[]), "its header is not a safetensors header"),
]


@pytest.mark.parametrize(("edit", "text"), HEADERS, ids=[f"{i} {text[:20]}" for i, (_, text) in enumerate(HEADERS)])
def test_a_header_that_lies_is_refused(folder: Path, edit: Any, text: str):
    header, data = read_header(folder / WEIGHTS)
    edit(header)
    write_header(folder / WEIGHTS, header, data)
    with pytest.raises(ArtifactError, match=text):
        growfx.load(folder / WEIGHTS, model=Tied())


def test_a_name_given_twice_is_refused(folder: Path):
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    entry = json.dumps(json.loads(content[8 : 8 + length])["norm.bias"])
    header = content[8 : 8 + length].rstrip()[:-1] + f',"norm.bias":{entry}}}'.encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert "`norm.bias` stands in it twice" in refusal(folder / WEIGHTS)
    (folder / CONFIG).write_text((folder / CONFIG).read_text().rstrip()[:-1] + ', "growfx": {}}')
    assert "`growfx` stands in it twice" in refusal(folder)


def test_a_float_in_the_place_of_an_integer_leaves_the_model_as_it_was(folder: Path):
    header, data = read_header(folder / WEIGHTS)
    header["norm.bias"]["dtype"] = "I32"
    write_header(folder / WEIGHTS, header, data)
    forge(folder / WEIGHTS, lambda m: m["tensors"]["norm.bias"].update(dtype="I32"))
    model = Tied()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert "`norm.bias` is torch.float32 in the model and I32 in the artifact" in refusal(folder / WEIGHTS, model=model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_truth_value_is_zero_or_one(tmp_path: Path):
    model = Tied()
    model.register_buffer("flag", torch.tensor([True, False]))
    growfx.save(growfx.wrap(model, torch.rand(1, 3, 6, 6)), tmp_path / "out")
    file = tmp_path / "out" / WEIGHTS
    header, data = read_header(file)
    start = header["flag"]["data_offsets"][0]
    write_header(file, header, data[:start] + b"\2\0" + data[start + 2 :])
    forge(file, lambda m: m["tensors"]["flag"].update(crc32=zlib.crc32(b"\2\0")))
    with pytest.raises(ArtifactError, match=r"tensor `flag`: .*a truth value is neither 0 nor 1"):
        growfx.to_numpy(file)


@pytest.mark.parametrize("shape", [[0, 2**62], [0] * 65, [2**33, 4], [1] * 100_000])
def test_a_shape_no_tensor_can_have_is_refused(folder: Path, shape: list[int]):
    forge(folder / WEIGHTS, lambda m: m["tensors"]["norm.bias"].update(shape=shape))
    assert "its shape has" in refusal(folder / WEIGHTS)


def test_a_file_of_holes_is_not_read_to_its_end(folder: Path):
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(1 << 41)
    config = json.loads((folder / CONFIG).read_text())
    config["growfx"]["bytes"] = 1 << 41
    (folder / CONFIG).write_text(json.dumps(config))
    start = time.process_time()
    assert "too many for max_bytes" in refusal(folder)
    assert time.process_time() - start < 5


def nnz_of(manifest: Any) -> int:
    return manifest["tensors"]["conv.weight"]["nnz"]


def test_a_file_alone_that_consists_of_holes_is_refused_by_its_header(folder: Path):
    """Without a config nothing says how large the file should be; its streams cannot be larger than what they hold."""
    index = {"codec": "gap8.huffman", "bytes": 1 << 41, "crc32": 0}
    forge(folder / WEIGHTS, lambda m: m["tensors"]["conv.weight"].update(index={**index, "raw": nnz_of(m)}))
    header, data = read_header(folder / WEIGHTS)
    parts = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}
    parts["conv.weight::index"], end = b"", 0
    for name in sorted(parts, key=lambda name: name == "conv.weight::index"):
        header[name]["data_offsets"] = [end, end + len(parts[name])]
        end += len(parts[name])
    header["conv.weight::index"].update(shape=[1 << 41], data_offsets=[end, end + (1 << 41)])
    write_header(folder / WEIGHTS, header, b"".join(part for part in parts.values() if part))
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate((folder / WEIGHTS).stat().st_size + (1 << 41))
    tracemalloc.start()
    assert "tensor `conv.weight`: a compressed stream longer than its bytes" in refusal(folder / WEIGHTS)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.slow
def test_a_header_full_of_small_objects_is_read_in_bounded_time_and_memory(folder: Path):
    """In a few times what its JSON alone takes to parse, a yardstick that slows down with the machine."""
    code = (
        "import json, sys, time, growfx\n"
        "from artifact_fuzz import peak_kib\n"
        "growfx.inspect(sys.argv[1] + '/small')\n"
        "for name in sys.argv[2:]:\n"
        "    before, start = peak_kib(), time.process_time()\n"
        "    growfx.inspect(sys.argv[1] + '/' + name)\n"
        "    middle, kib = time.process_time(), peak_kib() - before\n"
        "    json.load(open(sys.argv[1] + '/' + name + '.json'))\n"
        "    print(middle - start, time.process_time() - middle, kib)\n"
    )
    shutil.copy(folder / WEIGHTS, folder / "small")
    fillings = {"numbers": "1.5,", "lists": "[],"}  # they take the most time, and the most memory, for every byte
    share = 20
    for name, filling in fillings.items():
        shutil.copy(folder / WEIGHTS, folder / name)
        items = filling * (MAX_HEADER // share // len(filling))
        (folder / f"{name}.json").write_text(f"[{items[:-1]}]")
        forge(folder / name, lambda m, items=items: m["provenance"].update(note=json.loads(f"[{items[:-1]}]")))
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), *fillings],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for line in run.stdout.splitlines():
        seconds, parsing, kib = map(float, line.split())
        assert seconds < 6 * parsing
        assert kib < 40 * MAX_HEADER / share / 1024


BUILDS = [
    ("test_vit", {"depth": 10**6}),
    ("test_vit", {"depth": 10**12}),
    ("test_vit", {"embed_dim": 2**24, "num_heads": 2**24}),
    ("test_vit", {"img_size": 2**20}),
    ("test_resnet", {"layers": [10**5] * 4}),
    ("test_resnet", {"layers": [[10**9]]}),
    ("test_resnet", {"num_classes": 2**24}),
    ("test_convnext", {"depths": [10**6, 1, 1, 1]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kwargs"), BUILDS, ids=[f"{name} {i}" for i, (name, _) in enumerate(BUILDS)])
def test_a_recipe_that_asks_for_a_giant_is_stopped(tmp_path: Path, name: str, kwargs: dict[str, Any]):
    model = growfx.create_model("test_resnet", num_classes=4)
    growfx.save(growfx.wrap(model, torch.rand(1, 3, 32, 32)), tmp_path / "out")
    recipe = {"library": "timm", "name": name, "kwargs": kwargs}
    forge(tmp_path / "out" / WEIGHTS, lambda m: m.update(model=recipe))
    start = time.process_time()
    message = refusal(tmp_path / "out" / WEIGHTS, model=None)
    assert time.process_time() - start < 5
    assert any(text in message for text in ("far larger than", "allowed are sizes", "not the artifact's"))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_bytes_give_an_artifact_error_or_exactly_the_values_asked_for(data: Any):
    itemsize, nnz = data.draw(st.sampled_from([1, 2, 4, 8])), data.draw(st.integers(0, 40))
    body = data.draw(st.binary(max_size=100))
    planes = data.draw(st.lists(st.integers(0, 60), max_size=9)) if data.draw(st.booleans()) else ()
    codec = data.draw(st.sampled_from(["raw", "planes"]))
    try:
        values = decode_values(ValueStream(codec, tuple(planes), body), nnz, itemsize)
    except ArtifactError:
        return
    assert (values.size, values.itemsize) == (nnz, itemsize)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 2000), st.data())
def test_one_changed_byte_of_a_stream_is_refused_or_decodes_within_bounds(
    seed: int, density: float, size: int, data: Any
):
    generator = np.random.default_rng(seed)
    positions = np.flatnonzero(generator.random(size) < density)
    values = encode_values(generator.normal(size=positions.size).astype(np.float32).view(np.uint32), floating=True)
    index = encode_index(positions, size)
    for stream, decode in (
        (index, lambda s: decode_index(s, positions.size, size)),
        (values, lambda s: decode_values(s, positions.size, 4)),
    ):
        changed = bytearray(stream.data)
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            decoded = decode(type(stream)(**{**stream.__dict__, "data": bytes(changed)}))
        except ArtifactError:
            continue
        assert decoded.size == positions.size
        assert stream is values or not decoded.size or 0 <= decoded.min() <= decoded.max() < size


def test_a_plane_that_is_a_deflate_bomb_is_stopped_at_the_stated_size():
    bomb, nnz = artifact_fuzz.BOMB, 8 * len(artifact_fuzz.BOMB)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="a compressed stream of the wrong length"):
        decode_values(ValueStream("planes", (len(bomb), nnz, nnz, nnz), bomb + bytes(3 * nnz)), nnz, 4)
    assert tracemalloc.get_traced_memory()[1] < 20 * nnz
    tracemalloc.stop()


def test_the_manifest_of_an_open_file_is_that_of_save(folder: Path):
    from growfx.artifact.file import opened

    with opened(folder, max_bytes=None) as weights:
        assert isinstance(weights, ArtifactFile)
        assert weights.manifest.version == "1.2"
        assert weights.positions("norm.bias") is None
