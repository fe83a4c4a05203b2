"""Whatever a disk has kept when the power is cut: what was there before, or what came after it.

The states of the disk are those of `benchmarks/power_loss.py`, which also tries all of them.
"""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vaejax.files import atomic_folder, write_text
from vaejax.training import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from power_loss import Recorder, Restorer, record_saves, saved_and_begun, states


def trees(recorder: Recorder) -> Iterator[tuple[int, dict[str, bytes | None]]]:
    """After how many operations the power is cut, and what the disk may then have."""
    chance = random.Random(0)
    for state in states(recorder.before, recorder.operations, extra=5, chance=chance):
        yield state.after, state.disk.tree()


def record(folder: Path, act: Callable[[], object]) -> Recorder:
    recorder = Recorder(folder)
    with recorder.recording():
        act()
    return recorder


def test_what_was_not_flushed_may_be_lost_and_what_was_flushed_is_there(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def carelessly() -> None:
        (tmp_path / "new").write_text("new")
        (tmp_path / "new").rename(path)

    found = [tree for _, tree in trees(record(tmp_path, carelessly))]
    contents = [tree.get("file") for tree in found]
    assert {b"old", b"new", b"", b"n", bytes(3)} <= set(contents)
    assert all(tree.keys() <= {"file", "new"} for tree in found)
    assert not any(tree.get("new") == b"old" for tree in found)

    recorder = record(tmp_path, lambda: write_text(path, "newer"))
    end = len(recorder.operations)
    assert {tree["file"] for _, tree in trees(recorder)} == {b"new", b"newer"}
    assert {tree["file"] for after, tree in trees(recorder) if after == end} == {b"newer"}


def test_the_last_operation_replayed_leaves_what_is_there(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("1")

    def act() -> None:
        (tmp_path / "b" / "c").mkdir(parents=True)
        (tmp_path / "a" / "file").rename(tmp_path / "b" / "file")
        (tmp_path / "a").rmdir()
        (tmp_path / "b" / "c" / "more").write_text("2")
        (tmp_path / "b").rename(tmp_path / "d")

    recorder = record(tmp_path, act)
    end = len(recorder.operations)
    killed = next(tree for after, tree in trees(recorder) if after == end)
    assert killed == {"d": None, "d/c": None, "d/c/more": b"2", "d/file": b"1"}


def test_a_folder_is_there_with_all_of_its_files_or_not_at_all(tmp_path: Path):
    place = tmp_path / "new" / "folder"

    def act() -> None:
        with atomic_folder(place) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "file").write_text("content")

    recorder = record(tmp_path, act)
    end = len(recorder.operations)
    for after, tree in trees(recorder):
        there = tree.get("new/folder/inner/file") == b"content"
        assert there or (after < end and "new/folder" not in tree)


# Checkpoints: the second replaces the first


def tried(folder: Path) -> Iterator[tuple[str, bool]]:
    """What is restored from each state that differs outside of unfinished folders."""
    recorder, returned, digests = record_saves(folder / "run", 2, keep=1)
    restorer = Restorer(folder / "state", returned, digests)
    seen = []
    for state in states(recorder.before, recorder.operations, extra=1, chance=random.Random(0)):
        tree = state.disk.tree()
        tree = {n: c for n, c in tree.items() if not n.startswith("checkpoints/.partial-")}
        if (key := (saved_and_begun(returned, state.after), tree)) not in seen:
            seen.append(key)
            yield restorer.outcome(state)


def test_the_newest_whole_checkpoint_is_restored_or_the_one_before(tmp_path: Path):
    outcomes = list(tried(tmp_path))
    assert {outcome for outcome, _ in outcomes} == {"none yet", "the one before", "the newest"}
    assert not any(in_part for _, in_part in outcomes)


def test_without_flushes_checkpoints_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "fsync", lambda path: None)
    assert ("lost", True) in tried(tmp_path)
