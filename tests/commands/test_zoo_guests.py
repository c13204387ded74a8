"""Guests of the zoo, checked on a stand-in for a package: the real ones need not be installed."""

import dataclasses
import json
import os
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import growfx
from growfx.cli import main
from growfx.commands.zoo.check import check_model
from growfx.commands.zoo.coverage import Results
from growfx.commands.zoo.facts import CHECKS
from growfx.commands.zoo.guest import Draw, GuestForm
from growfx.commands.zoo.guests import (
    GUESTS,
    go_offline,
    guest,
    guest_names,
    guest_versions,
    missing_packages,
    packages,
)
from growfx.commands.zoo.inputs import model_names
from growfx.commands.zoo.outputs import leaves
from growfx.errors import ConfigError

SPEC = "guests/efficientnet_pytorch/efficientnet-b0"

# Takes the place of a package of the table: what its builder is called with, and a small model of that size.
STAND_IN = """
import torch
from torch import nn


class EfficientNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))

    @classmethod
    def from_name(cls, name, num_classes):
        assert name.startswith("efficientnet-b")
        return KINDS.get(name, cls)(num_classes)


class Frugal(EfficientNet):
    "Multiplies by a matrix that no layer owns."

    def __init__(self, classes):
        super().__init__(classes)
        self.matrix = nn.Parameter(torch.randn(classes, classes))

    def forward(self, x):
        return super().forward(x) @ self.matrix


class Dying(EfficientNet):
    def forward(self, x):
        import os
        os._exit(7)


KINDS = {"efficientnet-b1": Frugal, "efficientnet-b2": Dying}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder on the path that holds the stand-in, as an installed package."""
    (tmp_path / "efficientnet_pytorch").mkdir()
    (tmp_path / "efficientnet_pytorch" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "efficientnet_pytorch-9.8.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: efficientnet_pytorch\nVersion: 9.8\n"
    (tmp_path / "efficientnet_pytorch-9.8.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("efficientnet_pytorch")]:
        del sys.modules[name]


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_has_sixty_models_of_twenty_packages_and_two_or_more_of_each():
    table = packages()
    assert len(table) >= 20
    assert sum(len(package.models) for package in table) >= 60
    assert [package.module for package in table if len(package.models) < 2] == []
    assert len({package.distribution for package in table}) == len({package.module for package in table}) == len(table)


def test_every_guest_draws_inputs_that_its_seed_fixes():
    needs_a_package = {"gat-of-data", "gcn-of-data"}  # `Data` objects are made by torch_geometric
    for package in packages():
        for name, one in package.models.items():
            if name in needs_a_package:
                continue
            for larger in (False, True):
                form = GuestForm(one, larger)
                first, again, other = (list(leaves(form.inputs(2, seed))) for seed in (1, 1, 5))
                tensors = [value for value in first if isinstance(value, torch.Tensor)]
                assert tensors, name
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if isinstance(a, torch.Tensor))
                changed = [
                    not torch.equal(a, b)
                    for a, b in zip(first, other, strict=True)
                    if isinstance(a, torch.Tensor) and a.shape == b.shape
                ]
                assert any(changed), name


def test_inputs_of_another_size_have_as_many_rows():
    draw = Draw(3, larger=True)
    assert draw.normal(4, draw.size(8)).shape == (3, 4, 12)
    assert draw.size(8, 9) == 9
    assert Draw(3).size(8, 9) == 8
    assert draw.integers(5, 7, low=2).unique().min() >= 2


def test_names_are_those_of_installed_packages_with_or_without_the_prefix(stand_in):
    names = guest_names("efficientnet_pytorch/*")
    assert names == [f"guests/efficientnet_pytorch/efficientnet-b{size}" for size in range(3)]
    assert guest_names("guests/efficientnet_pytorch/*b0") == [SPEC]
    assert "efficientnet_pytorch" not in missing_packages()
    assert guest_versions()["efficientnet_pytorch"] == "9.8"
    assert not set(guest_names()) & set(model_names())


def test_a_package_that_is_not_installed_has_no_rows_but_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert guest_names() == []
    assert guest_versions() == {}
    assert missing_packages() == [package.distribution for package in packages()]


def test_a_package_without_metadata_has_no_known_version(stand_in, monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert guest_versions()["efficientnet_pytorch"] == "unknown"


def test_a_name_that_no_table_has_is_an_error():
    with pytest.raises(ConfigError, match="guests/transformers/nonesuch"):
        guest("guests/transformers/nonesuch")


def test_two_builds_of_a_guest_have_the_same_weights(stand_in):
    package, name = guest(SPEC)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = package.build(name).state_dict(), package.build(name).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert torch.equal(torch.get_rng_state(), before)


def test_packages_are_told_to_stay_offline_unless_the_user_said_otherwise(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("YOLO_OFFLINE", "false")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    go_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["YOLO_OFFLINE"] == "false"


# -- the check --------------------------------------------------------------------------------------------------------


def test_every_check_of_a_sound_guest_says_yes(stand_in):
    facts = check_model(SPEC)
    assert facts.checks == dict.fromkeys([c for c in CHECKS if c != "path rules"], "yes")
    assert (facts.library, facts.family, facts.device, facts.ended) == (GUESTS, "efficientnet_pytorch", "real", "done")
    assert facts.input == [[1, 3, 64, 64]]
    assert facts.other_input == [[1, 3, 96, 96]]
    assert not facts.missed


def test_a_matrix_of_a_guest_that_the_report_does_not_name_is_missed(stand_in, monkeypatch):
    wrap = growfx.wrap

    def silent(*args):
        net = wrap(*args)
        net.trace_report.unmasked.clear()
        return net

    monkeypatch.setattr(growfx, "wrap", silent)
    facts = check_model("guests/efficientnet_pytorch/efficientnet-b1")
    assert facts.missed == ["matrix"]
    assert facts.problems["weights found"].startswith("1 missed")


def test_a_matrix_that_the_table_asks_to_mask_is_masked_and_scored(stand_in, monkeypatch):
    package, name = guest("guests/efficientnet_pytorch/efficientnet-b1")
    monkeypatch.setitem(package.models, name, dataclasses.replace(package.models[name], masked=("mat*",)))
    facts = check_model("guests/efficientnet_pytorch/efficientnet-b1")
    assert facts.layers["masked"] == 3
    assert facts.checks == dict.fromkeys([c for c in CHECKS if c != "path rules"], "yes")


def test_a_wrap_that_writes_into_the_model_is_found(stand_in, monkeypatch):
    wrap = growfx.wrap

    def careless(model, *args):
        with torch.no_grad():
            model.norm.running_mean += 1
        return wrap(model, *args)

    monkeypatch.setattr(growfx, "wrap", careless)
    facts = check_model(SPEC)
    assert "norm.running_mean" in facts.problems["untouched"]
    assert {"eval", "untouched"} <= facts.problems.keys()


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def test_the_command_checks_guests_in_processes_and_names_packages_that_are_missing(
    stand_in, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("growfx.commands.zoo.guests.missing_packages", lambda: ["one", "two"])
    file = tmp_path / "guests.json"
    command = ("zoo", "efficientnet_pytorch/*b[02]", "--library", "guests", "--json", file, "--quiet", "--jobs", 1)
    assert run(*command) == 0
    shown = capsys.readouterr().out
    assert "not installed: one, two" in shown
    assert "crash in stage `eager`" in shown
    content = json.loads(file.read_text())
    assert content["versions"]["efficientnet_pytorch"] == "9.8"
    ends = {facts["model"].rpartition("-")[2]: facts["ended"] for facts in content["models"]}
    assert ends == {"b0": "done", "b2": "crash"}
    sound = next(facts for facts in content["models"] if facts["ended"] == "done")
    assert set(sound["checks"].values()) == {"yes"}


def test_results_with_another_version_of_a_guest_are_refused(stand_in, tmp_path):
    file = tmp_path / "guests.json"
    Results(file, packages={"efficientnet_pytorch": "9.8"}).save()
    Results(file, packages={"efficientnet_pytorch": "9.8"})
    with pytest.raises(ConfigError, match=r"efficientnet_pytorch 9\.8, installed: 9\.9.*--overwrite"):
        Results(file, packages={"efficientnet_pytorch": "9.9"})


def test_no_guest_of_that_name_is_an_error_that_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("growfx.commands.zoo.guests.missing_packages", lambda: ["one"])
    assert run("zoo", "nonesuch/*", "--library", "guests") == 1
    said = capsys.readouterr().err
    assert "nonesuch/*" in said
    assert "not installed: one" in said
