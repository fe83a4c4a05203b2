"""Operations one by one: onnxruntime computes what JAX computes, for batches of any size."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from small_exports import run_onnx

from vaejax.errors import UserError
from vaejax.export.graph import Network, to_onnx
from vaejax.models.convolution import convolve, convolve_transposed

TABLE = np.random.default_rng(9).normal(size=(5, 4)).astype(np.float32)
KERNEL = np.random.default_rng(8).normal(size=(3, 3, 2, 4)).astype(np.float32)
LAYOUT = ("NHWC", "HWIO", "NHWC")


def attention(x):
    scores = jnp.einsum("bqhd,bkhd->bhqk", x, x) / 2
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), x)


def class_token(x):
    tokens = jnp.broadcast_to(TABLE[:1, None, :2], (len(x), 1, 2))
    return jnp.concatenate([tokens, x.reshape(len(x), -1, 2)], axis=1)


def constant_start(x):
    """A decoder that begins with a constant, and scales it by its input."""
    start = jnp.broadcast_to(TABLE[None, :4, :, None], (len(x), 4, 4, 2))
    return nn.max_pool(start, (2, 2), (2, 2)) * x[:, :1, :1]


def recurrent(x):
    """A loop from the last row to the first."""

    def step(state, row):
        return jnp.tanh(state + row[None, None, None]), None

    return lax.scan(step, x, jnp.asarray(TABLE[:, :2]), reverse=True)[0]


def strided(x, kernel=KERNEL, **settings):
    settings = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT} | settings
    return lax.conv_general_dilated(x, kernel, **settings)


# of an image [b 4 6 2]
FUNCTIONS: dict[str, Callable] = {
    "activations": lambda x: nn.gelu(x) + nn.selu(x) + nn.softplus(x) + nn.elu(x) + nn.relu6(x),
    "exact gelu": lambda x: nn.gelu(x, approximate=False),
    "powers": lambda x: x**2 + x**3 + jnp.abs(x) ** 0.5 + jnp.sqrt(jnp.abs(x)) + jnp.square(x),
    "logarithms": lambda x: jnp.log1p(jnp.abs(x)) + jnp.log(2 + jnp.abs(x)) + jnp.expm1(x),
    "comparisons": lambda x: jnp.where((x > 0) & ~(x >= 1) | (x == 0), x, jnp.where(x != 2, -x, 1)),
    "rounding": lambda x: jnp.floor(x) + jnp.ceil(2 * x) + jnp.sign(x) + jnp.clip(x, -0.5, 0.5),
    "angles": lambda x: jnp.sin(x) * jnp.cos(x),
    "extremes": lambda x: x.max(axis=(1, 2)) - x.min(axis=(1, 2)) + x.mean(axis=(1, 2)),
    "softmax": lambda x: nn.softmax(x) + nn.log_softmax(x, axis=1),
    "norms": lambda x: (x - x.mean(3, keepdims=True)) * lax.rsqrt(x.var(3, keepdims=True) + 1e-5),
    "argmax": lambda x: jnp.asarray(TABLE)[jnp.argmax(x.reshape(len(x), -1)[:, :5], axis=1)],
    "embedding": lambda x: jnp.take(jnp.asarray(TABLE), (x[:, :, 0, 0] > 0).astype(int), axis=0),
    "turned": lambda x: jnp.flip(x.transpose(0, 2, 1, 3), (1, 3)),
    "parts": lambda x: jnp.concatenate(jnp.split(x, 3, axis=2)[::-1], axis=2)[:, 1:, ::2],
    "stacked": lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=2).squeeze(),
    "padded": lambda x: lax.pad(x, jnp.float32(3), [(0, 0, 0), (1, -1, 0), (-2, 3, 0), (0, 0, 0)]),
    "pooled": lambda x: (
        nn.max_pool(x, (3, 2), (1, 2), "SAME") + nn.avg_pool(x, (3, 2), (1, 2), "SAME")
    ),
    "attention": attention,
    "class token": class_token,
    "constant start": constant_start,
    "loop": recurrent,
    "convolution": lambda x: strided(x, window_strides=(2, 1), rhs_dilation=(1, 2)),
    "depthwise": lambda x: strided(x, KERNEL[:, :, :1], feature_group_count=2),
    "channels first": lambda x: strided(x, dimension_numbers=("NWHC", "WHIO", "NCHW")),
    "transposed": lambda x: lax.conv_transpose(x, jnp.asarray(KERNEL), (2, 2), "SAME"),
    "transposed, dilated": lambda x: strided(
        x, lhs_dilation=(2, 3), rhs_dilation=(2, 1), padding=[(2, 2), (1, 1)]
    ),
    "transposed, padded": lambda x: strided(x, lhs_dilation=(2, 2), padding=[(4, 1), (0, 3)]),
    "stride above the kernel": lambda x: convolve(x, jnp.asarray(KERNEL[:1, :1]), stride=2),
    "its transpose": lambda x: convolve_transposed(
        x, jnp.asarray(KERNEL[:1, :1].swapaxes(2, 3)), stride=2
    ),
}


def written(function: Callable) -> bytes:
    inputs = {"x": jax.ShapeDtypeStruct((4, 6, 2), jnp.float32)}
    network = Network("function", lambda _, x: function(x), {}, inputs, ["y"])
    return to_onnx(network, half=False, metadata={})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_that_of_jax(name: str):
    content = written(FUNCTIONS[name])
    x = np.random.default_rng(0).normal(size=(3, 4, 6, 2)).astype(np.float32)
    expected = np.asarray(jax.jit(FUNCTIONS[name])(x))
    for count in (3, 1):
        if name == "stacked" and count == 1:
            continue  # JAX, too, would squeeze a batch of one
        actual = run_onnx(content, x=x[:count])["y"]
        assert actual.shape == expected[:count].shape
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected[:count], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x - x.max(axis=0, keepdims=True), "reduce_max over the batch"),
        (lambda x: x[1:], "a slice of the batch"),
        (lambda x: jnp.flip(x, 0), "a reversal of the batch"),
        (lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0)]), "pad between"),
        (lambda x: strided(x, x[0, :2, :2, :, None]), "kernel depends on the input|slice of the"),
        (lambda x: lax.scan(lambda s, _: (s, s), x, length=3)[1], "an output at every step"),
        (lambda x: lax.while_loop(lambda s: s.sum() < 9, lambda s: s + 1, x), "while"),
        (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), "random_"),
    ],
)
def test_what_cannot_be_written_is_named(function: Callable, words: str):
    with pytest.raises(UserError, match=f"the function cannot be written as ONNX.*({words})"):
        written(function)


def test_a_constant_is_written_once_however_often_it_is_used():
    kernel = np.ones((2, 2), np.float32)
    network = Network(
        "function",
        lambda w, x: (x @ w["kernel"]) @ w["kernel"],
        {"kernel": kernel, "unused": np.ones(9999, np.float32)},
        {"x": jax.ShapeDtypeStruct((2,), jnp.float32)},
        ["y"],
    )
    content = to_onnx(network, half=False, metadata={})
    assert content.count(kernel.tobytes()) == 1
    assert len(content) < 1000
