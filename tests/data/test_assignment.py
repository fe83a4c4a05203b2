"""A run's own splits: what it knows, and the copy of a set that it reads."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax.data import assignment
from vaejax.data.assignment import FILE, remember, set_of_run, split_for_run
from vaejax.data.batches import Images, Selection
from vaejax.data.prepare import prepare
from vaejax.data.records import check, read_dataset_report
from vaejax.errors import UserError


def make(source: Path) -> Path:
    return prepare(source, size=16, say=lambda _: None)


def contents(prepared: Path) -> dict[str, tuple[str, bytes]]:
    """The split and the pixels of every image, by path."""
    return {
        some.metadata(i)["path"]: (split, some.read(np.array([i])).tobytes())
        for split in read_dataset_report(prepared)["splits"]
        for some in [Images(prepared, split)]
        for i in range(len(some))
    }


def splits(prepared: Path) -> dict[str, str]:
    return {path: split for path, (split, _) in contents(prepared).items()}


@pytest.fixture
def people(tmp_path: Path, draw: Callable[..., np.ndarray], monkeypatch) -> Path:
    """60 images of 30 persons; what is cached is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, image in enumerate(draw(60, 16)):
        folder = tmp_path / "people" / f"{i % 30:02}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return tmp_path / "people"


@pytest.fixture
def run(people: Path, tmp_path: Path) -> Path:
    """The folder of a run that has learned from them."""
    remember(tmp_path / "run", make(people))
    return tmp_path / "run"


def persons_of(prepared: Path, split: str) -> list[str]:
    return sorted({path[:2] for path, own in splits(prepared).items() if own == split})


def add_copies(people: Path) -> tuple[str, list[str]]:
    """Put an image of each training person among those of a person of the test split."""
    before = make(people)
    held_out = persons_of(before, "test")[0]
    learned = persons_of(before, "train")[:4]
    for person in learned:
        image = min((people / person).iterdir())
        shutil.copy(image, people / held_out / f"copy of {image.name}")
    return held_out, learned


def test_a_run_reads_the_prepared_set_as_long_as_its_images_are_the_same(people: Path, run: Path):
    prepared = make(people)
    assert set_of_run(run, prepared) == split_for_run(run, prepared, before=None) == prepared
    before = (run / FILE).read_bytes()
    remember(run, prepared)
    assert (run / FILE).read_bytes() == before


def test_a_run_that_is_new_reads_the_prepared_set(people: Path, tmp_path: Path):
    prepared = make(people)
    assert split_for_run(tmp_path, prepared, before=None) == prepared


def test_images_keep_their_splits_in_a_copy_of_the_set_which_can_be_made_again(
    people: Path, run: Path, capsys
):
    before = splits(make(people))
    held_out, learned = add_copies(people)
    prepared = make(people)
    assert {splits(prepared)[path] for path in before if path[:2] in (held_out, *learned)} == {
        splits(prepared)[f"{held_out}/{next(iter((people / held_out).iterdir())).name}"]
    }  # the copies have tied all of them together
    own = split_for_run(run, prepared, before=None)
    assert own != prepared
    assert "4 new images are left out of all splits" in capsys.readouterr().out
    check(own)
    assert {path: split for path, split in splits(own).items() if path in before} == before
    copies = {path: split for path, split in splits(own).items() if path not in before}
    assert list(copies.values()) == ["left_out"] * 4
    pixels = {path: image for path, (_, image) in contents(prepared).items()}
    assert {path: image for path, (_, image) in contents(own).items()} == pixels
    report = read_dataset_report(own)
    assert report["splits"]["left_out"] == 4
    assert assignment.identity(report) == assignment.identity(read_dataset_report(prepared))

    remember(run, own)
    made = contents(own)
    assert set_of_run(run, prepared) == own
    shutil.rmtree(own)
    assert set_of_run(run, prepared) == own
    assert contents(own) == made
    assert split_for_run(run, prepared, before=None) == own


def test_an_image_that_was_learned_from_is_known_when_it_comes_back(people: Path, run: Path):
    learned = persons_of(make(people), "train")[0]
    pixels = [Image.open(path).copy() for path in sorted((people / learned).iterdir())]
    shutil.rmtree(people / learned)
    own = split_for_run(run, make(people), before=None)
    remember(run, own)
    for i in range(20):  # in other files, as another person, whose name may mean any split
        (people / f"back {i}").mkdir()
        pixels[0].save(people / f"back {i}" / "image.bmp")
        pixels[1].save(people / f"back {i}" / "image.png", compress_level=i % 9)
    own = split_for_run(run, make(people), before=None)
    assert {split for path, split in splits(own).items() if "back" in path} == {"train"}


def test_a_run_of_an_earlier_version_is_asked_for_the_set_that_it_read(
    people: Path, tmp_path: Path, capsys
):
    old = make(people)
    add_copies(people)
    prepared = make(people)
    own = split_for_run(tmp_path, prepared, before=old)
    assert list(splits(own).values()).count("left_out") == 4
    shutil.rmtree(old)
    assert split_for_run(tmp_path, prepared, before=old) == prepared
    assert "is unknown" in capsys.readouterr().err


def test_a_split_that_would_be_empty_is_refused(people: Path, run: Path):
    for person in persons_of(make(people), "test"):
        shutil.rmtree(people / person)
    with pytest.raises(UserError, match="none is left for test"):
        split_for_run(run, make(people), before=None)


def test_the_file_is_small_and_damage_is_told(people: Path, run: Path):
    known = assignment.read(run)
    assert known is not None
    assert len(known.known) == 60 + 60 + 30  # files, pixels, persons
    assert (run / FILE).stat().st_size < 16 * 150 + 60 + 3000
    assert [path.name for path in run.iterdir()] == [FILE]
    content = (run / FILE).read_bytes()
    for damaged in (b"", content[:1000], content.replace(b"train", b"brain"), b"x" * 100):
        (run / FILE).write_bytes(damaged)
        with pytest.raises(UserError, match=r"splits.npz is damaged"):
            assignment.read(run)


def test_what_was_learned_from_is_found_in_any_split(people: Path, run: Path):
    prepared = make(people)
    train, test = Images(prepared, "train"), Images(prepared, "test")
    assert assignment.learned_from(run, train).tolist() == list(range(len(train)))
    assert len(assignment.learned_from(run, test)) == 0
    assert len(assignment.learned_from(people, train)) == 0  # no run


def test_a_selection_has_some_images_in_their_order(people: Path):
    images = Images(make(people), "train")
    some = Selection(images, np.array([2, 3, 7]))
    assert len(some) == 3
    assert some.shape == (16, 16, 3)
    assert np.array_equal(some.read(np.array([2, 0])), images.read(np.array([7, 2])))
    assert some.metadata(1) == images.metadata(3)
