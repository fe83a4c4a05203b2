"""What sets of faces are like: how far they lie from held-out ones, and from those that were
learned from. Everything is of features; only the copies are looked for in the pixels as well."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from vaejax.evaluation import copies, distances
from vaejax.evaluation.figures import HELD_OUT, Estimate, name

GROUPS = 10  # of faces, at most, over which a figure is taken

Features = Float[np.ndarray, "n d"]
Set = Float[np.ndarray, "_ d"]  # of any number of faces


class Found(NamedTuple):
    """Figures by their names, and why others were left out."""

    figures: dict[str, Estimate]
    left_out: dict[str, str]

    def __or__(self, other: "Found") -> "Found":
        return Found(self.figures | other.figures, self.left_out | other.left_out)


def common(sets: Iterable[Set]) -> int:
    """As many faces as each of the sets has."""
    return min(len(faces) for faces in sets)


def compare(sets: dict[str, Set], held_out: Features) -> Found:
    """Each set of faces against the held-out ones: all of them as many at a time, which alone makes
    their figures comparable. A set that is some times larger is taken in groups, and the error is
    the standard deviation over those."""
    n = common([held_out, *sets.values()])
    dimensions = held_out.shape[1]
    shares = ("precision", "recall", "density", "coverage")
    if n < distances.LEAST:
        reason = (
            f"a set has {n} faces: of less than {distances.LEAST} it would tell more of chance "
            "than of faces"
        )
        names = ("frechet", "kernel", *shares)
        return Found({}, {name(figure, one): reason for figure in names for one in sets})
    found = Found({}, {})
    real = held_out[:n]
    moments = distances.moments(real)
    for one, faces in sets.items():
        values: dict[str, list[float]] = {figure: [] for figure in ("frechet", "kernel", *shares)}
        for first in range(0, min(len(faces), GROUPS * n) - n + 1, n):
            group = faces[first : first + n]
            if n >= distances.least_for_frechet(dimensions):
                own = distances.moments(group)
                values["frechet"].append(distances.frechet(moments, own))
            values["kernel"].append(distances.kernel(real, group))
            for figure, value in distances.shares(real, group)._asdict().items():
                values[figure].append(value)
        for figure, each in values.items():
            if each:
                spread = float(np.std(each, ddof=1)) if len(each) > 1 else None
                found.figures[name(figure, one)] = Estimate(float(np.mean(each)), spread)
            else:
                found.left_out[name(figure, one)] = (
                    f"a set has {n} faces: a covariance of {dimensions} features needs "
                    f"{distances.least_for_frechet(dimensions)}"
                )
    return found


def gaps(figures: dict[str, Estimate]) -> Found:
    """How much further samples lie from held-out faces than reconstructions do: what is lost
    between the prior and the codes of faces. It is above 0 of a perfect model too, since
    reconstructions are of the very faces that they are held against, and samples are not."""
    found = Found({}, {})
    for figure in ("frechet", "kernel"):
        pair = [figures.get(name(figure, one)) for one in ("samples", "reconstructions")]
        if pair[0] and pair[1]:
            errors = [e.error for e in pair if e and e.error is not None]
            spread = math.hypot(*errors) if errors else None
            found.figures[f"{figure}_gap"] = Estimate(pair[0].value - pair[1].value, spread)
        else:
            found.left_out[f"{figure}_gap"] = f"it needs {figure} of samples and reconstructions"
    return found


def memory(kind: str, distances_of: dict[str, Float[np.ndarray, "..."]]) -> Found:
    """How near each set lies to what was learned from, against how near held-out faces do: `kind`
    is what the distances are by ("pixels", "features", "person")."""
    figures = {
        name(f"nearest_{kind}", one): Estimate(float(np.median(each)))
        for one, each in distances_of.items()
    }
    held_out = distances_of[HELD_OUT]
    others = {one: each for one, each in distances_of.items() if one != HELD_OUT}
    if len(held_out) < copies.LEAST:
        reason = (
            f"{len(held_out)} held-out faces: their nearest hundredth is none below {copies.LEAST}"
        )
        return Found(figures, {name(f"copies_{kind}", one): reason for one in others})
    for one, each in others.items():
        figures[name(f"copies_{kind}", one)] = Estimate(*copies.share_near(each, held_out))
    return Found(figures, {})


def from_persons(
    sets: dict[str, Set], training: Float[np.ndarray, "t d"], people: Sequence[str]
) -> dict[str, Float[np.ndarray, "..."]]:
    """How far each face lies from the nearest person, whose place is the mean of her or his
    training faces. Of those, a face of nobody in particular is left out."""
    who, number = np.unique(people, return_inverse=True)
    means = np.stack([training[number == i].mean(axis=0) for i, one in enumerate(who) if one])
    return {one: distances.nearest(faces, means).distance for one, faces in sets.items()}
