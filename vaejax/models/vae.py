"""The report's variational autoencoder: a convolutional encoder to a posterior, and a decoder."""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaejax.distributions import Normal
from vaejax.models.autoencoder import Autoencoder, require_divisible, require_positive
from vaejax.models.layers import (
    Block,
    Convolution,
    Dense,
    Norm,
    TransposedConvolution,
    leaky_relu,
)

LARGE = 256  # from this size on, the report's decoder ends in a stride of 4


class VAE(Autoencoder):
    """The report's model. The defaults are the report's, at 64 pixels; z is `[b latent_dim]`."""

    latent_dim: int = 512
    width: int = 32  # channels of the first convolution; every other layer is a multiple of it
    norm: Norm = "affine"
    output_norm: bool = True  # a norm after the sigmoid, so that the output may leave [0, 1]
    log_variance_bound: float | None = None  # |log variance| of the posterior stays below it

    title: ClassVar[str] = "variational autoencoder"

    def __post_init__(self) -> None:
        # four halvings in the encoder; in the large decoder 8 * 4 doublings
        require_divisible(self, by=16 if self.size < LARGE else 32, least=16)
        require_positive(self, "latent_dim", "width")
        super().__post_init__()

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        self.encoder = Encoder(self.latent_dim, self.width, self.norm, self.log_variance_bound)
        self.decoder = Decoder(self.size, self.channels, self.width, self.norm, self.output_norm)

    def encode(self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None = None) -> Normal:
        """Return q(z|x), with mean and log-variance `[b latent_dim]`."""
        return self.encoder(x, train=train, axis=axis)

    def decode(
        self, z: Float[Array, "b d"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the mean of p(x|z)."""
        return self.decoder(z, train=train, axis=axis)


class Encoder(nn.Module):
    latent_dim: int
    width: int
    norm: Norm
    log_variance_bound: float | None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None) -> Normal:
        width = self.width
        normed = partial(Block, norm=self.norm)
        mode = {"train": train, "axis": axis}
        for i, (features, stride) in enumerate(
            [(width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2), (16 * width, 2)], 1
        ):
            layer = partial(Convolution, features, stride)
            x = normed(layer, leaky_relu, name=f"conv_{i}")(x, **mode)
        x = x.reshape(x.shape[0], -1)
        x = normed(partial(Dense, 32 * width), nn.selu, name="dense")(x, **mode)
        mean = Block(partial(Dense, self.latent_dim), name="mean")(x, **mode)
        log_variance = Block(partial(Dense, self.latent_dim), name="log_variance")(x, **mode)
        if bound := self.log_variance_bound:
            log_variance = bound * jnp.tanh(log_variance / bound)
        return Normal(mean, log_variance)


class Decoder(nn.Module):
    size: int
    channels: int
    width: int
    norm: Norm
    output_norm: bool

    @nn.compact
    def __call__(
        self, z: Float[Array, "b d"], *, train: bool, axis: str | None
    ) -> Float[Array, "b h w c"]:
        width = self.width
        large = self.size >= LARGE
        if large:
            side, channels, multiples, last_stride = self.size // 32, 4 * width, (8, 4, 2), 4
        else:
            side, channels, multiples, last_stride = self.size // 16, 16 * width, (8, 4, 2, 1), 1
        normed = partial(Block, norm=self.norm)
        mode = {"train": train, "axis": axis}
        x = normed(partial(Dense, 32 * width), nn.selu, name="dense")(z, **mode)
        x = Block(partial(Dense, side * side * channels), nn.selu, name="reshape")(x, **mode)
        x = x.reshape(-1, side, side, channels)
        for i, multiple in enumerate(multiples, 1):
            layer = partial(TransposedConvolution, multiple * width, 2)
            block = Block if large and multiple == 2 else normed  # the report has no norm there
            x = block(layer, leaky_relu, name=f"conv_{i}")(x, **mode)
        block = normed if self.output_norm else Block
        layer = partial(TransposedConvolution, self.channels, last_stride)
        return block(layer, nn.sigmoid, name="output")(x, **mode)
