"""One pass over the files: read, judged, decoded and resized by all cores, each of them once.

The pixels go to a file, one image after the other; memory holds paths and hashes, and the few
images under way.
"""

import functools
import hashlib
import os
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from vaejax.data.decode import Refused, opened, pixels, resize
from vaejax.data.sources import Entry, Listing

# 49 megapixels with transparency fit into 190 KB and unpack to 1 GB: one such image at a time, or
# 16 threads would need 16 GB.
_LARGE_PIXELS = 8_000_000

_SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal


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


def gather(
    files: Listing,
    file: BinaryIO,
    *,
    size: int,
    threads: int | None,
    say: Callable[[str], None],
) -> Gathered:
    """Look at every file, and keep the images' pixels in `file`."""
    with warnings.catch_warnings():
        # Pillow remarks on odd files, one by one; what is wrong with them is reported by us.
        warnings.filterwarnings("ignore", module="PIL")
        results = _in_order(
            lambda entry: _examine(entry, files.read, size),
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
        if isinstance(result, Refused):
            found.refused.append({"path": entry.path, "reason": result.reason})
            continue
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


def _examine(entry: Entry, read: Callable[[Entry], bytes], size: int) -> _Examined | Refused:
    if entry.refused:
        return Refused(entry.refused)
    try:
        data = read(entry)
        image = opened(data)
        dimensions = image.size
        if _is_large(image):
            small = _one_at_a_time().submit(_shrunk, image, size).result()
        else:
            small = _shrunk(image, size)
    except Refused as refused:
        return refused
    return _Examined(hashlib.sha256(data).hexdigest(), dimensions, small)


def _shrunk(image: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    # Twice the size, so that the last step down is our averaging and not libjpeg's.
    return resize(pixels(image, at_least=2 * size), size)


@functools.cache
def _one_at_a_time() -> ThreadPoolExecutor:
    """One thread, and not a lock: what a thread has used, the allocator keeps for that thread."""
    return ThreadPoolExecutor(1)


def _is_large(image: Image.Image) -> bool:
    """Whether its pixels need much memory; a photograph that is not progressive is decoded small
    from the start."""
    streams = image.format in ("JPEG", "MPO") and not image.info.get("progressive")
    return not streams and image.width * image.height > _LARGE_PIXELS


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
