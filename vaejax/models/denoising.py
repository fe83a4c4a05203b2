"""The denoising autoencoder: it is shown a noisy image and learns to give the clean one."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from vaejax.models.autoencoder import Autoencoder, divisible
from vaejax.models.layers import Block, Convolution, MaxPool, Norm, Upsample, relu, sigmoid


@dataclass(frozen=True)
class Denoising(Autoencoder):
    """The defaults are the recipe's. It drew its noise once, before training; here it is drawn
    afresh for every image of every batch, so that no noise can be learned by heart."""

    width: int = 32  # channels of every layer but the last
    noise: float = 0.1  # its standard deviation, where 1 is from black to white
    norm: Norm = "batch"  # what Keras' `fit`, which the recipe calls, does

    title: ClassVar[str] = "denoising autoencoder"
    denoises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        divisible(self, by=4, least=4)  # two halvings

    @property
    def code(self) -> tuple[int, ...]:
        return (self.size // 4, self.size // 4, self.width)

    def encoder(self, *, axis: str | None) -> nn.Module:
        return Encoder(self, axis)

    def decoder(self, *, axis: str | None) -> nn.Module:
        return Decoder(self, axis)

    def corrupt(self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "..."]:
        """x with Gaussian noise, clipped to [0, 1], as a noisy picture in a file would be."""
        draw = partial(jax.random.normal, shape=x.shape[1:], dtype=x.dtype)
        return jnp.clip(x + self.noise * jax.vmap(draw)(keys), 0, 1)


class Encoder(nn.Module):
    model: Denoising
    axis: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b p q d"]:
        for i in (1, 2):
            layer = partial(Convolution, self.model.width, kernel_size=3)
            block = Block(layer, relu, self.model.norm, self.axis, name=f"conv_{i}")
            x = MaxPool(name=f"pool_{i}")(block(x, train=train))
        return x


class Decoder(nn.Module):
    model: Denoising
    axis: str | None = None

    @nn.compact
    def __call__(self, code: Float[Array, "b p q d"], *, train: bool) -> Float[Array, "b h w c"]:
        x = code
        for i in (1, 2):
            layer = partial(Convolution, self.model.width, kernel_size=3)
            block = Block(layer, relu, self.model.norm, self.axis, name=f"conv_{i}")
            x = Upsample(name=f"up_{i}")(block(x, train=train))
        layer = partial(Convolution, self.model.channels, kernel_size=3)
        return Block(layer, sigmoid, name="output")(x, train=train)
