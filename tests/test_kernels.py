"""The C++ kernels compute what XLA computes, and everything works without them."""

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
from numpy.typing import ArrayLike

from vaejax import files, kernels
from vaejax.models import convolution
from vaejax.models.convolution import convolve, convolve_transposed, native_algorithm
from vaejax.models.normalization import norm_silu

pytestmark = [
    pytest.mark.skipif(bool(kernels.unavailable_reason()), reason=kernels.unavailable_reason()),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]

# (images, height, width, channels, features, taps, stride): sizes that are multiples of vectors and
# tiles, and sizes that are not; an image no larger than a tile; more tiles than one block has
WINOGRAD = [
    (2, 16, 16, 32, 64, 5, 2), (1, 8, 8, 16, 16, 5, 2), (3, 12, 20, 12, 40, 5, 2),
    (1, 2, 6, 7, 5, 5, 2), (40, 16, 8, 5, 33, 5, 2), (800, 8, 8, 6, 6, 5, 2),
    (2, 8, 8, 32, 64, 3, 1), (1, 4, 4, 16, 16, 3, 1), (3, 11, 9, 12, 40, 3, 1),
    (1, 3, 5, 7, 5, 3, 1), (5, 33, 17, 5, 48, 3, 1), (70, 7, 6, 24, 12, 3, 1),
]  # fmt: skip
WINDOWS = [
    (2, 16, 16, 3, 32, 5, 1), (1, 7, 9, 1, 8, 3, 1), (5, 12, 20, 3, 20, 5, 4),
    (3, 6, 4, 4, 33, 5, 2), (1, 2, 2, 3, 5, 4, 1), (17, 9, 21, 2, 16, 3, 3),
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def always_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels for small convolutions too, and as if there were only one device."""
    monkeypatch.setattr(convolution, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(convolution, "winograd_is_faster", lambda *_: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def values_and_gradients(layer, x, kernel):
    y, pull_back = jax.vjp(layer, x, kernel)
    return [y, *pull_back(jnp.asarray(normal(*y.shape, seed=2), y.dtype))]


@pytest.mark.usefixtures("always_native")
@pytest.mark.parametrize("case", WINOGRAD + WINDOWS, ids=str)
@pytest.mark.parametrize("layer", [convolve, convolve_transposed], ids=lambda f: f.__name__)
def test_values_and_gradients_are_those_of_xla_in_double_precision(layer, case, monkeypatch):
    b, h, w, c, o, taps, stride = case
    kernel = normal(taps, taps, c, o, seed=1)
    image = normal(b, h, w, c)
    x = image if layer is convolve else normal(b, h // stride, w // stride, o)
    algorithm = native_algorithm(
        image.shape, kernel.shape, stride, jnp.asarray(image), jnp.asarray(kernel)
    )
    assert algorithm == ("winograd" if case in WINOGRAD else "windows")
    ours = values_and_gradients(partial(layer, stride=stride), jnp.asarray(x), jnp.asarray(kernel))
    with jax.enable_x64(True):
        monkeypatch.setattr(convolution, "native_algorithm", lambda *_: None)
        theirs = values_and_gradients(
            partial(layer, stride=stride), jnp.asarray(x, float), jnp.asarray(kernel, float)
        )
        for actual, expected in zip(ours, theirs, strict=True):
            error = np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)
            assert error < 2e-5


@pytest.mark.usefixtures("always_native")
@pytest.mark.parametrize("case", [WINOGRAD[2], WINOGRAD[8], WINDOWS[2]], ids=str)
@pytest.mark.parametrize("layer", [convolve, convolve_transposed], ids=lambda f: f.__name__)
def test_gradients_agree_with_finite_differences(layer, case):
    b, h, w, c, o, taps, stride = case
    x = normal(b, h, w, c) if layer is convolve else normal(b, h // stride, w // stride, o)
    arguments = (jnp.asarray(x), jnp.asarray(normal(taps, taps, c, o, seed=1)))
    # linear in each argument, and so exact for any step: a large one suits float32
    function = jax.jit(lambda x, kernel: layer(x, kernel, stride=stride))
    check_grads(function, arguments, order=1, modes=["rev"], eps=1.0, rtol=1e-3)


@pytest.mark.usefixtures("always_native")
@pytest.mark.parametrize("case", [WINOGRAD[2], WINOGRAD[8], WINDOWS[2]], ids=str)
def test_an_image_does_not_affect_the_others_of_its_batch(case):
    b, h, w, c, o, taps, stride = case
    image, kernel = normal(b, h, w, c), normal(taps, taps, c, o, seed=1)
    features = normal(b, h // stride, w // stride, o)
    image[1], features[1] = np.nan, np.nan
    for y in (
        convolve(jnp.asarray(image), jnp.asarray(kernel), stride=stride),
        convolve_transposed(jnp.asarray(features), jnp.asarray(kernel), stride=stride),
    ):
        assert np.isfinite(y[0]).all()
        assert np.isnan(y[1]).all()
        assert np.isfinite(y[2]).all()


# (images, height, width, channels, features) of convolutions by 3x3 kernels with stride 1
ODD = [
    (1, 5, 5, 3, 65), (2, 7, 33, 17, 3), (3, 9, 6, 65, 24), (4, 33, 10, 12, 16),
    (5, 13, 13, 31, 33), (1, 16, 5, 48, 47), (2, 6, 7, 64, 15), (5, 32, 31, 4, 12),
]  # fmt: skip


def direct_sum(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve by 3x3 kernels with stride 1 in float64, tap by tap."""
    b, h, w, _ = image.shape
    padded = np.pad(image.astype(float), [(0, 0), (1, 1), (1, 1), (0, 0)])
    y = np.zeros((b, h, w, kernel.shape[3]))
    for p in range(3):
        for q in range(3):
            y += padded[:, p : p + h, q : q + w] @ kernel[p, q].astype(float)
    return y


def inner(a: ArrayLike, b: ArrayLike) -> float:
    return float(np.vdot(np.asarray(a, float), np.asarray(b, float)))


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_winograd_of_stride_1_is_the_direct_sum_and_its_gradients_are_the_adjoints(shape):
    """<convolve(x, w), y> = <x, input_gradient(y, w)> = <w, kernel_gradient(x, y)>"""
    b, h, w, c, o = shape
    image, kernel, y = normal(b, h, w, c), normal(3, 3, c, o, seed=1), normal(b, h, w, o, seed=2)
    x, k, g = map(jnp.asarray, (image, kernel, y))
    expected = direct_sum(image, kernel)
    forward = np.asarray(kernels.forward("winograd", x, k, stride=1))
    assert np.linalg.norm(forward - expected) < 2e-5 * np.linalg.norm(expected)
    tolerance = 1e-6 * float(np.linalg.norm(expected) * np.linalg.norm(y))
    for a, dual in (
        (image, kernels.input_gradient("winograd", g, k, (h, w), stride=1)),
        (kernel, kernels.kernel_gradient("winograd", x, g, (3, 3), stride=1)),
    ):
        assert inner(a, dual) == pytest.approx(inner(expected, y), rel=0, abs=tolerance)


def test_the_report_s_layers_use_the_kernels(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    algorithms = [
        native_algorithm((128, size, size, c), (5, 5, c, o), stride, jnp.zeros(1))
        for size, c, o, stride in [
            (64, 3, 32, 1), (64, 32, 64, 2), (32, 64, 128, 2), (16, 128, 256, 2), (8, 256, 512, 2),
            (256, 3, 64, 4),
        ]
    ]  # fmt: skip
    assert algorithms == ["windows", *["winograd"] * 4, "windows"]


def test_a_residual_network_s_layers_use_the_kernels(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for size, c, o in [
        (32, 24, 24), (32, 24, 12), (32, 48, 48), (16, 48, 48), (16, 64, 64), (16, 192, 192),
        (8, 96, 96), (8, 128, 128), (4, 144, 144), (33, 5, 7),
    ]:  # fmt: skip
        assert native_algorithm((16, size, size, c), (3, 3, c, o), 1, jnp.zeros(1)) == "winograd"


def test_convolutions_for_which_winograd_is_slower_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for image, kernel, stride in [
        ((64, 2, 2, 128), (3, 3, 128, 128), 1),  # three quarters of every tile are empty
        ((128, 4, 4, 128), (5, 5, 128, 256), 2),
        ((1, 8, 8, 64), (3, 3, 64, 64), 1),  # too few tiles
        ((16, 4, 4, 512), (3, 3, 512, 512), 1),
        ((16, 8, 8, 64), (3, 3, 64, 64), 2),  # another stride
    ]:
        assert native_algorithm(image, kernel, stride, jnp.zeros(1)) is None


def test_other_dtypes_and_sizes_and_several_devices_are_left_to_xla(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    image, kernel = (128, 64, 64, 32), (5, 5, 32, 64)
    single, half = jnp.zeros(1), jnp.zeros(1, jnp.bfloat16)
    with jax.enable_x64(True):
        double = jnp.zeros(1)
    assert native_algorithm(image, kernel, 2, single) == "winograd"
    assert native_algorithm(image, kernel, 2, half, half) is None
    assert native_algorithm(image, kernel, 2, single, half) is None
    assert native_algorithm(image, kernel, 2, double) is None
    assert native_algorithm(image, (3, 3, 32, 64), 1, single) == "winograd"
    assert native_algorithm(image, (3, 3, 32, 64), 1, half, half) is None
    assert native_algorithm(image, (3, 3, 32, 64), 1, double) is None
    assert native_algorithm(image, (3, 3, 32, 64), 2, single) is None
    assert native_algorithm((128, 63, 64, 32), kernel, 2, single) is None
    assert native_algorithm((32, 8, 8, 8), (5, 5, 8, 4), 2, single) is None  # too little work
    assert native_algorithm((16, 8, 8, 256), (5, 5, 256, 512), 2, single) is None  # too few tiles
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert native_algorithm(image, kernel, 2, single) is None


# (images, height, width, channels, groups): rows of whole vectors and of parts of them, an image of
# fewer floats than a row, groups of one channel, one group of all
NORMS = [
    (16, 8, 8, 96, 8), (2, 5, 7, 24, 8), (3, 3, 3, 12, 4), (2, 1, 3, 40, 8), (3, 9, 4, 20, 5),
    (1, 17, 5, 7, 7), (4, 6, 5, 33, 1), (2, 32, 32, 24, 8),
]  # fmt: skip


def norm_arguments(case: tuple[int, ...], *, mean: float = 2.0) -> tuple[np.ndarray, ...]:
    b, h, w, c, _ = case
    x = 3 * normal(b, h, w, c) + np.float32(mean)
    return x, normal(c, seed=1), normal(c, seed=2), normal(b, 2, c, seed=3)


def by_definition(x, scale, bias, modulation, groups: int, epsilon: float):
    """SiLU of the modulated group norm, step by step as its equations are written."""
    b, h, w, c = x.shape
    grouped = x.reshape(b, h * w, groups, c // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = ((grouped - mean) ** 2).mean(axis=(1, 3), keepdims=True)
    normed = ((grouped - mean) / jnp.sqrt(variance + epsilon)).reshape(x.shape)
    normed = normed * scale.reshape(1, 1, 1, c) + bias.reshape(1, 1, 1, c)
    y = normed * (1 + modulation[:, None, None, 0]) + modulation[:, None, None, 1]
    return y / (1 + jnp.exp(-y))


def norm_and_gradients(function, arguments, dtype) -> list[np.ndarray]:
    y, pull_back = jax.vjp(jax.jit(function), *(jnp.asarray(a, dtype) for a in arguments))
    dy = np.random.default_rng(4).normal(size=y.shape).astype(np.float32)
    return [np.asarray(array) for array in (y, *pull_back(jnp.asarray(dy, dtype)))]


def relative_errors(case: tuple[int, ...], *, mean: float) -> list[float]:
    """Of the values and of the gradients by x, scale, bias and modulation, against float64."""
    settings = {"groups": case[-1], "epsilon": 1e-3}
    arguments = norm_arguments(case, mean=mean)
    ours = norm_and_gradients(partial(norm_silu, **settings), arguments, jnp.float32)
    with jax.enable_x64(True):
        theirs = norm_and_gradients(partial(by_definition, **settings), arguments, jnp.float64)
    pairs = zip(ours, theirs, strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.usefixtures("always_native")
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm_and_silu_and_their_gradients_are_the_definition_s_in_double_precision(case):
    assert max(relative_errors(case, mean=2.0)) < 2e-6


@pytest.mark.usefixtures("always_native")
def test_a_large_common_offset_does_not_spoil_the_norm():
    """In float32 the mean of the squares less the square of the mean would have no correct digit.

    The mean itself is rounded to 2^-24 of 3,000, six hundred-thousandths of x's deviation of 3.
    """
    assert max(relative_errors(NORMS[0], mean=3000.0)) < 2e-4


@pytest.mark.usefixtures("always_native")
@pytest.mark.parametrize("case", NORMS[1:4], ids=str)
def test_gradients_of_norm_and_silu_agree_with_finite_differences(case):
    function = jax.jit(partial(norm_silu, groups=case[-1], epsilon=1e-3))
    arguments = [jnp.asarray(a) for a in norm_arguments(case)]
    check_grads(function, arguments, order=1, modes=["rev"], eps=1e-2, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("always_native")
def test_silu_is_accurate_for_all_numbers():
    """With a scale of 0 the result is silu(bias): 16 channels for each number of a vector."""
    bias = np.concatenate([np.linspace(-100, 100, 4001), [-1e30, -88, -87, 0, 88, 89, 1e30]])
    bias = np.resize(bias, 4096).astype(np.float32)
    zeros, modulation = jnp.zeros(4096), jnp.zeros((1, 2, 4096))
    x = jnp.asarray(normal(1, 2, 1, 4096))
    y = np.asarray(norm_silu(x, zeros, jnp.asarray(bias), modulation, groups=1, epsilon=1e-3))
    with np.errstate(over="ignore"):
        expected = bias / (1 + np.exp(-bias.astype(float)))
    expected = np.broadcast_to(expected, y.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-30 * np.abs(bias).max())


@pytest.mark.usefixtures("always_native")
def test_the_norm_of_an_image_does_not_affect_the_others_of_its_batch():
    case = (3, 5, 7, 24, 8)
    x, *others = norm_arguments(case)
    settings = {"groups": 8, "epsilon": 1e-3}
    clean, *_ = norm_and_gradients(partial(norm_silu, **settings), (x, *others), jnp.float32)
    x[1, 2, 3, 4] = np.nan
    y, dx, *_ = norm_and_gradients(partial(norm_silu, **settings), (x, *others), jnp.float32)
    assert np.isnan(y[1, :, :, 3:6]).all()  # the group of channel 4
    assert np.isnan(dx[1, :, :, 3:6]).all()
    assert np.isfinite(np.delete(y[1], [3, 4, 5], axis=2)).all()
    np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
    assert np.isfinite(dx[[0, 2]]).all()


def test_other_dtypes_and_several_devices_leave_the_norm_to_xla(monkeypatch):
    def native(x, scale) -> bool:
        arguments = x, scale, scale, jnp.zeros((1, 2, 8))
        function = partial(norm_silu, groups=2, epsilon=1e-3)
        return "vaejax_norm_silu" in str(jax.make_jaxpr(function)(*arguments))

    x, scale = jnp.zeros((1, 4, 4, 8)), jnp.zeros(8)
    assert not native(x, scale)  # several devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert native(x, scale)
    assert not native(x.astype(jnp.bfloat16), scale)
    assert not native(x, scale.astype(jnp.bfloat16))


CONSTANTS = {"b1": 0.5, "b2": 0.999, "eps": 1e-8}
CORRECTIONS = jnp.asarray([1 - 0.5**3, 1 - 0.999**3], jnp.float32)


def moments() -> tuple[jax.Array, jax.Array, jax.Array]:
    """A gradient, and the moments before the third update; two and a half pieces for threads."""
    gradient, mean, root = (jnp.asarray(normal(5 * 2**15, seed=seed)) for seed in range(3))
    return gradient, mean, root**2


def test_adam_is_the_formula_of_its_paper():
    g, m, v = (np.asarray(array, np.float64) for array in moments())
    m, v = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g**2
    step = (m / (1 - 0.5**3)) / (np.sqrt(v / (1 - 0.999**3)) + 1e-8)
    actual = kernels.adam(*moments(), CORRECTIONS, jnp.float32(7.0), **CONSTANTS)
    for array, expected in zip(actual, (step, m, v), strict=True):
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", [np.nan, np.inf, -np.inf])
def test_adam_takes_no_step_where_the_norm_is_not_finite(norm):
    _, mean, square = moments()
    step, new_mean, new_square = kernels.adam(
        *moments(), CORRECTIONS, jnp.float32(norm), **CONSTANTS
    )
    assert not np.any(step)
    np.testing.assert_array_equal(new_mean, mean)
    np.testing.assert_array_equal(new_square, square)


@pytest.mark.parametrize("size", [0, 1, 63, 2**16, 5 * 2**15 + 3])
def test_the_squared_norm_is_the_sum_of_squares(size):
    x = normal(size)
    expected = np.sum(x.astype(np.float64) ** 2)
    np.testing.assert_allclose(kernels.squared_norm(jnp.asarray(x)), expected, rtol=1e-6)


GRADIENTS = """
import os, sys
if sys.argv[2] == "one":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import jax, numpy as np
from vaejax import kernels
from vaejax.models.convolution import convolve, convolve_transposed
from vaejax.models.normalization import norm_silu
def loss(a, b, c, scale, bias, modulation, x):
    features = convolve(x, a, stride=2)
    features = norm_silu(features, scale, bias, modulation, groups=8, epsilon=1e-6)
    features = convolve(features, c, stride=1)
    return (convolve_transposed(features, b, stride=2) ** 2).mean()
x, *weights = (np.sin(np.arange(np.prod(shape)) ** 2).astype(np.float32).reshape(shape)
               for shape in [(64, 32, 32, 16), (5, 5, 16, 40), (5, 5, 3, 24), (3, 3, 40, 24),
                             (40,), (40,), (64, 2, 40)])
gradients = jax.jit(jax.grad(loss, argnums=tuple(range(7))))(*weights, x)
np.savez(sys.argv[1], *gradients)
print(kernels.unavailable_reason())
"""


def gradients(folder: Path, threads: str, **environment: str) -> tuple[str, list[np.ndarray]]:
    """Compute the gradients of two layers in a process with one device.

    Returns why the kernels were unavailable, and the gradients.
    """
    path = folder / "gradients.npz"
    process = subprocess.run(
        [sys.executable, "-c", GRADIENTS, str(path), threads],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    with np.load(path) as arrays:
        return process.stdout.strip(), list(arrays.values())


def test_the_bits_are_the_same_with_any_number_of_threads_and_xla_agrees(tmp_path: Path):
    reason, many_threads = gradients(tmp_path, "all")
    assert reason == ""
    reason, one_thread = gradients(tmp_path, "one")
    assert reason == ""
    reason, xla = gradients(tmp_path, "all", CXX="no-such-compiler")
    assert "no-such-compiler" in reason
    for a, b, c in zip(many_threads, one_thread, xla, strict=True):
        np.testing.assert_array_equal(a, b)
        # not 0: without the kernels the rounding is another
        assert 0 < np.linalg.norm(a - c) <= 1e-4 * np.linalg.norm(c)


REASON = "from vaejax import kernels; print(kernels.unavailable_reason())"


def reason(**environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", REASON],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return process.stdout.strip()


def test_the_reason_names_the_variable_or_the_compiler_s_error(tmp_path: Path):
    assert reason(VAEJAX_NATIVE="0") == "VAEJAX_NATIVE=0"
    assert reason(CXX="c++ -include no-such-header.h").startswith("c++: ")
    assert "no-such-header.h" in reason(CXX="c++ -include no-such-header.h")


def test_a_build_is_kept_in_the_cache_folder_and_used_again(tmp_path: Path):
    compiler = tmp_path / "counting-c++"
    compiler.write_text(f'#!/bin/sh\necho >> {tmp_path / "calls"}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert reason(**environment) == reason(**environment) == ""
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    found = sorted((tmp_path / "cache" / "vaejax" / "kernels").iterdir())
    assert [path.suffix for path in found] == [".so", ".sha256"]


def test_half_of_a_library_is_built_again_and_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiler = tmp_path / "c++"
    compiler.write_text(
        f"""#!/bin/sh
echo >> {tmp_path / "calls"}
while [ $# -gt 1 ]; do [ "$1" = -o ] && printf library > "$2"; shift; done
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = kernels.build()
    checksum = library.with_name(f"{library.name}.sha256")

    def damage(path: Path, content: bytes | None) -> None:
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    def link() -> None:
        library.rename(tmp_path / "elsewhere")
        library.symlink_to(tmp_path / "elsewhere")

    damages = [
        lambda: damage(library, b"libr"),
        lambda: damage(library, b""),
        lambda: damage(library, b"malware"),
        lambda: damage(checksum, b""),
        lambda: damage(checksum, None),
        lambda: os.mkfifo(checksum) if damage(checksum, None) is None else None,
        link,
    ]
    for number, act in enumerate(damages, 1):
        assert kernels.build() == library  # as it was built
        assert len((tmp_path / "calls").read_text().splitlines()) == number
        act()
    assert kernels.build() == library
    assert library.read_bytes() == b"library"
    assert not library.is_symlink()
    assert {path.name for path in library.parent.iterdir()} == {library.name, checksum.name}


def test_a_library_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    events: list[str] = []
    monkeypatch.setattr(files, "fsync", lambda path: events.append(f"flush {Path(path).suffix}"))
    replace = os.replace

    def record(source: Path, target: Path) -> None:
        events.append(f"name {target.suffix}")
        replace(source, target)

    def compile_(command: list[str], **_: object) -> None:
        Path(command[-1]).write_bytes(b"library")

    monkeypatch.setattr(os, "replace", record)
    monkeypatch.setattr(subprocess, "run", compile_)
    kernels.build()
    assert events[:3] == ["flush .so", "name .so", "flush "]
