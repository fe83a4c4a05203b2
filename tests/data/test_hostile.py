"""A folder of all that can be wrong with an image, prepared: what becomes of each, and its cost."""

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from vaejax.data.batches import Images
from vaejax.data.gather import Threads
from vaejax.data.prepare import prepare
from vaejax.data.records import read_dataset_report
from vaejax.data.sources import open_source

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
Colour = tuple[int, int, int]


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def flat(mode: str, colour: Any, kind: str = "PNG") -> bytes:
    return encode(Image.new(mode, (20, 20), colour), kind)


def half(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), kind)
    return data[: len(data) // 2]


def with_wrong_checksum() -> bytes:
    data = bytearray(flat("RGB", RED))
    data[data.index(b"IDAT") + 6] ^= 1
    return bytes(data)


def turned(colour: Colour, kind: str) -> bytes:
    """Red above and another colour below, stored by a camera that was held upside down."""
    image = Image.new("RGB", (20, 20), colour)
    image.paste(RED, (0, 10, 20, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    return encode(image, kind, exif=exif)


def frames(kind: str, **settings: Any) -> bytes:
    some = [Image.new("RGB", (20, 20), colour) for colour in (RED, GREEN, BLUE)]
    return encode(some[0], kind, save_all=True, append_images=some[1:], **settings)


def of_16_bits(value: int) -> bytes:
    return cv2.imencode(".png", np.full((20, 20), value, np.uint16))[1].tobytes()


# Files, and the reason why each is refused
BAD = {
    "empty.png": (b"", "empty file"),
    "zeros.png": (bytes(5000), "not an image"),
    "garbage.jpg": (np.random.default_rng(0).bytes(5000), "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html>404 Not Found</html>", "not an image"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "zip.png": (b"PK\3\4" + bytes(100), "not an image"),
    "checksum.png": (with_wrong_checksum(), "truncated or damaged"),
    "beginning.jpg": (b"\xff\xd8\xff", "truncated or damaged"),
    **{
        f"half.{kind}": (half(kind), "truncated or damaged")
        for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    },
    "float.tiff": (flat("F", 0.5, "TIFF"), "float pixels"),
    "32 bits.tiff": (flat("I", 70_000, "TIFF"), "32-bit pixels"),
    "point.png": (
        encode(Image.new("RGB", (1, 1)), "PNG"),
        "too small: a side has less than 8 pixels",
    ),
}
# Files, and the colour of all their pixels
GOOD = {
    "grey.png": (flat("L", 100), (100, 100, 100)),
    "grey, half seen through.png": (flat("LA", (100, 128)), (177, 177, 177)),
    "black or white.png": (flat("1", 1), WHITE),
    "palette.png": (encode(Image.new("RGB", (20, 20), GREEN).quantize(2), "PNG"), GREEN),
    "seen through.png": (flat("RGBA", (*RED, 0)), WHITE),
    "half seen through.webp": (
        encode(Image.new("RGBA", (20, 20), (*RED, 128)), "WEBP", lossless=True),
        (255, 127, 127),
    ),
    "cmyk.jpg": (flat("CMYK", (0, 255, 255, 0), "JPEG"), RED),
    "16 bits.png": (of_16_bits(127 << 8), (127, 127, 127)),
    "frames.gif": (frames("GIF"), RED),
    "frames.webp": (frames("WEBP", lossless=True), RED),
    "really a png.jpg": (flat("RGB", BLUE), BLUE),
    "no name to go by": (flat("RGB", GREEN, "BMP"), GREEN),
}
TOO_LARGE = "too large: more than 50 megapixels"


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory, bombs: dict[str, Callable[[int], bytes]]
) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for name, (data, _) in {**BAD, **GOOD}.items():
        (folder / name).write_bytes(data)
    for kind, bomb in bombs.items():
        for side in (10_000, 16_000):
            (folder / f"{side}.{kind}").write_bytes(bomb(side))
    (folder / "turned.png").write_bytes(turned(BLUE, "PNG"))
    with (folder / "long.png").open("wb") as file:
        file.truncate(300 << 20)  # which takes no room on the disk
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "self.png").symlink_to("self.png")
    (folder / "up").symlink_to("..")
    (folder / "again.png").symlink_to("grey.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (folder / name).write_bytes(b"no image")
    for name in ("copy 1.png", "copy 2.png"):
        shutil.copy(folder / "grey.png", folder / name)
    return folder


@pytest.fixture(scope="module")
def refusals(bombs: dict[str, Callable[[int], bytes]]) -> dict[str, str]:
    return {
        **{name: reason for name, (_, reason) in BAD.items()},
        **{f"{side}.{kind}": TOO_LARGE for kind in bombs for side in (10_000, 16_000)},
        "long.png": "too large: more than 256 MB",
        "pipe.png": "not a regular file",
        "device.png": "not a regular file",
        "gone.png": "broken symlink",
        "self.png": "symlink loop",
        "up": "symlink loop",
    }


def images(folder: Path) -> dict[str, np.ndarray]:
    splits = [Images(folder, split) for split in read_dataset_report(folder)["splits"]]
    return {
        some.metadata(i)["path"]: some.read(np.array([i]))[0]
        for some in splits
        for i in range(len(some))
    }


PREPARE = """
import resource, sys
from pathlib import Path
from vaejax.data.gather import Threads
from vaejax.data.prepare import prepare
plain, hostile, out = map(Path, sys.argv[1:])
def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
prepare(plain, size=16, out=out / "plain", workers=Threads(2), say=lambda _: None)
before = megabytes()
prepare(
    hostile, size=16, out=out / "hostile", allow_refused=True, workers=Threads(2),
    say=lambda _: None,
)
print(megabytes() - before)
"""


def test_each_bad_file_has_its_reason_each_odd_one_its_colour_and_memory_is_bounded(
    faces: Path, source: Path, refusals: dict[str, str], tmp_path: Path
):
    command = [sys.executable, "-c", PREPARE, *map(str, (faces, source, tmp_path))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(ended.stdout) < 30  # MB
    report = read_dataset_report(tmp_path / "hostile")
    assert {r["path"]: r["reason"] for r in report["refused"]} == refusals
    assert len(report["refused"]) == len(refusals)
    assert report["ignored"] == 4  # three that are junk, and a second name of grey.png
    prepared = images(tmp_path / "hostile")
    same = [
        [n for n in sorted(prepared) if np.array_equal(prepared[n], i)] for i in prepared.values()
    ]
    assert {"copy 1.png", "copy 2.png", "grey.png"} <= set(max(same, key=len))
    assert report["duplicates"] == sorted({tuple(s): s for s in same if len(s) > 1}.values())
    assert prepared.keys() == {*GOOD, "turned.png", "copy 1.png", "copy 2.png"}
    for name, (_, colour) in GOOD.items():
        assert np.abs(prepared[name].astype(int) - colour).max() <= 1, name
    assert np.array_equal(prepared["turned.png"][0, 0], RED)
    assert np.array_equal(prepared["turned.png"][-1, -1], BLUE)


def test_a_zip_of_the_same_files_gives_the_same(source: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (data, _) in {**BAD, **GOOD}.items():
            archive.writestr(name, data)
    folder = prepare(tmp_path / "a.zip", size=16, allow_refused=True, say=lambda _: None)
    assert {r["path"]: r["reason"] for r in read_dataset_report(folder)["refused"]} == {
        name: reason for name, (_, reason) in BAD.items()
    }
    prepared = images(folder)
    assert prepared.keys() == GOOD.keys()
    for name, (_, colour) in GOOD.items():
        assert np.abs(prepared[name].astype(int) - colour).max() <= 1, name


# What changes while it is read


def test_files_that_change_after_the_listing_are_refused_and_the_others_read(
    faces: Path, tmp_path: Path
):
    source = Path(shutil.copytree(faces, tmp_path / "source"))
    with open_source(source) as files:
        os.unlink(source / "000.png")
        os.truncate(source / "001.png", 60)
        os.truncate(source / "002.png", 0)
        os.truncate(source / "003.png", 300 << 20)
        for name in ("004.png", "005.png", "006.png"):
            os.unlink(source / name)
        os.mkfifo(source / "004.png")
        (source / "005.png").mkdir()
        (source / "006.png").symlink_to("/dev/zero")
        (source / "007.png").write_text("<html>")
        scratch, say = tmp_path / "pixels", lambda _: None
        with Threads(2).gather(files, scratch, size=16, detector=None, say=say) as gathered:
            assert len(gathered.pixels[51]) == 16  # the last of them
    assert gathered.refused == [
        {"path": "000.png", "reason": "unreadable"},
        {"path": "001.png", "reason": "truncated or damaged"},
        {"path": "002.png", "reason": "empty file"},
        {"path": "003.png", "reason": "too large: more than 256 MB"},
        {"path": "004.png", "reason": "not a regular file"},
        {"path": "005.png", "reason": "not a regular file"},
        {"path": "006.png", "reason": "not a regular file"},
        {"path": "007.png", "reason": "not an image"},
    ]
    assert gathered.paths == [f"{i:03}.png" for i in range(8, 60)]


# Names


def test_names_that_are_not_utf_8_survive_from_a_folder_to_the_records(faces: Path, tmp_path: Path):
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/faces \xe9\n"))
    persons = [b"Zo\xeb", b"Zo\xeb.", "Zoë".encode(), b"-\xff\n"]
    for person in persons:
        os.makedirs(os.fsencode(source) + b"/" + person)
    for i, face in enumerate(sorted(faces.iterdir())):
        shutil.copy(face, os.fsencode(source) + b"/" + persons[i % 4] + b"/\xfe%d.png" % i)
    Path(os.fsdecode(os.fsencode(source) + b"/\xfe.png")).write_bytes(b"")
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out \xff\n/set"))
    assert prepare(source, size=16, out=out, say=lambda _: None) == out
    report = read_dataset_report(out)
    assert report["refused"] == [{"path": "\\xfe.png", "reason": "empty file"}]
    assert report["source"] == f"{tmp_path}/faces \\xe9\\x0a"
    assert report["persons"] == 4
    spelled = ["Zo\\xeb", "Zo\\xeb.", "Zoë", "-\\xff\\x0a"]
    assert images(out).keys() == {f"{spelled[i % 4]}/\\xfe{i}.png" for i in range(60)}


def test_names_that_are_not_utf_8_survive_from_a_zip_to_the_records(faces: Path, tmp_path: Path):
    source = tmp_path / "a.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("xxxx.png", b"")
        for i, face in enumerate(sorted(faces.iterdir())):
            archive.writestr(f"{'xxxx' if i % 2 else 'yyyy'}/{i}.png", face.read_bytes())
    data = source.read_bytes().replace(b"xxxx", b"\xff\xfe\n-").replace(b"yyyy", b"Zo\xc3\xab")
    source.write_bytes(data)
    folder = prepare(source, size=16, say=lambda _: None)
    assert read_dataset_report(folder)["refused"] == [
        {"path": "\xa0■\\x0a-.png", "reason": "empty file"}
    ]
    spelled = ["Zoë", "\xa0■\\x0a-"]
    assert images(folder).keys() == {f"{spelled[i % 2]}/{i}.png" for i in range(60)}
