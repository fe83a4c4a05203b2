"""The drawn faces are what their table and their credit say."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax.data.sources import drawn_attributes, drawn_faces

# the paint of scripts/draw_faces.py, under the names that the table uses
PAINT = {
    "hair_colour": {
        "black": 0x1A1718, "dark brown": 0x4A2F1B, "brown": 0x7A4A26, "auburn": 0xA8431C,
        "blonde": 0xE8C15A, "silver": 0xB4B6BD, "blue": 0x3A8FD8, "pink": 0xEE7FB8,
        "purple": 0x7D4CC2, "green": 0x3FAE68,
    },
    "skin_colour": {
        "light": 0xF7D6BD, "fair": 0xEEBD97, "tan": 0xD29A6E, "brown": 0xA86D48, "dark": 0x7C4A30,
    },
    "eye_colour": {"brown": 0x4B2422, "blue": 0x2B62C4, "green": 0x2A8350, "violet": 0x7436A8},
    "background_colour": {
        "sky": 0xA9D9F2, "mint": 0xB9ECC8, "rose": 0xFFC6D3, "peach": 0xFFD9AD,
        "lemon": 0xFFF1A3, "lilac": 0xCDBDF0,
    },
}  # fmt: skip
GLASSES_RIM = 0x26222B


@pytest.fixture(scope="module")
def faces() -> dict[str, np.ndarray]:
    def read() -> Iterator[tuple[str, np.ndarray]]:
        with zipfile.ZipFile(drawn_faces()) as archive:
            for name in archive.namelist():
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    assert image.mode == "RGB"
                    yield name, np.asarray(image)

    return dict(read())


@pytest.fixture(scope="module")
def paint(faces) -> dict[str, np.ndarray]:
    """Each pixel as one number, 0xRRGGBB."""
    return {name: face @ np.array([1 << 16, 1 << 8, 1]) for name, face in faces.items()}


def test_every_face_is_64_pixels_in_colour_and_no_two_are_the_same(faces):
    assert len(faces) == 3200
    assert {face.shape for face in faces.values()} == {(64, 64, 3)}
    assert len({face.tobytes() for face in faces.values()}) == len(faces)


def test_the_zip_holds_the_faces_of_the_table_in_order_and_nothing_else():
    with zipfile.ZipFile(drawn_faces()) as archive:
        assert archive.namelist() == [f"{i:05}.webp" for i in range(3200)]
        assert list(drawn_attributes()) == archive.namelist()
    assert len({tuple(row) for row in drawn_attributes().values()}) == 1


@pytest.mark.parametrize("attribute", ["hair_colour", "skin_colour", "eye_colour"])
def test_a_face_has_more_of_the_colour_that_the_table_says_than_of_any_other(paint, attribute):
    for name, row in drawn_attributes().items():
        pixels = {c: (paint[name] == rgb).sum() for c, rgb in PAINT[attribute].items()}
        if row[attribute] == "none":  # closed eyes: brown is left, the lashes' colour
            assert attribute == "eye_colour", name
            assert row["eyes"] == "humble", name
            assert sum(pixels.values()) == pixels["brown"], name
        else:
            assert max(pixels, key=pixels.__getitem__) == row[attribute], name
            assert pixels[row[attribute]] > 0, name


def test_the_background_reaches_the_corners(paint):
    for name, row in drawn_attributes().items():
        corners = {paint[name][0, 0], paint[name][-1, 0], paint[name][0, -1], paint[name][-1, -1]}
        assert corners == {PAINT["background_colour"][row["background_colour"]]}, name


def test_there_are_glasses_where_the_table_says_so_and_nowhere_else(paint):
    for name, row in drawn_attributes().items():
        assert (GLASSES_RIM in paint[name]) == (row["glasses"] == "yes"), name


# where in the picture a part is drawn, and what decides its pixels there
@pytest.mark.parametrize(
    ("where", "what"),
    [
        (np.s_[0:22, :], ("hair", "hair_colour", "skin_colour", "background_colour")),
        (np.s_[60:64, 0:14], ("rear_hair", "hair_colour", "background_colour")),
        (np.s_[25:30, 18:46], ("eyebrows", "hair", "hair_colour", "skin_colour")),
        (np.s_[38:42, 19:45], ("eyes", "eye_colour", "glasses", "skin_colour")),
        (np.s_[48:57, 28:37], ("mouth", "skin_colour")),
    ],
)
def test_parts_with_one_name_look_alike_in_every_face(faces, where, what):
    named = {name: tuple(row[w] for w in what) for name, row in drawn_attributes().items()}
    appearances = {(named[name], face[where].tobytes()) for name, face in faces.items()}
    assert len(appearances) == len(set(named.values()))


def test_the_faces_are_small_and_their_artist_is_named():
    folder = drawn_faces().parent
    assert sum(path.stat().st_size for path in folder.glob("drawn_faces.*")) <= 8_000_000
    credit = Path(folder / "drawn_faces.md").read_text(encoding="utf-8")
    for words in ("ToonHead", "Johan Melin", "creativecommons.org/licenses/by/4.0", "changed them"):
        assert words in credit
