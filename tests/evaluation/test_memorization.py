"""Nearest training faces, and faces that were memorized, are found and compared with chance."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from vaejax.evaluation import memorization
from vaejax.evaluation.memorization import (
    effective_persons,
    memorization_metrics,
    memorized_share,
    nearest_by_features,
    nearest_by_pixels,
    person_distances,
)
from vaejax.evaluation.set_metrics import HELD_OUT


@pytest.fixture(scope="module")
def training(draw):
    return draw(50, 16)


def normal(n: int, d: int = 6, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def by_pixels(images: np.ndarray, training: np.ndarray, *, batch: int) -> memorization.Nearest:
    parts = (training[i : i + batch] for i in range(0, len(training), batch))
    return nearest_by_pixels(images, parts, lambda indices: training[indices])


# Nearest neighbours -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [7, 50])
def test_nearest_by_pixels_is_that_of_all_pairs(training, draw, batch, monkeypatch):
    monkeypatch.setattr(memorization, "PIXEL_VALUES", 3 * training[0].size)  # 3 images at a time
    images = draw(10, 16, seed=1)
    indices, distances = by_pixels(images, training, batch=batch)
    differences = images[:, None].astype(float) - training[None]
    exact = np.sqrt(np.mean((differences / 255) ** 2, axis=(2, 3, 4)))
    np.testing.assert_array_equal(indices, exact.argmin(axis=1))
    np.testing.assert_allclose(distances, exact.min(axis=1), rtol=1e-5)


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


def test_planted_copies_are_found(training, draw):
    held_out = by_pixels(draw(200, 16, seed=2), training, batch=20).distances
    samples = draw(100, 16, seed=3)
    planted = {5: 17, 40: 3, 77: 49}
    for sample, original in planted.items():
        samples[sample] = training[original]
    samples[77, 0, 0, 0] ^= 1  # one level in one value
    indices, distances = by_pixels(samples, training, batch=20)
    assert {i: indices[i] for i in planted} == planted
    assert distances[5] == 0
    np.testing.assert_allclose(distances[77], 1 / 255 / np.sqrt(16 * 16 * 3), rtol=1e-5)
    # the nearest hundredth of 200 held-out faces, by Weibull's definition: between second and third
    second, third = np.sort(held_out)[1:3]
    near = np.flatnonzero(distances < second + 0.01 * (third - second))
    assert set(planted) <= set(near)
    assert memorized_share(distances, held_out).value == len(near) / 100


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


def test_the_share_and_its_error_are_those_of_the_formula():
    held_out = np.arange(1.0, 100)  # 99: one less than needed
    with pytest.raises(ValueError, match="99 held-out"):
        memorized_share(np.zeros(3), held_out)
    # of 199 faces at 1, 2, ... the threshold is 2: (199 + 1) / 100
    share = memorized_share(np.array([0.5, 1.9, 2.0, 3.0]), np.arange(1.0, 200))
    assert share.value == 0.5
    np.testing.assert_allclose(share.error, np.sqrt(0.5 * 0.5 / 4 + 0.01 * 0.99 / 201))


@pytest.mark.parametrize("held_out", [100, 150, 1000])
def test_by_chance_a_hundredth_is_near_however_few_are_held_out(held_out: int):
    random = np.random.default_rng(0)
    results = [
        memorized_share(random.uniform(size=1000), random.uniform(size=held_out))
        for _ in range(2000)
    ]
    shares = np.array([share.value for share in results])
    assert abs(shares.mean() - 0.01) < 4 * shares.std() / np.sqrt(2000)
    errors = np.sqrt(np.mean([share.error**2 for share in results]))
    np.testing.assert_allclose(errors, shares.std(), rtol=0.1)


def test_persons_count_by_how_often_they_occur():
    assert effective_persons(["a"] * 7) == 1
    assert effective_persons(["a", "b", "c", "d"] * 5) == pytest.approx(4)
    nine_to_one = np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    assert effective_persons(["a"] * 9 + ["b"]) == pytest.approx(nine_to_one)
