import errno
import io
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from growfx.errors import CheckpointError
from growfx.runs.checkpoint import Checkpoints, content_digest, read


def state(number: int) -> dict:
    return {
        "net": {"weight": torch.full((50, 30), float(number)), "mask": torch.arange(6) % 2 == 0},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.99), "foreach": None},
        "epoch": number,
        "name": "x",
    }


def same(a, b) -> bool:
    return content_digest(a) == content_digest(b)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoint")


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_loaded_bit_for_bit(checkpoints):
    checkpoints.save(state(1), steps=1)
    loaded, notice = checkpoints.load()
    assert notice is None
    assert same(loaded, state(1))
    assert loaded["net"]["mask"].dtype == torch.bool
    assert loaded["optimizer"]["betas"] == (0.9, 0.99)
    assert list(loaded["optimizer"]["state"]) == [0]


def test_torch_loads_a_checkpoint_without_trusting_it(checkpoints):
    checkpoints.save(state(1), steps=1)
    content = torch.load(checkpoints.latest, weights_only=True)
    assert same(content["state"], state(1))


def test_a_view_is_stored_without_the_storage_behind_it(checkpoints):
    checkpoints.save({"view": torch.zeros(1_000_000)[:3]}, steps=1)
    assert checkpoints.latest.stat().st_size < 10_000


def test_numbers_of_numpy_load_without_numpy(checkpoints):
    import numpy as np

    checkpoints.save({"a": np.float64(0.5)}, steps=1)
    assert type(checkpoints.load()[0]["a"]) is float


def test_other_objects_are_refused_by_their_place(checkpoints):
    with pytest.raises(TypeError, match=r"state\.a\.b: a checkpoint cannot hold a set"):
        checkpoints.save({"a": {"b": {1}}}, steps=1)
    assert not checkpoints.exists()


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def number(steps: int) -> str:
    return f"step-{steps:012d}.pt"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept_by_step_and_the_best_stays(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for steps in (1, 2, 9, 10, 11):
        checkpoints.save(state(steps), steps=steps, best=steps == 2)
    assert read(checkpoints.latest)["epoch"] == 11
    assert read(checkpoints.best)["epoch"] == 2
    kept = [9, 10, 11][-keep:]
    assert [read(path)["epoch"] for path in checkpoints.numbered()] == kept[::-1]
    assert names(tmp_path) == ["best.pt", "latest.pt", *map(number, kept)]
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == keep + 1


def test_a_folder_of_the_older_layout_is_read_and_becomes_a_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for steps in (1, 2):
        checkpoints.save(state(steps), steps=steps)
    (tmp_path / number(1)).rename(tmp_path / "previous.pt")
    (tmp_path / number(2)).unlink()
    assert names(tmp_path) == ["latest.pt", "previous.pt"]
    assert checkpoints.load()[0]["epoch"] == 2
    checkpoints.save(state(3), steps=3)
    # the one to fall back on is the old one until two of the new kind are there
    assert names(tmp_path) == ["latest.pt", "previous.pt", number(3)]
    assert [read(path)["epoch"] for path in checkpoints.candidates()] == [3, 2]
    checkpoints.save(state(4), steps=4)
    assert names(tmp_path) == ["latest.pt", number(3), number(4)]


def test_where_there_are_no_links_copies_take_their_place(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    checkpoints = Checkpoints(tmp_path)
    for steps in (1, 2, 3, 4):
        checkpoints.save(state(steps), steps=steps, best=steps == 2)
    assert names(tmp_path) == ["best.pt", "latest.pt", number(3), number(4)]
    assert [read(path)["epoch"] for path in (checkpoints.best, checkpoints.latest)] == [2, 4]


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(checkpoints, damage, finished):
    for steps in (1, 2):
        checkpoints.save(state(steps), steps=steps)
    content = checkpoints.latest.read_bytes()
    if damage == "flip":
        flip_a_bit(checkpoints.latest)
    else:
        new = {"cut": content[: len(content) // 2], "empty": b"", "text": b"not a checkpoint"}[damage]
        checkpoints.latest.write_bytes(new)
    before = names(checkpoints.folder)
    loaded, notice = checkpoints.load()
    assert loaded["epoch"] == 1
    assert notice is not None
    assert f"{number(2)}` is damaged" in notice
    assert f"continuing from the previous one, `{checkpoints.folder / number(1)}`" in notice
    assert names(checkpoints.folder) == before  # others may be reading
    if finished:
        checkpoints.finish_save()
        assert read(checkpoints.latest)["epoch"] == 1
    # The next save must neither count the damaged file among those kept, nor read it again.
    checkpoints.save(state(3), steps=3)
    assert [read(path)["epoch"] for path in checkpoints.candidates()] == [3, 1]
    damaged = number(2).replace(".pt", ".damaged.pt")
    assert names(checkpoints.folder) == sorted(["latest.pt", number(1), damaged, number(3)])
    # a step that is made again takes the place of the first
    checkpoints.save(state(2), steps=2)
    assert read(checkpoints.folder / number(2))["epoch"] == 2


@settings(max_examples=80, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(position=1 / 64, bit=0)  # within the names that the content goes by
def test_a_flipped_bit_anywhere_is_harmless_or_leads_to_the_one_before(tmp_path_factory, position, bit):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("flip"))
    for steps in (1, 2):
        checkpoints.save(state(steps), steps=steps)
    content = bytearray(checkpoints.latest.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    checkpoints.latest.write_bytes(content)
    loaded, notice = checkpoints.load()
    assert same(loaded, state(2 if notice is None else 1))


def test_every_bit_of_what_names_the_content_is_checked(checkpoints):
    for steps in (1, 2):
        checkpoints.save(state(steps), steps=steps)
    content = checkpoints.latest.read_bytes()
    names_of = [b"growfx-checkpoint", b"format", b"version", b"digest", b"state"]
    places = [(content.index(name) + i, bit) for name in names_of for i in range(len(name)) for bit in (0, 3, 6)]
    version = content.index(b"version")
    places += [(version + len(b"version") + i, bit) for i in range(8) for bit in range(8)]  # its number too
    for place, bit in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        checkpoints.latest.write_bytes(damaged)
        loaded, notice = checkpoints.load()
        assert same(loaded, state(2 if notice is None else 1)), place


def test_all_damaged_names_all(checkpoints):
    for steps in (1, 2):
        checkpoints.save(state(steps), steps=steps)
    for path in checkpoints.numbered():
        flip_a_bit(path)
    with pytest.raises(CheckpointError, match=r"step-0*2\.pt` is damaged.*step-0*1\.pt` is damaged"):
        checkpoints.load()


class Killed(BaseException):
    """Stands for a process that is no more: nothing after it is run but what a kill would leave undone."""


@pytest.mark.parametrize("deadly", range(1, 15))
def test_a_process_killed_within_a_save_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, deadly):
    """Dies before the so-manieth call that touches the disk, whatever it is."""
    checkpoints = Checkpoints(tmp_path)
    for steps in (1, 2, 3):
        checkpoints.save(state(steps), steps=steps, best=True)
    calls = 0

    def counted(function):
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls >= deadly:
                raise Killed
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "save"), (os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        with suppress(Killed):
            checkpoints.save(state(4), steps=4, best=True)
    again = Checkpoints(tmp_path)
    loaded, notice = again.load()
    assert notice is None
    assert loaded["epoch"] in (3, 4)
    assert read(again.best)["epoch"] >= loaded["epoch"]  # the epoch after `loaded` will be made again
    assert read(again.latest)["epoch"] in (3, 4)
    again.finish_save()
    assert read(again.latest)["epoch"] == loaded["epoch"]  # a run that was done but for this is not saved again
    assert len(again.numbered()) == 2
    assert set(names(tmp_path)) == {"best.pt", "latest.pt", *(path.name for path in again.numbered())}
    again.save(state(5), steps=5, best=True)
    assert [read(path)["epoch"] for path in again.candidates()] == [5, loaded["epoch"]]
    assert names(tmp_path) == ["best.pt", "latest.pt", number(loaded["epoch"]), number(5)]


def test_the_kills_above_reach_into_every_call(tmp_path, monkeypatch):
    checkpoints, calls = Checkpoints(tmp_path), []
    for steps in (1, 2):
        checkpoints.save(state(steps), steps=steps, best=True)
    for owner, name in ((torch, "save"), (os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1])
    checkpoints.save(state(3), steps=3, best=True)
    assert 10 <= len(calls) <= 13
    assert set(calls) == {"save", "fsync", "link", "replace", "unlink"}


@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_a_file_cut_short_while_it_was_written_is_never_read(checkpoints, cut):
    checkpoints.save(state(1), steps=1)
    content = checkpoints.latest.read_bytes()
    (checkpoints.folder / "step.pt.new").write_bytes(content[:cut])
    loaded, notice = checkpoints.load()
    assert (loaded["epoch"], notice) == (1, None)
    checkpoints.save(state(2), steps=2)
    assert names(checkpoints.folder) == ["latest.pt", number(1), number(2)]


@pytest.mark.parametrize("call", ["fsync", "save"])
def test_a_full_disk_leaves_the_old_checkpoint_as_it_was(checkpoints, monkeypatch, call):
    checkpoints.save(state(1), steps=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "save": (torch, "save")}[call], full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left on device.*; free space or make"):
        checkpoints.save(state(2), steps=2, best=True)
    assert checkpoints.load()[0]["epoch"] == 1
    assert names(checkpoints.folder) == ["latest.pt", number(1)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_disk_that_fills_up_under_torch_is_told_of_too(checkpoints, monkeypatch):
    checkpoints.save(state(1), steps=1)
    opened = Path.open
    full = lambda path, *a: opened(Path("/dev/full") if path.suffix == ".new" else path, *a)  # noqa: E731
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoints.save(state(2), steps=2)
    assert checkpoints.load()[0]["epoch"] == 1


class LittleSpace(io.FileIO):
    """A file on a disk that has no space left for much at once, and some for a little."""

    def write(self, data) -> int:
        if len(memoryview(data).cast("B")) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_named_where_torch_complains_of_something_else(checkpoints, monkeypatch):
    little = lambda path, mode: io.BufferedWriter(LittleSpace(path, mode), 100)  # noqa: E731
    monkeypatch.setattr(Path, "open", little)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left on device"):
        checkpoints.save({"weights": torch.zeros(20_000)}, steps=2)


def test_a_full_disk_is_named_where_there_are_no_links_either(checkpoints, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("growfx.runs.checkpoint.shutil.copyfile", full)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left on device"):
        checkpoints.save(state(1), steps=1, best=True)


def test_no_checkpoint_is_an_error_that_names_the_folder(checkpoints):
    assert not checkpoints.exists()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoints.load()
    with pytest.raises(CheckpointError, match="is not there"):
        read(checkpoints.best)


def test_a_file_of_others_or_of_another_version_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="is not a growfx checkpoint; it holds a dictionary with `a`"):
        read(tmp_path / "a.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="it holds the state dict of a model with `weight`, `bias`"):
        read(tmp_path / "c.pt")
    torch.save({"format": "growfx-checkpoint", "version": 9, "digest": "", "state": {}}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="has version 9; this growfx reads version 1"):
        read(tmp_path / "b.pt")


def test_a_newest_file_of_another_version_is_not_passed_over(checkpoints):
    for steps in (1, 2):
        checkpoints.save(state(steps), steps=steps)
    other = {"format": "growfx-checkpoint", "version": 9, "digest": "", "state": {}}
    torch.save(other, checkpoints.folder / number(3))
    with pytest.raises(CheckpointError, match="has version 9"):
        checkpoints.load()


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"format": "growfx-checkpoint", "call": os.getcwd}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        read(tmp_path / "evil.pt")


def test_the_digest_sees_types_order_and_bits():
    values = [
        1,
        1.0,
        True,
        "1",
        None,
        [1],
        (1,),
        {1: 1},
        torch.tensor(1),
        torch.tensor(1.0),
        torch.tensor([1]),
    ]
    digests = [content_digest(v) for v in values]
    assert len(set(digests)) == len(values)
    assert content_digest(0.0) != content_digest(-0.0)
    assert content_digest({"a": 1, "b": 2}) != content_digest({"b": 2, "a": 1})
    assert content_digest(["ab", "c"]) != content_digest(["a", "bc"])
    assert content_digest(torch.zeros(2, 3)) != content_digest(torch.zeros(3, 2))
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.complex64):
        assert content_digest(torch.ones(3, dtype=dtype)) != content_digest(torch.zeros(3, dtype=dtype))


def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_the_name_before_the_save_returns(checkpoints, monkeypatch):
    events, replace, sync = [], Path.replace, os.fsync
    checkpoints.save(state(1), steps=1)

    def noted_replace(path, target):
        events.append(Path(target).name)
        return replace(path, target)

    def noted_sync(handle):
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", noted_sync)
    checkpoints.save(state(2), steps=2)
    name = events.index("step-000000000002.pt")
    assert "file" in events[:name]
    assert "folder" in events[name + 1 :]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read from /proc")
def test_saving_and_loading_leave_no_file_open(checkpoints):
    checkpoints.save(state(1), steps=1)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(2, 6):
        checkpoints.save(state(number), steps=number, best=True)
        checkpoints.load()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_a_damaged_file_is_set_aside_under_all_its_names(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for number in (1, 2):
        checkpoints.save(state(number), steps=number)
    flip_a_bit(checkpoints.numbered()[0])
    damaged = checkpoints.latest.read_bytes()
    again = Checkpoints(tmp_path, keep=keep)
    with suppress(CheckpointError):  # with one kept there is none before it
        again.load()
    again.save(state(3), steps=3)
    assert all(path.read_bytes() != damaged for path in again.candidates())
    assert (tmp_path / "step-000000000002.damaged.pt").read_bytes() == damaged
    assert same(again.load()[0], state(3))


def test_a_state_dict_that_is_no_checkpoint_is_called_so_with_its_first_keys(tmp_path):
    for count in (1, 3, 4):
        torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(count)}, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=r"state dict .*`layer0.weight`") as caught:
            read(tmp_path / "model.pt")
        assert [i for i in range(4) if f"`layer{i}.weight`" in str(caught.value)] == list(range(min(count, 3)))
        assert str(caught.value).endswith("and more") is (count > 3)
