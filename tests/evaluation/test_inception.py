"""Inception is the network of pytorch-fid, and the FID's only with the FID's weights."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaejax.errors import UserError
from vaejax.evaluation import features, inception
from vaejax.evaluation.layers import largest, mean_of_neighbours
from vaejax.evaluation.pickles import Array
from vaejax.evaluation.weights import Weights

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
    for name, (k, l, c, o) in inception.kernels().items():  # noqa: E741
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


def test_inception_is_that_of_pytorch_fid(weights, monkeypatch):
    monkeypatch.setattr(features, "read_torch", lambda path: weights)
    found = features.inception(Path("inception.pth"))
    values = np.asarray(found.extract(two_images().astype(np.uint8)))
    assert values.shape == (2, found.dim)
    summary = np.column_stack([values[:, ::256], values.mean(axis=1), values.std(axis=1)])
    expected = np.array([line.split() for line in EXPECTED.strip().splitlines()], float)
    np.testing.assert_allclose(summary, expected, rtol=1e-4)
    assert found.name == "Inception pool3 (FID)"
    assert found.weights == f"inception.pth, SHA-256 {features.FID_SHA256}"


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
        inception.load(other)


def test_neighbours_are_those_in_the_image():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
    around = np.full((9, *x.shape), np.nan)
    for i, (top, left) in enumerate(np.ndindex(3, 3)):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
        around[i] = padded[:, top : top + 4, left : left + 5]
    np.testing.assert_allclose(mean_of_neighbours(x), np.nanmean(around, axis=0), rtol=1e-5)
    found = largest(x, size=3, stride=1, padding="SAME")
    np.testing.assert_array_equal(found, np.nanmax(around, axis=0))
    inner = jnp.asarray(np.nanmax(around, axis=0)[:, 1:-1:2, 1:-1:2])  # of whole windows
    np.testing.assert_array_equal(largest(x, size=3, stride=2), inner)
