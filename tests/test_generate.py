"""Pictures in, pictures out: decoding, reconstructing, corrupting, posterior means."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaejax import generate
from vaejax.data.batches import Images
from vaejax.models import autoencoder
from vaejax.models.denoising import Denoising
from vaejax.models.vae import VAE

MODEL = VAE(size=16, latent_dim=3, width=1)


class Held(Images):
    """Images in memory."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.batches = pixels, []

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.batches.append(len(indices))
        return self.pixels[indices]


@pytest.fixture(scope="module")
def weights():
    """Far from the initial ones, whose decoder hardly depends on z."""
    params, batch_stats = jax.jit(partial(autoencoder.init, MODEL))(jax.random.key(0))
    random = np.random.default_rng(0)
    move = lambda a: a + random.normal(0, 0.3, a.shape).astype("f")  # noqa: E731
    return jax.tree.map(move, params), batch_stats


@pytest.fixture(scope="module")
def pixels(draw) -> np.ndarray:
    return draw(7, 16)


def posterior(weights, pixels: np.ndarray):
    return jax.jit(partial(autoencoder.encode, MODEL))(*weights, jnp.asarray(pixels) / 255)


def test_a_decoded_face_is_the_mode_of_the_likelihood_in_levels(weights):
    z = jax.random.normal(jax.random.key(1), (4, 3))
    mean = jax.jit(partial(autoencoder.decode, MODEL))(*weights, z)
    faces = generate.decode(*weights, z, model=MODEL)
    assert faces.dtype == jnp.uint8
    assert np.abs(np.asarray(faces, float) - np.clip(mean, 0, 1) * 255).max() <= 0.501


def test_a_reconstruction_is_decoded_from_the_posterior_mean(weights, pixels):
    mean = posterior(weights, pixels).mean
    expected, other = (
        np.asarray(generate.decode(*weights, z, model=MODEL), int) for z in (mean, mean + 0.3)
    )
    actual = generate.reconstruct(*weights, pixels, model=MODEL)
    assert np.abs(actual - expected).max() <= 1  # of rounding
    assert np.abs(other - expected).max() > 1


def test_corrupted_images_differ_by_their_noise(pixels):
    model = Denoising(size=16, noise=0.1)
    noisy = generate.corrupt(pixels, jax.random.key(0), model=model)
    apart = (np.asarray(noisy, float) - pixels) / 255
    assert 0.05 < apart.std() < 0.11  # what leaves the range is cut off
    again = generate.corrupt(pixels, jax.random.key(0), model=model)
    assert np.array_equal(noisy, again)
    assert np.array_equal(generate.corrupt(pixels, jax.random.key(0), model=MODEL), pixels)


@pytest.mark.parametrize("most", [1, 3, 4, 6, 7, 99])
def test_posterior_means_are_those_of_the_first_images(most, weights, pixels, monkeypatch):
    monkeypatch.setattr(generate, "BATCH", 3)
    images = Held(pixels)
    means = generate.posterior_means(*weights, images, model=MODEL, most=most)
    expected = posterior(weights, pixels).mean[:most]
    assert means.shape == (min(most, 7), 3)
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)
    assert set(images.batches) == {3}  # one shape is compiled
