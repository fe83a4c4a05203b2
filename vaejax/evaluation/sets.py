"""The sets of faces that are held against each other, in the memory of their features."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vaejax import cache, generate
from vaejax.data.batches import Images
from vaejax.data.records import read_report
from vaejax.evaluation import copies, evaluate
from vaejax.evaluation.evaluate import Subject
from vaejax.evaluation.features import Features
from vaejax.evaluation.figures import SAMPLES
from vaejax.files import whole
from vaejax.models.autoencoder import Autoencoder

COMPARED = 1000  # faces of a set, at most, for which the nearest training face is looked for
COMPARED_BYTES = 2**26  # of those faces

Faces = UInt8[np.ndarray, "n h w c"]


class Sets:
    """The sets on their way: the features of all faces, and the first of the faces themselves."""

    def __init__(self, model: Autoencoder, features: Features | None):
        self._model, self._by = model, features
        each = model.size**2 * model.channels
        self._most = min(COMPARED, COMPARED_BYTES // each)
        self.first: dict[str, list[Faces]] = {}
        self._parts: dict[str, list[np.ndarray]] = {}

    def begin(self, *names: str) -> None:
        for one in names:
            self.first[one], self._parts[one] = [], []

    def add(self, one: str, images: Faces) -> None:
        if self._by is not None:
            self._parts[one].append(extract(self._by, images, self._model))
        room = self._most - sum(len(kept) for kept in self.first[one])
        if room > 0:
            self.first[one].append(images[:room])

    def images(self, one: str) -> Faces:
        """The first of them."""
        return np.concatenate(self.first[one])

    def features(self) -> dict[str, Float[np.ndarray, "..."]]:
        return {one: np.concatenate(parts) for one, parts in self._parts.items() if parts}


def extract(features: Features, images: Faces, model: Autoencoder) -> Float[np.ndarray, "n d"]:
    """Of a batch, filled up to the size of all others, so that it is compiled for once."""
    missing = evaluate.at_a_time(model) - len(images)
    padded = np.concatenate([images, np.repeat(images[-1:], max(0, missing), axis=0)])
    return np.asarray(features.extract(jnp.asarray(padded)))[: len(images)]


def sample(subject: Subject, count: int, sets: Sets) -> None:
    model, size = subject.model, evaluate.at_a_time(subject.model)
    with evaluate.progress(count, "samples") as bar:
        for first in range(0, count, size):
            seeds = range(first, first + size)  # more than is asked for, in the last batch
            z = generate.latents(seeds, latent_dim=model.code[0])
            drawn = generate.decode(subject.params, subject.statistics, z, model=model)
            some = np.asarray(drawn)[: count - first]
            sets.add(SAMPLES, some)
            bar.update(len(some))


def training_features(
    prepared: Path, features: Features, model: Autoencoder
) -> Float[np.ndarray, "n d"]:
    """Those of all images that were learned from; kept in the cache, since they take longest."""
    training = Images(prepared, "train")
    report = read_report(prepared)
    facts = [features.name, features.weights]
    facts += [report[field] for field in ("fingerprint", "persons", "splits")]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    path = cache.folder() / "features" / f"{digest}.npy"
    try:
        known = np.load(path)
    except (OSError, ValueError, EOFError):
        known = np.zeros(0)
    if known.shape == (len(training), features.dim) and known.dtype == np.float32:
        return known
    parts = []
    size = evaluate.at_a_time(model)
    for places, images in evaluate.batches(training, size, doing="features of training images"):
        parts.append(extract(features, images, model)[: len(np.unique(places))])
    found = np.concatenate(parts)
    try:
        with whole(path) as partial:
            np.save(partial, found)
    except OSError as error:
        print(f"warning: {path} cannot be written: {error.strerror}; next time they are made anew")
    return found


def near_in_pixels(sets: Sets, training: Images, model: Autoencoder) -> dict[str, copies.Nearest]:
    """The nearest training image of the first faces of each set, all in one pass over them."""
    size = evaluate.at_a_time(model)

    def stream() -> Iterator[Faces]:
        for places, images in evaluate.batches(training, size, doing="nearest training images"):
            yield images[: len(np.unique(places))]

    first = {one: sets.images(one) for one in sets.first}
    together = copies.by_pixels(np.concatenate(list(first.values())), stream(), training.read)
    ends = np.cumsum([len(images) for images in first.values()])[:-1]
    parts = zip(np.split(together.place, ends), np.split(together.distance, ends), strict=True)
    return {one: copies.Nearest(*part) for one, part in zip(first, parts, strict=True)}
