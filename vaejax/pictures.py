"""Pictures made of images, with or without labels, PNG files, and films as MP4 and GIF.

Images are uint8 arrays `[n h w c]`, a picture is one `[height width c]`. Files are written
atomically.
"""

import errno
import io
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vaejax.files import atomic, printable, read_bytes

MAX_PNG_BYTES, MAX_PNG_PIXELS = 256 << 20, 50_000_000  # of a picture that is read

Images = UInt8[np.ndarray, "n h w c"]
Picture = UInt8[np.ndarray, "H W c"]

CAPTION_HEIGHT = 20  # pixels below each frame of a film

GAP = 2  # pixels between images, and around them
FONT_SIZE = 12  # pixels, of labels
LABELLED_SIZE = 64  # pixels, at least, of an image that has a label
LOOP_RATE = 25.0  # frames a second, whose duration a GIF can express


def grid(images: Images, *, columns: int, gap: int = GAP, background: int = 255) -> Picture:
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


def enlarge(images: Images, factor: int) -> UInt8[np.ndarray, "n H W c"]:
    """Enlarge images so many times, smoothly; a factor of 1 leaves them as they are."""
    if factor == 1:
        return images
    size, cubic = tuple(factor * side for side in images.shape[2:0:-1]), Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(image).resize(size, cubic)) for image in images])


def labelled_rows(
    rows: Sequence[Images],
    labels: Sequence[str],
    *,
    headings: Sequence[str] = (),
    columns: int = 10,
) -> UInt8[np.ndarray, "H W 3"]:
    """Arrange RGB images in rows, each with its label at the left, and headings above the columns.

    The rows have equal lengths; they are divided as `stack_rows` does, where there are no headings.
    Images of less than 64 pixels are enlarged, so that headings find room.
    """
    factor = -(-LABELLED_SIZE // rows[0].shape[1])
    picture = stack_rows(
        [enlarge(row, factor) for row in rows], columns=len(rows[0]) if headings else columns
    )
    height, width = (factor * side + GAP for side in rows[0].shape[1:3])
    font = ImageFont.load_default(FONT_SIZE)
    left = round(max(map(font.getlength, labels))) + 5 * GAP
    top = FONT_SIZE + 3 * GAP if headings else 0
    sheet = Image.new("RGB", (left + picture.shape[1], top + picture.shape[0]), "white")
    sheet.paste(Image.fromarray(picture), (left, top))
    draw = ImageDraw.Draw(sheet)
    group = len(rows) * height + GAP
    for first in range(0, picture.shape[0], group):
        for i, label in enumerate(labels):
            middle = top + first + GAP + i * height + (height - GAP) / 2
            draw.text((left - 2 * GAP, middle), label, fill="black", font=font, anchor="rm")
    for i, heading in enumerate(headings):
        middle = left + GAP + i * width + (width - GAP) / 2
        draw.text((middle, top), heading, fill="black", font=font, anchor="md")
    return np.asarray(sheet)


def save_png(path: Path, picture: Picture) -> None:
    """Write a picture as a PNG file. Raises OSError if it cannot be written."""
    with atomic(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


def encode_png(picture: Picture) -> bytes:
    """Return a picture as a PNG file: its pixels, and nothing else."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def read_png(path: Path) -> Image.Image:
    """Read a PNG file that anybody may have put there.

    Raises OSError for anything but a regular file of bounded size, ValueError for one that is no
    PNG, damaged, or of more than 50 megapixels.
    """
    data = read_bytes(path, max_bytes=MAX_PNG_BYTES)
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
        if picture.width * picture.height > MAX_PNG_PIXELS:  # before anything is decoded
            raise ValueError("it has more than 50 megapixels")
        picture.load()
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many types of exceptions for damaged files
        raise ValueError("it is no undamaged PNG") from error
    return picture


# Films --------------------------------------------------------------------------------------------


def film(
    frames: Sequence[Path],
    *,
    mp4: Path,
    gif: Path,
    captions: Sequence[str] = (),
    seconds: float = 12,
    max_frames: int = 200,
) -> None:
    """Write PNG files of equal size as an MP4 and a GIF of about `seconds`, each above its caption.

    The last frame stays for two seconds. Of more than `max_frames` files, evenly spaced ones are
    shown, always with the first and the last. Damaged files and those of another size are left out
    with a warning; nothing is written if none remains. The GIF has at most 512 pixels a side,
    because Pillow holds all its frames: about 50 MB of memory.

    Raises OSError if a file cannot be written.
    """
    caption = dict(zip(frames, captions, strict=True)) if captions else {}
    frames, size = _frames_of_equal_size(frames)
    if not frames:
        return
    if len(frames) > max_frames:
        frames = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, max_frames)]
    rate = min(max(len(frames) / seconds, 2.0), 25.0)  # frames a second
    if caption:
        size = size[0], size[1] + CAPTION_HEIGHT
    _write_mp4(mp4, _read(frames, caption), size=size, rate=rate)
    _write_gif(gif, _read(frames, caption), count=len(frames), rate=rate)


def loop(path: Path, frames: Iterable[Picture]) -> None:
    """Write RGB pictures of equal size as a film that begins again at its end, 25 a second.

    It is a GIF if the name ends so, otherwise an MP4. Each frame goes to ffmpeg as it comes.

    Raises OSError if the file cannot be written.
    """
    frames = iter(frames)
    first = next(frames)
    size = first.shape[1], first.shape[0]
    codec = GIF if path.suffix.lower() == ".gif" else MP4
    with atomic(path) as partial, _ffmpeg(partial, size=size, rate=LOOP_RATE, codec=codec) as pipe:
        pipe.write(first.tobytes())
        for frame in frames:
            pipe.write(frame.tobytes())


def _frames_of_equal_size(frames: Sequence[Path]) -> tuple[list[Path], tuple[int, int]]:
    """Return the files that have the most frequent size, and that size (width, height).

    The others, which a full disk, a kill or a user may have left, are listed in a warning.
    """
    sizes: dict[Path, tuple[int, int]] = {}
    for frame in frames:
        with suppress(OSError, ValueError):
            sizes[frame] = read_png(frame).size
    size = Counter(sizes.values()).most_common(1)[0][0] if sizes else (0, 0)
    usable = [frame for frame in frames if sizes.get(frame) == size]
    if unusable := [frame for frame in frames if frame.exists() and frame not in usable]:
        names = ", ".join(printable(frame.name) for frame in unusable[:5])
        print(
            f"warning: {len(unusable)} of {len(frames)} pictures are damaged or of another size, "
            f"and are left out of the film: {names}{', …' if len(unusable) > 5 else ''}",
            file=sys.stderr,
        )
    return usable, size


def _read(frames: Sequence[Path], captions: Mapping[Path, str]) -> Iterator[Image.Image]:
    """Yield the pictures one by one, so that only one is in memory, above their captions."""
    for frame in frames:
        rgb = read_png(frame).convert("RGB")
        yield _captioned(rgb, captions[frame]) if captions else rgb


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    width, height = picture.size
    whole = Image.new("RGB", (width, height + CAPTION_HEIGHT), "white")
    whole.paste(picture)
    font = ImageFont.load_default(CAPTION_HEIGHT * 2 // 3)
    center = width / 2, height + CAPTION_HEIGHT / 2
    ImageDraw.Draw(whole).text(center, caption, fill="black", font=font, anchor="mm")
    return whole


def _write_mp4(
    path: Path, frames: Iterable[Image.Image], *, size: tuple[int, int], rate: float
) -> None:
    with atomic(path) as partial, _ffmpeg(partial, size=size, rate=rate) as pipe:
        pixels = b""
        for picture in frames:
            pixels = picture.tobytes()
            pipe.write(pixels)
        for _ in range(max(1, round(2 * rate))):  # two seconds
            pipe.write(pixels)


def _write_gif(path: Path, frames: Iterable[Image.Image], *, count: int, rate: float) -> None:
    def quantize(picture: Image.Image) -> Image.Image:
        picture.thumbnail((512, 512))
        # without dithering, whose noise would flicker from frame to frame
        return picture.quantize(256, dither=Image.Dither.NONE)

    pictures = map(quantize, frames)
    durations = [1000 / rate] * (count - 1) + [2000.0]  # milliseconds
    with atomic(path) as partial:
        next(pictures).save(
            partial, format="GIF", save_all=True, append_images=pictures, duration=durations, loop=0
        )


# yuv420p, which every player supports, halves the resolution of the colors: it needs even sides
MP4 = ("-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p")
MP4 += ("-vcodec", "libx264", "-crf", "10")
# a palette of each frame, so that none has to wait for the last one; without dithering, whose noise
# would flicker
GIF = ("-vf", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1:dither=none")
GIF += ("-loop", "0")


@contextmanager
def _ffmpeg(
    path: Path, *, size: tuple[int, int], rate: float, codec: Sequence[str] = MP4
) -> Iterator[IO[bytes]]:
    """Yield a pipe that encodes raw RGB frames of a size (width, height) as a film.

    `imageio_ffmpeg.write_frames` starts the same process, but does not report its exit status nor
    its messages: on a full disk it leaves a truncated file and raises nothing. It also forks
    Python, which JAX warns about.

    Raises OSError, with ffmpeg's message, if the video was not written.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}"]
    command += ["-r", str(Fraction(rate).limit_denominator(1000)), "-i", "-", "-an"]
    command += [*codec, str(path)]
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
