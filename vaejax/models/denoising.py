"""The denoising autoencoder: it is shown a noisy image and trained to return the clean one."""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vaejax.models.autoencoder import Autoencoder, require_divisible, require_positive
from vaejax.models.layers import Block, Convolution, MaxPool, Norm, Upsample


class Denoising(Autoencoder):
    """The defaults are the notebook's; z is `[b size/4 size/4 width]`.

    The notebook drew its noise once, before training; here it is drawn afresh for every image of
    every batch, so that no noise can be memorized.
    """

    width: int = 32  # channels of every layer but the last
    noise: float = 0.1  # its standard deviation, where 1 is from black to white
    norm: Norm = "batch"  # what Keras' `fit`, which the notebook calls, does

    title: ClassVar[str] = "denoising autoencoder"
    denoises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_divisible(self, by=4, least=4)  # two halvings
        require_positive(self, "width")
        super().__post_init__()

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        self.encoder = Encoder(self.width, self.norm)
        self.decoder = Decoder(self.width, self.channels, self.norm)

    def encode(
        self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b p q d"]:
        """Return z, `[b size/4 size/4 width]`."""
        return self.encoder(x, train=train, axis=axis)

    def decode(
        self, z: Float[Array, "b p q d"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the image of z."""
        return self.decoder(z, train=train, axis=axis)

    def corrupt(self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "..."]:
        """Return x with Gaussian noise, clipped to [0, 1], as a picture in a file would be."""
        draw = partial(jax.random.normal, shape=x.shape[1:], dtype=x.dtype)
        return jnp.clip(x + self.noise * jax.vmap(draw)(keys), 0, 1)


class Encoder(nn.Module):
    width: int
    norm: Norm

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None
    ) -> Float[Array, "b p q d"]:
        for i in (1, 2):
            layer = partial(Convolution, self.width, kernel_size=3)
            block = Block(layer, nn.relu, self.norm, name=f"conv_{i}")
            x = MaxPool(name=f"pool_{i}")(block(x, train=train, axis=axis))
        return x


class Decoder(nn.Module):
    width: int
    channels: int
    norm: Norm

    @nn.compact
    def __call__(
        self, z: Float[Array, "b p q d"], *, train: bool, axis: str | None
    ) -> Float[Array, "b h w c"]:
        x = z
        for i in (1, 2):
            layer = partial(Convolution, self.width, kernel_size=3)
            block = Block(layer, nn.relu, self.norm, name=f"conv_{i}")
            x = Upsample(name=f"up_{i}")(block(x, train=train, axis=axis))
        layer = partial(Convolution, self.channels, kernel_size=3)
        return Block(layer, nn.sigmoid, name="output")(x, train=train)
