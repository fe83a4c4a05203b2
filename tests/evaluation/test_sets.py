"""Figures of sets: of as many faces each, in groups, and of the right one against the other."""

import numpy as np
import pytest

from vaejax.evaluation import copies, distances, faces
from vaejax.evaluation.figures import HELD_OUT, Estimate


def normal(n: int, d: int = 6, *, seed: int, deviation: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, deviation, (n, d))
    return values.astype(np.float32)


def test_a_larger_set_is_taken_in_groups_of_the_smallest_and_the_error_is_their_spread():
    held_out, samples, train = normal(90, seed=0), normal(60, seed=1), normal(200, seed=2)
    found = faces.compare({"samples": samples, "train": train}, held_out)
    assert found.left_out == {}
    groups = [train[i : i + 60] for i in (0, 60, 120)]
    real = distances.moments(held_out[:60])
    each = {
        "frechet": [distances.frechet(real, distances.moments(group)) for group in groups],
        "kernel": [distances.kernel(held_out[:60], group) for group in groups],
        "recall": [distances.shares(held_out[:60], group).recall for group in groups],
    }
    for name, values in each.items():
        value, error = found.figures[f"{name}/train"]
        np.testing.assert_allclose(value, np.mean(values), rtol=1e-9)
        np.testing.assert_allclose(error, np.std(values, ddof=1), rtol=1e-9)
        assert found.figures[f"{name}/samples"].error is None


def test_faces_that_are_all_alike_are_precise_and_recall_nothing():
    held_out = normal(200, seed=0)
    alike = 0.01 * normal(200, seed=1)
    found = faces.compare({"samples": alike, "train": normal(200, seed=2)}, held_out).figures
    assert found["precision/samples"].value > 0.9
    assert found["recall/samples"].value < 0.05
    assert found["recall/train"].value > 0.7
    assert found["frechet/samples"].value > 10 * found["frechet/train"].value


def test_what_a_set_is_too_small_for_is_left_out_with_its_number():
    few = faces.compare({"samples": normal(49, seed=0)}, normal(90, seed=1))
    assert few.figures == {}
    assert "a set has 49 faces" in few.left_out["kernel/samples"]
    wide = faces.compare({"samples": normal(60, 64, seed=0)}, normal(90, 64, seed=1))
    assert "a covariance of 64 features needs 65" in wide.left_out["frechet/samples"]
    assert "kernel/samples" in wide.figures


def test_a_gap_is_of_samples_minus_reconstructions():
    figures = {
        "frechet/samples": Estimate(5.0, 0.3),
        "frechet/reconstructions": Estimate(2.0, 0.4),
        "kernel/samples": Estimate(1.0),
    }
    found = faces.gaps(figures)
    assert found.figures["frechet_gap"].value == 3
    np.testing.assert_allclose(found.figures["frechet_gap"].error or 0, 0.5)
    assert "kernel" in found.left_out["kernel_gap"]


def test_faces_that_were_learned_by_heart_are_found():
    random = np.random.default_rng(0)
    of = {HELD_OUT: random.uniform(1, 2, 200), "samples": random.uniform(1, 2, 400)}
    of["samples"][:100] = 0.1
    found = faces.memory("pixels", of).figures
    assert 0.25 <= found["copies_pixels/samples"].value < 0.28
    np.testing.assert_allclose(found["nearest_pixels/samples"].value, np.median(of["samples"]))
    assert "copies_pixels/held_out" not in found
    few = faces.memory("pixels", {**of, HELD_OUT: of[HELD_OUT][:99]})
    assert "99 held-out faces" in few.left_out["copies_pixels/samples"]


@pytest.mark.parametrize("held_out", [100, 150, 1000])
def test_by_chance_a_hundredth_is_near_however_few_are_held_out(held_out: int):
    random = np.random.default_rng(0)
    found = [
        copies.share_near(random.uniform(size=1000), random.uniform(size=held_out))
        for _ in range(2000)
    ]
    shares = np.array([share.value for share in found])
    assert abs(shares.mean() - copies.RARE) < 0.001
    errors = np.sqrt(np.mean([share.error**2 for share in found]))
    np.testing.assert_allclose(errors, shares.std(), rtol=0.1)


def test_a_person_is_the_mean_of_her_faces_and_nobody_is_no_person():
    training = np.array([[0, 0], [2, 0], [10, 0], [5, 5]], np.float32)
    people = ["a", "a", "b", ""]
    asked = np.array([[1, 0], [10, 3], [5, 5]], np.float32)
    found = faces.from_persons({"samples": asked}, training, people)["samples"]
    np.testing.assert_allclose(found, [0, 3, np.sqrt(41)], rtol=1e-6)


def test_the_nearest_is_the_same_however_many_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    some, others = normal(30, seed=0), normal(100, seed=1)
    others[70] = others[3]
    some[5] = others[3]
    found = distances.nearest(some, others)
    monkeypatch.setattr(distances, "CANDIDATES", 7)
    again = distances.nearest(some, others)
    np.testing.assert_array_equal(found.place, again.place)
    np.testing.assert_allclose(found.distance, again.distance)
    exact = np.linalg.norm(some[:, None] - others, axis=2)
    np.testing.assert_array_equal(found.place, exact.argmin(axis=1))
    assert found.place[5] == 3
