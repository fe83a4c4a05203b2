"""PSNR and SSIM against scikit-image's, which is written by others."""

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vaejax.evaluation import likelihood


@pytest.fixture(scope="module")
def pairs(draw):
    images = draw(4, 24)
    noise = np.random.default_rng(0).normal(0, 20, images.shape)
    return images, np.clip(images + noise, 0, 255).astype(np.uint8)


def test_psnr_is_that_of_others(pairs):
    exact = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*pairs, strict=True)]
    np.testing.assert_allclose(likelihood.psnr(*map(jnp.asarray, pairs)), exact, rtol=1e-5)


def test_ssim_is_that_of_others(pairs):
    exact = [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=255, channel_axis=-1,
        )
        for a, b in zip(*pairs, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(likelihood.ssim(*map(jnp.asarray, pairs)), exact, rtol=1e-4)


def test_a_copy_counts_as_half_a_level_off_in_one_value(pairs):
    image = jnp.asarray(pairs[0])
    np.testing.assert_allclose(likelihood.ssim(image, image), 1, atol=1e-5)
    values = 24 * 24 * 3
    one_level_off = image.at[:, 0, 0, 0].set(image[:, 0, 0, 0] ^ 1)
    for other, squares in ((image, 0.25), (one_level_off, 1)):
        exact = np.broadcast_to(10 * np.log10(255**2 * values / squares), 4)
        np.testing.assert_allclose(likelihood.psnr(image, other), exact, rtol=1e-6)


def test_an_image_smaller_than_the_window_has_no_ssim():
    image = jnp.zeros((1, 10, 10, 3), jnp.uint8)
    with pytest.raises(ValueError, match="11 pixels"):
        likelihood.ssim(image, image)
