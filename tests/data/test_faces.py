"""A face is detected, and cut out the same way wherever it is; every other case is reported."""

import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import cv2.data
import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data

from vaejax.data import gather
from vaejax.data.faces import (
    Box,
    Crop,
    Detector,
    Sheet,
    Thumbnail,
    cut,
    detect,
    draw_thumbnail,
    largest,
    shrink,
    square_around,
)
from vaejax.data.gather import Threads
from vaejax.data.prepare import builder, find_prepared, prepare
from vaejax.data.records import read_dataset_report
from vaejax.errors import UserError

EYES_AND_MOUTH = [(123, 101), (168, 103), (143, 147)]  # of the astronaut, (x, y)
ANOTHER = Path(cv2.data.haarcascades, "haarcascade_frontalface_alt2.xml")
YELLOW, BLUE, RED = (255, 230, 0), (0, 162, 255), (208, 0, 0)


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    """Eileen Collins, by NASA: her head and shoulders, 300 x 300 pixels."""
    return np.ascontiguousarray(data.astronaut()[:300, 80:380])


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(Crop())


def middle(box: Box) -> tuple[float, float]:
    return box.left + box.width / 2, box.top + box.height / 2


# Detection


def test_a_box_holds_the_eyes_and_the_mouth_and_little_else(
    astronaut: np.ndarray, detector: Detector
):
    (box,) = detector.detect(astronaut)
    assert all(0 < x - box.left < box.width for x, _ in EYES_AND_MOUTH)
    assert all(0 < y - box.top < box.height for _, y in EYES_AND_MOUTH)
    assert box.width == box.height < 120  # the head is 148 pixels wide


def resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size)))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda image: np.roll(image, (40, -60), (0, 1)), lambda x, y: (x - 60, y + 40, 1)),
        (lambda image: image[20:250, 60:].copy(), lambda x, y: (x - 60, y - 20, 1)),
        (lambda image: image[:, ::-1].copy(), lambda x, y: (300 - x, y, 1)),
        (lambda image: resized(image, 180), lambda x, y: (x * 0.6, y * 0.6, 0.6)),
        (lambda image: resized(image, 450), lambda x, y: (x * 1.5, y * 1.5, 1.5)),
        (lambda image: image // 3, lambda x, y: (x, y, 1)),
    ],
    ids=["shifted", "cut", "mirrored", "smaller", "larger", "darker"],
)
def test_a_face_is_detected_where_it_was_moved_to(
    astronaut: np.ndarray, detector: Detector, change: Callable, where: Callable
):
    box = largest(detector.detect(astronaut))
    x, y, scale = where(*middle(box))
    moved = largest(detector.detect(change(astronaut)))
    assert np.abs(np.subtract(middle(moved), (x, y))).max() < 0.05 * box.width * scale
    assert moved.width == pytest.approx(box.width * scale, rel=0.15)


@pytest.mark.parametrize("picture", [data.coffee, data.chelsea, data.rocket])
def test_no_face_is_detected_where_there_is_none(detector: Detector, picture: Callable):
    assert detector.detect(picture()) == []


def test_the_larger_of_two_is_chosen_wherever_it_stands(astronaut: np.ndarray, detector: Detector):
    head = astronaut[:230, :230]
    large = resized(head, 300)
    small = np.pad(resized(head, 180), ((0, 120), (0, 0), (0, 0)), constant_values=128)
    for pair, left in (([small, large], 180), ([large, small], 0)):
        boxes = detector.detect(np.concatenate(pair, axis=1))
        assert len(boxes) == 2
        assert left < largest(boxes).left < left + 300


def test_of_equal_faces_the_topmost_is_chosen_then_the_leftmost_in_any_order():
    boxes = [Box(9, 9, 4, 4), Box(5, 2, 6, 6), Box(3, 7, 6, 6), Box(7, 2, 6, 6)]
    assert {largest(some) for some in itertools.permutations(boxes)} == {Box(5, 2, 6, 6)}


def test_the_boxes_are_the_same_in_whatever_order_opencv_hands_them_over(astronaut: np.ndarray):
    head = astronaut[:, :230]
    two = np.concatenate([head, head[:, ::-1]], axis=1)
    multi_scale = cv2.CascadeClassifier(str(ANOTHER)).detectMultiScale
    one = detect(two, multi_scale)
    other = detect(two, lambda *a, **settings: multi_scale(*a, **settings)[::-1])
    assert len(one) == 2
    assert one == other


# The square that is cut out


def random_boxes(n: int) -> list[tuple[Box, float, tuple[int, int]]]:
    """Boxes inside a picture, some of them at its edges, with a margin and (height, width)."""
    random, some = np.random.default_rng(0), []
    for _ in range(n):
        height, width = (int(side) for side in random.integers(8, 200, 2))
        w, h = int(random.integers(1, width + 1)), int(random.integers(1, height + 1))
        left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
        some.append((Box(left, top, w, h), float(random.uniform(0, 2)), (height, width)))
    return some


def test_the_square_lies_inside_and_has_the_requested_size():
    for box, margin, (height, width) in random_boxes(500):
        cut = square_around(box, margin, (height, width))
        assert cut.width == cut.height
        assert cut.left >= 0
        assert cut.top >= 0
        assert cut.left + cut.width <= width
        assert cut.top + cut.height <= height
        side = max(box.width, box.height) * (1 + 2 * margin)
        assert cut.width == pytest.approx(min(side, height, width), abs=0.5)


def test_the_face_is_in_the_middle_unless_the_picture_ends_there():
    for box, margin, (height, width) in random_boxes(500):
        cut = square_around(box, margin, (height, width))
        for side, (at, there), (start, length) in (
            (width, (middle(box)[0], middle(cut)[0]), (cut.left, cut.width)),
            (height, (middle(box)[1], middle(cut)[1]), (cut.top, cut.height)),
        ):
            # no nearer to the middle without leaving the picture
            assert there - at < 1 or start == 0
            assert at - there < 1 or start + length == side


def test_a_face_at_the_edge_keeps_its_margin_on_the_other_side():
    assert square_around(Box(0, 30, 20, 20), 0.5, (100, 100)) == Box(0, 20, 40, 40)
    assert square_around(Box(80, 80, 20, 20), 0.5, (100, 100)) == Box(60, 60, 40, 40)
    assert square_around(Box(10, 5, 20, 20), 0.5, (30, 100)) == Box(5, 0, 30, 30)


# A prepared set


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, astronaut: np.ndarray) -> Path:
    """9 pictures of one face in many positions, one of two, two of none, and one that is broken."""
    folder = tmp_path_factory.mktemp("photos")
    head = Image.fromarray(astronaut).resize((150, 150))
    for i, image in enumerate([head, ImageOps.mirror(head), ImageOps.grayscale(head)]):
        for left in (0, 40, 90):  # at the left edge, the middle, the right edge
            page = Image.new("RGB", (240, 180), "grey")
            page.paste(image, (left, 15))
            page.save(folder / f"one {i} {left}.png")
    two = Image.new("RGB", (300, 170), "grey")
    two.paste(head.resize((100, 100)), (10, 0))
    two.paste(head, (140, 10))
    two.save(folder / "two.png")
    Image.fromarray(data.coffee()).resize((200, 150)).save(folder / "coffee.jpg")
    Image.fromarray(data.chelsea()).resize((200, 150)).save(folder / "cat.png")
    (folder / "page.jpg").write_text("<html>")
    return folder


def make(source: Path, **settings: Any) -> Path:
    default = {"size": 32, "crop": Crop(), "allow_refused": True, "say": lambda _: None}
    return prepare(source, **default | settings)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def images(folder: Path) -> dict[str, np.ndarray]:
    splits = [builder(folder).as_data_source(split) for split in ("train", "validation", "test")]
    return {record["path"].decode(): record["image"] for split in splits for record in split}


def test_the_report_describes_the_crop_and_counts_faces(photos: Path):
    lines: list[str] = []
    report = read_dataset_report(make(photos, out=None, say=lines.append, size=40))
    assert report["accepted"] == 10
    assert report["refused"] == [
        {"path": "cat.png", "reason": "no face found"},
        {"path": "coffee.jpg", "reason": "no face found"},
        {"path": "page.jpg", "reason": "not an image"},
    ]
    default = Path(cv2.data.haarcascades, "haarcascade_frontalface_default.xml")
    assert report["crop"] == {
        "cascade": default.name,
        "cascade_sha256": hashlib.sha256(default.read_bytes()).hexdigest(),
        "margin": 0.3,
        "several_faces": 1,
    }
    assert "3 files refused, 1 with several faces and 2 with none" in lines[-1]
    assert "faces" not in prepare(photos, size=40, allow_refused=True, say=lines.append).name
    assert "faces" not in lines[-1].split("images")[1].split("They are")[0]


def test_a_record_is_the_square_around_the_face(photos: Path, detector: Detector):
    cropped = images(make(photos))
    for path, image in cropped.items():
        with Image.open(photos / path) as file:
            original = np.asarray(file.convert("RGB"))
        box = square_around(largest(detector.detect(original)), 0.3, original.shape[:2])
        expected = Image.fromarray(cut(original, box)).resize((32, 32), Image.Resampling.BOX)
        assert np.abs(image.astype(int) - np.asarray(expected)).mean() < 4, path
    left, right = cropped["one 0 0.png"], cropped["one 0 90.png"]
    assert np.abs(left.astype(int) - right).mean() < 25  # the same face, from either edge


def test_a_set_is_the_same_whatever_the_number_of_threads(photos: Path, tmp_path: Path):
    one, many = (
        everything(make(photos, out=tmp_path / str(n), workers=Threads(n))) for n in (1, 4)
    )
    assert "faces_sheet.png" in one
    assert one.keys() == many.keys()
    assert [name for name in one if one[name] != many[name]] == ["dataset_report.json"]
    reports = [json.loads(files["dataset_report.json"]) for files in (one, many)]
    ours = {"seconds": 0, "sha256": ""}
    assert {**reports[0], **ours} == {**reports[1], **ours}


def test_a_small_face_keeps_the_resolution_of_a_large_photograph(
    astronaut: np.ndarray, detector: Detector, tmp_path: Path, monkeypatch
):
    sharp = np.pad(resized(astronaut, 480), ((460, 460), (460, 460), (0, 0)), mode="edge")
    photograph = Image.fromarray(sharp)  # 1,400 x 1,400
    photograph.save(tmp_path / "photograph.png")
    photograph.save(tmp_path / "photograph.jpg", quality=95)
    photograph.save(tmp_path / "progressive.jpg", quality=95, progressive=True)
    photograph.save(tmp_path / "third.jpg", quality=97)  # to "progressive.jpg" the second is equal
    decode, threads = gather.to_rgb, set()

    def watched(image: Image.Image, **settings: int) -> np.ndarray:
        if image.width * image.height > 1_000_000:
            threads.add(threading.get_ident())
        return decode(image, **settings)

    monkeypatch.setattr(gather, "to_rgb", watched)
    monkeypatch.setattr(gather, "_LARGE_PIXELS", 1_000_000)
    box = square_around(largest(detector.detect(shrink(sharp))), 0.3, (512, 512))
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    inside = tuple(edge * 1400 / 512 for edge in edges)
    expected = photograph.resize((64, 64), Image.Resampling.BOX, box=inside)
    for path, image in images(make(tmp_path, size=64, workers=Threads(4))).items():
        assert np.abs(image.astype(int) - np.asarray(expected)).mean() < 3, path
    assert len(threads) == 1  # one at a time, by one thread


# Finding it again


def test_sets_with_different_crops_are_different_sets(photos: Path, tmp_path: Path, monkeypatch):
    copied = Path(shutil.copy(ANOTHER, tmp_path / "mine.xml"))
    crops = [None, Crop(), Crop(margin=0.5), Crop(cascade=ANOTHER)]
    sets = [make(photos, crop=crop) for crop in crops]
    assert (
        len({read_dataset_report(folder)["fingerprint"] for folder in sets}) == len(set(sets)) == 4
    )
    monkeypatch.setattr(gather, "examine", None)  # whoever decodes, fails
    assert [make(photos, crop=crop) for crop in crops] == sets
    assert make(photos, crop=Crop(cascade=copied)) == sets[3]
    assert [find_prepared(photos, size=32, crop=crop)[0] for crop in crops] == sets
    assert find_prepared(photos, size=32, crop=Crop(margin=0.6)) == (None, 13)


def test_without_a_crop_the_key_and_the_fingerprint_are_hashes_of_the_files(photos: Path):
    report = read_dataset_report(make(photos, crop=None))
    assert "crop" not in report
    names = sorted(set(os.listdir(photos)) - {"page.jpg"})
    hashes = sorted(hashlib.sha256((photos / name).read_bytes()).hexdigest() for name in names)
    joined = "\n".join([*hashes, "32"]).encode()
    assert report["fingerprint"] == hashlib.sha256(joined).hexdigest()
    key = hashlib.sha256(b"vaejax prepared set 4, splits 2, 32 pixels\n")
    for name in sorted(os.listdir(photos)):
        stat = (photos / name).stat()
        key.update(json.dumps([name, stat.st_size, stat.st_mtime_ns]).encode())
    assert report["listing"] == key.hexdigest()


def test_a_prepared_set_is_not_cropped_again_in_another_way(photos: Path):
    cropped, uncropped = make(photos), make(photos, crop=None)
    assert make(cropped) == make(cropped, crop=None) == cropped
    with pytest.raises(UserError, match="cropped in another way: leave out --crop-faces"):
        make(cropped, crop=Crop(margin=0.5))
    with pytest.raises(UserError, match="not cropped to faces: leave out --crop-faces"):
        find_prepared(uncropped, size=32, crop=Crop())
    with pytest.raises(UserError, match=r"or not cropped in this way\. Choose another --out"):
        make(photos, out=uncropped)


# The sheet


def test_the_sheet_is_copied_to_its_path_even_if_the_set_was_prepared_before(
    photos: Path, tmp_path: Path
):
    first, again, prepared = (tmp_path / "new" / f"{name}.png" for name in ("1", "2", "3"))
    folder = make(photos, out=tmp_path / "set", debug_sheet=first)
    make(photos, out=tmp_path / "set", debug_sheet=again)
    make(folder, debug_sheet=prepared)
    expected = (folder / "faces_sheet.png").read_bytes()
    assert {path.read_bytes() for path in (first, again, prepared)} == {expected}


def test_the_sheet_is_there_when_too_many_have_no_face(photos: Path, tmp_path: Path):
    out, png = tmp_path / "set", tmp_path / "sheet.png"
    hint = r"3 of 13 files .* 2 no face found.* --debug-sheet faces_sheet\.png shows where"
    with pytest.raises(UserError, match=hint):
        make(photos, out=out, allow_refused=False)
    with pytest.raises(UserError, match=r"--allow-refused\. .*/sheet\.png shows where faces were"):
        make(photos, out=out, allow_refused=False, debug_sheet=png)
    assert {path.name for path in tmp_path.iterdir()} == {"sheet.png", "set.refused.json"}
    make(photos, out=out, debug_sheet=tmp_path / "kept.png")
    assert png.read_bytes() == (tmp_path / "kept.png").read_bytes()


def test_the_sheet_shows_the_face_and_the_square_and_frames_what_is_refused(astronaut: np.ndarray):
    face, other = Box(90, 60, 120, 120), Box(10, 240, 30, 30)
    drawn = draw_thumbnail(astronaut, [other, face], margin=0.25)  # 300 pixels become 160
    assert drawn.faces == 2
    assert {tuple(pixel) for pixel in drawn.image[35:95, 48].tolist()} == {YELLOW}  # x = 90
    assert {tuple(pixel) for pixel in drawn.image[20:110, 32].tolist()} == {BLUE}  # x = 60
    none = draw_thumbnail(astronaut[:150], [], margin=0.25)
    assert none.image.shape == (80, 160, 3)
    for edge in (none.image[0], none.image[-1], none.image[:, 0]):
        assert {tuple(pixel) for pixel in edge.tolist()} == {RED}


def test_a_sheet_of_many_pictures_is_bounded_and_even(tmp_path: Path):
    sheet, heights = Sheet(), []
    for count in (100, 900, 9_000):
        for i in range(count):
            sheet.add(f"{i}.png", Thumbnail(np.full((4, 4, 3), 0, np.uint8), i % 3))
        sheet.save(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            heights.append(image.height)
    assert heights[0] < heights[1] == heights[2]
    for sample in sheet._samples:
        assert sample.count == pytest.approx(10_000 / 3, abs=1)
        assert len(sample.held) <= 2 * sample.size
        assert len(sample.shown()) == sample.size


def test_a_picture_is_shown_among_those_with_as_many_faces(tmp_path: Path):
    sheet = Sheet()
    for faces in (0, 1, 2, 7):
        sheet.add(str(faces), Thumbnail(np.zeros((1, 1, 3), np.uint8), faces))
    none, several, one = ([path for path, _ in sample.shown()] for sample in sheet._samples)
    assert (none, several, one) == (["0"], ["2", "7"], ["1"])


def test_a_selection_is_spaced_evenly_from_the_first_to_the_last(tmp_path: Path):
    sheet = Sheet()
    for i in range(1_234):
        sheet.add(str(i), Thumbnail(np.zeros((1, 1, 3), np.uint8), 0))
    shown = [int(path) for path, _ in sheet._samples[0].shown()]
    gaps = np.diff(shown)
    assert shown[0] == 0
    assert shown[-1] >= 1_234 - gaps.max()
    assert gaps.max() <= 2 * gaps.min()


# What cannot be done


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("cascade", "message"),
    [
        (lambda folder: folder / "none.xml", r"none\.xml does not exist"),
        (lambda folder: folder, "is not a regular file"),
        (lambda folder: write(folder / "a.xml", ""), r"a\.xml is no cascade"),
        (lambda folder: write(folder / "a.xml", "hello"), r"a\.xml is no cascade"),
        (
            lambda folder: write(folder / "a.xml", ANOTHER.read_text()[:9_999]),
            r"a\.xml is no cascade",
        ),
        (
            lambda folder: write(
                folder / "a.xml", '<?xml version="1.0"?><opencv_storage><a>1</a></opencv_storage>'
            ),
            r"a\.xml is no cascade",
        ),
        (
            lambda folder: write(folder / os.fsdecode(b"\xff.xml"), ANOTHER.read_text()),
            r"\\xff\.xml: give it a plain name",
        ),
    ],
    ids=["missing", "folder", "empty", "text", "cut off", "another xml", "odd name"],
)
def test_a_file_that_is_no_cascade_is_an_error_before_the_work(
    photos: Path, tmp_path: Path, monkeypatch, cascade: Callable, message: str
):
    monkeypatch.setattr(gather, "examine", None)  # whoever decodes, fails
    settings = {"crop": Crop(cascade=cascade(tmp_path)), "out": tmp_path / "set"}
    with pytest.raises(UserError, match=message):
        make(photos, **settings)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("margin", [-0.1, 2.1, float("nan"), float("inf")])
def test_margins_outside_of_0_to_2_are_refused(photos: Path, margin: float):
    with pytest.raises(UserError, match=f"--margin {margin}: from 0 to 2"):
        make(photos, crop=Crop(margin=margin))


def test_a_path_where_no_sheet_can_be_written_is_an_error_before_the_work(
    photos: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(gather, "examine", None)  # whoever decodes, fails
    write(tmp_path / "file", "mine")
    for path, message in {
        tmp_path / "sheet.jpg": r"its name must end in \.png",
        tmp_path / "file" / "sheet.png": "file is a file",
        photos / "sheet.png": "lies in .*photos",
        tmp_path / "set" / "sheet.png": "lies in .*set",
    }.items():
        with pytest.raises(UserError, match=message):
            make(photos, out=tmp_path / "set", debug_sheet=path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        make(photos, out=tmp_path / "set", debug_sheet=tmp_path / "folder.png")
    with pytest.raises(UserError, match="add --crop-faces"):
        make(photos, crop=None, debug_sheet=tmp_path / "sheet.png")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}
