"""Images that are the same, or look the same: by a hash of their pixels, and by a perceptual hash.

Both are of the pixels of the prepared set. Files that differ, such as a PNG and a BMP of one
picture, decode to the same pixels; a copy that was compressed anew differs in most of them, and has
the same low frequencies.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

FREQUENCIES = 16  # in each direction, of the perceptual hash
HASH_BYTES = FREQUENCIES**2 // 8
MAX_DISTANCE = 8  # bits in which the hashes of near-duplicates differ, of 255

# a few seconds and some 20 MB, whatever the images: a million frames of a film are all alike
MAX_COMPARED, MAX_FOUND = 20_000_000, 100_000  # pairs
_BLOCK = 1 << 18  # pairs that are compared at a time


def hash_pixels(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """Return the SHA-256 of an image's pixels, in hex: of images of one size, equal for equal ones.

    It takes 8 µs for 64 x 64 pixels.
    """
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()


def hash_look(image: UInt8[np.ndarray, "s s 3"]) -> bytes:
    """Return a perceptual hash: the signs of the low frequencies of the grey image, as 32 bytes.

    The frequencies are those of the discrete cosine transform, without the mean (Zauner, 2010,
    section 3.2.1, with signs in place of a comparison with the median). So the hash stays nearly
    the same when an image is compressed, resized or made brighter, but not when it is cropped or
    mirrored.
    """
    basis = _cosines(image.shape[0])
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    signs = basis @ grey @ basis.T > 0
    signs[0, 0] = False  # the mean
    return np.packbits(signs).tobytes()


@functools.cache
def _cosines(size: int) -> Float[np.ndarray, "16 {size}"]:
    """Return the lowest frequencies of the discrete cosine transform; those that an image of less
    than 16 pixels does not have are 0."""
    frequencies = np.arange(FREQUENCIES)[:, None]
    angles = np.pi * frequencies * (np.arange(size) + 0.5) / size
    return np.where(frequencies < size, np.cos(angles), 0).astype(np.float32)


class NearDuplicates(NamedTuple):
    """Pairs of images that look the same."""

    pairs: int
    examples: list[tuple[int, int]]  # indices of images, the first ones found
    complete: bool  # whether all pairs that could be near were compared


def near_duplicates(
    looks: Sequence[bytes], *, examples: int, max_compared: int = MAX_COMPARED
) -> NearDuplicates:
    """Find the pairs of images whose perceptual hashes differ in at most `MAX_DISTANCE` bits.

    Of two such hashes, at least one of `MAX_DISTANCE` + 1 parts is equal. So only images with an
    equal part are compared, at most `max_compared` pairs, and until `MAX_FOUND` are found.
    """
    hashes = np.frombuffer(b"".join(looks), np.uint8).reshape(-1, HASH_BYTES)
    words = hashes.view(np.uint64)
    found: set[tuple[int, int]] = set()
    budget = max_compared
    for part in _parts(hashes):
        for first, second in _pairs_of_equal(part):
            if budget <= 0 or len(found) > MAX_FOUND:
                return NearDuplicates(len(found), sorted(found)[:examples], complete=False)
            budget -= len(first)
            distance = np.bitwise_count(words[first] ^ words[second]).sum(axis=1)
            near = distance <= MAX_DISTANCE
            found |= set(zip(first[near].tolist(), second[near].tolist(), strict=True))
    return NearDuplicates(len(found), sorted(found)[:examples], complete=True)


def _parts(hashes: UInt8[np.ndarray, "n 32"]) -> Iterator[Int[np.ndarray, " n"]]:
    """Yield one part of every hash after the other: each has every ninth bit, as a number."""
    bits = np.unpackbits(hashes, axis=1)
    for start in range(MAX_DISTANCE + 1):
        some = bits[:, start :: MAX_DISTANCE + 1].astype(np.int64)
        yield some @ (1 << np.arange(some.shape[1]))


def _pairs_of_equal(
    values: Int[np.ndarray, " n"],
) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]]:
    """Yield all pairs of indices, the smaller first, of equal values, in blocks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    # each image and the one that is `shift` places further, until no two such are equal
    left = np.arange(len(values))
    for shift in range(1, len(values)):
        left = left[left < len(values) - shift]
        left = left[ordered[left] == ordered[left + shift]]
        if not len(left):
            return
        for start in range(0, len(left), _BLOCK):
            some = left[start : start + _BLOCK]
            yield order[some], order[some + shift]
