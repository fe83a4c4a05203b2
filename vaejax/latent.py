"""Paths and directions through the latents of faces, which are vectors here: `[n d]`, in NumPy.

Whether latents have an attribute is decided by a linear probe, on faces that it was not fitted to.
The probe's normal is no good direction to change the attribute: it leaves out whatever other
dimensions tell as well, and the decoder needs all of them. So a face is moved by the effect of the
attribute's value: how latents differ with it where all other attributes are the same.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import solve
from scipy.stats import rankdata

MAX_COMPONENTS = 256  # that are kept
MIN_AUC = 0.75  # of an attribute that the latents have: half-way between chance and certainty
MIN_FACES = 10  # with a value and without it, on which a probe is fitted, and judged
PARALLEL = 1e-6  # sine of an angle below which two vectors have no great circle of their own

Vectors = Float[np.ndarray, "n d"]


# Paths --------------------------------------------------------------------------------------------


def slerp(start: Vectors, end: Vectors, t: Float[np.ndarray, " n"]) -> Vectors:
    """Interpolate spherically from each start (t = 0) to each end (t = 1), exact at both.

    Shoemake (1985), section 3.3; of latents White (2016). Points between draws of a normal
    distribution have the length that draws have, where a straight line comes too near to the mean.
    Parallel and opposite vectors, and those of no length, are interpolated linearly.
    """
    a, b = start.astype(np.float64), end.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(lengths > 0, np.sum(a * b, axis=1) / np.where(lengths > 0, lengths, 1), 1)
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.sin(angle)
    curved = sine > PARALLEL
    safe = np.where(curved, sine, 1)
    from_start = np.where(curved, np.sin((1 - t) * angle) / safe, 1 - t)
    from_end = np.where(curved, np.sin(t * angle) / safe, t)
    return (from_start[:, None] * a + from_end[:, None] * b).astype(start.dtype)


def along(stops: Float[np.ndarray, "k d"], positions: Float[np.ndarray, " n"]) -> Vectors:
    """Return the points of a walk through stops: stop i is at position i, and the first one again
    at position k."""
    before = np.floor(positions).astype(int)
    count = len(stops)
    return slerp(stops[before % count], stops[(before + 1) % count], positions - before)


# Principal components -----------------------------------------------------------------------------


class Components(NamedTuple):
    """The principal components of the latents of training images, largest first."""

    mean: Float[np.ndarray, " d"]
    vectors: Float[np.ndarray, "k d"]  # orthonormal
    stds: Float[np.ndarray, " k"]  # standard deviations of the latents along them
    total: float  # variance of the latents, over all dimensions

    def coordinates(self, z: Vectors) -> Float[np.ndarray, "n k"]:
        """Return the coordinates of latents along the components, from the mean."""
        return (z - self.mean) @ self.vectors.T


def principal_components(z: Vectors) -> Components:
    """Compute the principal components of latents, at most 256 of them.

    Each points to where its largest coefficient is positive. Raises ValueError for less than two
    faces.
    """
    if len(z) < 2:
        raise ValueError("one face has no variance")
    mean = z.mean(axis=0, dtype=np.float64)
    centered = z - mean
    _, values, vectors = np.linalg.svd(centered, full_matrices=False)
    vectors, stds = vectors[:MAX_COMPONENTS], values[:MAX_COMPONENTS] / np.sqrt(len(z) - 1)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    vectors = vectors * np.where(largest < 0, -1, 1)
    total = float(np.sum(values**2) / (len(z) - 1))
    mean, vectors, stds = (array.astype(np.float32) for array in (mean, vectors, stds))
    return Components(mean, vectors, stds, total)


# Attributes ---------------------------------------------------------------------------------------


class Directions(NamedTuple):
    """Where in the latents the values of attributes are; a row for each value `[p ...]`."""

    attributes: tuple[str, ...]  # of the rows, those of an attribute one after the other
    values: tuple[str, ...]
    auc: Float[np.ndarray, " p"]  # of the probe on held-out faces; NaN with too few of them
    weights: Float[np.ndarray, "p d"]  # of the probes
    offsets: Float[np.ndarray, " p"]
    effects: Float[np.ndarray, "p d"]  # on the latents, from the mean of all values
    stds: Float[np.ndarray, " p"]  # standard deviations of the latents along the effects

    def rows(self, attribute: str) -> list[int]:
        """Return the rows of an attribute's values."""
        return [i for i, name in enumerate(self.attributes) if name == attribute]

    def encoded(self) -> Bool[np.ndarray, " p"]:
        """Tell of each row whether the latents have it."""
        return self.auc >= MIN_AUC  # which NaN is not

    def step(self, row: int) -> Float[np.ndarray, " d"]:
        """Return one standard deviation towards a value."""
        effect = self.effects[row]
        return self.stds[row] / max(float(np.linalg.norm(effect)), 1e-12) * effect

    def present(self, z: Vectors, attribute: str) -> Int[np.ndarray, " n"]:
        """Return the row of the value that each face has, as the probes read it."""
        rows = np.asarray(self.rows(attribute))
        scores = z @ self.weights[rows].T + self.offsets[rows]
        return rows[scores.argmax(axis=1)]

    def replace(self, z: Vectors, row: int) -> Vectors:
        """Return how latents have to change so that each face has this value instead of its own."""
        return self.effects[row] - self.effects[self.present(z, self.attributes[row])]


def fit_directions(
    attributes: Mapping[str, Sequence[str]],
    components: Components,
    training: tuple[Vectors, Int[np.ndarray, "n a"]],
    held_out: tuple[Float[np.ndarray, "m d"], Int[np.ndarray, "m a"]],
) -> Directions:
    """Fit a direction to each value of each attribute, and judge it on held-out faces.

    Faces come as their latents and the numbers of their values, from 1 on, 0 if unknown. All is
    done in the coordinates of the principal components. The probe of a value is a ridge regression
    of whether a face has it, on the faces whose value is known. The effects are a ridge regression
    of the coordinates on all values at once, with the weight of one more face per value: an
    attribute that often occurs with another one does not get that one's effect.
    """
    y, y_held_out = (components.coordinates(z) for z, _ in (training, held_out))
    numbers, numbers_held_out = training[1], held_out[1]
    auc, weights, offsets, columns = [], [], [], []
    for i, values in enumerate(attributes.values()):
        known, known_held_out = numbers[:, i] > 0, numbers_held_out[:, i] > 0
        has = _one_hot(numbers[known, i], len(values))
        has_held_out = _one_hot(numbers_held_out[known_held_out, i], len(values))
        w, b = ridge(y[known], has)
        scores = y_held_out[known_held_out] @ w + b
        enough = np.minimum(has.sum(axis=0), (1 - has).sum(axis=0)) >= MIN_FACES
        auc += [
            area_under_curve(scores[:, j], has_held_out[:, j] > 0) if enough[j] else np.nan
            for j in range(len(values))
        ]
        weights.append(w.T)
        offsets.append(b)
        column = np.zeros((len(y), len(values)))
        column[known] = has - has.mean(axis=0)  # an unknown value counts as the mean one
        columns.append(column)
    x = np.concatenate(columns, axis=1)
    effects = solve(x.T @ x + np.eye(x.shape[1]), x.T @ y, assume_a="pos")
    effects = _centered(effects, columns, numbers)
    vectors = components.vectors
    lengths = np.maximum(np.linalg.norm(effects, axis=1), 1e-12)
    in_z = np.concatenate(weights) @ vectors
    return Directions(
        attributes=tuple(name for name, values in attributes.items() for _ in values),
        values=tuple(value for values in attributes.values() for value in values),
        auc=np.asarray(auc, np.float32),
        weights=in_z.astype(np.float32),
        offsets=(np.concatenate(offsets) - in_z @ components.mean).astype(np.float32),
        effects=(effects @ vectors).astype(np.float32),
        stds=np.std(y @ (effects / lengths[:, None]).T, axis=0).astype(np.float32),
    )


def _one_hot(numbers: Int[np.ndarray, " n"], values: int) -> Float[np.ndarray, "n v"]:
    return (numbers[:, None] == np.arange(1, values + 1)).astype(np.float64)


def _centered(
    effects: Float[np.ndarray, "p k"],
    columns: Sequence[Float[np.ndarray, "n _"]],
    numbers: Int[np.ndarray, "n a"],
) -> Float[np.ndarray, "p k"]:
    """Subtract from the effects of each attribute's values their mean over the faces."""
    centered, first = [], 0
    for i, column in enumerate(columns):
        own = effects[first : first + column.shape[1]]
        shares = _one_hot(numbers[:, i], len(own)).sum(axis=0)
        centered.append(own - shares @ own / max(shares.sum(), 1.0))
        first += len(own)
    return np.concatenate(centered)


def ridge(
    x: Float[np.ndarray, "n k"], y: Float[np.ndarray, "n p"]
) -> tuple[Float[np.ndarray, "k p"], Float[np.ndarray, " p"]]:
    """Regress y on x linearly; return weights and offsets.

    The penalty is that of k more faces with the mean variance of x in each dimension (Hoerl and
    Kennard, 1970): it grows with the number of dimensions and fades with that of faces.
    """
    if not len(x):
        return np.zeros((x.shape[1], y.shape[1])), np.zeros(y.shape[1])
    center, mean = x.mean(axis=0, dtype=np.float64), y.mean(axis=0)
    away = x - center
    penalty = x.shape[1] * np.mean(away**2) + 1e-12
    gram = away.T @ away + penalty * np.eye(x.shape[1])
    weights = solve(gram, away.T @ (y - mean), assume_a="pos")
    return weights, mean - center @ weights


def area_under_curve(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Return the area under the ROC curve: the probability that a face with the value has a higher
    score than one without, half of it where they are equal (Hanley and McNeil, 1982).

    NaN for less than 10 faces of either kind.
    """
    count, others = int(positive.sum()), int((~positive).sum())
    if min(count, others) < MIN_FACES:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))
