"""Whether the new faces of a run are copies of training faces, reported at the end of its training.

Samples are compared with all training images by pixels, at 32 × 32. Held-out faces say how near a
new face lies by chance. Reconstructions of training faces say how near a copy would lie, as the
decoder would draw it: where they are not nearer than new faces are, no copy can be detected.

The median alone shows no copies. Smooth images lie nearer to every image than sharp ones: blurring
held-out anime faces to 8 × 8 brings their median from 0.19 to 0.15. So the report goes by the share
of faces that lie nearer to a training face than 99 % of the held-out ones.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vaejax.data.batches import Images
from vaejax.nearest import MIN_HELD_OUT, RARE, Nearest, memorized_share, nearest_of_sets
from vaejax.pictures import shrink

FACES = 200  # of each set, at most
SIZE = 32  # pixels of a side, at most
MIN_TRAINING = 100  # images
BLOCK_PIXELS = 2**22  # of training images that are read at a time: 1,024 of 64 x 64
SURE = 3  # standard errors above chance; less than one report in 500 exceeds them by chance

SAMPLES, HELD_OUT, RECONSTRUCTIONS = "samples", "held_out", "reconstructions"
TITLES = {
    SAMPLES: "samples",
    HELD_OUT: "held-out faces",
    RECONSTRUCTIONS: "reconstructions of training faces",
}

Faces = UInt8[np.ndarray, "n h w c"]


def too_few(training: Images, held_out: Images) -> str | None:
    """Say why there are too few images for a report; None if there are enough."""
    counts = (
        (len(training), "training images", MIN_TRAINING),
        (len(held_out), "held-out faces", MIN_HELD_OUT),
    )
    for count, what, least in counts:
        if count < least:
            return f"{count} {what} are too few (at least {least})"
    return None


def first_faces(images: Images) -> Faces:
    """Read the first faces, a random sample: prepared sets are in the order of hashes."""
    return images.read(np.arange(min(FACES, len(images))))


def nearest_training_faces(sets: Mapping[str, Faces], training: Images) -> dict[str, Nearest]:
    """Find the nearest of all training images at 32 × 32 of each face, in the memory of a block."""

    def read(indices: Int[np.ndarray, " n"]) -> Faces:
        return shrink(training.read(indices), SIZE)

    def blocks() -> Iterator[Faces]:
        count, rows = len(training), max(1, BLOCK_PIXELS // training.shape[0] ** 2)
        for first in range(0, count, rows):
            yield read(np.arange(first, min(first + rows, count)))

    small = {name: shrink(faces, SIZE) for name, faces in sets.items()}
    return nearest_of_sets(small, blocks(), read)


def report(found: Mapping[str, Nearest], *, step: int, prior: str, training: Images) -> dict:
    """Summarize the distances as JSON: of each set the number of faces, the median, and the share
    that is near, with its standard error."""
    held_out = found[HELD_OUT].distances
    sets: dict[str, dict[str, float]] = {}
    for name, (_, distances) in found.items():
        sets[name] = {"faces": len(distances), "median_distance": float(np.median(distances))}
        if name != HELD_OUT:
            near = memorized_share(distances, held_out)
            sets[name] |= {"near_share": near.value, "near_share_error": near.error or 0.0}
    size = min(SIZE, training.shape[0])
    return {"step": step, "prior": prior, "training_images": len(training), "size": size, **sets}


# Words --------------------------------------------------------------------------------------------


def sentence(value: Mapping[str, Any]) -> str:
    """Say what a report found, or why there is none."""
    if "left_out" in value:
        return f"Copies of training faces were not looked for: {value['left_out']}."
    samples, held_out, reconstructions = (value[name] for name in TITLES)
    facts = (
        f"Samples are {samples['median_distance']:.4f} (median rms at {value['size']} px) from "
        f"their nearest training face, held-out faces {held_out['median_distance']:.4f}; "
        f"{_percent(samples)} of the samples are nearer than 99 % of the held-out faces"
    )
    if _above_chance(samples):
        source = "the model" if value["prior"] == "normal" else f"the {value['prior']} prior"
        return (
            f"{facts}, where chance makes 1 %: the samples are nearer than new faces are, {source} "
            "may have memorized training faces."
        )
    if not _above_chance(reconstructions):
        return (
            f"{facts}. Copies cannot be told from new faces: of the reconstructions of training "
            f"faces only {_percent(reconstructions)} are as near."
        )
    return f"{facts}: no sign of copying."


def section(value: Any) -> list[str]:
    """Write a report as a section of the run's README, without the picture.

    There is none where there is no report, or one that somebody has changed in `run.json`.
    """
    if not isinstance(value, Mapping):
        return []
    try:
        lines = ["## Copies of training faces?", "", sentence(value)]
        if "left_out" in value:
            return lines
        rows = [
            f"| {title} | {value[name]['faces']} | {value[name]['median_distance']:.4f} | "
            f"{_percent(value[name]) if name != HELD_OUT else '1 %, by definition'} |"
            for name, title in TITLES.items()
        ]
        return [
            *lines,
            "",
            "| faces | number | median distance | nearer than 99 % of held-out faces |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Distances (rms of values in [0, 1], at {value['size']} px) are those from the "
            f"nearest of all {value['training_images']:,} training images, after update "
            f"{value['step']:,}; the samples have the seeds 0 to {value[SAMPLES]['faces'] - 1} of "
            f"the {value['prior']} prior. Reconstructions show how near a copy would be. `vaejax "
            "evaluate` compares more faces, at their full size and by features.",
        ]
    except (KeyError, TypeError, ValueError):
        return []


def _above_chance(group: Mapping[str, Any]) -> bool:
    return group["near_share"] - RARE > SURE * group["near_share_error"]


def _percent(group: Mapping[str, Any]) -> str:
    return f"{100 * group['near_share']:.3g} %"
