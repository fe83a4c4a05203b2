"""One pass over the files: read, judged, decoded, cropped and resized by all cores.

The pixels go to a file, one image after the other; memory holds paths and hashes, and the few
images under way.
"""

import functools
import hashlib
import math
import os
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from vaejax.data import faces
from vaejax.data.decode import Refused, opened, pixels, resize
from vaejax.data.sheet import Seen, Sheet, seen
from vaejax.data.sources import Entry, Listing

# 49 megapixels with transparency fit into 190 KB and unpack to 1 GB: one such image at a time, or
# 16 threads would need 16 GB.
_LARGE_PIXELS = 8_000_000

_SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal

_Result = TypeVar("_Result")


class Pixels:
    """Images of one size in a file, by number."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._shape = file, (size, size, 3)
        self._bytes = size * size * 3

    def append(self, image: UInt8[np.ndarray, "size size 3"]) -> None:
        self._file.write(image.tobytes())

    def __getitem__(self, number: int) -> UInt8[np.ndarray, "size size 3"]:
        self._file.seek(number * self._bytes)
        return np.frombuffer(self._file.read(self._bytes), np.uint8).reshape(self._shape)


@dataclass
class Gathered:
    """The images in the order of the listing, and every file that is none, with the reason."""

    pixels: Any  # images by number: `Pixels`, or another store of them
    paths: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)  # SHA-256 of the file, in hex
    dimensions: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height)
    refused: list[dict[str, str]] = field(default_factory=list)
    several_faces: int = 0
    sheet: Sheet = field(default_factory=Sheet)  # without a picture if faces were not looked for


def gather(
    files: Listing,
    file: BinaryIO,
    *,
    size: int,
    finder: faces.Finder | None,
    threads: int | None,
    say: Callable[[str], None],
) -> Gathered:
    """Look at every file, and keep the images' pixels in `file`: their faces', with a finder."""
    with warnings.catch_warnings():
        # Pillow remarks on odd files, one by one; what is wrong with them is reported by us.
        warnings.filterwarnings("ignore", module="PIL")
        results = _in_order(
            lambda entry: _examine(entry, files.read, size, finder),
            files.entries,
            threads=threads or os.cpu_count() or 1,
        )
        progress = _shown(results, total=len(files.entries), say=say)
        return collected(files.entries, progress, Pixels(file, size))


def collected(
    entries: Iterable[Entry], results: Iterable["_Examined | Refused"], pixels: Any
) -> Gathered:
    """What came of the files, one by one."""
    found = Gathered(pixels)
    for entry, result in zip(entries, results, strict=True):
        if isinstance(result, _NoFace):
            found.sheet.add(entry.path, result.seen)
        if isinstance(result, Refused):
            found.refused.append({"path": entry.path, "reason": result.reason})
            continue
        if result.seen is not None:
            found.sheet.add(entry.path, result.seen)
            found.several_faces += result.seen.faces > 1
        found.pixels.append(result.pixels)
        found.paths.append(entry.path)
        found.hashes.append(result.sha256)
        found.dimensions[result.dimensions] += 1
    return found


@dataclass(frozen=True)
class _Examined:
    sha256: str
    dimensions: tuple[int, int]
    pixels: Any  # UInt8 [size size 3], or where a worker on another machine has left them
    seen: Seen | None  # where faces are looked for


class _NoFace(Refused):
    def __init__(self, seen: Seen):
        super().__init__(faces.NO_FACE)
        self.seen = seen


def _examine(
    entry: Entry, read: Callable[[Entry], bytes], size: int, finder: faces.Finder | None
) -> _Examined | Refused:
    if entry.refused:
        return Refused(entry.refused)
    try:
        data = read(entry)
        image = opened(data)
        dimensions = image.size
        if finder is None:
            # Twice the size, so that the last step down is our averaging and not libjpeg's.
            whole = functools.partial(resize, size=size)
            small, what = _decoded(image, whole, at_least=2 * size), None
        else:
            small, what = _face(image, data, size, finder)
    except Refused as refused:
        return refused
    return _Examined(hashlib.sha256(data).hexdigest(), dimensions, small, what)


def _face(
    image: Image.Image, data: bytes, size: int, finder: faces.Finder
) -> tuple[UInt8[np.ndarray, "{size} {size} 3"], Seen]:
    """The largest face alone: looked for in a small picture, and cut out of one that is as large
    as the face needs: a photograph of many megapixels is decoded small twice, and hardly ever
    whole."""
    look = _decoded(image, faces.small, at_least=faces.LOOK)
    boxes = finder.find(look)
    what = seen(look, boxes, margin=finder.margin)
    if not boxes:
        raise _NoFace(what)
    around = faces.square(faces.choose(boxes), finder.margin, look.shape[:2])

    def cut(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        box = faces.scaled(around, max(picture.shape) / max(look.shape))
        # what was rounded may be a pixel outside
        return resize(faces.crop(picture, faces.square(box, 0.0, picture.shape[:2])), size)

    # so that twice the size is left of the face, as above
    at_least = math.ceil(2 * size * min(look.shape[:2]) / around.width)
    return _decoded(opened(data), cut, at_least=at_least), what


def _decoded(
    image: Image.Image, function: Callable[[np.ndarray], _Result], *, at_least: int
) -> _Result:
    """The function of the image's pixels; of one image at a time, where they are many."""

    def work() -> _Result:
        return function(pixels(image, at_least=at_least))

    if _is_large(image, at_least):
        return _one_at_a_time().submit(work).result()
    return work()


@functools.cache
def _one_at_a_time() -> ThreadPoolExecutor:
    """One thread, and not a lock: what a thread has used, the allocator keeps for that thread."""
    return ThreadPoolExecutor(1)


def _is_large(image: Image.Image, at_least: int) -> bool:
    """Whether its pixels need much memory; a photograph that is not progressive is decoded small
    from the start."""
    if image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
        image.draft(None, (at_least, at_least))  # from here on it has the size that it will get
    return image.width * image.height > _LARGE_PIXELS


def _in_order(
    function: Callable[[Entry], _Examined | Refused], entries: Iterable[Entry], *, threads: int
) -> Iterator[_Examined | Refused]:
    """`map` by threads, with few items under way: those that wait for a slow one are bounded."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for entry in entries:
            waiting.append(pool.submit(function, entry))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _shown(items: Iterable[Any], *, total: int, say: Callable[[str], None]) -> Iterator[Any]:
    """The same items, with a bar on a terminal, or else a line now and then."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=" images", smoothing=0.05)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - last > _SECONDS_BETWEEN_LINES:
            last = now
            say(f"{done:,} of {total:,} files, {done / (now - start):,.0f} a second")
