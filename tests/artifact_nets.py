"""Small networks of the artifact tests, and tools to look at and change their files."""

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import growfx
from growfx.masked.graph import MaskedGraph

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tied(nn.Module):
    """A convolution, a norm, two linear layers with one weight, and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, 5)
        self.gate = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.gate(self.head(self.second(self.first(features).relu()).relu()))


def make_net(density: float = 0.3, dtype: torch.dtype = torch.float32, *, wild: bool = False) -> MaskedGraph:
    """A net of random masks of about this density; `wild`: any bit pattern as weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = growfx.wrap(Tied(), torch.rand(2, 3, 6, 6)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for layer in net.layers.values():
        layer.mask.copy_(torch.rand(layer.mask.shape, generator=generator) < density)
        if wild:
            words = layer.parameter.data.view(WORDS[dtype.itemsize])
            info = torch.iinfo(words.dtype)
            words.random_(info.min, info.max, generator=generator)
    net.settle()
    return net


def write_golden(folder: Path) -> None:
    """How the golden artifact was made; the files in the repository are never written again."""
    torch.manual_seed(0)
    net = growfx.wrap(Tied(64), torch.rand(2, 3, 6, 6))
    masks = {name: torch.rand(layer.mask.shape) for name, layer in net.layers.items()}
    density = {"conv": 0.5, "first": 0.08, "head": 0.01, "gate": 1.0}
    net.set_masks({name: mask < density[name] for name, mask in masks.items()})
    net.get_submodule("conv").to(torch.bfloat16)
    net.get_submodule("head").to(torch.float16)
    first = net.layers["first"]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])
    first.parameter.data[first.mask.nonzero()[: len(special)].unbind(1)] = special
    growfx.save(net, folder, provenance={"note": "golden"})
    expected = {**plain(net).state_dict(), **{f"mask {k}": v.mask for k, v in net.layers.items()}}
    save_file({k: v.clone().contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(WORDS[tensor.dtype.itemsize]).tolist()


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a
    )


def plain(net: MaskedGraph) -> nn.Module:
    return growfx.unwrap(copy.deepcopy(net))


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def forge(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and sign it again, as somebody would who knows the format."""
    header, data = read_header(file)
    manifest = json.loads(header["__metadata__"]["growfx"])["manifest"]
    edit(manifest)
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    signed = {"manifest": manifest, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    header["__metadata__"]["growfx"] = json.dumps(signed, sort_keys=True, separators=(",", ":"))
    write_header(file, header, data)
