import os
from pathlib import Path
from typing import Any

import pytest

from growfx.artifact.staging import staged_folder


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_new_folder_appears_with_all_its_files_at_once(tmp_path: Path):
    target = tmp_path / "deep" / "out"
    with staged_folder(target, last="c") as stage:
        write(stage, a="1", c="2")
        assert not target.exists()
    assert read(target) == {"a": "1", "c": "2"}
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_files_of_an_existing_folder_are_replaced_and_others_stay(tmp_path: Path):
    write(tmp_path, a="old", other="mine", gone="old")
    with staged_folder(tmp_path, last="c", stale=["gone", "never"]) as stage:
        write(stage, a="new", c="new")
        assert (tmp_path / "a").read_text() == "old"
    assert read(tmp_path) == {"a": "new", "c": "new", "other": "mine"}


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_in_the_block_leaves_everything_as_it_was(tmp_path: Path, exists: bool):
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        write(target, a="old")

    def stop() -> None:
        with staged_folder(target, last="a") as stage:
            write(stage, a="new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert target.exists() is exists
    assert not exists or read(target) == {"a": "old"}
    assert len(list(tmp_path.iterdir())) == exists


@pytest.mark.parametrize("reason", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_a_rename_that_fails_undoes_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, links: bool, reason: type[BaseException]
):
    write(tmp_path, a="old a", c="old c", gone="old", other="mine")
    before = read(tmp_path)
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(source).parent.name.endswith(".tmp") and Path(source).name == failing:
            raise reason("no more renames")
        replace(source, target)

    def no_link(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "replace", fail)
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    with pytest.raises(reason, match="no more renames"), staged_folder(tmp_path, last="c", stale=["gone"]) as stage:
        write(stage, a="new", b="new", c="new")
    assert read(tmp_path) == before


def test_files_are_replaced_from_the_first_to_the_one_that_refers_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, a="old")
    order: list[str] = []
    replace = os.replace

    def note(source: Any, target: Any) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    with staged_folder(tmp_path, first="z", last="a") as stage:
        write(stage, a="1", b="2", z="3")
    assert order == ["z", "b", "a"]


@pytest.mark.parametrize("exists", [False, True])
def test_files_are_on_disk_before_they_move_and_the_move_before_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
):
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        write(target, a="old")
    events: list[str] = []
    sync, replace, rename = os.fsync, os.replace, os.rename

    def noted_sync(handle: int) -> None:
        facts = os.fstat(handle)
        names = [target, target.parent, *target.parent.rglob("*")]
        (path,) = {p for p in names if p.exists() and os.path.samestat(p.stat(), facts)}
        events.append("stage" if path.name.endswith(".tmp") else str(path.relative_to(tmp_path)).rpartition("/")[2])
        sync(handle)

    def noted_move(move: Any) -> Any:
        return lambda source, into: (events.append("move"), move(source, into))

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_move(replace))
    monkeypatch.setattr(os, "rename", noted_move(rename))
    with staged_folder(target, last="c") as stage:
        write(stage, a="1", c="2")
    moves = [i for i, event in enumerate(events) if event == "move"]
    assert sorted(events[: moves[0]]) == ["a", "c", "stage"]
    assert events[moves[-1] + 1 :] == ["out" if exists else "."]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read from /proc")
def test_no_file_stays_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with staged_folder(tmp_path / "out", last="c") as stage:
            write(stage, a="1", c="2")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_appears_meanwhile_is_filled_as_one_that_was_there(tmp_path: Path):
    target = tmp_path / "out"
    with staged_folder(target, last="c", stale=["gone"]) as stage:
        write(stage, a="1", c="2")
        with staged_folder(target, last="c") as other:
            write(other, a="3", c="4", gone="5", kept="6")
    assert read(target) == {"a": "1", "c": "2", "kept": "6"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
