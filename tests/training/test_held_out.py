"""What a run has learned from stays out of its held-out images, whatever becomes of the images."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_fit import train

from vaejax.data import assignment
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.training import run
from vaejax.training.finish import Options


def leave_at_once(options: Options) -> None:
    """A run that is stopped before its first update."""
    run.write_spec(options.folder, options.spec)
    status = run.initial_status(options.spec, environment={"devices": ""}, before={})
    run.write_status(options.folder, status, status="stopped")


@pytest.fixture
def people(tmp_path: Path, draw: Callable[..., np.ndarray], monkeypatch) -> Path:
    """A folder with 90 images of 30 persons; runs end at once."""
    monkeypatch.setattr("vaejax.training.fit.finish", leave_at_once)
    for i, image in enumerate(draw(90, 16)):
        path = tmp_path / "people" / f"{i % 30:02}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "people"


@pytest.fixture
def folder(people: Path, tmp_path: Path) -> Path:
    """The folder of a run that was begun with them."""
    train(people, tmp_path / "run")
    return tmp_path / "run"


def hashes(folder: Path, split: str) -> set[str]:
    images = Images(Path(run.read_spec(folder).schedule.prepared), split)
    return {images.metadata(i)["sha256"] for i in range(len(images))}


def person(folder: Path, split: str) -> str:
    return Images(Path(run.read_spec(folder).schedule.prepared), split).metadata(0)["person"]


def test_persons_that_change_their_folders_are_noticed_and_keep_their_splits_if_accepted(
    people: Path, folder: Path
):
    learned, held_out = hashes(folder, "train"), hashes(folder, "test")
    one, other = (
        people / person(folder, "train"),
        people / person(folder, "test"),
    )
    one.rename(people.parent / "third")
    other.rename(one)
    (people.parent / "third").rename(other)
    with pytest.raises(UserError, match="6 added, 6 removed"):
        train(people, folder)
    train(people, folder, accept_changed_data=True)
    assert hashes(folder, "train") == learned
    assert hashes(folder, "test") == held_out
    assert train(people, folder) == folder  # they are its own from now on
    assert hashes(folder, "test") == held_out


def test_copies_in_another_persons_folder_take_nothing_that_was_learned_from_into_test(
    people: Path, folder: Path, capsys
):
    learned, held_out = hashes(folder, "train"), hashes(folder, "test")
    images = Images(Path(run.read_spec(folder).schedule.prepared), "train")
    for i in range(0, len(images), 3):
        path = images.metadata(i)["path"]
        name = path.replace("/", " ")
        shutil.copy(people / path, people / person(folder, "test") / name)
    train(people, folder, accept_changed_data=True)
    assert "new images are left out of all splits" in capsys.readouterr().out
    assert hashes(folder, "train") == learned
    assert hashes(folder, "test") == held_out
    shutil.rmtree(run.read_spec(folder).schedule.prepared)  # from the cache
    assert train(people, folder) == folder
    assert hashes(folder, "test") == held_out


def test_a_run_of_an_earlier_version_goes_on_and_remembers_its_images_from_then_on(
    people: Path, folder: Path
):
    spec = run.read_spec(folder)
    old = {name: value for name, value in spec.data.items() if name != "assignment"}
    run.write_spec(folder, spec.__class__(**{**vars(spec), "data": old}))
    before = assignment.read(folder)
    (folder / assignment.FILE).unlink()
    assert train(people, folder) == folder
    assert assignment.read(folder) == before
    assert run.read_spec(folder).data == spec.data


def test_what_a_run_learns_from_is_on_the_disk_before_it_learns(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vaejax.training.fit.finish", stop)
    with pytest.raises(KeyboardInterrupt):
        train(people, tmp_path / "run")
    images = Images(Path(run.read_spec(tmp_path / "run").schedule.prepared), "train")
    assert len(assignment.learned_from(tmp_path / "run", images)) == len(images)
