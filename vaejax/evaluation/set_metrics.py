"""Metrics that compare two sets of faces by their features `[n d]`, in float64.

All of them depend on the number of faces: only sets of equal size may be compared with each other.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vaejax.metrics import Estimate

# the names of sets of faces, as in "frechet/samples", in the order of the tables
SAMPLES, RECONSTRUCTIONS, TRAIN, HELD_OUT = "samples", "reconstructions", "train", "held_out"
SETS = (SAMPLES, RECONSTRUCTIONS, TRAIN, HELD_OUT)

BLOCK = 512  # faces that are compared with all others at a time
NEIGHBOURS = 5  # of precision, recall, density and coverage, as in Naeem et al. (2020)
# The standard error of a share of 0.5 of 50 faces is 0.07: with fewer, the kernel distance and the
# shares say more about chance than about faces.
MIN_FACES = 50
MAX_GROUPS = 10  # of faces, over which a metric is averaged

Features = Float[np.ndarray, "n d"]
OtherFeatures = Float[np.ndarray, "m d"]
AnyFeatures = Float[np.ndarray, "_ d"]  # of sets of different sizes

Results = dict[str, Estimate | str]  # a metric's value, or the reason why it is left out


def metric_of_set(metric: str, set_name: str) -> str:
    """Return the name of a metric of a set of faces, as in "frechet/samples"."""
    return f"{metric}/{set_name}"


def compare_sets(sets: Mapping[str, AnyFeatures], held_out: Features) -> Results:
    """Compare each set of faces with the held-out faces.

    All comparisons are of as many faces as the smallest set has. A set that is several times larger
    is divided into groups: the value is the mean over them, the error their standard deviation.
    """
    n, dim = min(map(len, [held_out, *sets.values()])), held_out.shape[1]
    names = ("frechet", "kernel", *PrecisionRecall._fields)
    if n < MIN_FACES:
        reason = (
            f"a set has {n} faces: with less than {MIN_FACES} it would say more about chance than "
            "about faces"
        )
        return {metric_of_set(name, set_name): reason for name in names for set_name in sets}
    results: Results = {}
    real = held_out[:n]
    real_moments = moments(real)
    for set_name, faces in sets.items():
        values: dict[str, list[float]] = {name: [] for name in names}
        for first in range(0, min(len(faces), MAX_GROUPS * n) - n + 1, n):
            group = faces[first : first + n]
            if n > dim:
                values["frechet"].append(frechet_distance(real_moments, moments(group)))
            values["kernel"].append(kernel_distance(real, group))
            for name, value in precision_recall(real, group)._asdict().items():
                values[name].append(value)
        too_few = f"a set has {n} faces: a covariance of {dim} features needs {dim + 1}"
        for name in names:
            key = metric_of_set(name, set_name)
            results[key] = _mean_and_spread(values[name]) if values[name] else too_few
    return results


def _mean_and_spread(values: list[float]) -> Estimate:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Estimate(float(np.mean(values)), spread)


def gaps(results: Results) -> Results:
    """Subtract the distances of reconstructions from those of samples.

    What remains is lost between the prior and the z of faces. It is above 0 of a perfect model too,
    because reconstructions are of the very faces that they are compared with, and samples are not.
    """
    differences: Results = {}
    for name in ("frechet", "kernel"):
        samples = results.get(metric_of_set(name, SAMPLES))
        reconstructions = results.get(metric_of_set(name, RECONSTRUCTIONS))
        if isinstance(samples, Estimate) and isinstance(reconstructions, Estimate):
            errors = [e for e in (samples.error, reconstructions.error) if e is not None]
            spread = math.hypot(*errors) if errors else None
            differences[f"{name}_gap"] = Estimate(samples.value - reconstructions.value, spread)
        else:
            differences[f"{name}_gap"] = f"it needs {name} of samples and reconstructions"
    return differences


# Fréchet distance ---------------------------------------------------------------------------------


class Moments(NamedTuple):
    """The mean and covariance of a set's features."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Features) -> Moments:
    """Compute mean and covariance. Raises ValueError for less than two faces."""
    if len(features) < 2:
        raise ValueError("one face has no covariance")
    exact = features.astype(np.float64)
    return Moments(exact.mean(axis=0), np.atleast_2d(np.cov(exact, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Compute the Fréchet distance of two Gaussians, |m - n|² + tr(A + B - 2 (A B)^½): equation 4
    of Dowson and Landau (1982), equation 6 of Heusel et al. (2017), with Inception's features.

    The trace of (A B)^½ equals that of the symmetric (A^½ B A^½)^½, whose eigenvalues are real.
    Implementations that take the square root of the asymmetric A B lose digits.

    It grows as the sets become smaller (Chong and Forsyth, 2020): its expectation is that of the
    distributions plus a term in 1/n. With fewer faces than features the covariances do not have
    full rank, and that term is most of it.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    difference = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    between = traces - 2 * np.sum(np.sqrt(np.maximum(cross, 0)))
    return float(difference @ difference + max(between, 0.0))


# Kernel distance ----------------------------------------------------------------------------------


def kernel_distance(real: Features, generated: OtherFeatures) -> float:
    """Compute the squared maximum mean discrepancy for the kernel (x·y / d + 1)³.

    It is the unbiased estimate, over all pairs of the two sets: 0 in expectation for two sets of
    one distribution (Bińkowski et al., 2018, section 4; Gretton et al., 2012, equation 3).

    Raises ValueError for less than two faces in a set.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError("one face has no distance from others")
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    return (
        _mean_kernel(real, real, distinct=True)
        + _mean_kernel(generated, generated, distinct=True)
        - 2 * _mean_kernel(real, generated)
    )


def _mean_kernel(x: Features, y: OtherFeatures, *, distinct: bool = False) -> float:
    """Average the kernel over all pairs; of a set with itself, over pairs of `distinct` faces."""
    total = sum(
        float(np.sum((x[i : i + BLOCK] @ y.T / x.shape[1] + 1) ** 3))
        for i in range(0, len(x), BLOCK)
    )
    if not distinct:
        return total / (len(x) * len(y))
    diagonal = float(np.sum((np.sum(x * x, axis=1) / x.shape[1] + 1) ** 3))
    return (total - diagonal) / (len(x) * (len(x) - 1))


# Precision and recall -----------------------------------------------------------------------------


class PrecisionRecall(NamedTuple):
    """Shares of faces that lie in neighbourhoods of the other set.

    The neighbourhood of a face is the ball around it that reaches to the k-th nearest face of its
    own set.
    """

    precision: float  # share of generated faces in a neighbourhood of a real one
    recall: float  # share of real faces in a neighbourhood of a generated one
    density: float  # mean number of real neighbourhoods that a generated face lies in, over k
    coverage: float  # share of real faces in whose neighbourhood a generated one lies


def precision_recall(
    real: Features, generated: OtherFeatures, *, k: int = NEIGHBOURS
) -> PrecisionRecall:
    """Compute precision and recall (Kynkäänniemi et al., 2019, equation 1), density and coverage
    (Naeem et al., 2020, equations 3 and 5).

    Raises ValueError unless each set has more than `k` faces.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"of {min(len(real), len(generated))} faces none has {k} neighbours")
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    hits = np.zeros(len(generated), int)  # real neighbourhoods that each generated face lies in
    recalled: Bool[np.ndarray, " n"] = np.zeros(len(real), bool)
    covered: Bool[np.ndarray, " n"] = np.zeros(len(real), bool)
    for rows, distances in _distance_blocks(real, generated):
        inside = distances <= real_radii[rows, None]
        hits += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
        recalled[rows] = (distances <= generated_radii).any(axis=1)
    return PrecisionRecall(
        precision=float(np.mean(hits > 0)),
        recall=float(np.mean(recalled)),
        density=float(np.mean(hits) / k),
        coverage=float(np.mean(covered)),
    )


def _radii(points: Features, k: int) -> Float[np.ndarray, " n"]:
    """Return the distance of each point from the k-th nearest of the others."""
    radii = np.empty(len(points))
    for rows, distances in _distance_blocks(points, points):
        radii[rows] = np.partition(distances, k, axis=1)[:, k]  # the point itself is the nearest
    return radii


def _distance_blocks(
    x: Features, y: OtherFeatures
) -> Iterator[tuple[slice, Float[np.ndarray, "b m"]]]:
    """Yield the distances of `BLOCK` rows of x at a time from all rows of y."""
    for first in range(0, len(x), BLOCK):
        rows = slice(first, first + BLOCK)
        yield rows, euclidean_distances(x[rows], y)


def euclidean_distances(x: Features, y: OtherFeatures) -> Float[np.ndarray, "n m"]:
    """Compute the distances of all pairs by products, and exactly where these cancel, which is
    where two faces are (nearly) the same."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    a, b = np.sum(x * x, axis=1), np.sum(y * y, axis=1)
    squares = np.maximum(a[:, None] + b[None] - 2 * x @ y.T, 0)
    rows, columns = np.nonzero(squares < 1e-6 * (a[:, None] + b[None]))
    squares[rows, columns] = np.sum((x[rows] - y[columns]) ** 2, axis=1)
    return np.sqrt(squares)
