"""How far one set of faces lies from another, both as features `[n d]`. Statistics in float64.

All of these depend on the number of faces: only sets of one size may be compared with each other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vaejax.evaluation.copies import Nearest

Features = Float[np.ndarray, "n d"]
Others = Float[np.ndarray, "m d"]

BLOCK = 512  # faces that are held against all others at a time
CANDIDATES = 8192  # of those, where there may be many
NEIGHBOURS = 5  # of precision, recall, density and coverage: those of Naeem et al. (2020)
# faces below which the kernel distance and the shares say more about chance than about faces: the
# standard error of a share of 0.5 of 50 is 0.07
LEAST = 50


class Moments(NamedTuple):
    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Features) -> Moments:
    """Raises ValueError for less than two faces."""
    if len(features) < 2:
        raise ValueError("one face has no covariance")
    exact = features.astype(np.float64)
    return Moments(exact.mean(axis=0), np.atleast_2d(np.cov(exact, rowvar=False)))


def frechet(a: Moments, b: Moments) -> float:
    """Fréchet distance of two Gaussians, |m - n|^2 + tr(A + B - 2 (A B)^1/2): equation 4 of Dowson
    and Landau (1982), equation 6 of Heusel et al. (2017), where features come from Inception.

    The trace of (A B)^1/2 is that of the symmetric (A^1/2 B A^1/2)^1/2, whose eigenvalues are real
    and found as such: no square root of a matrix that is not symmetric, which is where other
    implementations lose digits.

    It grows as the sets become smaller (Chong and Forsyth, 2020): its expectation is that of the
    distributions plus a term in 1/n. Of fewer faces than features the covariances have no full
    rank, and most of what it says is that term: see `least_for_frechet`.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root)
    away = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    between = traces - 2 * np.sum(np.sqrt(np.maximum(cross, 0)))
    return float(away @ away + max(between, 0.0))


def least_for_frechet(dimensions: int) -> int:
    """Faces of which a covariance over so many features can have full rank."""
    return dimensions + 1


def kernel(real: Features, generated: Others) -> float:
    """Kernel distance: squared maximum mean discrepancy for the kernel (x·y / d + 1)^3, in its
    unbiased estimate, 0 in expectation for two sets of one distribution (Bińkowski et al., 2018,
    section 4; Gretton et al., 2012, equation 3). Over all pairs of the two sets.

    Raises ValueError for less than two faces in a set.
    """
    if min(len(real), len(generated)) < 2:
        raise ValueError("one face has no distance from others")
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    return (
        _mean_kernel(real, real, pairs=True)
        + _mean_kernel(generated, generated, pairs=True)
        - 2 * _mean_kernel(real, generated)
    )


def _mean_kernel(x: Features, y: Others, *, pairs: bool = False) -> float:
    """Over all pairs; of a set with itself, without those of a face with itself."""
    total = sum(
        float(np.sum((x[i : i + BLOCK] @ y.T / x.shape[1] + 1) ** 3))
        for i in range(0, len(x), BLOCK)
    )
    if not pairs:
        return total / (len(x) * len(y))
    own = float(np.sum((np.sum(x * x, axis=1) / x.shape[1] + 1) ** 3))
    return (total - own) / (len(x) * (len(x) - 1))


class Shares(NamedTuple):
    """By which of the other set's neighbourhoods a face lies in: the ball round each face that
    reaches to the `NEIGHBOURS`-th nearest face of its own set."""

    precision: float  # of generated faces that lie in a ball of a real one
    recall: float  # of real faces that lie in a ball of a generated one
    density: float  # balls of real faces that a generated one lies in, over `NEIGHBOURS`
    coverage: float  # of real faces in whose ball there is a generated one


def shares(real: Features, generated: Others, *, k: int = NEIGHBOURS) -> Shares:
    """Precision and recall (Kynkäänniemi et al., 2019, equation 1), density and coverage (Naeem et
    al., 2020, equations 3 and 5).

    Raises ValueError unless each set has more than `k` faces.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"of {min(len(real), len(generated))} faces none has {k} neighbours")
    reach, other_reach = _reach(real, k), _reach(generated, k)
    balls = np.zeros(len(generated), int)  # of real faces, that each generated one lies in
    recalled: Bool[np.ndarray, " n"] = np.zeros(len(real), bool)
    covered: Bool[np.ndarray, " n"] = np.zeros(len(real), bool)
    for some, distances in _distances(real, generated):
        inside = distances <= reach[some, None]
        balls += inside.sum(axis=0)
        covered[some] = inside.any(axis=1)
        recalled[some] = (distances <= other_reach).any(axis=1)
    return Shares(
        precision=float(np.mean(balls > 0)),
        recall=float(np.mean(recalled)),
        density=float(np.mean(balls) / k),
        coverage=float(np.mean(covered)),
    )


def _reach(points: Features, k: int) -> Float[np.ndarray, " n"]:
    """The distance of each from the k-th nearest of the others."""
    found = np.empty(len(points))
    for some, distances in _distances(points, points):
        found[some] = np.partition(distances, k, axis=1)[:, k]  # itself is the nearest
    return found


def _distances(x: Features, y: Others) -> Iterator[tuple[slice, Float[np.ndarray, "b m"]]]:
    """Euclidean, of some of x from all of y."""
    for first in range(0, len(x), BLOCK):
        some = slice(first, first + BLOCK)
        yield some, _euclidean(x[some].astype(np.float64), y.astype(np.float64))


def _euclidean(x: Features, y: Others) -> Float[np.ndarray, "n m"]:
    """By products, and exactly where those cancel: of faces that are (nearly) the same."""
    a, b = np.sum(x * x, axis=1), np.sum(y * y, axis=1)
    squares = np.maximum(a[:, None] + b[None] - 2 * x @ y.T, 0)
    rows, columns = np.nonzero(squares < 1e-6 * (a[:, None] + b[None]))
    squares[rows, columns] = np.sum((x[rows] - y[columns]) ** 2, axis=1)
    return np.sqrt(squares)


def nearest(faces: Features, candidates: Others) -> Nearest:
    """Of each face the candidate with the smallest Euclidean distance, the first of several."""
    place, distance = np.zeros(len(faces), int), np.full(len(faces), np.inf)
    for first in range(0, len(candidates), CANDIDATES):
        for some, distances in _distances(faces, candidates[first : first + CANDIDATES]):
            least = distances.min(axis=1)
            nearer = least < distance[some]
            place[some] = np.where(nearer, first + distances.argmin(axis=1), place[some])
            distance[some] = np.where(nearer, least, distance[some])
    return Nearest(place, distance)
