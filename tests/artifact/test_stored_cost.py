"""Multiply-accumulates in the artifact: written at save, read from the header alone."""

import json
from pathlib import Path

import pytest
import torch
from artifact_nets import Tied, forge, make_net
from torch import nn

import growfx
from growfx.artifact.writer import WEIGHTS
from growfx.errors import ArtifactError


def test_the_header_tells_what_the_network_costs(tmp_path):
    net = make_net(0.3)
    written = growfx.save(net, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    read = growfx.inspect(tmp_path / "out" / WEIGHTS)
    counted = growfx.cost(net)
    assert written.cost == read.cost
    assert read.cost is not None
    assert read.cost.to_dict() == counted.to_json()
    for layer in read.layers:
        assert (layer.dense_macs, layer.sparse_macs) == (
            counted.layers[layer.name].dense,
            counted.layers[layer.name].sparse,
        )
    assert json.loads(json.dumps(read.to_dict()))["cost"]["sparse"] == counted.sparse
    assert f"{counted.layers['conv'].dense:,.0f}" in str(read)


def test_an_artifact_of_an_older_version_tells_no_cost():
    golden = Path(__file__).parents[1] / "golden" / "artifact-1.0"
    info = growfx.inspect(golden)
    assert info.cost is None
    assert info.to_dict()["cost"] is None
    assert {layer.dense_macs for layer in info.layers} == {None}
    assert str(info)


class Picky(nn.Module):
    """Runs in training, not in evaluation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.works = True

    def forward(self, x):
        if not self.works:
            raise ValueError("not now")
        return self.layer(x)


def test_a_network_that_cannot_be_run_is_stored_without_its_cost(tmp_path):
    net = growfx.wrap(Picky(), torch.zeros(1, 4))
    net.trace_report.faithful = False  # its own forward is run
    net.shell.works = False
    info = growfx.save(net, tmp_path / "out")
    assert info.cost is None
    assert growfx.inspect(tmp_path / "out").nnz == 16


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({}, "parts `layers` and `rest`"),
        ({"layers": {}, "rest": 0}, "layers are not the masked layers"),
        ({"layers": None, "rest": -1}, "rest is not a number"),
        ({"layers": None, "rest": True}, "rest is not a number"),
        ({"layers": {"conv": [1.0, 2.0]}, "rest": 0}, "`conv` is not a dense number"),
        ({"layers": {"conv": [1.0]}, "rest": 0}, "`conv` is not a dense number"),
        ({"layers": {"conv": [1e300, 0]}, "rest": 0}, "`conv` is not a dense number"),
    ],
)
def test_a_forged_cost_is_refused_by_name(tmp_path, value, text):
    growfx.save(growfx.wrap(Tied(), torch.rand(1, 3, 6, 6)), tmp_path / "out")

    def edit(manifest):
        own = manifest["multiply_accumulates"]["layers"]
        layers = value.get("layers")
        if layers:
            layers = own | layers
        forged = {"layers": own if layers is None else layers, "rest": value.get("rest")}
        manifest["multiply_accumulates"] = forged if value else {}

    forge(tmp_path / "out" / WEIGHTS, edit)
    with pytest.raises(ArtifactError, match=text):
        growfx.inspect(tmp_path / "out" / WEIGHTS)
