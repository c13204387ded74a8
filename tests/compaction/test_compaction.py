"""Compaction plans: stored, read, refused, and followed without the network they were found on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_nets import forge
from compact_nets import agree, awake, sparse_net
from connect_nets import build
from places import GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

import growfx
from growfx.compaction.apply import apply_plan
from growfx.compaction.plan import CompactionPlan
from growfx.errors import ArtifactError
from growfx.passes.compact.network import compact

COMPACTED = GOLDEN / "artifact-1.1-compacted"


def test_the_plan_alone_makes_another_instance_as_small() -> None:
    model, x = build("dense")
    net = sparse_net(awake(model), x, 0.6, 0.5, 2)
    result = compact(net)
    assert result.plan
    other = apply_plan(build("dense")[0], CompactionPlan.from_json(result.plan.to_json()))
    other.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), result.model(x))


def test_a_compacted_artifact_loads_by_name_without_the_network_it_was_made_of(tmp_path: Path) -> None:
    model = awake(growfx.create_model("test_efficientnet", num_classes=4))
    x = torch.randn(2, 3, 32, 32)
    net = sparse_net(model, x, 0.2, 0.4)
    info = growfx.save(net, tmp_path / "small", compact=True, provenance={"seed": 1})
    whole = growfx.save(net, tmp_path / "whole")
    loaded = growfx.load(tmp_path / "small")
    assert type(loaded) is type(model)
    agree(net, loaded, x)
    assert info == growfx.inspect(tmp_path / "small")
    assert info.version == "1.2"
    assert whole.version == "1.2"
    assert info.bytes < whole.bytes
    assert info.numel < whole.numel
    assert info.nnz <= whole.nnz
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    growfx.save(net, tmp_path / "again", compact=True, provenance={"seed": 1})
    for file in ("sparse.safetensors", "config.json", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "small" / file).read_bytes()


def test_a_compacted_artifact_loads_into_an_instance_of_its_own_class(tmp_path: Path) -> None:
    model, x = build("flat")
    net = sparse_net(awake(model), x, 0.6, 0.5, 1)
    growfx.save(net, tmp_path / "out", compact=True)
    instance = build("flat")[0]
    parameters = dict(instance.named_parameters())
    assert growfx.load(tmp_path / "out", model=instance) is instance
    agree(net, instance, x)
    assert all(parameter is parameters[name] for name, parameter in instance.named_parameters() if name in parameters)
    other = build("dense")[0]
    with pytest.raises(ArtifactError, match=r"not the artifact's \(\w+\), or the artifact is damaged: .*no tensor"):
        growfx.load(tmp_path / "out", model=other)


def test_where_nothing_leaves_the_artifact_is_an_ordinary_one(tmp_path: Path) -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3))
    assert growfx.save(net, tmp_path / "a", compact=True).version == "1.2"
    with pytest.raises(ArtifactError, match="`dense` and `compact` exclude each other"):
        growfx.save(net, tmp_path / "b", compact=True, dense=True)


def test_the_golden_compacted_artifact_of_version_1_1_reads_for_ever() -> None:
    expected = load_file(COMPACTED / "expected.safetensors")
    model = growfx.load(COMPACTED, model=build("flat")[0].float())
    x = expected.pop("input")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected.pop("output"), rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def write_golden(folder: Path) -> None:
    """How the golden artifact was made; the files in the repository are never written again."""
    model, x = build("flat")
    net = sparse_net(awake(model).float(), x.float(), 0.6, 0.5, 1)
    growfx.save(net, folder, compact=True, provenance={"note": "golden"})
    with torch.no_grad():
        output = net(x.float())
    state = compact(net).model.state_dict()
    save_file({**state, "input": x.float(), "output": output}, folder / "expected.safetensors")


HOSTILE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda p: p.pop("biases"), "a plan has the fields"),
    (lambda p: p["tensors"].update(nowhere={"0": [[0, 1]]}), "the model has no tensor `nowhere`"),
    (lambda p: p["tensors"]["a.weight"].update({"0": [[0, 10**9]]}), "`a.weight` of shape .* has no index 999999999"),
    (lambda p: p["tensors"]["a.weight"].update({"0": [[2, 1]]}), "the spans of `a.weight` do not ascend"),
    (lambda p: p["tensors"]["a.weight"].update({"0": [[0, 2], [1, 3]]}), "do not ascend"),
    (lambda p: p["tensors"]["a.weight"].update({"0": [[-1, 2]]}), "do not ascend"),
    (lambda p: p["tensors"]["a.weight"].update({"0": []}), "keeps no index"),
    (lambda p: p["tensors"]["a.weight"].update({"0": [[True, 2]]}), "not a pair of integers"),
    (lambda p: p["tensors"]["a.weight"].update({"0": [["0", 2]]}), "not a pair of integers"),
    (lambda p: p["tensors"]["a.weight"].update({"9": [[0, 1]]}), "has no axis `9`"),
    (lambda p: p["tensors"]["a.weight"].update({"5": [[0, 1]]}), "has no index 0 on axis 5"),
    (lambda p: p["modules"].update(a={"out_channels": 10**12}), "`a` has a size that is not a positive integer"),
    (lambda p: p["modules"].update(a={"out_channels": 0}), "not a positive integer"),
    (lambda p: p["modules"]["a"].update(out_channels=1), "`out_channels` of `a` does not agree with its tensors"),
    (lambda p: p["modules"]["deep"].update(groups=1), "of `deep` does not agree with its tensors"),
    (lambda p: p["modules"]["a"].update(forward=1), "`a` has no size `forward` that could change"),
    (lambda p: p["modules"].update({"": {"training": 1}}), "has no size `training`"),
    (lambda p: p["modules"].update(nowhere={"groups": 1}), "the model has no module `nowhere`"),
    (lambda p: p["modules"].pop("norm"), "`num_features` of `norm` does not agree with its tensors"),
    (lambda p: p.update(biases=["a"]), "`a` is not a layer without a bias"),
    (lambda p: p.update(biases=["pool"]), "`pool` is not a layer without a bias"),
    (lambda p: p.update(biases="c"), "`biases` is not a list of names"),
    (lambda p: p.update(tensors=[]), "is not an object of objects"),
    (lambda p: p["tensors"].pop("a.bias"), "the bias of `a` does not agree with its weight"),
    (lambda p: p["tensors"].clear() or p["modules"].clear(), "the model is not the artifact's"),
]


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_a_hostile_plan_is_refused_and_the_instance_stays_as_it_was(tmp_path: Path, case: int) -> None:
    edit, text = HOSTILE[case]
    shutil.copytree(COMPACTED, tmp_path / "out")
    file = tmp_path / "out" / "sparse.safetensors"
    forge(file, lambda manifest: edit(manifest["compaction"]))
    model = build("flat")[0]
    before = {name: (value.clone(), id(value)) for name, value in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ArtifactError, match=text):
        growfx.load(file, model=model)
    after = model.state_dict(keep_vars=True)
    assert all(torch.equal(after[name], value) and id(after[name]) == key for name, (value, key) in before.items())


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))


@pytest.fixture(scope="module")
def grouped_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three inputs the first group keeps 0 and 2, the second 4 and 5."""
    model = grouped()
    model[0].bias.data[[1, 3]] = 0
    net = growfx.wrap(model.eval(), torch.randn(1, 3, 4, 4))
    net.layers["0"].mask[[1, 3]] = False
    net.settle()
    growfx.save(net, tmp_path_factory.mktemp("grouped") / "out", compact=True)
    return tmp_path_factory.getbasetemp() / "grouped0" / "out"


def test_an_artifact_whose_groups_lost_different_channels_loads(grouped_folder: Path) -> None:
    model = growfx.load(grouped_folder, model=grouped())
    assert tuple(model.get_parameter("2.weight").shape) == (6, 2, 1, 1)
    assert model.get_submodule("2").in_channels == 4


BLOCKS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.update(requires=["compaction"]), "fields `compaction` and `requires` do not agree"),
    (lambda m: m["compaction"].pop("blocks"), "fields `compaction` and `requires` do not agree"),
    (lambda m: m["compaction"].update(blocks=[]), "`blocks` is not an object"),
    (lambda m: m["compaction"].update(blocks={"2.weight": [[0, 10**18]]}), "has 6 channels along its second axis"),
    (lambda m: m["compaction"].update(blocks={"2.weight": [[-1, 2]]}), "do not ascend"),
    (lambda m: m["compaction"].update(blocks={"2.weight": [[0, 3], [4, 5]]}), "its groups would be uneven"),
    (lambda m: m["compaction"].update(blocks={"2.weight": [[0, 3]]}), "its groups would be uneven"),
    (lambda m: m["compaction"].update(blocks={"2.weight": [[0, 1], [3, 4]]}), "does not agree with its tensors"),
    (lambda m: m["compaction"].update(blocks={"4.weight": [[0, 1]]}), "`4.weight` is not a weight of a grouped conv"),
    (lambda m: m["compaction"].update(blocks={"2.bias": [[0, 1]]}), "`2.bias` is not a weight of a grouped conv"),
    (lambda m: m["compaction"].update(blocks={"nowhere": [[0, 1]]}), "the model has no tensor `nowhere`"),
    (lambda m: m["compaction"]["tensors"].update({"2.weight": {"0": [[0, 1]]}}), "its groups would be uneven"),
    (lambda m: m["compaction"]["tensors"].update({"2.weight": {"0": [[0, 7]]}}), "has no index 6 on axis 0"),
    (lambda m: m["compaction"]["tensors"].update({"2.weight": {"1": [[0, 1]]}}), "cut along its second axis too"),
]


@pytest.mark.parametrize("case", range(len(BLOCKS)))
def test_a_hostile_plan_for_groups_is_refused(tmp_path: Path, grouped_folder: Path, case: int) -> None:
    edit, text = BLOCKS[case]
    file = tmp_path / "sparse.safetensors"
    shutil.copy(grouped_folder / file.name, file)
    forge(file, edit)
    model = grouped()
    before = facts(model)
    with pytest.raises(ArtifactError, match=text):
        growfx.load(file, model=model)
    assert facts(model) == before


def on_meta() -> nn.Module:
    return build("flat")[0].to("meta")


def lazy() -> nn.Module:
    model = build("flat")[0]
    model.add_module("a", nn.LazyConv2d(6, 3))
    return model


@pytest.mark.parametrize(("make", "text"), [(on_meta, "has no storage"), (lazy, "no shape yet")])
def test_an_instance_that_cannot_take_the_weights_stays_as_it_was(make: Callable[[], nn.Module], text: str) -> None:
    model = make()
    before = facts(model)
    with pytest.raises(ArtifactError, match=text):
        growfx.load(COMPACTED, model=model)
    assert facts(model) == before


def facts(model: nn.Module) -> dict[str, Any]:
    """Which objects a model consists of, where their values lie, and every number and flag of its modules."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, str, bool, tuple)):
                found[f"{name}.{key}"] = value
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and not nn.parameter.is_lazy(value):
                place = 0 if value.is_meta else value.data_ptr()
                found[f"{name}.{key}"] = (id(value), place, tuple(value.shape), value.dtype, id(value.grad))
    return found


def test_whatever_breaks_while_the_instance_is_filled_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("flat")
    model.train()
    model(x).sum().backward()
    before, values = facts(model), {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*_: object, **__: object) -> nn.Module:
        raise torch.OutOfMemoryError("no memory left on the device")

    monkeypatch.setattr(nn.Module, "to", fail)  # the last step: weights are filled in already
    with pytest.raises(torch.OutOfMemoryError):
        growfx.load(COMPACTED, model=model, dtype=torch.float16)
    assert facts(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_what_a_reader_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    for edit, text in (
        (lambda m: m.update(requires=["compaction", "origami"]), "requires `origami`, unknown to this growfx; known"),
        (lambda m: m.update(requires=[]), "fields `compaction` and `requires` do not agree"),
        (lambda m: m.update(requires="compaction"), "field `requires` is not a list of names"),
    ):
        shutil.copytree(COMPACTED, tmp_path / "out", dirs_exist_ok=True)
        forge(tmp_path / "out" / "sparse.safetensors", edit)
        with pytest.raises(ArtifactError, match=text):
            growfx.inspect(tmp_path / "out" / "sparse.safetensors")
