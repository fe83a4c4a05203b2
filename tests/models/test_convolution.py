"""All forms compute the same convolution and gradients, and the fast one is chosen."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from vaejax.models import convolution
from vaejax.models.convolution import (
    compiler_options,
    convolve,
    convolve_transposed,
    patches,
    phases,
    plain,
    xla_form,
)

STRIDES = [1, 2, 4]

# (size of the image, size of the kernel): divisible by the stride; not divisible; an image smaller
# than its kernel; a kernel smaller than the stride
CASES = [((8, 12), (5, 5)), ((7, 5), (4, 5)), ((2, 3), (6, 5)), ((5, 8), (1, 3))]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}

# (height and width, channels, features, stride) of the convolutions of the report's encoder at 64
# pixels, which are also those that its decoder transposes; the last is the first layer at 256
REPORT = [(64, 3, 32, 1), (64, 32, 64, 2), (32, 64, 128, 2), (16, 128, 256, 2), (8, 256, 512, 2)]
REPORT_LAST = (256, 3, 64, 4)


@pytest.fixture
def small_work_uses_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "MIN_PRODUCTS", 0)


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int = 0, dtype: str = "float64") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def difference(a: jax.Array, b: jax.Array) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


@partial(jax.jit, static_argnums=0)
def values_and_gradients(
    layer: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array
) -> list[jax.Array]:
    y, pull_back = jax.vjp(layer, x, kernel)
    return [y, *pull_back(jnp.cos(y))]


def xla(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    same = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=same)


def xla_transposed(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    b, h, w, _ = x.shape
    image = jax.ShapeDtypeStruct((b, h * stride, w * stride, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda image: xla(image, kernel, stride), image)(x)[0]


@pytest.mark.usefixtures("x64", "small_work_uses_every_form")
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(("size", "taps"), CASES)
def test_convolve_and_its_gradients_are_those_of_xla(
    size: tuple[int, int], taps: tuple[int, int], stride: int
) -> None:
    for dtype in TOLERANCE if size == (8, 12) else ["float64"]:
        x, kernel = normal(2, *size, 3, dtype=dtype), normal(*taps, 3, 4, seed=1, dtype=dtype)
        ours = values_and_gradients(partial(convolve, stride=stride), x, kernel)
        theirs = values_and_gradients(partial(xla, stride=stride), x, kernel)
        assert max(map(difference, ours, theirs)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("x64", "small_work_uses_every_form")
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize(("size", "taps"), CASES)
def test_convolve_transposed_and_its_gradients_are_those_of_xla(
    size: tuple[int, int], taps: tuple[int, int], stride: int
) -> None:
    for dtype in TOLERANCE if size == (8, 12) else ["float64"]:
        x, kernel = normal(2, *size, 4, dtype=dtype), normal(*taps, 3, 4, seed=1, dtype=dtype)
        ours = values_and_gradients(partial(convolve_transposed, stride=stride), x, kernel)
        theirs = values_and_gradients(partial(xla_transposed, stride=stride), x, kernel)
        assert max(map(difference, ours, theirs)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("x64", "small_work_uses_every_form")
@pytest.mark.parametrize("paddings", [[(0, 0), (0, 0)], [(2, 2), (3, 0)], [(5, 1), (-1, 4)]])
def test_phases_and_patches_equal_the_plain_form_with_any_padding(paddings: list) -> None:
    image, kernel = normal(2, 6, 7, 3), normal(5, 4, 3, 4, seed=1)
    for n in (1, 2, 3):
        for form, option in ((phases, "dilation"), (patches, "stride")):
            actual = jax.jit(partial(form, paddings=paddings, **{option: n}))(image, kernel)
            expected = plain(image, kernel, paddings, **{option: n})
            assert difference(actual, expected) < 1e-12, (option, n)


@pytest.mark.usefixtures("x64", "small_work_uses_every_form")
@pytest.mark.parametrize("stride", STRIDES)
def test_the_transposed_convolution_is_the_adjoint(stride: int) -> None:
    """<convolve(x, w), g> = <x, convolve_transposed(g, w)>"""
    x, kernel = normal(2, 8, 12, 3), normal(5, 5, 3, 4, seed=1)
    g = normal(2, 8 // stride, 12 // stride, 4, seed=2)
    left = jnp.vdot(convolve(x, kernel, stride=stride), g)
    right = jnp.vdot(x, convolve_transposed(g, kernel, stride=stride))
    assert float(left) == pytest.approx(float(right), rel=1e-12)


def naive_taps(size: int, taps: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield every (output, tap, input) of a sum, by TensorFlow's definition of "SAME"."""
    outputs = -(-size // stride)
    overhang = max(taps - (stride if size % stride == 0 else size % stride), 0)
    for i, p in product(range(outputs), range(taps)):
        n = i * stride + p - overhang // 2
        if 0 <= n < size:
            yield i, p, n


@pytest.mark.usefixtures("x64", "small_work_uses_every_form")
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [(8, 4), (7, 5)])
def test_convolve_is_the_naive_sum(size: tuple[int, int], stride: int) -> None:
    x, kernel = normal(2, *size, 2), normal(5, 4, 2, 3, seed=1)
    y = np.zeros((2, *(-(-n // stride) for n in size), 3))
    for i, p, n in naive_taps(size[0], 5, stride):
        for j, q, m in naive_taps(size[1], 4, stride):
            y[:, i, j] += np.asarray(x)[:, n, m] @ np.asarray(kernel)[p, q]
    np.testing.assert_allclose(convolve(x, kernel, stride=stride), y, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64", "small_work_uses_every_form")
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [(4, 2), (3, 5)])
def test_convolve_transposed_is_the_naive_sum(size: tuple[int, int], stride: int) -> None:
    x, kernel = normal(2, *size, 3), normal(5, 4, 2, 3, seed=1)
    h, w = (n * stride for n in size)
    y = np.zeros((2, h, w, 2))
    for i, p, n in naive_taps(h, 5, stride):
        for j, q, m in naive_taps(w, 4, stride):
            y[:, n, m] += np.asarray(x)[:, i, j] @ np.asarray(kernel)[p, q].T
    actual = convolve_transposed(x, kernel, stride=stride)
    np.testing.assert_allclose(actual, y, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64", "small_work_uses_every_form")
@pytest.mark.parametrize("layer", [convolve, convolve_transposed])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("side", [8, 3])
def test_gradients_agree_with_finite_differences(layer: Callable, stride: int, side: int) -> None:
    ins, outs = (2, 3) if layer is convolve else (3, 2)
    x, kernel = normal(2, side, side, ins), normal(5, 5, min(ins, outs), max(ins, outs), seed=1)
    nonlinear = jax.jit(lambda x, kernel: jnp.sin(layer(x, kernel, stride=stride)))
    check_grads(nonlinear, (x, kernel), modes=["rev"], order=1, rtol=1e-6, atol=1e-6, eps=1e-5)


@pytest.mark.usefixtures("x64")
def test_a_3x3_convolution_in_double_precision_is_xla_s_and_its_gradients_are_consistent() -> None:
    x, kernel = normal(8, 12, 12, 5), normal(3, 3, 5, 24, seed=1)
    layer = partial(convolve, stride=1)
    program = str(jax.make_jaxpr(partial(values_and_gradients, layer))(x, kernel))
    assert "ffi_call" not in program
    assert program.count("conv_general_dilated") >= 3
    nonlinear = jax.jit(lambda x, kernel: jnp.sin(layer(x, kernel)))
    check_grads(nonlinear, (x, kernel), modes=["rev"], order=1)


@pytest.mark.parametrize("stride", STRIDES)
def test_bfloat16_is_summed_in_float32_and_rounded_once(stride: int) -> None:
    x, kernel = normal(4, 16, 16, 32, dtype="bfloat16"), normal(5, 5, 32, 32, dtype="bfloat16")
    floats = x.astype("float32"), kernel.astype("float32")
    layer = jax.jit(partial(convolve, stride=stride))
    assert layer(x, kernel).dtype == jnp.bfloat16
    rounded = layer(*floats).astype("bfloat16").astype("float32")
    # bfloat16 has 8 bits of mantissa: the last one may be rounded differently
    np.testing.assert_allclose(layer(x, kernel).astype("float32"), rounded, rtol=2**-7, atol=1e-2)


def layer_gradients(size: int, channels: int, features: int, stride: int, batch: int) -> str:
    """Return the program of a convolution, its transpose and all their gradients."""
    x = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    kernel = jax.ShapeDtypeStruct((5, 5, channels, features), jnp.float32)

    def both(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = convolve(x, kernel, stride=stride)
        return jnp.sum(convolve_transposed(y, kernel, stride=stride) ** 2)

    return str(jax.make_jaxpr(jax.grad(both, argnums=(0, 1)))(x, kernel))


@pytest.mark.parametrize("layer", [*REPORT, REPORT_LAST])
@pytest.mark.parametrize("batch", [8, 128])
def test_no_layer_of_the_report_has_a_dilated_image_which_xla_computes_in_naive_loops(
    layer: tuple[int, int, int, int], batch: int
) -> None:
    assert jax.default_backend() == "cpu"
    size, channels, features, stride = layer
    program = layer_gradients(size, channels, features, stride, batch)
    assert "lhs_dilation=(1, 1)" in program
    assert program.count("lhs_dilation=(1, 1)") == program.count("lhs_dilation")


def test_an_image_smaller_than_its_kernel_is_a_matrix_product() -> None:
    """As in the deepest layers for faces of 16 and 32 pixels."""
    for side in (2, 4):
        assert xla_form((64, side, side, 256), (5, 5, 256, 512), stride=2) == "patches"
    assert xla_form((64, 8, 8, 256), (5, 5, 256, 512), stride=2) == "plain"


def test_tiny_work_is_left_to_xla() -> None:
    assert xla_form((4, 4, 4, 8), (5, 5, 8, 4), dilation=2) == "plain"
    assert xla_form((128, 4, 4, 512), (5, 5, 512, 256), dilation=2) == "phases"


def test_another_backend_gets_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for size, channels, features, stride in REPORT:
        g = (128, size // stride, size // stride, features)
        assert xla_form(g, (5, 5, features, channels), dilation=stride) == "plain"
    assert "lhs_dilation=(2, 2)" in layer_gradients(8, 256, 512, 2, batch=128)
    assert compiler_options.__wrapped__() == {}


def test_the_compiler_accepts_the_options() -> None:
    x, kernel = normal(2, 8, 8, 32, dtype="float32"), normal(5, 5, 32, 32, dtype="float32")
    layer = partial(convolve, stride=2)
    with_options = jax.jit(layer, compiler_options=compiler_options())
    assert difference(with_options(x, kernel), layer(x, kernel)) < 1e-5


def test_options_unknown_to_the_compiler_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolution, "EIGEN_CONVOLUTIONS", {"xla_cpu_no_such_option": "1"})
    assert compiler_options.__wrapped__() == {}


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vaejax.models import convolution
from vaejax.models.convolution import convolve, convolve_transposed

convolution.MIN_PRODUCTS = 0

def loss(kernel, x):
    y = convolve(x, kernel, stride=2)
    return jnp.mean(jnp.sin(convolve_transposed(y, kernel, stride=2)))

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
random = np.random.default_rng(0)
kernel = jnp.asarray(random.normal(size=(5, 5, 3, 8)), jnp.float32)
x = jnp.asarray(random.normal(size=(8, 6, 6, 3)), jnp.float32)
one = jax.jit(jax.grad(loss))(kernel, x)

four = jax.jit(jax.grad(loss), in_shardings=(replicated, split), out_shardings=replicated)
four = four.lower(kernel, x).compile()
for gather in ("all-gather", "all-to-all", "collective-permute"):
    assert gather not in four.as_text(), gather
gradient = four(jax.device_put(kernel, replicated), jax.device_put(x, split))
np.testing.assert_allclose(gradient, one, rtol=1e-4, atol=1e-6)

def share(kernel, x):
    kernel = jax.lax.pcast(kernel, "data", to="varying")
    return jax.lax.pmean(jax.grad(loss)(kernel, x), "data")

mapped = jax.shard_map(share, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
np.testing.assert_allclose(jax.jit(mapped)(kernel, x), one, rtol=1e-4, atol=1e-6)
mapped = jax.pmap(share, axis_name="data", in_axes=(None, 0), out_axes=None)
np.testing.assert_allclose(mapped(kernel, x.reshape(4, 2, 6, 6, 3)), one, rtol=1e-4, atol=1e-6)
"""


def test_four_devices_share_a_batch_without_gathering_it() -> None:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", SHARDED], env=environment, check=True)
