"""Whether a model repeats its training faces: the nearest training face of each face.

The distances of held-out faces, which the model cannot have memorized, say how near a face lies by
chance.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from vaejax.evaluation.set_metrics import (
    HELD_OUT,
    AnyFeatures,
    Features,
    OtherFeatures,
    Results,
    euclidean_distances,
    metric_of_set,
)
from vaejax.metrics import Estimate
from vaejax.nearest import MIN_HELD_OUT, Nearest, memorized_share, nearest

ROWS, COLUMNS = 512, 8192  # of a block of distances between features

Distances = Float[np.ndarray, "..."]  # [n] of each set, whose sizes differ


# Nearest neighbours -------------------------------------------------------------------------------


def nearest_by_features(faces: Features, candidates: OtherFeatures) -> Nearest:
    """Find the candidate at the smallest Euclidean distance from each face."""
    blocks = (candidates[i : i + COLUMNS] for i in range(0, len(candidates), COLUMNS))
    return nearest(faces, blocks, euclidean_distances, rows=ROWS)


def person_distances(
    sets: Mapping[str, AnyFeatures], training: OtherFeatures, persons: Sequence[str]
) -> dict[str, Distances]:
    """Compute the distance of each face from the nearest training person, of each set.

    A person's position is the mean of the features of her or his training faces. Training faces of
    no known person ("") are left out.
    """
    names, numbers = np.unique(persons, return_inverse=True)
    means = np.stack([training[numbers == i].mean(axis=0) for i, name in enumerate(names) if name])
    return {name: nearest_by_features(faces, means).distances for name, faces in sets.items()}


# Metrics ------------------------------------------------------------------------------------------


def memorization_metrics(kind: str, distances: Mapping[str, Distances]) -> Results:
    """Compute the median distance of each set from its nearest training faces, and the share of
    each set but the held-out one that is memorized.

    `kind` says what the distances are of: "pixels", "features" or "person".
    """
    results: Results = {
        metric_of_set(f"nearest_{kind}", name): Estimate(float(np.median(values)))
        for name, values in distances.items()
    }
    held_out = distances[HELD_OUT]
    for name, values in distances.items():
        if name == HELD_OUT:
            continue
        results[metric_of_set(f"memorized_{kind}", name)] = (
            memorized_share(values, held_out)
            if len(held_out) >= MIN_HELD_OUT
            else f"with {len(held_out)} held-out faces, less than {MIN_HELD_OUT}, their nearest "
            "hundredth is less than one face"
        )
    return results


def effective_persons(persons: Sequence[str]) -> float:
    """Compute the effective number of persons, exp of the entropy (Hill, 1973, N1).

    It is the number of different persons if all occur equally often, and 1 if one occurs alone.
    """
    _, counts = np.unique(persons, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))
