"""Mutations of whole artifacts, and what reading each must end in. Run in a process of its own, whose memory counts.

A damage is anything that happens to files: it must be refused, or change no bit of the weights. A forgery is made
by somebody who signs it again, checksums and all: it may be another network, but nothing else may happen.
"""

import copy
import json
import os
import pickle
import random
import resource
import shutil
import socket
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from artifact_nets import Tied, forge, make_net, plain, read_header, same_bits, write_header
from safetensors.torch import save_file

import growfx
from growfx.artifact.writer import load_masks
from growfx.errors import ArtifactError

WEIGHTS, CONFIG = "sparse.safetensors", "config.json"
MAX_BYTES = 10_000_000
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2.5, -0.0, 255, 256, 2**31, 2**34, 2**63, 2**64, 2**70, 10**400, "", "x", "F16", "F64",
    "BOOL", "U8", "::index", "conv.weight", "\ud800", "\x1b[2J", "a\nb", "ä", "a\u0308", "\0", [], [0], [-1], [2**40],
    [0, 2**70], [1] * 1000, [[]], {}, {"a": {}}, "9" * 5000, float("1e308"),
]  # fmt: skip
NAMES = [
    "", ".", "..", "/", "\\", "../config.json", "/etc/passwd", "a/../" + WEIGHTS, "./" + WEIGHTS, WEIGHTS + "/", "C:x",
    WEIGHTS + ":stream", "\0", WEIGHTS + "\0", "ä", "a" * 300, ".hidden", "~", "*", WEIGHTS.upper(), " " + WEIGHTS,
    "sparse\u2024safetensors", "\u202e" + WEIGHTS, "\n", 7, None, [], {}, "file:///etc/passwd", "http://x/y", "-rf",
]  # fmt: skip

Mutation = Callable[[random.Random, Path], Path]
Json = dict[str, Any]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in items for p in leaves(v, (*path, k)))]


def edit_leaf(rng: random.Random, tree: Any) -> None:
    """Replace, remove, rename or copy one value somewhere in a JSON tree."""
    places = leaves(tree)[1:]
    if not places:
        return
    path = rng.choice(places)
    for key in path[:-1]:
        tree = tree[key]
    action = rng.randrange(6)
    if action == 0:
        del tree[path[-1]]
    elif action == 1 and isinstance(tree, dict):
        tree[rng.choice(["ä", "\ud800", "__metadata__", "", "a\0", "x" * 5000, "::values"])] = tree.pop(path[-1])
    elif action == 2:
        tree[path[-1]] = copy.deepcopy(tree[rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))])
    else:
        tree[path[-1]] = copy.deepcopy(rng.choice(ODD))


def resign(folder: Path) -> None:
    """Make the config describe the weights file that is there now."""
    import hashlib

    config, content = json.loads((folder / CONFIG).read_text()), (folder / WEIGHTS).read_bytes()
    config["growfx"].update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / CONFIG).write_text(json.dumps(config))


def either(rng: random.Random, folder: Path, signed: bool = True) -> Path:
    """The folder, its config signed again or not, or the weights file alone."""
    if rng.random() < 0.3:
        if signed:
            resign(folder)
        return folder
    return folder / WEIGHTS


def flip_bits(rng: random.Random, folder: Path) -> Path:
    file = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little") if file.name == WEIGHTS else len(data)
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(rng.choice([len(data), header, 16]))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return folder if file.name == CONFIG else either(rng, folder)


def splice(rng: random.Random, folder: Path) -> Path:
    file = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    data = bytearray(file.read_bytes())
    start, size = rng.randrange(len(data)), rng.choice([1, 8, 64, 1000])
    piece = rng.choice([b"", rng.randbytes(size), data[:size], b"\0" * size, data[start : start + size] * 2])
    data[start : start + rng.choice([0, size])] = piece
    file.write_bytes(data)
    return folder if file.name == CONFIG else either(rng, folder)


def truncate(rng: random.Random, folder: Path) -> Path:
    file = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([rng.randrange(len(data)), rng.randrange(20), len(data) - 1])])
    return folder if file.name == CONFIG else either(rng, folder)


def edit_header(rng: random.Random, folder: Path) -> Path:
    """Offsets, shapes, dtypes and names of the safetensors header."""
    header, data = read_header(folder / WEIGHTS)
    metadata = header.pop("__metadata__")
    kind, names = rng.randrange(5), list(header)
    one, other = header[rng.choice(names)], header[rng.choice(names)]
    if kind == 0:
        one["data_offsets"] = rng.choice([other["data_offsets"], [0, 2**62], [5, 1], [0, 0], [-8, 8], one["shape"]])
    elif kind == 1:
        one["data_offsets"][rng.randrange(2)] += rng.choice([-8, -1, 1, 8, 2**40])
    elif kind == 2:
        name = rng.choice([*names, "ä", "\x1b[31m", "conv", "..", "/etc/passwd", "x" * 3000])
        header[name] = rng.choice([other, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}])
    elif kind == 3:
        data = data + rng.randbytes(rng.randrange(1, 50)) if rng.random() < 0.5 else data[rng.randrange(1, 9) :]
    else:
        edit_leaf(rng, header)
    write_header(folder / WEIGHTS, {"__metadata__": metadata, **header}, data)
    return either(rng, folder)


def repeat_names(rng: random.Random, folder: Path) -> Path:
    """A key twice in one object of a header or config: JSON allows it and readers disagree which one counts."""
    if rng.random() < 0.3:
        text = (folder / CONFIG).read_text().rstrip()[:-1]
        (folder / CONFIG).write_text(text + ', "growfx": {"weights": "other"}}')
        return folder
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, name = content[8 : 8 + length].rstrip()[:-1], rng.choice(["conv.bias", "norm.weight", "__metadata__"])
    again = json.dumps(json.loads(content[8 : 8 + length])[rng.choice([name, "norm.bias"])])
    text = header + f',"{name}":{again}}}'.encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return either(rng, folder)


def edit_metadata(rng: random.Random, folder: Path) -> Path:
    header, data = read_header(folder / WEIGHTS)
    own = header["__metadata__"]["growfx"]
    header["__metadata__"] = rng.choice(
        [{}, None, [], {"growfx": 5}, {"growfx": own[: rng.randrange(len(own))]}, {"growfx": own, "format": "pt"},
         {"growfx": own.replace("conv", "cone")}, {"growfx": "[" * 50_000}, {"growfx": '{"a":' * 50_000},
         {"growfx": "9" * 10_000}, {"growfx": own + " "},
         {"growfx": own.replace('"1.2"', '"1.3"')}]
    )  # fmt: skip
    write_header(folder / WEIGHTS, header, data)
    return either(rng, folder)


def forge_manifest(rng: random.Random, folder: Path) -> Path:
    """One to three edits of the manifest, its checksum corrected."""

    def edit(manifest: Json) -> None:
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            edit_leaf(rng, rng.choice([manifest, *[manifest.get("tensors") or manifest] * 2]))

    forge(folder / WEIGHTS, edit)
    return either(rng, folder)


def edit_config(rng: random.Random, folder: Path) -> Path:
    config = json.loads((folder / CONFIG).read_text())
    if rng.random() < 0.5:
        config["growfx"]["weights"] = rng.choice(NAMES)
    else:
        edit_leaf(rng, config)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def foreign_files(folder: Path) -> list[bytes]:
    save_file({"a": torch.zeros(3)}, folder / "plain.safetensors")
    return [
        b"", b"\0", b"hello", b"\0" * 4096, b"{}", b"[]", b"null", b'"x"', b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        b"<!DOCTYPE html><html><body>Not Found</body></html>", b"\n <html>", b"<?xml version='1.0'?><Error/>",
        pickle.dumps({"a": 1}), b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", b"PK\x03\x04" + bytes(100),
        b"GGUF" + bytes(99), (folder / "plain.safetensors").read_bytes(), struct.pack("<Q", 2**63) + b"{" + bytes(99),
        struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 99_999_999) + b"{", struct.pack("<Q", 10) + b"{" * 10,
        struct.pack("<Q", 40_000) + b'{"a":' * 8_000, struct.pack("<Q", 9) + b'{"a":NaN}', b'{"growfx":' * 30_000,
    ]  # fmt: skip


def swap_files(rng: random.Random, folder: Path) -> Path:
    """Another file in the place of one of the two."""
    name = rng.choice([WEIGHTS, CONFIG])
    other = CONFIG if name == WEIGHTS else WEIGHTS
    stranger = folder.parent / "other"
    choice = rng.random()
    if choice < 0.7:
        (folder / name).write_bytes(rng.choice(foreign_files(folder)))
    elif choice < 0.85:
        shutil.copy(stranger / name, folder / name)  # whole in itself, so only the folder can tell
        return folder
    else:
        shutil.copy(folder / other, folder / name)
    return folder if name == CONFIG else either(rng, folder, signed=rng.random() < 0.5)


def odd_inodes(rng: random.Random, folder: Path) -> Path:
    """Links, pipes, devices, folders, sockets and files of holes in the place of one of the two."""
    name = rng.choice([WEIGHTS, CONFIG])
    file = folder / name
    kind = rng.randrange(9)
    content = file.read_bytes()
    if kind == 8:
        with file.open("r+b") as stream:
            stream.truncate(rng.choice([1 << 26, 1 << 33, 1 << 40]))
        if rng.random() < 0.5 and name == WEIGHTS:
            config = json.loads((folder / CONFIG).read_text())
            config["growfx"]["bytes"] = file.stat().st_size
            (folder / CONFIG).write_text(json.dumps(config))
    else:
        file.unlink()
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind in (2, 3, 4):
        outside = folder.parent / "outside"
        outside.write_bytes(content)
        file.symlink_to(
            rng.choice(["/dev/zero", "/dev/stdin", "/dev/null", "/proc/self/mem", name, "nothing", outside])
        )
    elif kind == 5:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(file))
    elif kind == 6:
        (folder / "inner").write_bytes(content)
        file.symlink_to("inner")
    elif kind == 7:
        file.write_bytes(content)
        file.chmod(0)
    return folder if name == CONFIG else rng.choice([folder, file])


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


BOMB = deflate(bytes(100_000_000))


def forge_stream(rng: random.Random, folder: Path) -> Path:
    """Another stream under a header, manifest and checksums made to fit: bombs, noise, other codecs and counts."""
    header, data = read_header(folder / WEIGHTS)
    metadata = header.pop("__metadata__")
    manifest = json.loads(metadata["growfx"])["manifest"]
    name = rng.choice([k for k, e in manifest["tensors"].items() if "index" in e])
    entry, numel = manifest["tensors"][name], torch.Size(manifest["tensors"][name]["shape"]).numel()
    parts = {k: data[slice(*v["data_offsets"])] for k, v in header.items()}
    which = rng.choice(["index", "values"])
    key = f"{name}::{which}"
    new = bytearray(rng.choice([parts[key], BOMB, rng.randbytes(50), deflate(rng.randbytes(numel)), b"", bytes(numel)]))
    if new and rng.random() < 0.3:
        new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
    parts[key] = bytes(new)
    entry[which]["crc32"] = zlib.crc32(new)
    if which == "index":
        size = rng.choice([entry["index"]["raw"], numel, numel + 1, len(new), 10**8, 2**60])
        entry["index"].update(bytes=len(new), raw=size, codec=rng.choice(["gap8", "gap8.huffman", "bitmask"]))
    elif "planes" in entry["values"]:
        entry["values"]["planes"] = rng.choice([[len(new), 0, 0, 0], [0, 0, 0, len(new)], [len(new)], []])
    if rng.random() < 0.4:
        entry["nnz"] = rng.choice([0, 1, numel, numel - 1, entry["nnz"] + 1, 2**33])
    if rng.random() < 0.2:
        entry["shape"] = rng.choice([[2**33], [2**20, 2**13], [0, 5], [numel], entry["shape"][::-1], [1] * 65])
    start, header = 0, {k: v for k, v in header.items() if k != key} | {key: dict(header[key])}
    header[key].update(dtype="U8", shape=[len(new)])
    for tensor, value in header.items():
        value["data_offsets"] = [start, start + len(parts[tensor])]
        start += len(parts[tensor])
    body = b"".join(parts[tensor] for tensor in header)
    write_header(folder / WEIGHTS, {"__metadata__": metadata, **header}, body)
    forge(folder / WEIGHTS, lambda m: m.update(manifest))
    return either(rng, folder)


DAMAGES: dict[Mutation, int] = {
    flip_bits: 500, splice: 250, truncate: 250, edit_header: 300, repeat_names: 40, edit_metadata: 60,
    forge_manifest: 500, edit_config: 200, swap_files: 200, odd_inodes: 150,
}  # fmt: skip
FORGERIES: dict[Mutation, int] = {forge_stream: 250}


def read(place: Path) -> Any:
    """The network, after every other reader had its turn; None when refused."""
    with suppress(ArtifactError):
        growfx.inspect(place)
    for other in (load_masks, growfx.to_scipy, growfx.to_numpy):
        with suppress(ArtifactError):
            other(place, max_bytes=MAX_BYTES)
    try:
        with warnings.catch_warnings():
            # forged inputs or outputs are not those of the model
            warnings.filterwarnings("ignore", "`model=` is not the network that was saved", growfx.GrowfxWarning)
            return growfx.load(place, model=Tied(), max_bytes=MAX_BYTES)
    except ArtifactError as error:
        text = str(error)
    assert text.isprintable()
    assert len(text) < 2100
    return None


def peak_kib() -> int:
    """The most memory this process ever had; on Linux not `ru_maxrss`, which a process inherits from its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(root: Path, seed: int, scale: float) -> dict[str, Any]:
    """Make and read the mutations; a report of counts, the slowest one and the growth of the process."""
    growfx.save(make_net(0.3), root / "origin")
    growfx.save(make_net(0.1), root / "other")
    expected = plain(make_net(0.3))
    origin = {name: (root / "origin" / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    assert same_bits(growfx.load(root / "origin", model=Tied()), expected)
    refused, total, slowest = Counter[str](), Counter[str](), ("", 0.0)
    before = peak_kib()
    for mutation, count in {**DAMAGES, **FORGERIES}.items():
        for i in range(max(1, int(count * scale))):
            rng, name = random.Random(f"{seed} {mutation.__name__} {i}"), mutation.__name__
            folder = root / "mutant"
            folder.mkdir()
            for file, content in origin.items():
                (folder / file).write_bytes(content)
            place = mutation(rng, folder)
            start = time.process_time()
            try:
                model = read(place)
                seconds = time.process_time() - start
                assert model is None or mutation in FORGERIES or same_bits(model, expected), "other weights"
            except BaseException as error:
                raise AssertionError(f"{name} {i} of seed {seed}") from error
            total[name] += 1
            refused[name] += model is None
            slowest = max(slowest, (f"{name} {i}", seconds), key=lambda pair: pair[1])
            shutil.rmtree(folder)
    grown = peak_kib() - before
    return {"total": total, "refused": refused, "slowest": slowest, "grown_kib": grown}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
