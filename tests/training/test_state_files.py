"""A run is found again by its small files; damaged or gone, they cost nothing that was learned."""

import errno
import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_fit import digest, leave, lines, train

from vaejax import doctor, plots
from vaejax.errors import CheckpointError, StorageError, UserError
from vaejax.metrics import first_and_last
from vaejax.training import checkpoint, run
from vaejax.training.config import differences
from vaejax.training.visualize import Visualizer

pytestmark = pytest.mark.slow
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "emptied": lambda path: path.write_text(""),
    "another kind": lambda path: path.write_text("[1]"),
}


@pytest.fixture
def half(complete_run: Path, tmp_path: Path) -> Path:
    """The run as if it had been stopped after 14 of its 18 updates."""
    folder = Path(shutil.copytree(complete_run, tmp_path / "run"))
    shutil.rmtree(checkpoint.path(folder, 18))
    leave(folder, "stopped")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_run_goes_on_without_its_small_files(
    name: str, damage: str, complete_run: Path, half: Path, data: Path, capsys
):
    DAMAGES[damage](half / name)
    train(data, half)
    told = capsys.readouterr()
    assert "14 of 18 updates are done" in told.out
    if (name, damage) != ("run.json", "missing"):  # which a kill in the first moment leaves too
        assert f"{name} " in told.err
        assert "warning" in told.err
    assert digest(half) == digest(complete_run)
    assert differences(run.read_spec(half), run.read_spec(complete_run)) == []
    assert run.status(half) == "finished"


def test_a_numbered_run_is_found_by_its_checkpoints_where_its_settings_are_gone(
    half: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(half.parent)
    shutil.move(half, "runs/00003-tiny")
    folder = Path("runs/00003-tiny")
    (folder / "config.json").write_text("{")
    assert train(data, None) == folder
    assert "its newest checkpoint tells what it held" in capsys.readouterr().err


def test_a_numbered_run_that_cannot_be_known_is_told_and_left_alone(
    half: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(half.parent)
    folder = Path("runs/00003-tiny")
    shutil.move(half, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.json").write_text("{")
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert train(data, None, steps=1) == Path("runs/00004-tiny")
    warnings = capsys.readouterr().err
    assert "00003-tiny/config.json cannot be read" in warnings
    assert "It is left alone" in warnings
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_named_run_that_cannot_be_known_is_refused_and_fresh_moves_it_aside(
    half: Path, data: Path
):
    shutil.rmtree(half / "checkpoints")
    (half / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json cannot be read.*--fresh"):
        train(data, half)
    train(data, half, fresh=True, steps=1)
    assert (half.parent / "run.1" / "metrics.jsonl").exists()
    assert checkpoint.steps(half) == [1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_begins_from_zero_where_metrics_tell_that_it_had_begun(
    damage: str, half: Path, data: Path
):
    shutil.rmtree(half / "checkpoints")
    DAMAGES[damage](half / "run.json")
    with pytest.raises(CheckpointError, match="they are gone"):
        train(data, half)


def at_the_end_of_the_first_epoch(monkeypatch: pytest.MonkeyPatch, act) -> None:
    end = Visualizer.draw_epoch_end

    def with_a_fault(self, state, epoch: int) -> dict[str, np.ndarray]:
        drawn = end(self, state, epoch)
        if epoch == 1:
            act()
        return drawn

    monkeypatch.setattr(Visualizer, "draw_epoch_end", with_a_fault)


@pytest.mark.parametrize("damage", DAMAGES)
def test_small_files_that_are_damaged_under_a_run_are_written_anew(
    damage: str, complete_run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"

    def act() -> None:
        DAMAGES[damage](out / "config.json")
        DAMAGES[damage](out / "run.json")

    at_the_end_of_the_first_epoch(monkeypatch, act)
    train(data, out)
    assert digest(out) == digest(complete_run)
    assert run.read_spec(out).model == run.read_spec(complete_run).model
    assert run.read_status(out)["saved"] == 18
    assert run.status(out) == "finished"


@pytest.mark.parametrize("to", ["elsewhere", None])
def test_a_folder_that_is_moved_or_deleted_ends_the_run_and_nothing_is_begun_in_its_place(
    to: str | None, complete_run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "run"

    def act() -> None:
        shutil.move(out, tmp_path / to) if to else shutil.rmtree(out)

    with monkeypatch.context() as fault:
        at_the_end_of_the_first_epoch(fault, act)
        with pytest.raises(StorageError, match="was moved or deleted"):
            train(data, out, checkpoint_steps=2)
    assert not out.exists()
    if to:
        shutil.move(tmp_path / to, out)
        train(data, out)
        assert digest(out) == digest(complete_run)


def test_metrics_that_are_gone_are_told(half: Path, data: Path, capsys):
    (half / "metrics.jsonl").unlink()
    train(data, half)
    assert "no metrics of the first 14 updates" in capsys.readouterr().out
    assert min(line["step"] for line in lines(half)) == 14


def test_absurd_metrics_are_left_out(half: Path, monkeypatch: pytest.MonkeyPatch):
    good = len(lines(half))
    absurd = ["1e308", "-1e308", "NaN", "Infinity", "1" + "0" * 400, "true", '"1"', "null"]
    with (half / "metrics.jsonl").open("a") as file:
        for value in absurd:
            file.write(f'{{"step": 18, "epoch": 3, "split": "train", "mse": {value}}}\n')
        file.write('{"step": -1, "epoch": 3, "split": "train", "mse": 1}\n')
        file.write('{"step": true, "epoch": 3, "split": "train", "mse": 1}\n')
    plots.curves(half / "metrics.jsonl", half / "curves.png")
    _, last = first_and_last(half / "metrics.jsonl")
    assert last["train"]["step"] == 16
    assert good == 12
    (half.parent / "runs").mkdir()
    shutil.move(half, half.parent / "runs" / "00000-tiny")
    config = half.parent / "runs" / "00000-tiny" / "config.json"
    settings = json.loads(config.read_text())
    settings["schedule"]["updates_per_epoch"] = 0
    config.write_text(json.dumps(settings))
    monkeypatch.chdir(half.parent)
    assert "unreadable" in doctor.runs()


def test_a_name_that_is_too_long_is_refused(data: Path, tmp_path: Path):
    with pytest.raises(UserError, match="cannot be a folder: File name too long"):
        train(data, tmp_path / ("x" * 300))


def test_a_disk_that_locks_no_files_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="files cannot be locked there"):
        train(data, tmp_path / "run")


def test_a_finished_run_goes_on_with_changed_images_where_that_is_accepted(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(faces, tmp_path / "faces"))
    first = train(folder, None, steps=2)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(folder / "new.png")
    assert train(folder, None, steps=3, accept_changed_data=True) == first
    assert checkpoint.steps(tmp_path / "runs" / "00000-tiny") == [2, 3]


def test_pixels_that_are_damaged_under_a_run_stop_it_with_their_name(
    data: Path, complete_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepared, out = Path(shutil.copytree(data, tmp_path / "set")), tmp_path / "run"
    kept = Path(shutil.copytree(data, tmp_path / "kept"))

    def act() -> None:
        for path in (prepared / "pixels").iterdir():
            with path.open("r+b") as file:
                file.write(b"\0" * path.stat().st_size)

    with monkeypatch.context() as fault:
        at_the_end_of_the_first_epoch(fault, act)
        with pytest.raises(StorageError, match=r"is damaged.*The run was stopped"):
            train(prepared, out, checkpoint_steps=2)
    assert run.status(out) == "stopped"
    assert checkpoint.steps(out)[-1] >= 4
    shutil.rmtree(prepared)
    kept.rename(prepared)
    train(prepared, out)
    assert digest(out) == digest(complete_run)
