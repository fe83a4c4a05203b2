"""The drawn faces are what their table and their credit say."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax.data.demo import attributes, drawn_faces

BACKGROUNDS = {
    "sky": (0xA9, 0xD9, 0xF2), "mint": (0xB9, 0xEC, 0xC8), "rose": (0xFF, 0xC6, 0xD3),
    "peach": (0xFF, 0xD9, 0xAD), "lemon": (0xFF, 0xF1, 0xA3), "lilac": (0xCD, 0xBD, 0xF0),
}  # fmt: skip


@pytest.fixture(scope="module")
def faces() -> dict[str, np.ndarray]:
    def read() -> Iterator[tuple[str, np.ndarray]]:
        with zipfile.ZipFile(drawn_faces()) as archive:
            for name in archive.namelist():
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    assert image.mode == "RGB"
                    yield name, np.asarray(image)

    return dict(read())


def test_every_face_is_64_pixels_in_colour_and_no_two_are_the_same(faces):
    assert len(faces) == 3200
    assert {face.shape for face in faces.values()} == {(64, 64, 3)}
    assert len({face.tobytes() for face in faces.values()}) == len(faces)


def test_the_table_names_every_face_and_no_other(faces):
    assert list(attributes()) == list(faces)
    assert len({tuple(row) for row in attributes().values()}) == 1


def test_the_background_is_the_one_the_table_says(faces):
    for name, row in attributes().items():
        # the left edge, half-way down, is clear of hair in most drawings
        edge = faces[name][:, 0].reshape(-1, 3)
        assert (edge == BACKGROUNDS[row["background_colour"]]).all(axis=1).any(), name


def test_the_colours_of_hair_and_glasses_are_those_the_table_says(faces):
    def mean(chosen, region) -> np.ndarray:
        rows = attributes().items()
        return np.mean([faces[n][region] for n, row in rows if chosen(row)], axis=(0, 1, 2))

    top = (slice(8, 14), slice(26, 38))
    red, green, blue = (
        mean(lambda row, c=c: row["hair_colour"] == c, top) for c in ("auburn", "green", "blue")
    )
    assert np.argmax(red) == 0
    assert np.argmax(green) == 1
    assert np.argmax(blue) == 2
    bridge = (slice(37, 39), slice(31, 33))
    with_glasses = mean(lambda row: row["glasses"] == "yes", bridge)
    assert with_glasses.mean() < mean(lambda row: row["glasses"] == "no", bridge).mean() - 40


def test_the_faces_are_small_and_their_artist_is_named():
    folder = drawn_faces().parent
    assert sum(path.stat().st_size for path in folder.glob("drawn_faces.*")) <= 8_000_000
    credit = Path(folder / "drawn_faces.md").read_text(encoding="utf-8")
    for words in ("ToonHead", "Johan Melin", "creativecommons.org/licenses/by/4.0", "Changed"):
        assert words in credit
