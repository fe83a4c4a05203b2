"""What Apache Beam's direct runner prepares is what threads prepare, to the last record."""

import contextlib
import importlib.util
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import cv2.data
import numpy as np
import pytest
from PIL import Image
from skimage import data

from vaejax.data.batches import Images, stream
from vaejax.data.faces import Crop, Detector
from vaejax.data.gather import workers_from_flags
from vaejax.data.prepare import builder, prepare
from vaejax.data.records import read_dataset_report
from vaejax.errors import UserError

pytestmark = pytest.mark.slow
SPLITS = ("train", "validation", "test")
IS_THERE = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not IS_THERE, reason="pip install -r requirements-beam.txt")


def make(
    source: Path, out: Path, *, beam: str | None = None, beam_options: str = "", **settings: Any
) -> Path:
    workers = workers_from_flags(beam=beam, beam_options=beam_options)
    default = {"size": 16, "out": out, "workers": workers, "say": lambda _: None}
    return prepare(source, **default | settings)


def by_beam(source: Path, out: Path, **settings: Any) -> Path:
    return make(source, out, beam="DirectRunner", **settings)


def assert_same_records(one: Path, other: Path) -> None:
    for split in SPLITS:
        records, others = (builder(folder).as_data_source(split) for folder in (one, other))
        assert len(records) == len(others) > 0
        for record, another in zip(records, others, strict=True):
            np.testing.assert_equal(record, another)


def assert_same_report(one: Path, other: Path, *but: str) -> None:
    reports = [read_dataset_report(folder) for folder in (one, other)]
    for name in ("seconds", "sha256", *but):
        assert all(report.pop(name) for report in reports)
    assert reports[0] == reports[1]


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, faces: Path) -> Path:
    """60 faces of 12 persons, two duplicates across persons, odd names, bad files, a note."""
    folder = tmp_path_factory.mktemp("photos")
    for i, face in enumerate(sorted(faces.iterdir())):
        person = folder / f"person {i % 12}"
        person.mkdir(exist_ok=True)
        shutil.copy(face, person / f"{i}.png")
    shutil.copy(folder / "person 1" / "1.png", folder / "person 2" / "copy.png")
    shutil.copy(folder / "person 1" / "1.png", folder / "person 1" / "new\nline [é].png")
    Image.new("RGB", (640, 480), "red").save(folder / "person 0" / "photograph.jpg")
    (folder / "person 0" / "page.jpg").write_text("<html>404 Not Found</html>")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe")).write_bytes(b"")
    (folder / "notes.txt").write_text("on a journey")
    return folder


@pytest.fixture(scope="module")
def by_threads(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(photos, tmp_path_factory.mktemp("threads") / "set")


# The same


@needs_beam
def test_a_folder_becomes_the_same_set(photos: Path, by_threads: Path, tmp_path: Path):
    folder = by_beam(photos, tmp_path / "set [1]*")
    assert read_dataset_report(folder)["accepted"] == 63
    assert len(read_dataset_report(folder)["refused"]) == 2
    assert_same_records(folder, by_threads)
    assert_same_report(folder, by_threads)
    assert names(folder) == names(by_threads)
    sheets = [(f / "contact_sheet.png").read_bytes() for f in (folder, by_threads)]
    assert sheets[0] == sheets[1]
    assert list(tmp_path.iterdir()) == [folder]


@needs_beam
def test_a_zip_becomes_the_same_set(photos: Path, by_threads: Path, tmp_path: Path, capsys):
    source = tmp_path / "photos.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for path in sorted(photos.glob("*/*")):
            archive.write(path, path.relative_to(photos))
        archive.writestr("../evil.png", (photos / "person 1" / "1.png").read_bytes())
    folder = by_beam(source, tmp_path / "set")
    assert [r["path"] for r in read_dataset_report(folder)["refused"]] == [
        "../evil.png",
        "person 0/page.jpg",
    ]
    assert_same_records(folder, by_threads)
    assert_same_report(folder, make(source, tmp_path / "other"))
    assert capsys.readouterr().out == ""


@needs_beam
def test_many_shards_give_the_same_stream(
    photos: Path, by_threads: Path, tmp_path: Path, monkeypatch
):
    from vaejax.data import beam

    monkeypatch.setattr(beam, "FILES_PER_PART", 7)
    monkeypatch.setattr(beam, "MAX_SHARD_RECORDS", 4)  # of which the last holds fewer
    folder = by_beam(photos, tmp_path / "set")
    for kind in ("records/faces-train", "pixels/train"):
        assert len([name for name in names(folder) if name.startswith(kind)]) == 14
    assert_same_records(folder, by_threads)
    assert_same_report(folder, by_threads, "files", "metadata")
    batches = [
        stream(Images(folder, "train"), batch_size=8, seed=3) for folder in (folder, by_threads)
    ]
    for _ in range(20):
        assert np.array_equal(*(next(iterator) for iterator in batches))


@needs_beam
def test_work_that_is_done_twice_changes_nothing(
    photos: Path, by_threads: Path, tmp_path: Path, monkeypatch
):
    from vaejax.data import beam

    seen, examine = [], beam.examine
    monkeypatch.setattr(beam, "examine", lambda *a: (seen.append(a[0].path), examine(*a))[1])
    options = "--direct_runner_bundle_repeat=1"
    folder = by_beam(photos, tmp_path / "set", beam_options=options)
    assert len(seen) == 2 * 65
    assert_same_records(folder, by_threads)
    assert_same_report(folder, by_threads)
    assert names(folder) == names(by_threads)


@needs_beam
def test_workers_in_their_own_process_prepare_the_same_set(
    photos: Path, by_threads: Path, tmp_path: Path
):
    options = "--direct_running_mode=multi_processing --direct_num_workers=1"
    folder = by_beam(photos, tmp_path / "set", beam_options=options)
    assert_same_records(folder, by_threads)
    assert_same_report(folder, by_threads)


# The same with faces


CASCADE = Path(cv2.data.haarcascades, "haarcascade_frontalface_alt2.xml")


@pytest.fixture(scope="module")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 pictures of one face, one of two, three of none, one that is broken."""
    folder = tmp_path_factory.mktemp("portraits")
    head = Image.fromarray(data.astronaut()[:300, 80:380]).resize((150, 150))
    for i in range(5):
        page = Image.new("RGB", (240, 180), "grey")
        page.paste(head, (20 * i, 15))
        page.save(folder / f"one {i}.png")
    two = Image.new("RGB", (300, 170), "grey")
    two.paste(head.resize((100, 100)), (10, 0))
    two.paste(head, (140, 10))
    two.save(folder / "two.png")
    for name, colour in {"a": "red", "z": "green", "n": "blue"}.items():
        Image.new("RGB", (200, 150), colour).save(folder / f"{name}.png")
    (folder / "page.jpg").write_text("<html>")
    return folder


@needs_beam
@pytest.mark.parametrize("crop", [Crop(), Crop(cascade=CASCADE, margin=0.1)])
def test_faces_are_cut_out_the_same_and_so_is_their_sheet(
    portraits: Path, tmp_path: Path, monkeypatch, crop: Crop
):
    from vaejax.data import beam

    monkeypatch.setattr(beam, "FILES_PER_PART", 3)
    folders = [
        make(portraits, tmp_path / name, size=32, crop=crop, allow_refused=True, beam=runner)
        for name, runner in {"beam": "DirectRunner", "threads": None}.items()
    ]
    assert read_dataset_report(folders[0])["accepted"] == 6
    assert_same_records(*folders)
    assert_same_report(*folders)
    sheets = [(folder / "faces_sheet.png").read_bytes() for folder in folders]
    assert sheets[0] == sheets[1]
    assert names(folders[0]) == names(folders[1])


@needs_beam
def test_the_faces_sheet_is_there_when_too_many_have_none(portraits: Path, tmp_path: Path):
    sheets = []
    for runner in (None, "DirectRunner"):
        sheet = tmp_path / f"{runner}.png"
        message = failure(portraits, tmp_path / "set", crop=Crop(), debug_sheet=sheet, beam=runner)
        assert "4 of 10 files" in message
        sheets.append(sheet.read_bytes())
    assert sheets[0] == sheets[1]


def test_a_detector_on_another_machine_has_the_same_cascade(tmp_path: Path):
    shutil.copy(CASCADE, tmp_path / "cascade.xml")
    detector = Detector(Crop(cascade=tmp_path / "cascade.xml", margin=0.1))
    assert pickle.loads(pickle.dumps(detector)).identity == detector.identity
    content = pickle.dumps(detector)
    shutil.copy(CASCADE.with_name("haarcascade_frontalface_alt.xml"), tmp_path / "cascade.xml")
    with pytest.raises(UserError, match=r"cascade\.xml is another one on this machine"):
        pickle.loads(content)


# What goes wrong


def failure(*args: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        make(*args, **settings)
    return str(error.value)


@needs_beam
def test_too_many_bad_files_are_the_same_error(faces: Path, tmp_path: Path):
    source, out = Path(shutil.copytree(faces, tmp_path / "source")), tmp_path / "set"
    for i in range(5):
        (source / f"bad {i}.png").write_bytes(b"" if i % 2 else b"<html>")
    message, listed = failure(source, out), tmp_path / "set.refused.json"
    assert "5 of 65 files" in message
    refused = listed.read_bytes()
    listed.unlink()
    assert failure(source, out, beam="DirectRunner") == message
    assert listed.read_bytes() == refused
    assert set(tmp_path.iterdir()) == {source, listed}


@needs_beam
@pytest.mark.parametrize(
    ("runner", "options", "message"),
    [
        (
            "Direkt",
            "",
            "--beam Direkt: Unexpected pipeline runner: .* DirectRunner, .* FlinkRunner",
        ),
        ("no.such.Runner", "", "--beam no.such.Runner: No module named 'no'"),
        ("os.path.join", "", "--beam os.path.join: "),
        ("DirectRunner", "--direct_num_workers=two", "--direct_num_workers: invalid int .*'two'"),
        ("DirectRunner", '--job_name="faces', "No closing quotation"),
        ("DataflowRunner", "", "wants more --beam-options: .*option: project"),
    ],
)
def test_an_unusable_runner_is_an_error_before_any_work(
    tmp_path: Path, runner: str, options: str, message: str
):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "unread", tmp_path / "set", beam=runner, beam_options=options)
    assert list(tmp_path.iterdir()) == []


def test_options_without_a_runner_are_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="name a runner, as in --beam DirectRunner"):
        make(tmp_path / "unread", tmp_path / "set", beam_options="--job_name=faces")


@contextlib.contextmanager
def room_for(most: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@needs_beam
@pytest.mark.parametrize("most", [5_000, 30_000, 50_000])  # the listing, the pixels, the records
def test_a_disk_that_is_full_is_an_error_and_leaves_nothing(faces: Path, tmp_path: Path, most: int):
    with room_for(most):
        message = failure(faces, tmp_path / "set", beam="DirectRunner")
    assert "File too large" in message
    assert message.endswith("; nothing was kept.")
    assert "while running" not in message
    assert list(tmp_path.iterdir()) == []


@needs_beam
def test_a_worker_that_does_not_see_the_source_says_so(faces: Path, tmp_path: Path, monkeypatch):
    from vaejax.data import beam, sources

    monkeypatch.setattr(beam, "open_reader", lambda _: sources.open_reader(tmp_path / "elsewhere"))
    message = failure(faces, tmp_path / "set", beam="DirectRunner")
    expected = f"--beam DirectRunner: {tmp_path / 'elsewhere'} does not exist; nothing was kept."
    assert message == expected
    assert list(tmp_path.iterdir()) == []


WITHOUT = "import sys; sys.modules['apache_beam'] = None; from vaejax import cli; cli.main()"


def test_without_beam_one_line_says_what_to_install(faces: Path, tmp_path: Path):
    command = ["prepare", str(faces), "--out", str(tmp_path / "set"), "--beam", "DirectRunner"]
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, *command], capture_output=True, text=True
    )
    expected = "error: --beam needs Apache Beam: pip install -r requirements-beam.txt\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", expected)
    assert list(tmp_path.iterdir()) == []


@needs_beam
def test_the_command_line_passes_the_runner_and_its_options(faces: Path, tmp_path: Path):
    command = ["prepare", str(faces), "--size", "16", "--out", str(tmp_path / "set")]
    command += ["--beam", "DirectRunner", "--beam-options=--direct_running_mode=nowhere"]
    ended = subprocess.run(
        [sys.executable, "-c", "from vaejax import cli; cli.main()", *command],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --beam-options: argument --direct_running_mode: ")
    assert len(ended.stderr.splitlines()) == 1
