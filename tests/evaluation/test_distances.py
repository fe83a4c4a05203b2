"""Distances between sets, against closed forms, other implementations and brute force."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist

from vaejax.evaluation import distances
from vaejax.evaluation.distances import Moments, frechet, kernel, moments, nearest, shares


def draw(seed: int, n: int, d: int, *, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def covariance(seed: int, d: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(d, rank or 2 * d))
    return factor @ factor.T / d


# Fréchet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 3, 64])
def test_gaussians_of_one_orientation_have_the_distance_of_their_deviations(d: int):
    """Of diagonal covariances: |m - n|^2 + sum of (s - t)^2; turned round, the same."""
    chance = np.random.default_rng(d)
    m, n, s, t = chance.normal(size=d), chance.normal(size=d), *chance.uniform(0.1, 3, (2, d))
    exact = np.sum((m - n) ** 2) + np.sum((s - t) ** 2)
    turn = np.linalg.qr(chance.normal(size=(d, d)))[0]
    for q in (np.eye(d), turn):
        a = Moments(q @ m, q @ np.diag(s**2) @ q.T)
        b = Moments(q @ n, q @ np.diag(t**2) @ q.T)
        np.testing.assert_allclose(frechet(a, b), exact, rtol=1e-10)
        np.testing.assert_allclose(frechet(b, a), exact, rtol=1e-10)


@pytest.mark.parametrize("d", [2, 32, 200])
def test_it_agrees_with_the_square_root_of_the_product(d: int):
    a = Moments(np.zeros(d), covariance(0, d))
    b = Moments(np.full(d, 0.1), covariance(1, d))
    root = sqrtm(a.covariance @ b.covariance).real
    exact = 0.01 * d + np.trace(a.covariance + b.covariance - 2 * root)
    np.testing.assert_allclose(frechet(a, b), exact, rtol=1e-7)


def test_covariances_without_full_rank_are_no_trouble():
    """In one another's null space nothing is shared: the traces add up."""
    low, high = np.diag([1.0, 2, 0, 0]), np.diag([0.0, 0, 3, 4])
    np.testing.assert_allclose(frechet(Moments(np.zeros(4), low), Moments(np.zeros(4), high)), 10)
    features = draw(0, 5, 20)
    assert frechet(moments(features), moments(features)) < 1e-6


def test_moments_are_those_of_numpy_in_double_precision():
    features = draw(0, 100, 3) + np.float32(1000)
    found = moments(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(found.covariance, np.cov(exact.T), rtol=1e-12)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match="no covariance"):
        moments(features[:1])


def test_smaller_sets_are_further_apart():
    """The bias that forbids comparing sets of different sizes."""
    few, many = ([moments(draw(s, n, 8)) for s in (0, 1)] for n in (20, 2000))
    assert frechet(*few) > 5 * frechet(*many)


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
    np.testing.assert_allclose(kernel(x, y), exact, rtol=1e-10)
    monkeypatch.setattr(distances, "BLOCK", 3)
    np.testing.assert_allclose(kernel(x, y), exact, rtol=1e-10)


def test_the_kernel_distance_of_one_distribution_is_zero_in_the_mean():
    found = [kernel(draw(s, 60, 4), draw(100 + s, 60, 4)) for s in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))
    assert min(found) < 0  # unbiased: on both sides of it
    with pytest.raises(ValueError, match="no distance"):
        kernel(draw(0, 1, 4), draw(0, 5, 4))


# Shares -------------------------------------------------------------------------------------------


def test_hand_made_points_have_the_shares_that_one_can_count():
    """Real faces at 0, 1, 2, 10: their balls (k = 1) reach 1, 1, 1 and 8. Generated ones at 1.5
    and 11: their balls reach 9.5 each."""
    real, generated = np.array([[0.0], [1], [2], [10]]), np.array([[1.5], [11.0]])
    found = shares(real, generated, k=1)
    assert found.precision == 1.0  # 1.5 lies in the balls of 1 and 2, 11 in that of 10
    assert found.recall == 1.0
    assert found.density == (2 + 1) / 2
    assert found.coverage == 3 / 4  # nothing within 1 of 0


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_shares_are_those_of_brute_force(k: int, monkeypatch: pytest.MonkeyPatch):
    real, generated = draw(0, 40, 3), draw(1, 30, 3, scale=1.4)
    between = cdist(real, generated)
    reach = np.sort(cdist(real, real), axis=1)[:, k]
    other = np.sort(cdist(generated, generated), axis=1)[:, k]
    inside = between <= reach[:, None]
    exact = (
        inside.any(axis=0).mean(),
        (between <= other[None]).any(axis=1).mean(),
        inside.sum() / k / 30,
        inside.any(axis=1).mean(),
    )
    np.testing.assert_allclose(shares(real, generated, k=k), exact)
    assert 0 < exact[0] < 1
    assert 0 < exact[3] < 1
    monkeypatch.setattr(distances, "BLOCK", 7)
    np.testing.assert_allclose(shares(real, generated, k=k), exact)


def test_a_set_against_itself_is_precise_and_complete():
    faces = draw(0, 50, 8)
    found = shares(faces, faces)
    assert found[:2] == (1.0, 1.0)
    assert found.coverage == 1.0
    with pytest.raises(ValueError, match="of 5 faces none has 5 neighbours"):
        shares(faces[:5], faces)


# Copies -------------------------------------------------------------------------------------------


def test_the_nearest_is_found_and_a_copy_has_no_distance():
    """Far from the origin, where products cancel."""
    candidates = draw(0, 100, 16) + np.float32(300)
    faces = candidates[[5, 77, 20]].copy()
    faces[1] += np.float32(0.01)
    found = nearest(faces, candidates)
    exact = cdist(faces.astype(float), candidates.astype(float))
    assert found.place.tolist() == [5, 77, 20]
    assert found.distance[0] == 0
    np.testing.assert_allclose(found.distance, exact.min(axis=1), rtol=1e-6)
