"""Nearest training faces, and faces that were memorized, are found and compared with chance."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from vaejax.evaluation import memorization
from vaejax.evaluation.memorization import (
    effective_persons,
    memorization_metrics,
    nearest_by_features,
    person_distances,
)
from vaejax.evaluation.set_metrics import HELD_OUT


def normal(n: int, d: int = 6, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


# Nearest neighbours -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(512, 8192), (4, 7)])
def test_nearest_by_features_is_that_of_all_pairs_and_the_first_of_equals(
    rows, columns, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memorization, "ROWS", rows)
    monkeypatch.setattr(memorization, "COLUMNS", columns)
    faces, candidates = normal(30, seed=0), normal(100, seed=1)
    candidates[70] = candidates[3]
    faces[5] = candidates[3]
    indices, distances = nearest_by_features(faces, candidates)
    exact = cdist(faces.astype(float), candidates.astype(float))
    np.testing.assert_array_equal(indices, exact.argmin(axis=1))
    np.testing.assert_allclose(distances, exact.min(axis=1), rtol=1e-6)
    assert indices[5] == 3


def test_a_copy_has_distance_zero_far_from_the_origin_where_products_cancel():
    candidates = normal(100, 16, seed=0) + np.float32(300)
    faces = candidates[[5, 77, 20]].copy()
    faces[1] += np.float32(0.01)
    indices, distances = nearest_by_features(faces, candidates)
    exact = cdist(faces.astype(float), candidates.astype(float))
    assert indices.tolist() == [5, 77, 20]
    assert distances[0] == 0
    np.testing.assert_allclose(distances, exact.min(axis=1), rtol=1e-6)


def test_a_person_is_the_mean_of_her_faces_and_the_unknown_are_no_person():
    training = np.array([[0, 0], [2, 0], [10, 0], [5, 5]], np.float32)
    persons = ["a", "a", "b", ""]
    faces = np.array([[1, 0], [10, 3], [5, 5]], np.float32)
    distances = person_distances({"samples": faces}, training, persons)["samples"]
    np.testing.assert_allclose(distances, [0, 3, np.sqrt(41)], rtol=1e-6)


# Metrics ------------------------------------------------------------------------------------------


def test_memorized_faces_are_counted():
    random = np.random.default_rng(0)
    sets = {HELD_OUT: random.uniform(1, 2, 200), "samples": random.uniform(1, 2, 400)}
    sets["samples"][:100] = 0.1
    results = memorization_metrics("pixels", sets)
    second, third = np.sort(sets[HELD_OUT])[1:3]
    share = np.mean(sets["samples"] < second + 0.01 * (third - second))
    assert results["memorized_pixels/samples"].value == share
    for name, distances in sets.items():
        assert results[f"nearest_pixels/{name}"].value == np.median(distances)
    assert results.keys() == {
        "nearest_pixels/held_out", "nearest_pixels/samples", "memorized_pixels/samples",
    }  # fmt: skip
    few = memorization_metrics("pixels", {**sets, HELD_OUT: sets[HELD_OUT][:99]})
    assert "99 held-out faces" in few["memorized_pixels/samples"]


def test_persons_count_by_how_often_they_occur():
    assert effective_persons(["a"] * 7) == 1
    assert effective_persons(["a", "b", "c", "d"] * 5) == pytest.approx(4)
    nine_to_one = np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    assert effective_persons(["a"] * 9 + ["b"]) == pytest.approx(nine_to_one)
