"""Metrics of sets of faces, against closed forms, other implementations and brute force."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from vaejax.evaluation import set_metrics
from vaejax.evaluation.set_metrics import (
    Moments,
    compare_sets,
    frechet_distance,
    gaps,
    kernel_distance,
    moments,
    precision_recall,
)
from vaejax.metrics import Estimate


def draw(seed: int, n: int, d: int, *, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def covariance(seed: int, d: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(d, rank or 2 * d))
    return factor @ factor.T / d


# Fréchet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 64])
def test_gaussians_of_one_orientation_have_the_distance_of_their_deviations(d: int):
    """With diagonal covariances it is |m - n|² + Σ (s - t)²; a rotation does not change it."""
    random = np.random.default_rng(d)
    m, n, s, t = random.normal(size=d), random.normal(size=d), *random.uniform(0.1, 3, (2, d))
    exact = np.sum((m - n) ** 2) + np.sum((s - t) ** 2)
    rotation = np.linalg.qr(random.normal(size=(d, d)))[0]
    for q in (np.eye(d), rotation):
        a = Moments(q @ m, q @ np.diag(s**2) @ q.T)
        b = Moments(q @ n, q @ np.diag(t**2) @ q.T)
        np.testing.assert_allclose(frechet_distance(a, b), exact, rtol=1e-10)
        np.testing.assert_allclose(frechet_distance(b, a), exact, rtol=1e-10)


@pytest.mark.parametrize("d", [2, 32, 200])
def test_the_frechet_distance_is_that_of_the_square_root_of_the_product(d: int):
    a = Moments(np.zeros(d), covariance(0, d))
    b = Moments(np.full(d, 0.1), covariance(1, d))
    root = sqrtm(a.covariance @ b.covariance).real
    exact = 0.01 * d + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet_distance(a, b), exact, rtol=1e-7)


def test_covariances_in_each_others_null_space_have_the_distance_of_their_traces():
    low = Moments(np.zeros(4), np.diag([1.0, 2, 0, 0]))
    high = Moments(np.zeros(4), np.diag([0.0, 0, 3, 4]))
    np.testing.assert_allclose(frechet_distance(low, high), 10)
    features = draw(0, 5, 20)
    assert frechet_distance(moments(features), moments(features)) < 1e-6


def test_moments_are_those_of_numpy_in_double_precision():
    features = draw(0, 100, 3) + np.float32(1000)
    mean, covariance = moments(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(covariance, np.cov(exact.T), rtol=1e-12)
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match="no covariance"):
        moments(features[:1])


@pytest.mark.parametrize("n", [200, 400])
def test_smaller_sets_are_further_apart(n: int):
    """The bias that forbids comparing sets of different sizes: to first order in 1/n, 2d/n by the
    means and d (d + 1) / 2n by the covariances."""
    d = 8
    distances = [
        frechet_distance(moments(draw(2 * s, n, d)), moments(draw(2 * s + 1, n, d)))
        for s in range(200)
    ]
    bias = (2 * d + d * (d + 1) / 2) / n
    np.testing.assert_allclose(np.mean(distances), bias, rtol=0.06)


# Kernel -------------------------------------------------------------------------------------------


def test_the_kernel_distance_is_the_sum_over_pairs(monkeypatch: pytest.MonkeyPatch):
    x, y = draw(0, 11, 4), draw(1, 7, 4, scale=2)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.astype(float) @ b.astype(float) / 4 + 1) ** 3)

    within = [
        np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
        for s in (x, y)
    ]
    exact = sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(kernel_distance(x, y), exact, rtol=1e-10)
    monkeypatch.setattr(set_metrics, "BLOCK", 3)
    np.testing.assert_allclose(kernel_distance(x, y), exact, rtol=1e-10)


def test_the_kernel_distance_of_one_distribution_is_zero_in_the_mean():
    distances = [kernel_distance(draw(s, 60, 4), draw(200 + s, 60, 4)) for s in range(200)]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / np.sqrt(len(distances))
    with pytest.raises(ValueError, match="no distance"):
        kernel_distance(draw(0, 1, 4), draw(0, 5, 4))


# Precision and recall -----------------------------------------------------------------------------


def test_the_shares_of_points_on_a_line_are_those_that_one_can_count():
    """Real faces at 0, 1, 2 and 10 have radii 1, 1, 1 and 8 (k = 1); generated ones at 1.5 and 11
    have radii 9.5."""
    real, generated = np.array([[0.0], [1], [2], [10]]), np.array([[1.5], [11.0]])
    assert precision_recall(real, generated, k=1)._asdict() == {
        "precision": 1.0,  # 1.5 lies near 1 and 2, 11 near 10
        "recall": 1.0,
        "density": (2 + 1) / 2,
        "coverage": 3 / 4,  # nothing within 1 of 0
    }


def test_faces_that_are_all_alike_are_precise_and_recall_one_face():
    """60 real faces at 0, 1, 2, ... have radii 3 (k = 5); 50 generated ones are all at 30."""
    real, generated = np.arange(60.0)[:, None], np.full((50, 1), 30.0)
    assert precision_recall(real, generated)._asdict() == {
        "precision": 1.0,
        "recall": 1 / 60,
        "density": 7 / 5,  # that of 27, 28, ..., 33
        "coverage": 7 / 60,
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_shares_are_those_of_brute_force(k: int, monkeypatch: pytest.MonkeyPatch):
    real, generated = draw(0, 40, 3), draw(1, 30, 3, scale=1.4)
    between = cdist(real, generated)
    radii = np.sort(cdist(real, real), axis=1)[:, k]
    generated_radii = np.sort(cdist(generated, generated), axis=1)[:, k]
    inside = between <= radii[:, None]
    exact = (
        inside.any(axis=0).mean(),
        (between <= generated_radii[None]).any(axis=1).mean(),
        inside.sum() / k / 30,
        inside.any(axis=1).mean(),
    )
    np.testing.assert_allclose(precision_recall(real, generated, k=k), exact)
    monkeypatch.setattr(set_metrics, "BLOCK", 7)
    np.testing.assert_allclose(precision_recall(real, generated, k=k), exact)


def test_a_set_against_itself_is_precise_and_complete():
    faces = draw(0, 50, 8)
    precision, recall, density, coverage = precision_recall(faces, faces)
    assert (precision, recall, coverage) == (1, 1, 1)
    assert density == 6 / 5  # each face has 5 neighbours and itself in its neighbourhood
    with pytest.raises(ValueError, match="of 5 faces none has 5 neighbours"):
        precision_recall(faces[:5], faces)


# Sets of faces ------------------------------------------------------------------------------------


def test_a_larger_set_is_divided_into_groups_and_the_error_is_their_spread():
    held_out, samples, train = draw(0, 90, 6), draw(1, 60, 6), draw(2, 200, 6)
    results = compare_sets({"samples": samples, "train": train}, held_out)
    groups = [train[i : i + 60] for i in (0, 60, 120)]
    real = held_out[:60]
    expected = {
        "frechet": [frechet_distance(moments(real), moments(group)) for group in groups],
        "kernel": [kernel_distance(real, group) for group in groups],
        "recall": [precision_recall(real, group).recall for group in groups],
    }
    for name, values in expected.items():
        value, error = results[f"{name}/train"]
        np.testing.assert_allclose(value, np.mean(values), rtol=1e-9)
        np.testing.assert_allclose(error, np.std(values, ddof=1), rtol=1e-9)
        assert results[f"{name}/samples"].error is None  # one group
    names = ("frechet", "kernel", "precision", "recall", "density", "coverage")
    assert results.keys() == {f"{name}/{of}" for name in names for of in ("samples", "train")}


def test_a_metric_that_needs_more_faces_is_left_out_with_their_number():
    few = compare_sets({"samples": draw(0, 49, 6)}, draw(1, 90, 6))
    assert len(few) == 6
    assert all("a set has 49 faces" in reason for reason in few.values())
    wide = compare_sets({"samples": draw(0, 64, 64)}, draw(1, 90, 64))
    assert "a covariance of 64 features needs 65" in wide["frechet/samples"]
    np.testing.assert_allclose(
        wide["kernel/samples"].value, kernel_distance(draw(1, 90, 64)[:64], draw(0, 64, 64))
    )
    enough = compare_sets({"samples": draw(0, 65, 64)}, draw(1, 90, 64))
    assert isinstance(enough["frechet/samples"], Estimate)


def test_a_gap_is_of_samples_minus_reconstructions():
    results = gaps(
        {
            "frechet/samples": Estimate(5.0, 0.3),
            "frechet/reconstructions": Estimate(2.0, 0.4),
            "kernel/samples": Estimate(1.0),
            "kernel/reconstructions": "of 3 faces none has 5 neighbours",
        }
    )
    assert results["frechet_gap"].value == 3
    np.testing.assert_allclose(results["frechet_gap"].error, 0.5)
    assert results["kernel_gap"] == "it needs kernel of samples and reconstructions"
