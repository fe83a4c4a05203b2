"""A folder or zip becomes a prepared set: complete, exact, the same everywhere, or not at all."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaejax import files
from vaejax.data import gather
from vaejax.data.assignment import identity
from vaejax.data.gather import Threads
from vaejax.data.prepare import builder, find_prepared, prepare
from vaejax.data.records import is_prepared, read_dataset_report
from vaejax.errors import UserError
from vaejax.files import atomic_folder

SPLITS = ("train", "validation", "test")
DATA = Path(os.environ.get("VAEJAX_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def make(source: Path, **settings: Any) -> Path:
    return prepare(source, **{"size": 16, "say": lambda _: None} | settings)


def records(folder: Path) -> list[dict[str, Any]]:
    """Every record, with the name of its split."""
    return [
        {**record, "split": split}
        for split in SPLITS
        for record in builder(folder).as_data_source(split)
    ]


def text(record: dict[str, Any], name: str) -> str:
    return record[name].decode()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> Path:
    """54 faces of 6 persons, two duplicates across persons, a photograph, a web page, a note."""
    folder = tmp_path_factory.mktemp("photos")
    for i, face in enumerate(sorted(faces.iterdir())[:54]):
        person = folder / f"person {i % 6}"
        person.mkdir(exist_ok=True)
        shutil.copy(face, person / (f"{i}.png" if i else "png named.jpg"))
    shutil.copy(folder / "person 1" / "1.png", folder / "person 2" / "copy.png")
    shutil.copy(folder / "person 1" / "1.png", folder / "person 1" / "copy.png")
    Image.new("RGB", (640, 480), "red").save(folder / "person 0" / "photograph.jpg")
    (folder / "person 0" / "page.jpg").write_text("<html>404 Not Found</html>")
    (folder / "notes.txt").write_text("on a journey")
    return folder


@pytest.fixture(scope="module")
def prepared(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, and leave it as it is."""
    return make(photos, out=tmp_path_factory.mktemp("out") / "set")


# What is in a prepared set


def test_the_report_counts_images_refusals_duplicates_sizes_and_persons(
    photos: Path, prepared: Path
):
    report = read_dataset_report(prepared)
    assert report["accepted"] == 57
    assert report["refused"] == [{"path": "person 0/page.jpg", "reason": "not an image"}]
    assert report["ignored"] == 1
    assert report["duplicates"] == [["person 1/1.png", "person 1/copy.png", "person 2/copy.png"]]
    assert report["sizes"] == {
        "width": {"min": 16, "median": 16.0, "max": 640},
        "height": {"min": 16, "median": 16.0, "max": 480},
        "most_common": {"16x16": 56, "640x480": 1},
    }
    assert report["persons"] == 6
    assert list(report["splits"]) == list(SPLITS)
    assert sum(report["splits"].values()) == 57
    assert 0 < report["seconds"] < 60
    assert report["source"] == str(photos)
    assert report["size"] == 16


def test_every_accepted_file_is_one_record_with_its_pixels(photos: Path, prepared: Path):
    examples = {text(record, "path"): record for record in records(prepared)}
    files = {str(p.relative_to(photos)): p for p in photos.rglob("*") if p.is_file()}
    assert set(examples) == set(files) - {"notes.txt", "person 0/page.jpg"}
    photograph = examples.pop("person 0/photograph.jpg")
    assert np.abs(photograph["image"].astype(int) - (255, 0, 0)).max() <= 1
    for path, record in examples.items():
        with Image.open(files[path]) as image:
            assert np.array_equal(record["image"], np.asarray(image)), path
        assert text(record, "sha256") == hashlib.sha256(files[path].read_bytes()).hexdigest()
        assert text(record, "person") == path.split("/")[0]


def test_the_splits_are_those_of_the_report_and_hold_all_images_of_a_person(prepared: Path):
    examples = records(prepared)
    for split, count in read_dataset_report(prepared)["splits"].items():
        assert len([r for r in examples if r["split"] == split]) == count > 0
    assert len({(text(r, "person"), r["split"]) for r in examples}) == 6
    assert len({(text(r, "sha256"), r["split"]) for r in examples}) == 55


def test_the_order_of_the_records_is_not_that_of_the_names(prepared: Path):
    for split in SPLITS:
        some = [r for r in records(prepared) if r["split"] == split]
        order = [(text(r, "sha256"), text(r, "path")) for r in some]
        assert order == sorted(order)
        assert order != sorted(order, key=lambda pair: pair[1])


def test_there_is_a_contact_sheet_and_no_other_file_is_left(prepared: Path):
    records = {f"faces-{split}.array_record-00000-of-00001" for split in SPLITS}
    tables = {"dataset_info.json", "features.json"}
    assert {path.name for path in (prepared / "records").iterdir()} == records | tables
    pixels = {path.name for path in (prepared / "pixels").iterdir()}
    assert pixels == {f"{split}-00000-of-00001" for split in SPLITS}
    assert {path.name for path in prepared.iterdir()} == {
        "dataset_report.json",
        "contact_sheet.png",
        "records",
        "pixels",
    }
    with Image.open(prepared / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * 18 + 2, 8 * 18 + 2)


def test_a_set_is_the_same_whatever_the_number_of_threads(photos: Path, tmp_path: Path):
    one, many = (
        everything(make(photos, out=tmp_path / str(n), workers=Threads(n))) for n in (1, 16)
    )
    assert {n: d for n, d in one.items() if n != "dataset_report.json"} == {
        n: d for n, d in many.items() if n != "dataset_report.json"
    }
    reports = [json.loads(files["dataset_report.json"]) for files in (one, many)]
    ours = {"seconds": 0, "sha256": ""}
    assert {**reports[0], **ours} == {**reports[1], **ours}


def test_a_zip_gives_the_records_of_its_folder(photos: Path, prepared: Path, tmp_path: Path):
    shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
    other = make(tmp_path / "photos.zip", out=tmp_path / "set")
    for one, two in zip(records(prepared), records(other), strict=True):
        np.testing.assert_equal(one, two)
    assert read_dataset_report(other)["fingerprint"] == read_dataset_report(prepared)["fingerprint"]


def test_the_fingerprint_depends_on_the_images_and_the_size_alone(
    photos: Path, faces: Path, tmp_path: Path
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for i, face in enumerate(sorted(faces.iterdir())):
        shutil.copy(face, elsewhere / f"{99 - i}.jpg")
    prints = [
        read_dataset_report(make(source))["fingerprint"] for source in (faces, elsewhere, photos)
    ]
    prints.append(read_dataset_report(make(faces, size=8))["fingerprint"])
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_an_image_of_many_megapixels_becomes_a_record(faces: Path, tmp_path: Path):
    source = Path(shutil.copytree(faces, tmp_path / "source"))
    Image.new("RGB", (3000, 2800), "red").save(source / "large.png")
    images = {text(r, "path"): r["image"] for r in records(make(source))}
    assert np.array_equal(images["large.png"], np.broadcast_to([255, 0, 0], (16, 16, 3)))


def test_odd_names_survive_to_the_report_and_the_records(faces: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(faces, source)
    odd = [b"\xff\xfe", b"new\nline", "😀".encode(), b"-rf", "é".encode() * 125 + b".jpeg"]
    for i, name in enumerate(odd):
        path = os.fsencode(source) + b"/" + name
        Path(os.fsdecode(path)).write_bytes(b"" if i == 0 else (faces / f"{i:03}.png").read_bytes())
    folder = make(source)
    assert read_dataset_report(folder)["refused"] == [
        {"path": "\\xff\\xfe", "reason": "empty file"}
    ]
    duplicates = {path for paths in read_dataset_report(folder)["duplicates"] for path in paths}
    expected = {"new\\x0aline", "😀", "-rf", "é" * 125 + ".jpeg"}
    assert expected <= duplicates
    assert expected <= {text(record, "path") for record in records(folder)}


# Finding it again


def test_a_second_use_decodes_nothing(faces: Path, tmp_path: Path, monkeypatch):
    cached, placed = make(faces), make(faces, out=tmp_path / "set")
    before = everything(placed)
    monkeypatch.setattr(gather, "examine", None)  # whoever decodes, fails
    assert make(faces) == cached
    assert make(faces, out=tmp_path / "set") == placed
    assert everything(placed) == before


def test_a_changed_source_makes_another_set(faces: Path, tmp_path: Path):
    source = Path(shutil.copytree(faces, tmp_path / "source"))
    sets = [make(source), make(source, size=8)]
    for colour in ("red", "blue"):  # files of the same length
        Image.new("RGB", (16, 16), colour).save(source / "more.bmp")
        sets.append(make(source))
    (source / "more.bmp").unlink()
    assert len(set(sets)) == 4
    assert [read_dataset_report(folder)["accepted"] for folder in sets] == [60, 60, 61, 61]
    assert make(source) == sets[0]


def test_a_prepared_set_is_a_source_without_its_original_images(faces: Path, tmp_path: Path):
    source = Path(shutil.copytree(faces, tmp_path / "source"))
    folder = make(source, out=tmp_path / "set")
    shutil.rmtree(source)
    assert make(folder) == make(folder, out=folder) == folder
    with pytest.raises(UserError, match=r"prepared at 16x16, not 32x32\. Use --size 16"):
        make(folder, size=32)
    with pytest.raises(UserError, match="leave out --out"):
        make(folder, out=tmp_path / "other")


def noise(path: Path, image: int) -> Path:
    """Write an image that resembles no other."""
    pixels = np.random.default_rng(image).integers(0, 256, (16, 16, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def splits_of(folder: Path, name: Callable[[str], str]) -> dict[str, set[str]]:
    """The splits of all images whose paths have the same name."""
    found: dict[str, set[str]] = {}
    for record in records(folder):
        found.setdefault(name(text(record, "path")), set()).add(record["split"])
    return found


def test_a_person_in_several_folders_is_in_one_split(tmp_path: Path):
    for i in range(40):
        for j, folder in enumerate((f"person {i}/2019", f"person {i}/2020", f"PERSON {i}")):
            noise(tmp_path / "all" / folder / "x.png", 3 * i + j)
    said: list[str] = []
    folder = make(tmp_path, out=tmp_path.with_name("set"), say=said.append)
    persons = splits_of(folder, lambda path: path.split("/")[1].lower())
    assert len(persons) == 40
    assert all(len(splits) == 1 for splits in persons.values())
    report = read_dataset_report(folder)
    assert (report["persons"], report["person_depth"]) == (40, 2)
    assert len(said) == 1
    assert "of 40 persons (folder 2 of a path)" in said[0]


def test_files_with_the_same_pixels_are_joined_and_listed(tmp_path: Path):
    for i in range(40):
        image = Image.open(noise(tmp_path / "all" / f"{i}.png", i))
        image.save(tmp_path / "all" / f"{i}.bmp")
    folder = make(tmp_path / "all", out=tmp_path / "set")
    images = splits_of(folder, lambda path: path.split(".")[0])
    assert all(len(splits) == 1 for splits in images.values())
    duplicates = read_dataset_report(folder)["duplicates"]
    assert sorted(duplicates) == sorted([f"{i}.bmp", f"{i}.png"] for i in range(40))


def test_images_that_look_the_same_are_listed_and_not_joined(faces: Path, tmp_path: Path):
    for i, path in enumerate(sorted(faces.iterdir())[:20]):
        noise(tmp_path / "all" / f"{i}.png", i)
        pixels = np.asarray(Image.open(tmp_path / "all" / f"{i}.png")).astype(int)
        brighter = np.clip(pixels + 1, 0, 255).astype(np.uint8)
        Image.fromarray(brighter).save(tmp_path / "all" / f"{i} brighter.png")
        shutil.copy(path, tmp_path / "all" / f"face {i}.png")
    said: list[str] = []
    folder = make(tmp_path / "all", out=tmp_path / "set", say=said.append)
    report = read_dataset_report(folder)
    near = report["near_duplicates"]
    pairs = [[f"{i} brighter.png", f"{i}.png"] for i in range(20)]
    assert [pair for pair in near["listed"] if "face" not in pair[0]] == sorted(pairs)
    assert near["pairs"] == len(near["listed"])
    assert near["complete"]
    assert report["duplicates"] == []
    assert f"{near['pairs']} pairs look alike" in said[0]
    assert len(set(map(str, splits_of(folder, lambda path: path.split()[0]).values()))) > 1


def test_folders_that_name_splits_are_doubted_once_and_another_folder_can_be_named(tmp_path: Path):
    for i in range(48):
        split, person = ("train", "val", "test")[i % 3], f"person {i % 8}"
        noise(tmp_path / "all" / split / person / f"{i}.png", i)
    said: list[str] = []
    make(tmp_path / "all", out=tmp_path / "one", say=said.append)
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1
    assert "the folders test, train, val are taken for persons. --person-depth N" in warnings[0]
    assert "here it was 1" in warnings[0]
    said.clear()
    folder = make(tmp_path / "all", out=tmp_path / "two", say=said.append, person_depth=2)
    assert not [line for line in said if line.startswith("warning")]
    assert read_dataset_report(folder)["persons"] == 8
    persons = splits_of(folder, lambda path: path.split("/")[1])
    assert all(len(splits) == 1 for splits in persons.values())
    none = make(tmp_path / "all", out=tmp_path / "none", person_depth=0)
    assert read_dataset_report(none)["persons"] == 0
    with pytest.raises(UserError, match="prepared already, with --person-depth 2"):
        make(folder, person_depth=1)
    with pytest.raises(UserError, match="Choose another --out"):
        make(tmp_path / "all", out=tmp_path / "two")
    assert make(folder, person_depth=2) == make(folder) == folder


def test_fewer_than_three_persons_are_doubted(tmp_path: Path):
    for i in range(8):
        noise(tmp_path / "all" / "ab"[i % 2] / f"{i}.png", i)
    said: list[str] = []
    make(tmp_path / "all", out=tmp_path / "set", say=said.append)
    assert "only 2 folders name persons (a, b), so that a person may be in several" in said[0]


def test_the_identity_of_a_set_says_which_image_is_in_which_split(tmp_path: Path):
    for i in range(60):
        noise(tmp_path / "all" / f"{i % 30:02}" / f"{i}.png", i)
    before = make(tmp_path / "all", out=tmp_path / "before")
    of = {next(iter(splits)): name for name, splits in splits_of(before, lambda p: p[:2]).items()}
    one, other = tmp_path / "all" / of["train"], tmp_path / "all" / of["test"]
    one.rename(tmp_path / "third")
    other.rename(one)
    (tmp_path / "third").rename(other)
    after = make(tmp_path / "all", out=tmp_path / "after")
    reports = [read_dataset_report(folder) for folder in (before, after)]
    for field in ("fingerprint", "persons", "splits"):
        assert reports[0][field] == reports[1][field]
    assert identity(reports[0]) != identity(reports[1])


def test_finding_a_prepared_set_writes_nothing(faces: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_prepared(faces, size=16) == (None, 60)
    assert list(tmp_path.iterdir()) == []
    folder = make(faces)
    assert folder.parent == tmp_path / "vaejax" / "prepared"
    assert find_prepared(faces, size=16) == find_prepared(folder, size=16) == (folder, 60)
    assert find_prepared(faces, size=8) == (None, 60)


# What cannot be prepared


def with_bad(faces: Path, folder: Path, bad: int) -> Path:
    shutil.copytree(faces, folder)
    for i in range(bad):
        (folder / f"bad {i}.png").write_bytes(b"" if i % 2 else b"<html>")
    return folder


def test_a_few_bad_files_are_left_out_and_listed(faces: Path, tmp_path: Path):
    report = read_dataset_report(make(with_bad(faces, tmp_path / "source", 3)))
    assert report["accepted"] == 60
    assert report["refused"] == [
        {"path": "bad 0.png", "reason": "not an image"},
        {"path": "bad 1.png", "reason": "empty file"},
        {"path": "bad 2.png", "reason": "not an image"},
    ]


def test_more_than_5_percent_of_bad_files_are_an_error_unless_allowed(faces: Path, tmp_path: Path):
    source, out = with_bad(faces, tmp_path / "source", 5), tmp_path / "set"
    with pytest.raises(UserError, match=r"5 of 65 files .* 3 not an image, 2 empty file") as error:
        make(source, out=out)
    assert "for example bad 0.png" in str(error.value)
    assert "--allow-refused" in str(error.value)
    listed = tmp_path / "set.refused.json"
    assert str(listed) in str(error.value)
    assert len(json.loads(listed.read_text())) == 5
    assert not out.exists()
    report = read_dataset_report(make(source, out=out, allow_refused=True))
    assert (report["accepted"], len(report["refused"])) == (60, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "set"}


def test_members_whose_names_lead_out_of_a_zip_are_refused_and_write_nothing(
    faces: Path, tmp_path: Path
):
    source = tmp_path / "in" / "faces.zip"
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as archive:
        for face in faces.iterdir():
            archive.write(face, face.name)
        for name in ("../evil.png", str(tmp_path / "evil.png")):
            archive.writestr(name, (faces / "000.png").read_bytes())
    before = everything(tmp_path)
    report = read_dataset_report(make(source))
    assert [r["reason"] for r in report["refused"]] == ["its name leads out of the zip"] * 2
    assert report["accepted"] == 60
    assert everything(tmp_path) == before


def empty(source: Path, faces: Path) -> None:
    source.mkdir()


def only_notes(source: Path, faces: Path) -> None:
    source.mkdir()
    (source / "notes.txt").write_text("none yet")


def only_bad(source: Path, faces: Path) -> None:
    source.mkdir()
    (source / "1.jpg").write_text("<html>")


def two_of_many(source: Path, faces: Path) -> None:
    source.mkdir()
    for i in range(5):
        shutil.copy(faces / f"00{i % 2}.png", source / f"{i}.png")


def missing(source: Path, faces: Path) -> None: ...


def a_text(source: Path, faces: Path) -> None:
    source.write_text("no zip")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (empty, "no images in .*: no file there could be one"),
        (only_notes, "no images in .*: no file there could be one"),
        (only_bad, r"no usable images in .* \(0 of 1 files\): 1 not an image"),
        (two_of_many, "only 2 different images .* at least 3 are needed"),
        (missing, "does not exist"),
        (a_text, "neither a folder of images nor a readable zip"),
    ],
)
def test_too_few_images_are_an_error_and_leave_nothing(
    faces: Path, tmp_path: Path, fill: Any, message: str
):
    fill(tmp_path / "source", faces)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "source", out=tmp_path / "set", allow_refused=True)
    assert everything(tmp_path) == before
    assert not (tmp_path / "set").exists()


def test_three_images_are_one_for_each_split(faces: Path, tmp_path: Path):
    for name in ("000.png", "001.png", "002.png"):
        shutil.copy(faces / name, tmp_path / name)
    report = read_dataset_report(make(tmp_path))
    assert report["splits"] == {"train": 1, "validation": 1, "test": 1}
    assert report["persons"] == 0


@pytest.mark.parametrize("size", [0, 7, 2049])
def test_sizes_outside_of_8_to_2048_are_refused(faces: Path, size: int):
    with pytest.raises(UserError, match="8 to 2048"):
        make(faces, size=size)


# Where it may lie


def test_an_empty_folder_may_be_filled(faces: Path, tmp_path: Path):
    (tmp_path / "set").mkdir()
    assert is_prepared(make(faces, out=tmp_path / "set"))


def test_nothing_that_exists_is_replaced(faces: Path, prepared: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    shutil.copytree(prepared, tmp_path / "set")
    before = everything(tmp_path)
    for name, message in {
        "file": "file is a file",
        "folder": "neither empty nor a prepared set",
        "set": "holds another prepared set: .*photos.* at 16x16",
        "file/set": "cannot write .*/file: File exists",
        "a" * 300: "cannot write .*: File name too long",
    }.items():
        with pytest.raises(UserError, match=message):
            make(faces, out=tmp_path / name)
    assert everything(tmp_path) == before


def test_a_set_among_its_images_is_refused(faces: Path):
    with pytest.raises(UserError, match="lies among the images"):
        make(faces, out=faces / "set")
    assert not (faces / "set").exists()


def test_too_little_disk_space_is_an_error_before_the_work(
    faces: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(gather, "examine", None)  # whoever decodes, fails
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(UserError, match="not enough room"):
        make(faces, out=tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=[20_000, 50_000])
def _a_full_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file may grow beyond so many bytes: less than the pixels need, or than the records."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_a_full_disk")
def test_a_disk_that_is_full_is_an_error_and_leaves_nothing(faces: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot write .*/set: .*File too large.* nothing was"):
        make(faces, out=tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_pipe_is_not_reported_as_a_disk_error(faces: Path, tmp_path: Path):
    def closed(_: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        make(faces, out=tmp_path / "set", say=closed)
    assert is_prepared(tmp_path / "set")  # it was told at the end, when all was there
    with pytest.raises(BrokenPipeError):
        make(faces, out=tmp_path / "set", say=closed)


# Death


DIE = """
import importlib, itertools, os, signal, sys
from pathlib import Path
from vaejax import files
from vaejax.data import gather, prepare, records
module, name, calls = sys.argv[3:]
owner = gather.Pixels if module == "pixels" else {"records": records, "files": files}[module]
real, count = getattr(owner, name), itertools.count(1)
def deadly(*args, **settings):
    if next(count) == int(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **settings)
setattr(owner, name, deadly)
prepare.prepare(Path(sys.argv[1]), size=16, out=Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    "when",
    [("pixels", "append", "30"), ("records", "write_metadata", "1"), ("files", "_rename", "1")],
)
def test_a_kill_leaves_no_prepared_set_and_the_next_call_clears_up(
    faces: Path, tmp_path: Path, when: tuple[str, ...]
):
    out = tmp_path / "set"
    process = subprocess.run([sys.executable, "-c", DIE, str(faces), str(out), *when])
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had begun
    assert make(faces, out=out) == out
    assert len(records(out)) == 60
    assert list(tmp_path.iterdir()) == [out]


def test_the_unfinished_folder_of_a_living_process_is_kept(faces: Path, tmp_path: Path):
    with atomic_folder(tmp_path / "other") as partial:
        (partial / "file").write_text("mine")
        make(faces, out=tmp_path / "set")
    assert (tmp_path / "other" / "file").read_text() == "mine"


def meanwhile(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen just before the next set takes its name."""
    rename = files._rename

    def later(*args: Path) -> None:
        monkeypatch.setattr(files, "_rename", rename)
        act()
        rename(*args)

    monkeypatch.setattr(files, "_rename", later)


def test_two_processes_that_prepare_the_same_set_both_get_it(
    faces: Path, tmp_path: Path, monkeypatch
):
    out = tmp_path / "set"
    meanwhile(lambda: make(faces, out=out), monkeypatch)
    assert make(faces, out=out) == out
    assert len(records(out)) == 60
    assert list(tmp_path.iterdir()) == [out]


def test_a_set_that_appeared_meanwhile_is_not_replaced(faces: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "set"
    meanwhile(lambda: make(faces, size=8, out=out), monkeypatch)
    with pytest.raises(UserError, match="holds another prepared set"):
        make(faces, out=out)
    assert read_dataset_report(out)["size"] == 8
    assert list(tmp_path.iterdir()) == [out]


# Photographs


@pytest.mark.skipif(not (DATA / "lfw49.zip").exists(), reason="no photographs: VAEJAX_TEST_DATA")
def test_49_persons_are_told_apart_in_photographs():
    folder = make(DATA / "lfw49.zip", size=32)
    report = read_dataset_report(folder)
    assert (report["accepted"], report["refused"], report["persons"]) == (832, [], 49)
    examples = records(folder)
    assert len(examples) == 832
    assert len({(text(record, "person"), record["split"]) for record in examples}) == 49
    with zipfile.ZipFile(DATA / "lfw49.zip") as archive:
        assert {text(record, "path") for record in examples} == set(archive.namelist())
