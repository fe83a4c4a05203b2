"""The simplest autoencoder: one dense layer to a bottleneck, one dense layer back."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from vaejax.models.autoencoder import Autoencoder, divisible
from vaejax.models.layers import Block, Dense, relu, sigmoid


@dataclass(frozen=True)
class FeedForward(Autoencoder):
    """The recipe's code has 32 numbers, for grey digits of 28 pixels."""

    latent_dim: int = 32

    title: ClassVar[str] = "feed-forward autoencoder"

    def __post_init__(self) -> None:
        divisible(self, by=1, least=1)

    @property
    def code(self) -> tuple[int, ...]:
        return (self.latent_dim,)

    def encoder(self, *, axis: str | None) -> nn.Module:
        return Encoder(self)

    def decoder(self, *, axis: str | None) -> nn.Module:
        return Decoder(self)


class Encoder(nn.Module):
    model: FeedForward

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b d"]:
        layer = partial(Dense, self.model.latent_dim)
        return Block(layer, relu, name="dense")(x.reshape(len(x), -1), train=train)


class Decoder(nn.Module):
    model: FeedForward

    @nn.compact
    def __call__(self, code: Float[Array, "b d"], *, train: bool) -> Float[Array, "b h w c"]:
        size, channels = self.model.size, self.model.channels
        layer = partial(Dense, size * size * channels)
        x = Block(layer, sigmoid, name="output")(code, train=train)
        return x.reshape(-1, size, size, channels)
