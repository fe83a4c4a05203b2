"""The same image is found by its pixels, and one that looks the same by its low frequencies."""

import io
import itertools
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from vaejax.data import duplicates
from vaejax.data.decode import decode
from vaejax.data.duplicates import MAX_DISTANCE, hash_look, hash_pixels, near_duplicates
from vaejax.data.sources import drawn_faces


@pytest.fixture(scope="module")
def drawings() -> list[np.ndarray]:
    """Every eighth of the drawn faces."""
    with zipfile.ZipFile(drawn_faces()) as archive:
        return [decode(archive.read(name)) for name in sorted(archive.namelist())[::8]]


def distance(one: bytes, other: bytes) -> int:
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return decode(file.getvalue())


def test_the_hash_of_pixels_is_of_pixels(drawings: list[np.ndarray]):
    image = drawings[0]
    other = image.copy()
    other[63, 63, 2] ^= 1
    assert hash_pixels(image) == hash_pixels(np.ascontiguousarray(image[:, ::-1])[:, ::-1])
    assert hash_pixels(image) != hash_pixels(other)


def test_the_look_of_an_image_is_that_of_its_cosine_transform(drawings: list[np.ndarray]):
    for image in drawings[:20]:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
        signs = cv2.dct(grey)[:16, :16] > 0
        signs[0, 0] = False
        assert distance(hash_look(image), np.packbits(signs).tobytes()) <= 2  # of values near 0


def test_an_image_that_was_compressed_resized_or_brightened_looks_the_same(
    drawings: list[np.ndarray],
):
    def resized(image: np.ndarray) -> np.ndarray:
        small = cv2.resize(image, (48, 48), interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(small, (64, 64), interpolation=cv2.INTER_CUBIC), np.uint8)

    def brightened(image: np.ndarray) -> np.ndarray:
        return np.minimum(image.astype(int) + 12, 255).astype(np.uint8)

    for change in (jpeg, resized, brightened):
        near = [distance(hash_look(i), hash_look(change(i))) <= MAX_DISTANCE for i in drawings]
        assert np.mean(near) > 0.97, change


def test_of_the_drawn_faces_one_pair_in_ten_thousand_looks_the_same(drawings: list[np.ndarray]):
    pairs = len(drawings) * (len(drawings) - 1) / 2
    found = near_duplicates([hash_look(image) for image in drawings], examples=0)
    assert found.complete
    assert found.pairs / pairs < 2e-4  # 0.9e-4 of all 3,200, which are all different


def test_small_images_have_a_look():
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    looks = [hash_look(image) for image in noise]
    assert distance(*looks) > MAX_DISTANCE
    assert distance(looks[0], hash_look(noise[0])) == 0


def looks_around(centres: int, copies: int) -> list[bytes]:
    """Hashes of which some differ in few bits."""
    random = np.random.default_rng(0)
    bits = np.repeat(random.integers(0, 2, (centres, 256), np.uint8), copies, axis=0)
    for row in bits:
        row[random.choice(256, random.integers(0, 9), replace=False)] ^= 1
    return [np.packbits(row).tobytes() for row in bits]


def test_near_duplicates_are_all_pairs_within_the_distance():
    looks = looks_around(30, 4)
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(looks)), 2)
        if distance(looks[i], looks[j]) <= MAX_DISTANCE
    ]
    assert 30 < len(expected) < 180
    found = near_duplicates(looks, examples=1000)
    assert found == (len(expected), expected, True)
    assert near_duplicates(looks, examples=7).examples == expected[:7]
    assert near_duplicates([], examples=7) == (0, [], True)
    assert near_duplicates(looks[:1], examples=7) == (0, [], True)


def test_the_search_ends_whatever_the_images(monkeypatch: pytest.MonkeyPatch):
    film = [bytes(32)] * 500
    assert near_duplicates(film[:300], examples=2) == (300 * 299 // 2, [(0, 1), (0, 2)], True)
    monkeypatch.setattr(duplicates, "MAX_FOUND", 2000)
    found = near_duplicates(film, examples=3)
    assert not found.complete
    assert 2000 < found.pairs < 3000
    monkeypatch.setattr(duplicates, "_BLOCK", 100)
    found = near_duplicates(film, examples=3, max_compared=1000)
    assert not found.complete
    assert 900 < found.pairs < 1200
