"""Pictures of images and of learning, without any global plotting state.

Images are uint8 `[n h w c]`. Files are written whole or not at all, and no picture
is kept in memory for the next.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
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
    frames = [frame for frame in frames if frame.exists()]  # a full disk may have taken one
    if not frames:
        return
    if len(frames) > most:
        frames = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, most)]
    rate = min(max(len(frames) / seconds, 2), 25)  # frames a second
    still = max(1, round(2 * rate))

    def pictures() -> Iterator[Image.Image]:
        for frame in frames:
            with Image.open(frame) as picture:
                yield picture.convert("RGB")

    def small(picture: Image.Image) -> Image.Image:
        picture.thumbnail((512, 512))
        return picture

    with whole(mp4) as partial, warnings.catch_warnings():
        # JAX warns of every fork; this one is followed by ffmpeg at once
        warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
        # yuv420p, which every player knows, halves the colours' resolution: sides must be even
        writer = imageio.get_writer(
            partial, fps=rate, codec="libx264", quality=8, pixelformat="yuv420p", macro_block_size=2
        )
        with writer:
            picture = np.zeros(0)
            for picture in map(np.asarray, pictures()):
                writer.append_data(picture)
            for _ in range(still):
                writer.append_data(picture)
    with whole(gif) as partial:
        # without dithering, whose noise would flicker from frame to frame
        palettes = (small(p).quantize(256, dither=Image.Dither.NONE) for p in pictures())
        first = next(palettes)
        durations = [1000 / rate] * (len(frames) - 1) + [2000.0]  # milliseconds
        first.save(
            partial, format="GIF", save_all=True, append_images=palettes, duration=durations, loop=0
        )


def curves(metrics: Path, path: Path) -> None:
    """Loss, mse, kl and bits per dimension, as far as a `metrics.jsonl` has them, by step.

    Where the loss is the mse itself there is one panel for both.
    """
    lines: dict[str, list[dict]] = {"train": [], "validation": []}
    for _, line in log.lines(metrics):
        lines[line["split"]].append(line)
    panels = [
        ("loss", "loss", "log"),
        ("mse", "mse (mean squared error)", "log"),
        ("kl", "kl (nats per latent dimension)", "log"),
        ("bits_per_dim", "bits per dimension", "linear"),
    ]
    every = [line for split in lines.values() for line in split]
    panels = [p for p in panels if any(p[0] in line for line in every)]
    if all(line.get("loss") == line.get("mse") for line in every):
        panels = [p for p in panels if p[0] != "loss"]
    if not panels:
        return
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained", dpi=120)
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
