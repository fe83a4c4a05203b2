"""A folder or zip becomes a prepared set: whole, exact, the same everywhere, or not at all."""

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

from vaejax.data import gather, whole
from vaejax.data.prepare import builder, look, prepare
from vaejax.data.records import is_prepared, read_report
from vaejax.errors import UserError

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
def album(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> Path:
    """54 faces of 6 persons, two copies across persons, a photograph, a web page, a note."""
    folder = tmp_path_factory.mktemp("album")
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
def prepared(album: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, and leave it as it is."""
    return make(album, out=tmp_path_factory.mktemp("out") / "set")


# What is in a prepared set


def test_the_report_says_what_was_found(album: Path, prepared: Path):
    report = read_report(prepared)
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
    assert report["source"] == str(album)
    assert report["size"] == 16


def test_every_accepted_file_is_one_record_with_its_pixels(album: Path, prepared: Path):
    found = {text(record, "path"): record for record in records(prepared)}
    files = {str(p.relative_to(album)): p for p in album.rglob("*") if p.is_file()}
    assert set(found) == set(files) - {"notes.txt", "person 0/page.jpg"}
    photograph = found.pop("person 0/photograph.jpg")
    assert np.abs(photograph["image"].astype(int) - (255, 0, 0)).max() <= 1
    for path, record in found.items():
        with Image.open(files[path]) as image:
            assert np.array_equal(record["image"], np.asarray(image)), path
        assert text(record, "sha256") == hashlib.sha256(files[path].read_bytes()).hexdigest()
        assert text(record, "person") == path.split("/")[0]


def test_the_splits_are_those_of_the_report_and_hold_whole_persons(prepared: Path):
    found = records(prepared)
    for split, count in read_report(prepared)["splits"].items():
        assert len([r for r in found if r["split"] == split]) == count > 0
    assert len({(text(r, "person"), r["split"]) for r in found}) == 6
    assert len({(text(r, "sha256"), r["split"]) for r in found}) == 55


def test_the_order_of_the_records_is_not_that_of_the_names(prepared: Path):
    for split in SPLITS:
        some = [r for r in records(prepared) if r["split"] == split]
        order = [(text(r, "sha256"), text(r, "path")) for r in some]
        assert order == sorted(order)
        assert order != sorted(order, key=lambda pair: pair[1])


def test_there_is_a_contact_sheet_and_nothing_is_left_lying_about(prepared: Path):
    records = {f"faces-{split}.array_record-00000-of-00001" for split in SPLITS}
    tables = {"dataset_info.json", "features.json"}
    assert {path.name for path in (prepared / "records").iterdir()} == records | tables
    assert {path.name for path in prepared.iterdir()} == {
        "report.json",
        "contact_sheet.png",
        "records",
    }
    with Image.open(prepared / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * 18 + 2, 8 * 18 + 2)


def test_a_set_is_the_same_whatever_the_number_of_threads(album: Path, tmp_path: Path):
    one, many = (everything(make(album, out=tmp_path / str(n), threads=n)) for n in (1, 16))
    assert {n: d for n, d in one.items() if n != "report.json"} == {
        n: d for n, d in many.items() if n != "report.json"
    }
    reports = [json.loads(files["report.json"]) for files in (one, many)]
    ours = {"seconds": 0, "sha256": ""}
    assert {**reports[0], **ours} == {**reports[1], **ours}


def test_a_zip_gives_the_records_of_its_folder(album: Path, prepared: Path, tmp_path: Path):
    shutil.make_archive(str(tmp_path / "album"), "zip", album)
    other = make(tmp_path / "album.zip", out=tmp_path / "set")
    for one, two in zip(records(prepared), records(other), strict=True):
        np.testing.assert_equal(one, two)
    assert read_report(other)["fingerprint"] == read_report(prepared)["fingerprint"]


def test_the_fingerprint_is_of_the_images_and_the_size_alone(
    album: Path, faces: Path, tmp_path: Path
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for i, face in enumerate(sorted(faces.iterdir())):
        shutil.copy(face, elsewhere / f"{99 - i}.jpg")
    prints = [read_report(make(source))["fingerprint"] for source in (faces, elsewhere, album)]
    prints.append(read_report(make(faces, size=8))["fingerprint"])
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_an_image_of_many_megapixels_is_a_record_like_any_other(faces: Path, tmp_path: Path):
    source = Path(shutil.copytree(faces, tmp_path / "source"))
    Image.new("RGB", (3000, 2800), "red").save(source / "large.png")
    found = {text(r, "path"): r["image"] for r in records(make(source))}
    assert np.array_equal(found["large.png"], np.broadcast_to([255, 0, 0], (16, 16, 3)))


def test_odd_names_survive_to_the_report_and_the_records(faces: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(faces, source)
    odd = [b"\xff\xfe", b"new\nline", "😀".encode(), b"-rf", "é".encode() * 125 + b".jpeg"]
    for i, name in enumerate(odd):
        path = os.fsencode(source) + b"/" + name
        Path(os.fsdecode(path)).write_bytes(b"" if i == 0 else (faces / f"{i:03}.png").read_bytes())
    folder = make(source)
    assert read_report(folder)["refused"] == [{"path": "\\xff\\xfe", "reason": "empty file"}]
    copies = {path for paths in read_report(folder)["duplicates"] for path in paths}
    expected = {"new\\x0aline", "😀", "-rf", "é" * 125 + ".jpeg"}
    assert expected <= copies
    assert expected <= {text(record, "path") for record in records(folder)}


# Finding it again


def test_a_second_use_decodes_nothing(faces: Path, tmp_path: Path, monkeypatch):
    cached, placed = make(faces), make(faces, out=tmp_path / "set")
    before = everything(placed)
    monkeypatch.setattr(gather, "_examine", None)  # whoever decodes, fails
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
    assert [read_report(folder)["accepted"] for folder in sets] == [60, 60, 61, 61]
    assert make(source) == sets[0]


def test_a_prepared_set_is_a_source_and_needs_its_images_no_more(faces: Path, tmp_path: Path):
    source = Path(shutil.copytree(faces, tmp_path / "source"))
    folder = make(source, out=tmp_path / "set")
    shutil.rmtree(source)
    assert make(folder) == make(folder, out=folder) == folder
    with pytest.raises(UserError, match=r"prepared at 16x16, not 32x32\. Use --size 16"):
        make(folder, size=32)
    with pytest.raises(UserError, match="leave out --out"):
        make(folder, out=tmp_path / "other")


def test_to_look_writes_nothing(faces: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert look(faces, size=16) == (None, 60)
    assert list(tmp_path.iterdir()) == []
    folder = make(faces)
    assert folder.parent == tmp_path / "vaejax" / "prepared"
    assert look(faces, size=16) == look(folder, size=16) == (folder, 60)
    assert look(faces, size=8) == (None, 60)


# What cannot be prepared


def with_bad(faces: Path, folder: Path, bad: int) -> Path:
    shutil.copytree(faces, folder)
    for i in range(bad):
        (folder / f"bad {i}.png").write_bytes(b"" if i % 2 else b"<html>")
    return folder


def test_a_few_bad_files_are_left_out_and_listed(faces: Path, tmp_path: Path):
    report = read_report(make(with_bad(faces, tmp_path / "source", 3)))
    assert report["accepted"] == 60
    assert report["refused"] == [
        {"path": "bad 0.png", "reason": "not an image"},
        {"path": "bad 1.png", "reason": "empty file"},
        {"path": "bad 2.png", "reason": "not an image"},
    ]


def test_more_than_5_percent_of_bad_files_stop_it_unless_they_are_allowed(
    faces: Path, tmp_path: Path
):
    source, out = with_bad(faces, tmp_path / "source", 5), tmp_path / "set"
    with pytest.raises(UserError, match=r"5 of 65 files .* 3 not an image, 2 empty file") as error:
        make(source, out=out)
    assert "for example bad 0.png" in str(error.value)
    assert "--allow-refused" in str(error.value)
    listed = tmp_path / "set.refused.json"
    assert str(listed) in str(error.value)
    assert len(json.loads(listed.read_text())) == 5
    assert not out.exists()
    report = read_report(make(source, out=out, allow_refused=True))
    assert (report["accepted"], len(report["refused"])) == (60, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "set"}


def test_a_zip_made_to_harm_is_refused_by_member_and_writes_nothing(faces: Path, tmp_path: Path):
    source = tmp_path / "in" / "faces.zip"
    source.parent.mkdir()
    with zipfile.ZipFile(source, "w") as archive:
        for face in faces.iterdir():
            archive.write(face, face.name)
        for name in ("../evil.png", str(tmp_path / "evil.png")):
            archive.writestr(name, (faces / "000.png").read_bytes())
    before = everything(tmp_path)
    report = read_report(make(source))
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
def test_too_little_to_learn_from_is_an_error_and_leaves_nothing(
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
    report = read_report(make(tmp_path))
    assert report["splits"] == {"train": 1, "validation": 1, "test": 1}
    assert report["persons"] == 0


@pytest.mark.parametrize("size", [0, 7, 2049])
def test_sizes_that_make_no_sense_are_refused(faces: Path, size: int):
    with pytest.raises(UserError, match="8 to 2048"):
        make(faces, size=size)


# Where it may lie


def test_an_empty_folder_may_be_filled(faces: Path, tmp_path: Path):
    (tmp_path / "set").mkdir()
    assert is_prepared(make(faces, out=tmp_path / "set"))


def test_what_is_there_is_never_replaced(faces: Path, prepared: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    shutil.copytree(prepared, tmp_path / "set")
    before = everything(tmp_path)
    for name, message in {
        "file": "file is a file",
        "folder": "neither empty nor a prepared set",
        "set": "holds another prepared set: .*album.* at 16x16",
        "file/set": "cannot write .*/file: File exists",
        "a" * 300: "cannot write .*: File name too long",
    }.items():
        with pytest.raises(UserError, match=message):
            make(faces, out=tmp_path / name)
    assert everything(tmp_path) == before


def test_it_may_not_lie_among_its_images(faces: Path):
    with pytest.raises(UserError, match="lies among the images"):
        make(faces, out=faces / "set")
    assert not (faces / "set").exists()


def test_too_little_room_is_known_before_the_work(faces: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gather, "_examine", None)  # whoever decodes, fails
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


def test_a_listener_who_leaves_is_no_trouble_of_the_disk(faces: Path, tmp_path: Path):
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
from vaejax.data import gather, prepare, records, whole
module, name, calls = sys.argv[3:]
owner = gather.Pixels if module == "pixels" else {"records": records, "whole": whole}[module]
real, count = getattr(owner, name), itertools.count(1)
def deadly(*args, **settings):
    if next(count) == int(calls):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **settings)
setattr(owner, name, deadly)
prepare.prepare(Path(sys.argv[1]), size=16, out=Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    "when", [("pixels", "append", "30"), ("records", "describe", "1"), ("whole", "_rename", "1")]
)
def test_a_kill_leaves_nothing_that_looks_prepared_and_the_next_call_clears_up(
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


def test_what_a_living_process_fills_is_not_cleared_away(faces: Path, tmp_path: Path):
    with whole.appearing(tmp_path / "other") as partial:
        (partial / "file").write_text("mine")
        make(faces, out=tmp_path / "set")
    assert (tmp_path / "other" / "file").read_text() == "mine"


def meanwhile(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen just before the next set takes its name."""
    rename = whole._rename

    def later(*args: Path) -> None:
        monkeypatch.setattr(whole, "_rename", rename)
        act()
        rename(*args)

    monkeypatch.setattr(whole, "_rename", later)


def test_of_two_who_prepare_the_same_both_get_it(faces: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "set"
    meanwhile(lambda: make(faces, out=out), monkeypatch)
    assert make(faces, out=out) == out
    assert len(records(out)) == 60
    assert list(tmp_path.iterdir()) == [out]


def test_what_came_to_be_there_meanwhile_is_not_replaced(faces: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "set"
    meanwhile(lambda: make(faces, size=8, out=out), monkeypatch)
    with pytest.raises(UserError, match="holds another prepared set"):
        make(faces, out=out)
    assert read_report(out)["size"] == 8
    assert list(tmp_path.iterdir()) == [out]


# Photographs


@pytest.mark.skipif(not (DATA / "lfw49.zip").exists(), reason="no photographs: VAEJAX_TEST_DATA")
def test_49_persons_are_told_apart_in_photographs():
    folder = make(DATA / "lfw49.zip", size=32)
    report = read_report(folder)
    assert (report["accepted"], report["refused"], report["persons"]) == (832, [], 49)
    found = records(folder)
    assert len(found) == 832
    assert len({(text(record, "person"), record["split"]) for record in found}) == 49
    with zipfile.ZipFile(DATA / "lfw49.zip") as archive:
        assert {text(record, "path") for record in found} == set(archive.namelist())
