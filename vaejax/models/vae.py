"""The report's variational autoencoder: a convolutional encoder, a decoder, and pure functions.

The modules are deterministic: whoever wants a sample of z draws it with a key of their own.
`params` and `statistics` (batch norm's moving mean and variance) are trees of arrays with the
branches "encoder" and "decoder"; x is float `[b h w 3]` in [0, 1].
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from vaejax.distributions import Normal
from vaejax.errors import UserError
from vaejax.models.layers import (
    Block,
    Convolution,
    Dense,
    Norm,
    TransposedConvolution,
    identity,
    leaky_relu,
    selu,
    sigmoid,
)

CHANNELS = 3
LARGE = 256  # from this size on, the report's decoder ends in a stride of 4


@dataclass(frozen=True)
class VAE:
    """What must be known to build the model. The defaults are the report's, at 64 pixels."""

    size: int = 64  # height and width of an image, pixels
    latent_dim: int = 512
    width: int = 32  # channels of the first convolution; every other layer is a multiple of it
    norm: Norm = "frozen"
    output_norm: bool = True  # a norm after the sigmoid, so that the output may leave [0, 1]
    log_variance_bound: float | None = None  # |log variance| of the posterior stays below it

    def __post_init__(self) -> None:
        # four halvings in the encoder; in the large decoder 8 * 4 doublings
        unit = 16 if self.size < LARGE else 32
        if self.size < 16 or self.size % unit:
            below = max(16, self.size // unit * unit)
            above = max(16, (self.size // unit + 1) * unit)
            nearest = f"{below}" if below == above else f"{below} or {above}"
            raise UserError(
                f"the VAE's layers do not admit images of {self.size} pixels: "
                f"take a multiple of {unit}, the nearest is {nearest}"
            )


class Encoder(nn.Module):
    model: VAE

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Normal:
        model, width = self.model, self.model.width
        for i, (features, stride) in enumerate(
            [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2), (16 * width, 2)], 1
        ):
            layer = partial(Convolution, features, stride)
            x = Block(layer, leaky_relu, model.norm, name=f"conv_{i}")(x, train=train)
        x = x.reshape(x.shape[0], -1)
        x = Block(partial(Dense, 32 * width), selu, model.norm, name="dense")(x, train=train)
        mean = Block(partial(Dense, model.latent_dim), identity, name="mean")(x, train=train)
        log_variance = Block(partial(Dense, model.latent_dim), identity, name="log_variance")(
            x, train=train
        )
        if bound := model.log_variance_bound:
            log_variance = bound * jnp.tanh(log_variance / bound)
        return Normal(mean, log_variance)


class Decoder(nn.Module):
    model: VAE

    @nn.compact
    def __call__(self, z: Float[Array, "b d"], *, train: bool) -> Float[Array, "b h w c"]:
        model, width = self.model, self.model.width
        large = model.size >= LARGE
        if large:
            side, channels, multiples, last_stride = model.size // 32, 4 * width, (8, 4, 2), 4
        else:
            side, channels, multiples, last_stride = model.size // 16, 16 * width, (8, 4, 2, 1), 1
        x = Block(partial(Dense, 32 * width), selu, model.norm, name="dense")(z, train=train)
        x = Block(partial(Dense, side * side * channels), selu, name="reshape")(x, train=train)
        x = x.reshape(-1, side, side, channels)
        for i, multiple in enumerate(multiples, 1):
            layer = partial(TransposedConvolution, multiple * width, 2)
            norm = None if large and multiple == 2 else model.norm  # the report leaves it out there
            x = Block(layer, leaky_relu, norm, name=f"conv_{i}")(x, train=train)
        output_norm = model.norm if model.output_norm else None
        layer = partial(TransposedConvolution, CHANNELS, last_stride)
        return Block(layer, sigmoid, output_norm, name="output")(x, train=train)


def init(model: VAE, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
    """Parameters and statistics, by Keras' rules: Glorot's uniform kernels, biases of zero."""
    encoder_key, decoder_key = jax.random.split(key)
    x = jnp.zeros((1, model.size, model.size, CHANNELS))
    z = jnp.zeros((1, model.latent_dim))
    encoder = Encoder(model).init(encoder_key, x, train=False)
    decoder = Decoder(model).init(decoder_key, z, train=False)
    params = {"encoder": encoder["params"], "decoder": decoder["params"]}
    statistics = {"encoder": encoder["batch_stats"], "decoder": decoder["batch_stats"]}
    return params, statistics


def encode(
    model: VAE,
    params: PyTree,
    statistics: PyTree,
    x: Float[Array, "b h w c"],
    *,
    train: bool = False,
) -> tuple[Normal, PyTree]:
    """q(z|x), and the statistics as they stand after this batch (unchanged unless `train`)."""
    return _apply(Encoder(model), "encoder", params, statistics, x, train)


def decode(
    model: VAE, params: PyTree, statistics: PyTree, z: Float[Array, "b d"], *, train: bool = False
) -> tuple[Float[Array, "b h w c"], PyTree]:
    """The mean of p(x|z), and the statistics as they stand after this batch."""
    return _apply(Decoder(model), "decoder", params, statistics, z, train)


def _apply(module, branch, params, statistics, inputs, train):
    variables = {"params": params[branch], "batch_stats": statistics[branch]}
    outputs, updated = module.apply(variables, inputs, train=train, mutable=["batch_stats"])
    return outputs, {**statistics, branch: updated["batch_stats"]}
