"""Pictures of images and of learning, without any global plotting state.

Images are uint8 `[n h w c]`. Files are written whole or not at all, and no picture
is kept in memory for the next.
"""

import errno
import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vaejax import log
from vaejax.files import whole

Images = UInt8[np.ndarray, "n h w c"]
Picture = UInt8[np.ndarray, "H W c"]


def grid(images: Images, *, columns: int, gap: int = 2, background: int = 255) -> Picture:
    """Images in rows of `columns`, `gap` pixels apart; what the last row lacks is background."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), background, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet


def strips(rows: Sequence[Images], *, columns: int = 10) -> Picture:
    """Each sequence of images as a row, image i of every row in column i; what is more than
    `columns` stands below, in rows again."""
    parts = [[row[i : i + columns] for row in rows] for i in range(0, len(rows[0]), columns)]
    sheets = [grid(np.concatenate(part), columns=len(part[0])) for part in parts]
    missing = [sheets[0].shape[1] - sheet.shape[1] for sheet in sheets]
    padded = [
        np.pad(sheet, ((0, 0), (0, n), (0, 0)), constant_values=255)
        for sheet, n in zip(sheets, missing, strict=True)
    ]
    return np.concatenate(padded)


def save(path: Path, picture: Picture) -> None:
    """Write a PNG."""
    with whole(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


def film(
    frames: Sequence[Path], *, mp4: Path, gif: Path, seconds: float = 12, most: int = 200
) -> None:
    """A film of pictures of one size, read from disk one by one; the last one stays for a while.

    Of more than `most` pictures, evenly spaced ones are shown, first and last always. The GIF,
    whose frames Pillow holds until all are there, has at most 512 pixels a side: 50 MB of memory.
    """
    frames, size = _of_one_size(frames)
    if not frames:
        return
    if len(frames) > most:
        frames = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, most)]
    rate = min(max(len(frames) / seconds, 2.0), 25.0)  # frames a second
    still = max(1, round(2 * rate))

    def pictures() -> Iterator[Image.Image]:
        for frame in frames:
            with Image.open(frame) as picture:
                yield picture.convert("RGB")

    def small(picture: Image.Image) -> Image.Image:
        picture.thumbnail((512, 512))
        return picture

    with whole(mp4) as partial, _ffmpeg(partial, size=size, rate=rate) as pipe:
        raw = b""
        for raw in (picture.tobytes() for picture in pictures()):
            pipe.write(raw)
        for _ in range(still):
            pipe.write(raw)
    with whole(gif) as partial:
        # without dithering, whose noise would flicker from frame to frame
        palettes = (small(p).quantize(256, dither=Image.Dither.NONE) for p in pictures())
        first = next(palettes)
        durations = [1000 / rate] * (len(frames) - 1) + [2000.0]  # milliseconds
        first.save(
            partial, format="GIF", save_all=True, append_images=palettes, duration=durations, loop=0
        )


def _of_one_size(frames: Sequence[Path]) -> tuple[list[Path], tuple[int, int]]:
    """Those that can be shown, and their width and height; a full disk, a kill or a person may have
    made others of some, which are told."""
    sizes: dict[Path, tuple[int, int]] = {}
    for frame in frames:
        try:
            with Image.open(frame) as picture:
                picture.load()
                sizes[frame] = picture.size
        except Exception:  # Pillow has many for a broken file
            continue
    size = Counter(sizes.values()).most_common(1)[0][0] if sizes else (0, 0)
    good = [frame for frame in frames if sizes.get(frame) == size]
    if bad := [frame for frame in frames if frame.exists() and frame not in good]:
        names = ", ".join(frame.name for frame in bad[:5]) + (", …" if len(bad) > 5 else "")
        print(
            f"warning: {len(bad)} of {len(frames)} pictures are broken or of another size, and are "
            f"left out of the film: {names}",
            file=sys.stderr,
        )
    return good, size


@contextmanager
def _ffmpeg(path: Path, *, size: tuple[int, int], rate: float) -> Iterator[IO[bytes]]:
    """A pipe that makes an MP4 of raw RGB frames. OSError where the video was not written."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}"]
    command += ["-r", str(Fraction(rate).limit_denominator(1000)), "-i", "-", "-an"]
    # yuv420p, which every player knows, halves the colours' resolution: sides must be even
    command += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p"]
    command += ["-vcodec", "libx264", "-crf", "10", str(path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for us: the film is finished, or the run stops
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        with suppress(BrokenPipeError):  # why it ended is what it says itself
            yield process.stdin
        with suppress(BrokenPipeError):
            process.stdin.close()
        words = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.returncode == -signal.SIGXFSZ:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    if process.returncode:
        said = words[-1] if words else f"it ended with {process.returncode}"
        raise OSError(errno.EIO, f"ffmpeg: {said}", str(path))


def curves(metrics: Path, path: Path) -> None:
    """Loss, mse, kl and bits per dimension, as far as a `metrics.jsonl` has them, by step.

    Where the loss is the mse itself there is one panel for both.
    """
    lines: dict[str, list[dict]] = {"train": [], "validation": []}
    for _, line in log.lines(metrics):
        lines[line["split"]].append(line)
    every = [line for split in lines.values() for line in split]
    panels = [
        # that of a density may be negative
        ("loss", "loss", "linear" if any(p.get("loss", 1) <= 0 for p in every) else "log"),
        ("mse", "mse (mean squared error)", "log"),
        ("kl", "kl (nats per latent dimension)", "log"),
        ("bits_per_dim", "bits per dimension", "linear"),
    ]
    panels = [p for p in panels if any(p[0] in line for line in every)]
    if all(line.get("loss") == line.get("mse") for line in every):
        panels = [p for p in panels if p[0] != "loss"]
    if not panels:
        return
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    width, height = 5 * columns, 3 * rows
    figure = Figure(figsize=(width, height), dpi=120)
    # inches round the panels; a layout that is computed draws all twice, and this is drawn often
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.35 / height,
        wspace=0.2,
        hspace=0.4,
    )
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (name, label, scale) in zip(places, panels, strict=False):
        for split, style in (("train", {"alpha": 0.5, "lw": 1}), ("validation", {"marker": "."})):
            points = [(p["step"], p[name]) for p in lines[split] if name in p]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, **style)
        axes.set(xlabel="step", title=label, yscale=scale)
        axes.grid(alpha=0.3)
        axes.legend()
    with whole(path) as partial:
        figure.savefig(partial)


def rates(kl: Float[np.ndarray, " d"], path: Path) -> None:
    """The rate of each latent dimension, nats, largest first."""
    figure = Figure(figsize=(7, 3), layout="constrained", dpi=120)
    axes = figure.subplots()
    ordered = np.sort(np.maximum(kl, 1e-6))[::-1]
    axes.fill_between(np.arange(len(ordered)), ordered, 1e-6, step="mid", alpha=0.6)
    axes.set(
        xlabel="latent dimension, by its rate",
        ylabel="nats",
        yscale="log",
        title=f"{np.sum(kl):,.1f} nats in {len(kl)} dimensions, {np.sum(kl > 0.01)} above 0.01",
        ylim=(1e-3, 2 * max(float(ordered[0]), 1e-2)),
        xlim=(0, max(1, len(ordered) - 1)),
    )
    axes.grid(alpha=0.3)
    with whole(path) as partial:
        figure.savefig(partial)


def rate_distortion(
    curve: Mapping[str, tuple[float, float, float]],
    named: Mapping[str, tuple[float, float, float]],
    path: Path,
    *,
    title: str,
) -> None:
    """(rate, distortion, mse) of the runs of a sweep as a curve with their names, and of others as
    points in a legend: the distortion, among lines of equal ELBO, and the mse, by the rate.

    The rate's axis is linear up to 1 nat, where the posterior is the prior, and logarithmic beyond.
    """
    figure = Figure(figsize=(11.5, 5.6), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, sharex=True)
    by_rate = sorted(curve.items(), key=lambda item: item[1])
    panels = [
        (left, 1, "distortion, −log p(x|z) (nats per image)", "What an image costs"),
        (right, 2, "mse (mean over values in [0, 1])", "What the mse alone would show"),
    ]
    for axes, column, label, heading in panels:
        points = np.array([(point[0], point[column]) for _, point in by_rate])
        axes.plot(*points.T, ".-", color="0.45", lw=1.2, zorder=3)
        for i, (name, _) in enumerate(by_rate):
            # a curve that falls has room above on the right, and below on the left
            offset, side = ((-5, -12), "right") if i % 2 else ((5, 5), "left")
            style = {"fontsize": 8, "color": "0.35", "textcoords": "offset points", "ha": side}
            axes.annotate(name, points[i], xytext=offset, zorder=5, **style)
        for (name, point), mark in zip(named.items(), itertools.cycle("osD^vP")):
            words = f"{name}: ELBO {_minus(-point[0] - point[1])} nats"
            style = {"marker": mark, "ms": 9, "mec": "white", "mew": 1, "ls": "", "zorder": 4}
            axes.plot(point[0], point[column], label=words, **style)
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.margins(0.11)
        axes.set(xlabel="rate, KL(q(z|x) ‖ N(0, I)) (nats per image)", ylabel=label)
        axes.set_title(heading, fontsize=10)
        axes.grid(alpha=0.25)
    left.set_xlim(left=max(0.0, left.get_xlim()[0]))
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    right.legend(fontsize=9)
    _equal_elbo(left)
    with whole(path) as partial:
        figure.savefig(partial)


def _equal_elbo(axes: Axes) -> None:
    """Lines of equal rate + distortion, over what the axes show, named at their left ends."""
    (first, last), (low, high) = axes.get_xlim(), axes.get_ylim()
    rates = np.concatenate([np.linspace(first, last, 400), np.geomspace(1e-3, 1, 400) * last])
    rates = np.sort(rates[(rates >= first) & (rates <= last)])
    at = axes.transData.inverted().transform(axes.transAxes.transform((0.015, 0)))[0]
    for cost in MaxNLocator(8).tick_values(low + first, high + last):
        axes.plot(rates, cost - rates, "--", color="C0", lw=0.8, alpha=0.4, zorder=1)
        if low < cost - at < low + 0.95 * (high - low):
            style = {"fontsize": 7, "color": "C0", "alpha": 0.8, "va": "bottom"}
            axes.text(at, cost - at, f"ELBO {_minus(-cost)}", zorder=1, **style)
    axes.set(xlim=(first, last), ylim=(low, high))


def _minus(value: float) -> str:
    return f"{value:,.0f}".replace("-", "−")
