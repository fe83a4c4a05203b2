"""Read, check, decode, crop and resize all files of a listing, on every core.

The pixels go to a file, one image after another; memory holds paths, hashes and the few images in
progress. Who does the work is a `Workers`: threads of this process, or those of Apache Beam.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import os
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from vaejax.data import faces, records
from vaejax.data.decode import Refused, open_image, resize, to_rgb
from vaejax.data.duplicates import hash_look, hash_pixels
from vaejax.data.sources import Entry, Listing
from vaejax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# 49 megapixels with transparency fit into 190 KB and unpack to 1 GB: one such image at a time, or
# 16 threads would need 16 GB.
_LARGE_PIXELS = 8_000_000

_TASK_BYTES = 1 << 18  # of a thread's results, at most, before they are handed over

_PROGRESS_SECONDS = 30  # between lines of progress, where there is no terminal

_Result = TypeVar("_Result")


class Pixels:
    """Images of one size in a file, by index."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._shape = file, (size, size, 3)
        self._bytes = size * size * 3

    def append(self, image: UInt8[np.ndarray, "size size 3"]) -> None:
        """Write the next image."""
        self._file.write(image.tobytes())

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        self._file.seek(index * self._bytes)
        return np.frombuffer(self._file.read(self._bytes), np.uint8).reshape(self._shape)


@dataclass
class Gathered:
    """The accepted images in the order of the listing, and the refused files with their reasons."""

    pixels: Any  # images by index: `Pixels`, or the store of other workers
    paths: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)  # SHA-256 of the file, in hex
    pixel_hashes: list[str] = field(default_factory=list)
    looks: list[bytes] = field(default_factory=list)  # perceptual hashes
    dimensions: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height)
    refused: list[dict[str, str]] = field(default_factory=list)  # "path" and "reason"
    several_faces: int = 0  # images in which more than one face was detected
    sheet: faces.Sheet = field(default_factory=faces.Sheet)  # empty without a detector


# Who does the work --------------------------------------------------------------------------------


@runtime_checkable
class Workers(Protocol):
    """Those who decode the images and write the records."""

    def gather(
        self,
        files: Listing,
        scratch: Path,
        *,
        size: int,
        detector: faces.Detector | None,
        say: Callable[[str], None],
    ) -> AbstractContextManager[Gathered]:
        """Examine all files; the pixels lie in `scratch` until the end of the block."""
        ...

    def write_split(
        self,
        folder: Path,
        gathered: Gathered,
        selected: Iterable[tuple[int, records.Metadata]],
        *,
        size: int,
        split: str,
    ) -> "tfds.core.SplitInfo":
        """Write the records of one split: the selected images by index, and their metadata."""
        ...


@dataclass(frozen=True)
class Threads:
    """Threads of this process."""

    count: int | None = None  # one per core if None

    @contextlib.contextmanager
    def gather(
        self,
        files: Listing,
        scratch: Path,
        *,
        size: int,
        detector: faces.Detector | None,
        say: Callable[[str], None],
    ) -> Iterator[Gathered]:
        """Examine all files; the pixels lie in `scratch` until the end of the block."""
        with scratch.open("w+b") as file:
            with warnings.catch_warnings():
                # Pillow warns of odd files, one by one; the report lists what is wrong with them.
                warnings.filterwarnings("ignore", module="PIL")
                results = _map_in_order(
                    lambda entry: examine(entry, files.read, size, detector),
                    files.entries,
                    threads=self.count or os.cpu_count() or 1,
                    at_a_time=max(1, min(16, _TASK_BYTES // (3 * size * size))),
                )
                results = _show_progress(results, total=len(files.entries), say=say)
                gathered = collect(files.entries, results, Pixels(file, size))
            yield gathered
        scratch.unlink()

    def write_split(
        self,
        folder: Path,
        gathered: Gathered,
        selected: Iterable[tuple[int, records.Metadata]],
        *,
        size: int,
        split: str,
    ) -> "tfds.core.SplitInfo":
        """Write the records of one split: the selected images by index, and their metadata."""
        examples = (
            records.Record(image=gathered.pixels[i], **metadata) for i, metadata in selected
        )
        return records.write_split(folder, split=split, examples=examples)


def workers_from_flags(*, beam: str | None, beam_options: str) -> Workers:
    """Return the workers of an Apache Beam runner if one is named, else threads.

    Raises UserError if Beam is not installed, or there is no such runner or option.
    """
    if beam is not None:
        return _import_beam().runner_from_flags(beam, beam_options)
    if beam_options:
        raise UserError(f"--beam-options {beam_options}: name a runner, as in --beam DirectRunner.")
    return Threads()


def _import_beam() -> ModuleType:
    logging.disable(logging.WARNING)  # Beam remarks that Google's packages are missing
    try:
        from vaejax.data import beam
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "apache_beam":
            raise
        raise UserError("--beam needs Apache Beam: pip install -r requirements-beam.txt") from None
    finally:
        logging.disable(logging.NOTSET)
    return beam


def _map_in_order(
    function: "Callable[[Entry], Examined | Refused]",
    entries: Iterable[Entry],
    *,
    threads: int,
    at_a_time: int,
) -> "Iterator[Examined | Refused]":
    """Map by threads; few results are held while they wait for a slow one before them.

    A thread gets several entries, because handing over one takes a sixth as long as an image.
    """
    remaining = iter(entries)
    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        while some := list(itertools.islice(remaining, at_a_time)):
            pending.append(pool.submit(lambda some: [function(entry) for entry in some], some))
            if len(pending) > 2 * threads:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _show_progress(
    items: Iterable[Any], *, total: int, say: Callable[[str], None]
) -> Iterator[Any]:
    """Yield the same items, and show a bar on a terminal, or else a line now and then."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=" images", smoothing=0.05)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - last > _PROGRESS_SECONDS:
            last = now
            say(f"{done:,} of {total:,} files, {done / (now - start):,.0f} a second")


# One file -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examined:
    """An accepted image."""

    sha256: str  # of the file, in hex
    pixel_hash: str  # of the prepared image
    look: bytes  # perceptual hash of the prepared image
    dimensions: tuple[int, int]  # (width, height), as stored
    pixels: Any  # UInt8 [size size 3], or where a worker on another machine has stored them
    thumbnail: faces.Thumbnail | None  # for the faces sheet, if there is a detector


class NoFace(Refused):
    """No face was detected in an image."""

    def __init__(self, thumbnail: faces.Thumbnail):
        super().__init__(faces.NO_FACE)
        self.thumbnail = thumbnail


def examine(
    entry: Entry, read: Callable[[Entry], bytes], size: int, detector: faces.Detector | None
) -> Examined | Refused:
    """Read, decode and resize one image, cropped to its largest face if there is a detector."""
    if entry.refused:
        return Refused(entry.refused)
    try:
        data = read(entry)
        image = open_image(data)
        dimensions = image.size
        if detector is None:
            # Twice the size, so that the last step down is our averaging and not libjpeg's.
            shrink = functools.partial(resize, size=size)
            pixels, thumbnail = _decode_and(shrink, image, min_side=2 * size), None
        else:
            pixels, thumbnail = _cut_face(image, data, size, detector)
    except Refused as refused:
        return refused
    digest = hashlib.sha256(data).hexdigest()
    hashes = digest, hash_pixels(pixels), hash_look(pixels)
    return Examined(*hashes, dimensions, pixels, thumbnail)


def collect(
    entries: Iterable[Entry], results: Iterable[Examined | Refused], pixels: Any
) -> Gathered:
    """Sort the results of all entries into accepted images and refused files."""
    gathered = Gathered(pixels)
    for entry, result in zip(entries, results, strict=True):
        if isinstance(result, NoFace):
            gathered.sheet.add(entry.path, result.thumbnail)
        if isinstance(result, Refused):
            gathered.refused.append({"path": entry.path, "reason": result.reason})
            continue
        if result.thumbnail is not None:
            gathered.sheet.add(entry.path, result.thumbnail)
            gathered.several_faces += result.thumbnail.faces > 1
        gathered.pixels.append(result.pixels)
        gathered.paths.append(entry.path)
        gathered.hashes.append(result.sha256)
        gathered.pixel_hashes.append(result.pixel_hash)
        gathered.looks.append(result.look)
        gathered.dimensions[result.dimensions] += 1
    return gathered


def _cut_face(
    image: Image.Image, data: bytes, size: int, detector: faces.Detector
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], faces.Thumbnail]:
    """Cut out the largest face. Raises NoFace.

    It is detected in a small picture, and cut out of one that is as large as the face needs: a
    photograph of many megapixels is decoded small twice, and hardly ever at full size.
    """
    small = _decode_and(faces.shrink, image, min_side=faces.DETECTION_SIDE)
    boxes = detector.detect(small)
    thumbnail = faces.draw_thumbnail(small, boxes, margin=detector.margin)
    if not boxes:
        raise NoFace(thumbnail)
    square = faces.square_around(faces.largest(boxes), detector.margin, small.shape[:2])

    def cut(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        box = faces.scale(square, max(picture.shape) / max(small.shape))
        # rounding may move it by a pixel to the outside
        return resize(faces.cut(picture, faces.square_around(box, 0.0, picture.shape[:2])), size)

    # so that the face has twice the size, as above
    min_side = math.ceil(2 * size * min(small.shape[:2]) / square.width)
    return _decode_and(cut, open_image(data), min_side=min_side), thumbnail


def _decode_and(
    function: Callable[[np.ndarray], _Result], image: Image.Image, *, min_side: int
) -> _Result:
    """Apply a function to the pixels of an image; large images are decoded one at a time."""

    def work() -> _Result:
        return function(to_rgb(image, min_side=min_side))

    if _is_large(image, min_side):
        return _single_thread().submit(work).result()
    return work()


@functools.cache
def _single_thread() -> ThreadPoolExecutor:
    """One thread instead of a lock: the allocator keeps for each thread what it has used."""
    return ThreadPoolExecutor(1)


def _is_large(image: Image.Image, min_side: int) -> bool:
    """Return whether decoding needs much memory; JPEGs that are not progressive decode small."""
    if image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
        image.draft(None, (min_side, min_side))  # from here on it has the size that it will get
    return image.width * image.height > _LARGE_PIXELS
