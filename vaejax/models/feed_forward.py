"""The simplest autoencoder: one dense layer to a bottleneck, one dense layer back."""

from functools import partial
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from vaejax.models.autoencoder import Autoencoder, require_divisible, require_positive
from vaejax.models.layers import Block, Dense


class FeedForward(Autoencoder):
    """The notebook's bottleneck has 32 numbers, for grey digits of 28 pixels."""

    latent_dim: int = 32

    title: ClassVar[str] = "feed-forward autoencoder"

    def __post_init__(self) -> None:
        require_divisible(self, by=1, least=1)
        require_positive(self, "latent_dim")
        super().__post_init__()

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        self.encoder = Encoder(self.latent_dim)
        self.decoder = Decoder(self.size, self.channels)

    def encode(
        self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b d"]:
        """Return z, `[b latent_dim]`."""
        return self.encoder(x, train=train)

    def decode(
        self, z: Float[Array, "b d"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the image of z."""
        return self.decoder(z, train=train)


class Encoder(nn.Module):
    latent_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b d"]:
        layer = partial(Dense, self.latent_dim)
        return Block(layer, nn.relu, name="dense")(x.reshape(len(x), -1), train=train)


class Decoder(nn.Module):
    size: int
    channels: int

    @nn.compact
    def __call__(self, z: Float[Array, "b d"], *, train: bool) -> Float[Array, "b h w c"]:
        layer = partial(Dense, self.size * self.size * self.channels)
        x = Block(layer, nn.sigmoid, name="output")(z, train=train)
        return x.reshape(-1, self.size, self.size, self.channels)
