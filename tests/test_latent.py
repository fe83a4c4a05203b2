"""Paths end where they should, components are those of the covariance, directions are found."""

import numpy as np
import pytest
from scipy.linalg import lstsq

from vaejax import latent
from vaejax.latent import (
    MIN_AUC,
    Components,
    Directions,
    along,
    area_under_curve,
    fit_directions,
    principal_components,
    ridge,
    slerp,
)

RANDOM = np.random.default_rng(0)


def vectors(n: int, d: int) -> np.ndarray:
    return RANDOM.standard_normal((n, d)).astype(np.float32)


# Paths


def test_a_path_begins_and_ends_at_its_faces_exactly():
    a, b = vectors(5, 8), vectors(5, 8)
    assert np.array_equal(slerp(a, b, np.zeros(5)), a)
    assert np.array_equal(slerp(a, b, np.ones(5)), b)


def test_a_path_between_vectors_of_one_length_is_an_arc_of_equal_steps():
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (vectors(1, 6), vectors(1, 6)))
    t = np.linspace(0, 1, 7)
    path = slerp(a.repeat(7, axis=0), b.repeat(7, axis=0), t)
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 1, rtol=1e-6)
    angles = np.arccos(np.sum(path[1:] * path[:-1], axis=1))
    np.testing.assert_allclose(angles, np.arccos(np.sum(a * b)) / 6, rtol=1e-3)


def test_the_middle_of_normal_draws_is_as_long_as_they_are():
    a, b = vectors(500, 64), vectors(500, 64)
    middle = slerp(a, b, np.full(500, 0.5))
    assert np.mean(np.linalg.norm(middle, axis=1)) == pytest.approx(8, rel=0.02)
    assert np.mean(np.linalg.norm((a + b) / 2, axis=1)) < 5.8


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, 2.0])
def test_a_path_between_parallel_vectors_is_a_line(factor: float):
    a = vectors(1, 4)
    middle = slerp(a, np.float32(factor) * a, np.array([0.5]))
    np.testing.assert_allclose(middle, (1 + factor) / 2 * a, atol=1e-3)


def test_a_walk_passes_its_stops_and_comes_back_to_the_first():
    stops = vectors(3, 4)
    points = along(stops, np.array([0, 1, 2, 2.999999, 3]))
    assert np.array_equal(points[[0, 1, 2, 4]], stops[[0, 1, 2, 0]])
    np.testing.assert_allclose(points[3], stops[0], atol=1e-4)
    half = along(stops, np.array([1.5]))
    assert np.array_equal(half, slerp(stops[1:2], stops[2:3], np.array([0.5])))


# Principal components


def test_components_are_the_axes_of_the_covariance_largest_first():
    z = (vectors(400, 5) * np.array([3, 0.1, 1, 2, 0.5], np.float32)) @ vectors(5, 5) + 7
    found = principal_components(z)
    values, axes = np.linalg.eigh(np.cov(z, rowvar=False))
    np.testing.assert_allclose(found.stds, np.sqrt(values[::-1]), rtol=1e-3)
    cosines = np.abs(np.sum(found.vectors * axes.T[::-1], axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-3)
    np.testing.assert_allclose(found.mean, z.mean(axis=0), rtol=1e-5)
    assert found.total == pytest.approx(np.trace(np.cov(z, rowvar=False)), rel=1e-4)
    assert np.all(np.take_along_axis(
        found.vectors, np.abs(found.vectors).argmax(axis=1)[:, None], axis=1) > 0)  # fmt: skip


def test_there_are_no_more_components_than_faces_and_dimensions_allow(monkeypatch):
    assert principal_components(vectors(4, 300)).vectors.shape == (4, 300)
    monkeypatch.setattr(latent, "MAX_COMPONENTS", 3)
    assert principal_components(vectors(9, 5)).vectors.shape == (3, 5)
    with pytest.raises(ValueError, match="no variance"):
        principal_components(vectors(1, 3))


# Probes


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    scores, positive = RANDOM.integers(0, 9, 60).astype(float), RANDOM.random(60) < 0.4
    pairs = scores[positive][:, None] - scores[~positive][None]
    expected = np.mean(pairs > 0) + np.mean(pairs == 0) / 2
    assert area_under_curve(scores, positive) == pytest.approx(expected)
    assert np.isnan(area_under_curve(scores, np.arange(60) < 9))


def test_ridge_regression_is_least_squares_with_more_faces():
    x, y = RANDOM.standard_normal((30, 4)) + 3, RANDOM.standard_normal((30, 2))
    weights, offsets = ridge(x, y)
    away = x - x.mean(axis=0)
    more = np.sqrt(4 * np.mean(away**2)) * np.eye(4)
    expected = lstsq(np.vstack([away, more]), np.vstack([y - y.mean(axis=0), np.zeros((4, 2))]))[0]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(x.mean(axis=0) @ weights + offsets, y.mean(axis=0))


# Attributes

ATTRIBUTES = {"glasses": ["no", "yes"], "hair": ["black", "blue", "red"], "luck": ["bad", "good"]}


class Planted:
    """Faces whose latents show glasses and hair; luck they do not. Hair often goes with glasses."""

    def __init__(self, n: int, effects: dict[str, np.ndarray]):
        glasses = RANDOM.integers(0, 2, n)
        hair = np.where(RANDOM.random(n) < 0.7, 2 * glasses, RANDOM.integers(0, 3, n))
        self.numbers = np.stack([glasses, hair, RANDOM.integers(0, 2, n)], axis=1) + 1
        self.z = vectors(n, 12) + effects["glasses"][glasses] + effects["hair"][hair] + 5


@pytest.fixture(scope="module")
def effects() -> dict[str, np.ndarray]:
    return {"glasses": 3 * vectors(2, 12), "hair": 3 * vectors(3, 12)}


@pytest.fixture(scope="module")
def faces(effects) -> Planted:
    return Planted(2000, effects)


@pytest.fixture(scope="module")
def directions(faces, effects) -> Directions:
    held_out = Planted(300, effects)
    components = principal_components(faces.z)
    return fit_directions(
        ATTRIBUTES, components, (faces.z, faces.numbers), (held_out.z, held_out.numbers)
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_direction_of_a_planted_attribute_is_found_and_no_other(directions, faces, effects):
    assert list(directions.encoded()) == [True] * 5 + [False] * 2
    assert 0.3 < directions.auc[-1] < MIN_AUC
    planted = effects["glasses"][1] - effects["glasses"][0]
    found = directions.effects[1] - directions.effects[0]
    np.testing.assert_allclose(found, planted, atol=0.3)
    # faces with glasses differ by their hair as well
    means = [faces.z[faces.numbers[:, 0] == i].mean(axis=0) for i in (1, 2)]
    assert cosine(means[1] - means[0], planted) < 0.98 < cosine(found, planted)


def test_scores_are_probabilities_and_effects_cancel_over_all_faces(directions, faces):
    shares = np.concatenate(
        [np.mean(faces.numbers[:, i, None] == np.arange(1, len(v) + 1), axis=0)
         for i, v in enumerate(ATTRIBUTES.values())]
    )  # fmt: skip
    scores = faces.z @ directions.weights.T + directions.offsets
    np.testing.assert_allclose(scores.mean(axis=0), shares, atol=1e-3)
    for attribute in ATTRIBUTES:
        rows = directions.rows(attribute)
        np.testing.assert_allclose(shares[rows] @ directions.effects[rows], 0, atol=1e-4)


def test_a_step_is_a_standard_deviation_of_the_latents_along_a_direction(directions, faces):
    step = directions.step(1)
    along_it = faces.z @ step / np.linalg.norm(step)
    assert np.linalg.norm(step) == pytest.approx(np.std(along_it), rel=1e-3)
    assert cosine(step, directions.effects[1]) == pytest.approx(1)
    assert cosine(step, directions.step(0)) == pytest.approx(-1)  # of two values


def test_probes_read_the_present_value_and_an_edit_replaces_it(directions, faces):
    for column, attribute in enumerate(("glasses", "hair")):
        rows = np.asarray(directions.rows(attribute))
        present = directions.present(faces.z, attribute)
        assert np.mean(present == rows[faces.numbers[:, column] - 1]) > 0.9
    row = directions.rows("hair")[1]
    edited = faces.z + directions.replace(faces.z, row)
    assert np.mean(directions.present(edited, "hair") == row) > 0.9
    before, after = (directions.present(z, "glasses") for z in (faces.z, edited))
    assert np.mean(before == after) > 0.9
    assert np.abs(directions.replace(edited, row)[
        directions.present(edited, "hair") == row]).max() == 0  # fmt: skip


def test_faces_of_unknown_value_move_no_direction(faces, effects):
    held_out, known = Planted(100, effects), faces.numbers.copy()
    known[::2] = 0
    components = principal_components(faces.z)

    def fit(z: np.ndarray, numbers: np.ndarray, components: Components) -> Directions:
        return fit_directions(
            ATTRIBUTES, components, (z, numbers), (held_out.z, held_out.numbers)
        )  # fmt: skip

    half = fit(faces.z[1::2], faces.numbers[1::2], components)
    with_unknown = fit(faces.z, known, components)
    np.testing.assert_allclose(with_unknown.weights, half.weights, atol=1e-5)
    np.testing.assert_allclose(with_unknown.auc, half.auc)
    np.testing.assert_allclose(with_unknown.effects, half.effects, atol=0.2)


def test_few_faces_with_a_value_are_too_few_to_judge():
    z, few, enough = vectors(100, 3), np.ones((100, 1), int), np.ones((100, 1), int)
    few[:9], enough[:10] = 2, 2
    for training, held_out, judged in ((few, enough, 0), (enough, few, 0), (enough, enough, 2)):
        found = fit_directions(
            {"hat": ["no", "yes"]}, principal_components(z), (z, training), (z, held_out)
        )
        assert np.isfinite(found.auc).sum() == judged
    found = found._replace(auc=np.full(2, np.nan, np.float32))
    assert not found.encoded().any()
    assert np.isfinite(found.effects).all()
