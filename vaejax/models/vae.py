"""The report's variational autoencoder: a convolutional encoder to a posterior, and a decoder."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaejax.distributions import Normal
from vaejax.models.autoencoder import Autoencoder, divisible
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

LARGE = 256  # from this size on, the report's decoder ends in a stride of 4


@dataclass(frozen=True)
class VAE(Autoencoder):
    """The defaults are the report's, at 64 pixels."""

    latent_dim: int = 512
    width: int = 32  # channels of the first convolution; every other layer is a multiple of it
    norm: Norm = "frozen"
    output_norm: bool = True  # a norm after the sigmoid, so that the output may leave [0, 1]
    log_variance_bound: float | None = None  # |log variance| of the posterior stays below it

    title: ClassVar[str] = "variational autoencoder"
    has_prior: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # four halvings in the encoder; in the large decoder 8 * 4 doublings
        divisible(self, by=16 if self.size < LARGE else 32, least=16)

    @property
    def code(self) -> tuple[int, ...]:
        return (self.latent_dim,)

    def encoder(self, *, axis: str | None) -> nn.Module:
        return Encoder(self, axis)

    def decoder(self, *, axis: str | None) -> nn.Module:
        return Decoder(self, axis)


class Encoder(nn.Module):
    model: VAE
    axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Normal:
        model, width = self.model, self.model.width
        normed = partial(Block, norm=model.norm, axis=self.axis)
        for i, (features, stride) in enumerate(
            [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2), (16 * width, 2)], 1
        ):
            layer = partial(Convolution, features, stride)
            x = normed(layer, leaky_relu, name=f"conv_{i}")(x, train=train)
        x = x.reshape(x.shape[0], -1)
        x = normed(partial(Dense, 32 * width), selu, name="dense")(x, train=train)
        mean = Block(partial(Dense, model.latent_dim), identity, name="mean")(x, train=train)
        log_variance = Block(partial(Dense, model.latent_dim), identity, name="log_variance")(
            x, train=train
        )
        if bound := model.log_variance_bound:
            log_variance = bound * jnp.tanh(log_variance / bound)
        return Normal(mean, log_variance)


class Decoder(nn.Module):
    model: VAE
    axis: str | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "b d"], *, train: bool) -> Float[Array, "b h w c"]:
        model, width = self.model, self.model.width
        large = model.size >= LARGE
        if large:
            side, channels, multiples, last_stride = model.size // 32, 4 * width, (8, 4, 2), 4
        else:
            side, channels, multiples, last_stride = model.size // 16, 16 * width, (8, 4, 2, 1), 1
        normed = partial(Block, norm=model.norm, axis=self.axis)
        x = normed(partial(Dense, 32 * width), selu, name="dense")(z, train=train)
        x = Block(partial(Dense, side * side * channels), selu, name="reshape")(x, train=train)
        x = x.reshape(-1, side, side, channels)
        for i, multiple in enumerate(multiples, 1):
            layer = partial(TransposedConvolution, multiple * width, 2)
            block = Block if large and multiple == 2 else normed  # the report has no norm there
            x = block(layer, leaky_relu, name=f"conv_{i}")(x, train=train)
        block = normed if model.output_norm else Block
        layer = partial(TransposedConvolution, model.channels, last_stride)
        return block(layer, sigmoid, name="output")(x, train=train)
