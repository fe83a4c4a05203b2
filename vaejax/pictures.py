"""Pictures made of images, PNG files, and films as MP4 and GIF.

Images are uint8 arrays `[n h w c]`, a picture is one `[height width c]`. Files are written
atomically.
"""

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vaejax.files import atomic

Images = UInt8[np.ndarray, "n h w c"]
Picture = UInt8[np.ndarray, "H W c"]


def grid(images: Images, *, columns: int, gap: int = 2, background: int = 255) -> Picture:
    """Arrange images in rows of `columns`, in reading order and `gap` pixels apart.

    The end of an incomplete last row has the color of the background.
    """
    n, h, w, c = images.shape
    rows = -(-n // columns)
    picture = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), background, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        picture[top : top + h, left : left + w] = image
    return picture


def stack_rows(rows: Sequence[Images], *, columns: int = 10) -> Picture:
    """Arrange every sequence of images as a row, so that image i of each row is in column i.

    The rows have equal lengths. Images after the first `columns` of each row follow below, as
    another group of rows.
    """
    groups = [[row[i : i + columns] for row in rows] for i in range(0, len(rows[0]), columns)]
    grids = [grid(np.concatenate(group), columns=len(group[0])) for group in groups]
    width = grids[0].shape[1]
    padded = [
        np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
        for picture in grids
    ]
    return np.concatenate(padded)


def shrink(images: Images, size: int) -> UInt8[np.ndarray, "n s s c"]:
    """Reduce square images to `size` × `size`; smaller ones stay as they are.

    A pixel is the mean of those whose centres lie in its area.
    """
    if images.shape[1] <= size:
        return images
    box = Image.Resampling.BOX
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), box)) for image in images]
    )


def save_png(path: Path, picture: Picture) -> None:
    """Write a picture as a PNG file. Raises OSError if it cannot be written."""
    with atomic(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


# Films --------------------------------------------------------------------------------------------


def film(
    frames: Sequence[Path],
    *,
    mp4: Path,
    gif: Path,
    seconds: float = 12,
    max_frames: int = 200,
) -> None:
    """Write PNG files of equal size as an MP4 and a GIF of about `seconds`.

    The last frame stays for two seconds. Of more than `max_frames` files, evenly spaced ones are
    shown, always with the first and the last. Damaged files and those of another size are left out
    with a warning; nothing is written if none remains. The GIF has at most 512 pixels a side,
    because Pillow holds all its frames: about 50 MB of memory.

    Raises OSError if a file cannot be written.
    """
    frames, size = _frames_of_equal_size(frames)
    if not frames:
        return
    if len(frames) > max_frames:
        frames = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, max_frames)]
    rate = min(max(len(frames) / seconds, 2.0), 25.0)  # frames a second
    _write_mp4(mp4, frames, size=size, rate=rate)
    _write_gif(gif, frames, rate=rate)


def _frames_of_equal_size(frames: Sequence[Path]) -> tuple[list[Path], tuple[int, int]]:
    """Return the files that have the most frequent size, and that size (width, height).

    The others, which a full disk, a kill or a user may have left, are listed in a warning.
    """
    sizes: dict[Path, tuple[int, int]] = {}
    for frame in frames:
        try:
            with Image.open(frame) as picture:
                picture.load()
                sizes[frame] = picture.size
        except Exception:  # Pillow raises many types of exceptions for damaged files
            continue
    size = Counter(sizes.values()).most_common(1)[0][0] if sizes else (0, 0)
    usable = [frame for frame in frames if sizes.get(frame) == size]
    if unusable := [frame for frame in frames if frame.exists() and frame not in usable]:
        names = ", ".join(frame.name for frame in unusable[:5])
        print(
            f"warning: {len(unusable)} of {len(frames)} pictures are damaged or of another size, "
            f"and are left out of the film: {names}{', …' if len(unusable) > 5 else ''}",
            file=sys.stderr,
        )
    return usable, size


def _read(frames: Sequence[Path]) -> Iterator[Image.Image]:
    """Yield the pictures one by one, so that only one is in memory."""
    for frame in frames:
        with Image.open(frame) as picture:
            yield picture.convert("RGB")


def _write_mp4(path: Path, frames: Sequence[Path], *, size: tuple[int, int], rate: float) -> None:
    with atomic(path) as partial, _ffmpeg(partial, size=size, rate=rate) as pipe:
        pixels = b""
        for picture in _read(frames):
            pixels = picture.tobytes()
            pipe.write(pixels)
        for _ in range(max(1, round(2 * rate))):  # two seconds
            pipe.write(pixels)


def _write_gif(path: Path, frames: Sequence[Path], *, rate: float) -> None:
    def quantize(picture: Image.Image) -> Image.Image:
        picture.thumbnail((512, 512))
        # without dithering, whose noise would flicker from frame to frame
        return picture.quantize(256, dither=Image.Dither.NONE)

    pictures = map(quantize, _read(frames))
    durations = [1000 / rate] * (len(frames) - 1) + [2000.0]  # milliseconds
    with atomic(path) as partial:
        next(pictures).save(
            partial, format="GIF", save_all=True, append_images=pictures, duration=durations, loop=0
        )


@contextmanager
def _ffmpeg(path: Path, *, size: tuple[int, int], rate: float) -> Iterator[IO[bytes]]:
    """Yield a pipe that encodes raw RGB frames of a size (width, height) as an MP4 file.

    `imageio_ffmpeg.write_frames` starts the same process, but does not report its exit status nor
    its messages: on a full disk it leaves a truncated file and raises nothing. It also forks
    Python, which JAX warns about.

    Raises OSError, with ffmpeg's message, if the video was not written.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}"]
    command += ["-r", str(Fraction(rate).limit_denominator(1000)), "-i", "-", "-an"]
    # yuv420p, which every player supports, halves the resolution of the colors: it needs even sides
    command += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p"]
    # a number of threads, or the bytes of the film would depend on the number of cores
    command += ["-vcodec", "libx264", "-crf", "10", "-threads", "4", str(path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C must reach the program, which finishes the film, not ffmpeg
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        with suppress(BrokenPipeError):  # ffmpeg ended early, and its message says why
            yield process.stdin
        with suppress(BrokenPipeError):
            process.stdin.close()
        messages = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.returncode == -signal.SIGXFSZ:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    if process.returncode:
        message = messages[-1] if messages else f"exit status {process.returncode}"
        raise OSError(errno.EIO, f"ffmpeg: {message}", str(path))
