"""A run says whether its new faces are copies of training faces, and when it cannot tell."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_fit import MODEL, RECIPE, leave, train

from vaejax import nearest
from vaejax.data.batches import Images
from vaejax.errors import StorageError, UserError
from vaejax.models.convolutional import Convolutional
from vaejax.priors import StandardNormal
from vaejax.training import copies, run
from vaejax.training.copies import HELD_OUT, RECONSTRUCTIONS, SAMPLES
from vaejax.training.step import TrainState, init
from vaejax.training.visualize import Visualizer


class Stack(Images):
    """Images in memory, not on the disk."""

    def __init__(self, images: np.ndarray):
        self.images = images

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.images[indices]


@pytest.fixture(scope="module")
def training(draw) -> Stack:
    return Stack(draw(300, 16))


@pytest.fixture(scope="module")
def held_out(draw) -> Stack:
    return Stack(draw(150, 16, seed=1))


def noisy(images: np.ndarray) -> np.ndarray:
    """As a good decoder would draw them."""
    noise = np.random.default_rng(0).integers(-3, 4, images.shape)
    return np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def report_on(training: Stack, held_out: Stack):
    def report(samples: np.ndarray, reconstructions: np.ndarray, prior: str = "flow") -> dict:
        sets = {SAMPLES: samples, HELD_OUT: held_out.images, RECONSTRUCTIONS: reconstructions}
        found = copies.nearest_training_faces(sets, training)
        return copies.report(found, step=7, prior=prior, training=training)

    return report


# What is found ------------------------------------------------------------------------------------


def test_distances_are_those_of_all_pairs_of_means_over_areas(draw, monkeypatch):
    monkeypatch.setattr(copies, "BLOCK_PIXELS", 7 * 64**2)  # 7 images at a time
    images, known = draw(10, 64, seed=1), draw(50, 64)
    sets = {"a": images[:4], "b": images[4:]}
    found = copies.nearest_training_faces(sets, Stack(known))

    def means(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), 32, 2, 32, 2, 3).mean(axis=(2, 4)) / 255

    differences = means(images)[:, None] - means(known)[None]
    exact = np.sqrt(np.mean(differences**2, axis=(2, 3, 4)))
    indices, distances = (np.concatenate([found["a"][i], found["b"][i]]) for i in (0, 1))
    np.testing.assert_array_equal(indices, exact.argmin(axis=1))
    # the means are rounded to levels
    np.testing.assert_allclose(distances, exact.min(axis=1), atol=0.5 / 255)


def test_the_report_has_the_medians_and_the_share_of_the_evaluation(report_on, training, held_out):
    samples = training.images[:120]
    value = report_on(samples, noisy(samples))
    pairs = held_out.images[:, None].astype(float) - training.images[None]
    exact = np.sqrt(np.mean((pairs / 255) ** 2, axis=(2, 3, 4))).min(axis=1)
    assert value[SAMPLES]["median_distance"] == 0
    assert value[HELD_OUT]["median_distance"] == pytest.approx(np.median(exact), rel=1e-5)
    share = nearest.memorized_share(np.zeros(120), exact)
    assert (value[SAMPLES]["near_share"], value[SAMPLES]["near_share_error"]) == share
    assert [value[name]["faces"] for name in copies.TITLES] == [120, 150, 120]
    assert (value["size"], value["step"], value["training_images"]) == (16, 7, 300)


@pytest.mark.parametrize(("prior", "who"), [("flow", "the flow prior"), ("normal", "the model")])
def test_training_images_are_reported_as_copies(report_on, training, prior, who):
    value = report_on(noisy(training.images[100:200]), noisy(training.images[:100]), prior)
    assert f"{who} may have memorized" in copies.sentence(value)


def test_some_copies_among_new_faces_are_reported(report_on, training, draw):
    samples = draw(200, 16, seed=2)
    samples[:30] = training.images[:30]
    assert "may have memorized" in copies.sentence(report_on(samples, training.images[:100]))


def test_new_faces_are_not(report_on, training, draw):
    for seed in range(2, 7):
        value = report_on(draw(200, 16, seed=seed), noisy(training.images[:100]))
        assert copies.sentence(value).endswith("no sign of copying.")


def test_where_reconstructions_of_training_faces_are_not_near_copies_cannot_be_told(
    report_on, draw
):
    value = report_on(draw(200, 16, seed=2), draw(100, 16, seed=3))
    assert "Copies cannot be told from new faces" in copies.sentence(value)


# What a run writes --------------------------------------------------------------------------------


@pytest.fixture
def state() -> TrainState:
    trainer = RECIPE.trainer(updates=1)
    return init(jax.random.key(0), trainer=trainer)


def test_a_prior_that_returns_training_faces_is_found_and_drawn_above_them(
    state, training, held_out, tmp_path, monkeypatch
):
    decoded = iter(training.images[:200].reshape(8, 25, 16, 16, 3))
    monkeypatch.setattr(Visualizer, "_decode", lambda *_: next(decoded))
    monkeypatch.setattr(Visualizer, "_reconstruct", lambda self, state, faces: noisy(faces))
    visualizer = Visualizer(tmp_path, MODEL, held_out)
    value = visualizer.draw_nearest(state, StandardNormal(MODEL), training, held_out)
    assert value is not None
    assert value[SAMPLES]["near_share"] == 1
    assert "may have memorized" in copies.sentence(value)
    picture = np.asarray(Image.open(tmp_path / "nearest.png"))
    above, below = picture[2:18], picture[20:36]  # with gaps of 2 pixels
    np.testing.assert_array_equal(above, below)
    np.testing.assert_array_equal(above[:, 2:18], training.images[0])


def test_the_report_is_the_same_each_time(state, training, held_out, tmp_path):
    results = []
    for _ in range(2):
        visualizer = Visualizer(tmp_path, MODEL, held_out)
        value = visualizer.draw_nearest(state, None, training, held_out)
        results.append((json.dumps(value), (tmp_path / "nearest.png").read_bytes()))
    assert results[0] == results[1]
    assert json.loads(results[0][0])[SAMPLES]["faces"] == 200


def test_a_model_that_draws_no_new_faces_has_no_report(state, training, held_out, tmp_path):
    visualizer = Visualizer(tmp_path, Convolutional(size=16), held_out)
    assert visualizer.draw_nearest(state, None, training, held_out) is None
    assert not (tmp_path / "nearest.png").exists()


@pytest.mark.parametrize(
    ("known", "new", "reason"),
    [(99, 100, "99 training images are too few"), (100, 99, "99 held-out faces are too few")],
)
def test_too_few_images_are_a_reason_for_no_report(
    known, new, reason, state, training, held_out, tmp_path
):
    (tmp_path / "nearest.png").write_bytes(b"of a shorter run, with other images")
    few = Stack(training.images[:known]), Stack(held_out.images[:new])
    value = Visualizer(tmp_path, MODEL, held_out).draw_nearest(state, None, *few)
    assert value is not None
    assert reason in copies.sentence(value)
    assert not (tmp_path / "nearest.png").exists()
    assert copies.too_few(Stack(training.images[:100]), Stack(held_out.images[:100])) is None


def test_a_damaged_training_image_is_a_reason_for_no_report(state, training, held_out, tmp_path):
    damaged = Stack(training.images)

    def read(indices: np.ndarray) -> np.ndarray:
        raise UserError("the prepared data set is damaged.")

    damaged.read = read
    value = Visualizer(tmp_path, MODEL, held_out).draw_nearest(state, None, damaged, held_out)
    assert value == {"left_out": "the prepared data set is damaged"}


@pytest.mark.parametrize("value", [None, 7, "text", {}, {SAMPLES: 1}, {"samples": {"faces": "x"}}])
def test_a_report_that_was_changed_by_hand_is_not_shown(value):
    assert copies.section(value) == []


def test_a_run_says_why_it_has_no_report(complete_run: Path):
    readme = (complete_run / "README.md").read_text()
    assert "## Copies of training faces?\n\nCopies of training faces were not looked for" in readme
    assert "too few (at least 100)" in readme
    assert not (complete_run / "nearest.png").exists()


def test_the_end_of_a_run_writes_the_report_and_is_done_again_where_it_was_interrupted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    for module, name in ((copies, "MIN_TRAINING"), (copies, "MIN_HELD_OUT")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(nearest, "MIN_HELD_OUT", 1)
    out = tmp_path / "run"
    train(data, out, steps=2)
    value = run.read_status(out)["copies"]
    text = copies.sentence(value)
    assert text in capsys.readouterr().out
    section = "\n".join(copies.section(value))
    readme = (out / "README.md").read_text()
    assert text in section
    assert section in readme
    assert "(nearest.png)" in readme
    picture = (out / "nearest.png").read_bytes()

    train(data, out, steps=2)  # only the README is written again
    assert section in (out / "README.md").read_text()

    (out / "nearest.png").unlink()
    (out / "nearest.png").mkdir()  # cannot be written
    leave(out, "running")  # as after a kill
    with pytest.raises(StorageError, match="the search for copies"):
        train(data, out, steps=2)
    assert run.status(out) == "stopped"
    assert "copies" not in run.read_status(out)
    (out / "nearest.png").rmdir()
    train(data, out, steps=2)
    assert run.status(out) == "finished"
    assert (out / "nearest.png").read_bytes() == picture
    assert run.read_status(out)["copies"] == value
