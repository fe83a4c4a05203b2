"""The kernels of our own are the same convolutions as XLA's, and nothing depends on them."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vaejax import native
from vaejax.models import convolution
from vaejax.models.convolution import convolve, convolve_transposed, native_form

pytestmark = [
    pytest.mark.skipif(bool(native.missing()), reason=native.missing()),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]

# (images, height, width, channels, features, taps, stride): whole vectors and tiles, and neither;
# an image no larger than a tile; more tiles than are computed at a time
WINOGRAD = [
    (2, 16, 16, 32, 64, 5, 2), (1, 8, 8, 16, 16, 5, 2), (3, 12, 20, 12, 40, 5, 2),
    (1, 2, 6, 7, 5, 5, 2), (40, 16, 8, 5, 33, 5, 2), (300, 8, 8, 6, 6, 5, 2),
]  # fmt: skip
WINDOWS = [
    (2, 16, 16, 3, 32, 5, 1), (1, 7, 9, 1, 8, 3, 1), (5, 12, 20, 3, 20, 5, 4),
    (3, 6, 4, 4, 33, 5, 2), (1, 2, 2, 3, 5, 4, 1), (17, 9, 21, 2, 16, 3, 3),
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with one device, and however little work there is."""
    monkeypatch.setattr(convolution, "TINY", 0)
    monkeypatch.setattr(convolution, "FEW_TILES", 0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def values_and_gradients(layer, x, kernel):
    y, pull_back = jax.vjp(layer, x, kernel)
    return [y, *pull_back(jnp.asarray(normal(*y.shape, seed=2), y.dtype))]


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("case", WINOGRAD + WINDOWS, ids=str)
@pytest.mark.parametrize("layer", [convolve, convolve_transposed], ids=lambda f: f.__name__)
def test_every_map_is_that_of_xla_in_double_precision(layer, case, monkeypatch):
    b, h, w, c, o, taps, stride = case
    kernel = normal(taps, taps, c, o, seed=1)
    image = normal(b, h, w, c)
    x = image if layer is convolve else normal(b, h // stride, w // stride, o)
    chosen = native_form(image.shape, kernel.shape, stride, *map(jnp.asarray, (image, kernel)))
    assert chosen == ("winograd" if case in WINOGRAD else "windows")
    ours = values_and_gradients(partial(layer, stride=stride), jnp.asarray(x), jnp.asarray(kernel))
    with jax.enable_x64(True):
        monkeypatch.setattr(convolution, "native_form", lambda *_: None)
        theirs = values_and_gradients(
            partial(layer, stride=stride), jnp.asarray(x, float), jnp.asarray(kernel, float)
        )
        for found, expected in zip(ours, theirs, strict=True):
            error = np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)
            assert error < 2e-5


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("case", [WINOGRAD[2], WINDOWS[2]], ids=str)
@pytest.mark.parametrize("layer", [convolve, convolve_transposed], ids=lambda f: f.__name__)
def test_their_gradients_are_those_of_finite_differences(layer, case):
    b, h, w, c, o, taps, stride = case
    x = normal(b, h, w, c) if layer is convolve else normal(b, h // stride, w // stride, o)
    arguments = (jnp.asarray(x), jnp.asarray(normal(taps, taps, c, o, seed=1)))
    # linear in each argument, and so exact whatever the step: a large one, for float32
    function = jax.jit(lambda x, kernel: layer(x, kernel, stride=stride))
    check_grads(function, arguments, order=1, modes=["rev"], eps=1.0, rtol=1e-3)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("case", [WINOGRAD[2], WINDOWS[2]], ids=str)
def test_an_image_does_not_see_its_neighbours(case):
    b, h, w, c, o, taps, stride = case
    image, kernel = normal(b, h, w, c), normal(taps, taps, c, o, seed=1)
    code = normal(b, h // stride, w // stride, o)
    image[1], code[1] = np.nan, np.nan
    for y in (
        convolve(jnp.asarray(image), jnp.asarray(kernel), stride=stride),
        convolve_transposed(jnp.asarray(code), jnp.asarray(kernel), stride=stride),
    ):
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()
        assert np.isfinite(y[2]).all()


def test_the_report_s_layers_are_taken_and_what_is_not_float32_is_not(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    found = [
        native_form((128, size, size, c), (5, 5, c, o), stride, jnp.zeros(1))
        for size, c, o, stride in [
            (64, 3, 32, 1), (64, 32, 64, 2), (32, 64, 128, 2), (16, 128, 256, 2), (8, 256, 512, 2),
            (256, 3, 64, 4),
        ]
    ]  # fmt: skip
    assert found == ["windows", *["winograd"] * 4, "windows"]
    single, half = jnp.zeros(1), jnp.zeros(1, jnp.bfloat16)
    assert native_form((128, 64, 64, 32), (5, 5, 32, 64), 2, half, half) is None
    assert native_form((128, 64, 64, 32), (5, 5, 32, 64), 2, single, half) is None
    assert native_form((128, 64, 64, 32), (3, 3, 32, 64), 2, single) is None
    assert native_form((128, 63, 64, 32), (5, 5, 32, 64), 2, single) is None
    monkeypatch.setattr(jax, "device_count", lambda: 4)  # XLA could not split them
    assert native_form((128, 64, 64, 32), (5, 5, 32, 64), 2, single) is None


GRADIENTS = """
import os, sys
if sys.argv[2] == "one":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import jax, numpy as np
from vaejax import native
from vaejax.models.convolution import convolve, convolve_transposed
def loss(a, b, x):
    code = convolve(x, a, stride=2)
    return (convolve_transposed(code, b, stride=2) ** 2).mean()
x, a, b = (np.sin(np.arange(np.prod(shape)) ** 2).astype(np.float32).reshape(shape)
           for shape in [(64, 32, 32, 16), (5, 5, 16, 40), (5, 5, 3, 40)])
found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(a, b, x)
np.savez(sys.argv[1], *found)
print(not native.missing())
"""


def gradients(folder: Path, threads: str, **environment: str) -> tuple[str, list[np.ndarray]]:
    """Of two layers, in a process with one device; and whether the kernels were there."""
    out = folder / "gradients.npz"
    ran = subprocess.run(
        [sys.executable, "-c", GRADIENTS, str(out), threads],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    with np.load(out) as kept:
        return ran.stdout.strip(), list(kept.values())


def test_the_same_bits_on_any_number_of_threads_and_the_same_figures_without(tmp_path: Path):
    here, ours = gradients(tmp_path, "all")
    one, alone = gradients(tmp_path, "one")
    without, theirs = gradients(tmp_path, "all", CXX="no-such-compiler")
    assert (here, one, without) == ("True", "True", "False")
    for a, b, c in zip(ours, alone, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
        assert 0 < np.linalg.norm(a - c) <= 1e-4 * np.linalg.norm(c)  # not 0: they were used
