"""PSNR and SSIM against scikit-image's, which is written by others."""

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vaejax.evaluation import similarity


@pytest.fixture(scope="module")
def pairs(draw):
    images = draw(4, 24)
    noise = np.random.default_rng(0).normal(0, 20, images.shape)
    return images, np.clip(images + noise, 0, 255).astype(np.uint8)


def test_psnr_is_that_of_others(pairs):
    exact = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*pairs, strict=True)]
    np.testing.assert_allclose(similarity.psnr(*map(jnp.asarray, pairs)), exact, rtol=1e-5)


def test_ssim_is_that_of_others(pairs):
    exact = [
        structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=255, channel_axis=-1,
        )
        for a, b in zip(*pairs, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(similarity.ssim(*map(jnp.asarray, pairs)), exact, rtol=1e-4)


def test_a_copy_is_as_alike_as_can_be(pairs):
    image = jnp.asarray(pairs[0])
    np.testing.assert_allclose(similarity.ssim(image, image), 1, atol=1e-5)
    one_value_off = image.at[:, 0, 0, 0].add(1)
    copy, off = similarity.psnr(image, image), similarity.psnr(image, one_value_off)
    assert np.all(np.isfinite(copy))
    assert np.all(copy > off)


def test_an_image_smaller_than_the_window_has_no_ssim():
    image = jnp.zeros((1, 10, 10, 3), jnp.uint8)
    with pytest.raises(ValueError, match="11 pixels"):
        similarity.ssim(image, image)
