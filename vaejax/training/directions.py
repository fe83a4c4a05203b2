"""The principal components of a run's latents, and the directions of attributes in them.

    latents/components.npz   of the posterior means of training images; computed on first use
    latents/directions.npz   of the attributes that a table of labels has

Either belongs to the weights that it was computed with, and is used with no others.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vaejax import generate, priors
from vaejax.data.batches import Images
from vaejax.data.labels import Labels, read_labels
from vaejax.data.sources import drawn_faces, drawn_labels
from vaejax.errors import UserError
from vaejax.files import atomic
from vaejax.latent import Components, Directions, fit_directions, principal_components
from vaejax.training import run

FOLDER = "latents"  # in the run's folder
FORMAT = "vaejax latents 1"
COMPONENT_IMAGES = 4096  # whose posterior means have the components; their decomposition takes long
ATTRIBUTE_IMAGES = 20_000  # of a split, whose attributes are learned


def components(loaded: run.LoadedRun) -> Components:
    """Return the principal components of a run; they are computed and saved on first use.

    Raises UserError if its training images are gone.
    """
    latents = priors.latent_dimensions(loaded.model)
    found = _read(loaded, "components")
    if found is not None:
        shapes = {"mean": (latents,), "vectors": (-1, latents), "stds": (-1,), "total": ()}
        if _fits(found, shapes):
            return Components(found["mean"], found["vectors"], found["stds"], float(found["total"]))
    means = _means(loaded, Images(_prepared(loaded), "train"), most=COMPONENT_IMAGES)
    if len(means) < 2 or not np.isfinite(means).all():
        raise UserError(
            "principal components need two training images or more, with finite posterior means"
        )
    computed = principal_components(means)
    _write(loaded, "components", computed._asdict())
    return computed


def default_labels(loaded: run.LoadedRun) -> Path | None:
    """Return the labels that a run was trained with, or those of the drawn faces, or None."""
    schedule = loaded.spec.schedule
    if schedule.labels:
        return Path(schedule.labels)
    drawn = Path(schedule.source).name == drawn_faces().name
    return drawn_labels() if drawn else None


def fit(loaded: run.LoadedRun, path: Path) -> Directions:
    """Fit the directions of all attributes of a table of labels, and save them.

    Held-out faces are those that no update has seen: the validation and the test images.

    Raises UserError if the table cannot be used, has none of the training images, or the images
    are gone.
    """
    labels = read_labels(path)
    training = _labelled(loaded, labels, "train")
    held_out = [_labelled(loaded, labels, split) for split in ("validation", "test")]
    if not np.any(training.numbers):
        raise UserError(
            f"--labels {path} names {len(labels.files):,} files, and the run has "
            f"{len(training.z):,} training images, but no file is one of them: it names "
            f"{next(iter(labels.files), '')!r}, and the run has {training.first!r}"
        )
    directions = fit_directions(
        labels.attributes,
        components(loaded),
        training[:2],
        (
            np.concatenate([part.z for part in held_out]),
            np.concatenate([part.numbers for part in held_out]),
        ),
    )
    _write(loaded, "directions", directions._asdict())
    return directions


def load(loaded: run.LoadedRun) -> Directions:
    """Read the directions of a run, or fit those of the labels that it was trained with.

    Raises UserError where there are none.
    """
    latents = priors.latent_dimensions(loaded.model)
    found = _read(loaded, "directions")
    if found is not None:
        p = len(found.get("values", ()))
        one = dict.fromkeys(("attributes", "values", "auc", "offsets", "stds"), (p,))
        if _fits(found, {**one, "weights": (p, latents), "effects": (p, latents)}):
            texts = {name: tuple(map(str, found[name])) for name in ("attributes", "values")}
            return Directions(**{**found, **texts})
    path = default_labels(loaded)
    if path is None:
        raise UserError(
            f"{loaded.folder} has no directions of attributes for its present weights: `vaejax "
            f"directions {loaded.folder} --labels FILE.csv` fits them"
        )
    return fit(loaded, path)


# Its images ---------------------------------------------------------------------------------------


class LabelledLatents(NamedTuple):
    """Latents of a split, and the numbers of the attributes' values, 0 if unknown."""

    z: Float[np.ndarray, "n d"]
    numbers: Int[np.ndarray, "n a"]
    first: str  # path of the first image


def _labelled(loaded: run.LoadedRun, labels: Labels, split: str) -> LabelledLatents:
    images = Images(_prepared(loaded), split)
    z = _means(loaded, images, most=ATTRIBUTE_IMAGES)
    paths = [images.metadata(i)["path"] for i in range(len(z))]
    return LabelledLatents(z, labels.of(paths), paths[0])


def _means(loaded: run.LoadedRun, images: Images, *, most: int) -> Float[np.ndarray, "n d"]:
    params, stats = loaded.weights.params, loaded.weights.batch_stats
    return generate.posterior_means(params, stats, images, model=loaded.model, most=most)


def _prepared(loaded: run.LoadedRun) -> Path:
    return Path(loaded.spec.schedule.prepared)


# In the run's folder ------------------------------------------------------------------------------


def _read(loaded: run.LoadedRun, name: str) -> dict[str, np.ndarray] | None:
    """Read the arrays of a file; None if there is none, or it is damaged or of other weights."""
    try:
        with (loaded.folder / FOLDER / f"{name}.npz").open("rb") as file, np.load(file) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    except Exception:  # whatever NumPy and zipfile raise for a damaged file
        return None
    identity = str(found.pop("format", "")), str(found.pop("digest", ""))
    return found if identity == (FORMAT, loaded.weights.digest) else None


def _fits(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Tell whether arrays have these names and shapes, where -1 is any length."""
    return arrays.keys() == shapes.keys() and all(
        array.ndim == len(shapes[name])
        and all(want in (-1, have) for want, have in zip(shapes[name], array.shape, strict=True))
        for name, array in arrays.items()
    )


def _write(loaded: run.LoadedRun, name: str, arrays: dict[str, Any]) -> None:
    """Write arrays atomically; where the disk takes none, the next command computes them again."""
    path = loaded.folder / FOLDER / f"{name}.npz"
    try:
        with atomic(path) as partial, partial.open("wb") as file:
            np.savez(file, format=FORMAT, digest=loaded.weights.digest, **arrays)
    except OSError as error:
        print(f"warning: {path} cannot be written: {error.strerror}", file=sys.stderr)
