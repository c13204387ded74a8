import re
from pathlib import Path

import pytest
from error_facts import facts

from growfx.errors import CheckpointError, ConfigError
from growfx.runs.folder import RunFolder, refuse_existing
from growfx.runs.lock import LOCK_NAME


def config(**train) -> dict:
    return {
        "versions": {"torch": "2"},
        "model": {"name": "resnet18", "kwargs": {"num_classes": 10}},
        "data": {"spec": "digits", "fingerprint": "f", "batch_size": 8, "workers": 0},
        "train": {"lr": 0.1, "device": "auto", **train},
    }


def test_an_existing_run_needs_resume_or_overwrite(tmp_path):
    path = tmp_path / "run"
    RunFolder.start(path, config()).close()
    with pytest.raises(CheckpointError, match=facts(str(path), "`--resume`", "`--overwrite`")):
        RunFolder.start(path, config())
    RunFolder.start(path, config(), resume=True).close()
    RunFolder.start(path, config(), overwrite=True).close()


def test_resume_starts_a_run_that_is_not_there_yet(tmp_path):
    folder = RunFolder.start(tmp_path / "run", config(), resume=True)
    assert RunFolder.open(folder.path).config == config()
    assert not folder.checkpoints.exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match=facts("`resume`", "`overwrite`")):
        RunFolder.start(tmp_path, config(), resume=True, overwrite=True)


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    folder = RunFolder.start(tmp_path / "run", config())
    folder.log({"event": "epoch"})
    folder.checkpoints.save({"epoch": 1}, steps=1)
    folder.close()
    (folder.path / "notes.txt").write_text("mine")
    again = RunFolder.start(folder.path, config(lr=0.2), overwrite=True)
    assert sorted(p.name for p in again.path.iterdir()) == [LOCK_NAME, "config.json", "notes.txt"]
    assert RunFolder.open(again.path).config["train"]["lr"] == 0.2


def started(path):
    folder = RunFolder.start(path, config())
    folder.close()
    return folder.path


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_something_else_is_never_touched(tmp_path, flags):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=facts(str(tmp_path), "`thesis.tex`")):
        RunFolder.start(tmp_path, config(), **flags)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", {"name": "resnet50", "kwargs": {}}), ("train", {"lr": 0.2, "device": "auto"})],
)
def test_another_model_or_option_is_refused_by_name_on_resume(tmp_path, key, value):
    path = started(tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        RunFolder.start(path, {**config(), key: value}, resume=True)
    expected = {
        "model": facts("`model.name`", "resnet18", "resnet50"),
        "train": facts("`train.lr`", 0.1, 0.2),
    }
    assert re.search(expected[key], str(caught.value))


def test_device_workers_memory_place_of_the_data_and_versions_may_change_on_resume(tmp_path):
    path = started(tmp_path / "run")
    moved = config(device="cpu")
    moved["data"] |= {"workers": 4, "cache_mb": 0, "spec": "/elsewhere"}
    moved["versions"] = {"torch": "3"}
    RunFolder.start(path, moved, resume=True)


def test_checking_a_place_leaves_nothing_behind(tmp_path):
    refuse_existing(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=facts(str(tmp_path / "file" / "run"))):
        refuse_existing(tmp_path / "file" / "run", resume=False, overwrite=False)
    with pytest.raises(CheckpointError, match=facts(str(tmp_path / "file"))):
        refuse_existing(tmp_path / "file", resume=False, overwrite=False)


def test_the_log_is_cut_back_to_a_position(tmp_path):
    folder = RunFolder.start(tmp_path / "run", config())
    assert folder.log_position() == 0
    folder.log({"epoch": 1})
    position = folder.log_position()
    folder.log({"epoch": 2})
    folder.rewind_log(position)
    assert folder.read_log() == [{"epoch": 1}]
    folder.rewind_log(position + 100)
    assert folder.log_position() == position


def test_json_is_read_back_and_missing_or_damaged_is_told_apart(tmp_path):
    folder = RunFolder.start(tmp_path / "run", config())
    assert folder.read_json("result.json") is None
    folder.write_json("result.json", {"a": 1})
    assert folder.read_json("result.json") == {"a": 1}
    (folder.path / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=facts(str(folder.path / "result.json"))):
        folder.read_json("result.json")


def test_a_folder_without_a_run_or_with_a_damaged_one_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=facts(str(tmp_path), "`config.json`")):
        RunFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=facts(str(tmp_path / "config.json"))):
        RunFolder.open(tmp_path)


def test_the_artifact_of_a_run_names_the_run(tmp_path):
    run = RunFolder.start(tmp_path / "run", config())
    (run.path / "artifact").mkdir()
    (run.path / "artifact" / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(CheckpointError, match=facts(str(run.path / "artifact"), f"`{run.path}`")):
        RunFolder.open(run.path / "artifact")


def test_runs_that_start_at_the_same_time_in_a_new_folder_do_not_refuse_each_other(tmp_path, monkeypatch):
    original = Path.touch

    def touch(path, *args, **kwargs):
        original(path, *args, **kwargs)
        (tmp_path / "new" / "other").mkdir(exist_ok=True)  # the other run, just now

    monkeypatch.setattr(Path, "touch", touch)
    refuse_existing(tmp_path / "new" / "run", resume=False, overwrite=False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_a_checkpoint_that_has_a_tuple_where_the_config_file_has_a_list_is_of_the_same_run(tmp_path):
    started = {**config(), "model": {"name": "resnet10t", "kwargs": {"channels": (16, 32)}}}
    folder = RunFolder.start(tmp_path / "run", started)
    folder.require_same(started, "the checkpoint")
    folder.require_same(RunFolder.open(tmp_path / "run").config, "the folder")
    other = {**started, "model": {"name": "resnet10t", "kwargs": {"channels": (16, 64)}}}
    with pytest.raises(CheckpointError, match=facts("model.kwargs.channels")):
        folder.require_same(other, "the checkpoint")
    folder.close()
