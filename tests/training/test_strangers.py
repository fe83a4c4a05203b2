"""A run's folder that a stranger has made: nothing is written, deleted or read outside of it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_fit import leave, train

from vaejax.errors import UserError
from vaejax.files import partial_name
from vaejax.metrics import MAX_FILE_BYTES, MAX_LINE_BYTES, read_lines
from vaejax.training import checkpoint, run


@pytest.fixture
def folder(complete_run: Path, tmp_path: Path) -> Path:
    """A copy of a run, beside a folder of mine."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    return Path(shutil.copytree(complete_run, tmp_path / "run"))


def contents(place: Path) -> dict[str, str]:
    return {str(p.relative_to(place)): p.read_text() for p in place.rglob("*") if p.is_file()}


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("name", [*run.FOLDERS, *run.FLOW_FOLDERS])
def test_a_folder_of_a_run_that_is_a_link_is_refused_by_its_name(name: str, folder: Path):
    for target in ("mine", "none"):
        clear(folder / name)
        (folder / name).symlink_to(folder.parent / target)
        with pytest.raises(UserError, match=f" {name} in it is a link"), run.locked(folder):
            pass
    (folder / name).unlink()
    (folder / name).touch()
    with pytest.raises(UserError, match=f" {name} in it is no folder"), run.locked(folder):
        pass


@pytest.mark.parametrize("name", run.APPENDED)
def test_a_file_that_a_run_appends_to_is_its_own(name: str, folder: Path):
    mine, path = folder.parent / "mine" / "file", folder / name
    plants: dict[str, Callable[[], None]] = {
        "is a link": lambda: path.symlink_to(mine),
        "has another name elsewhere": lambda: os.link(mine, path),
        "is not a regular file": lambda: os.mkfifo(path),
    }
    for problem, plant in plants.items():
        clear(path)
        plant()
        assert not run.is_locked(folder)
        with pytest.raises(UserError, match=f" {name} in it {problem}"), run.locked(folder):
            pass
    clear(path)
    path.symlink_to(folder.parent / "created")
    with pytest.raises(UserError, match="is a link"), run.locked(folder):
        pass
    assert contents(folder.parent / "mine") == {"file": "mine"}
    assert not (folder.parent / "created").exists()


def snapshot(place: Path) -> dict[Path, int]:
    return {path: os.lstat(path).st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize("name", ["checkpoints", "samples", "run.lock", "metrics.jsonl"])
def test_a_run_that_leads_elsewhere_is_not_resumed(name: str, folder: Path, data: Path):
    leave(folder, "stopped")
    mine = folder.parent / "mine"
    (folder / name).rename(mine / name)
    (folder / name).symlink_to(mine / name)
    if name == "checkpoints":
        (mine / name / partial_name("0000003")).mkdir()
    before = snapshot(mine)
    with pytest.raises(UserError, match=f"run is not used: {name} in it is a link"):
        train(data, folder, steps=20)
    assert snapshot(mine) == before


def test_an_evaluation_is_not_written_elsewhere(folder: Path):
    (folder / "evaluation").symlink_to(folder.parent / "mine")
    with pytest.raises(UserError, match="evaluation in it is a link"), run.evaluating(folder):
        pass
    assert contents(folder.parent / "mine") == {"file": "mine"}


def test_a_run_may_lie_behind_links(folder: Path, data: Path, capsys):
    elsewhere = folder.parent / "other disk"
    elsewhere.mkdir()
    (folder.parent / "runs").symlink_to(elsewhere)
    folder.rename(elsewhere / "real")
    (elsewhere / "run").symlink_to("real")
    train(data, folder.parent / "runs" / "run")
    assert "is finished" in capsys.readouterr().out


def test_only_what_a_save_has_left_is_deleted(folder: Path):
    mine, place = folder.parent / "mine", folder / checkpoint.FOLDER
    (place / partial_name("0000003")).mkdir()
    (place / partial_name("0000004")).symlink_to(mine)
    (place / ".partial-0000005").mkdir()
    checkpoint.delete_unfinished(folder)
    assert contents(mine) == {"file": "mine"}
    assert len([path for path in place.iterdir() if path.name.startswith(".partial-")]) == 2


def test_metrics_of_a_stranger_are_bounded_and_no_link_is_followed(folder: Path):
    path = folder / "metrics.jsonl"
    count = len(list(read_lines(path)))
    with path.open("ab") as file:
        file.write(b"[" * (3 * MAX_LINE_BYTES) + b"\n")
    assert len(list(read_lines(path))) == count
    os.truncate(path, MAX_FILE_BYTES + 1)
    with pytest.raises(OSError, match="more than"):
        list(read_lines(path))
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="is a link"):
        list(read_lines(path))
    path.unlink()
    assert list(read_lines(path)) == []
