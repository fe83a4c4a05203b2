"""The deep convolutional autoencoder: convolutions and pooling, upsampling and convolutions."""

from functools import partial
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from vaejax.models.autoencoder import Autoencoder, require_divisible, require_positive
from vaejax.models.layers import Block, Convolution, MaxPool, Upsample


class Convolutional(Autoencoder):
    """The notebook's layers have 16, 8 and 8 channels; z is `[b size/8 size/8 width]`.

    Its digits of 28 pixels went to 14, 7 and, rounded up, 4, and came back to 28 by way of a
    convolution without padding; here every side is halved and doubled.
    """

    width: int = 8  # channels of z; the layers at the image's own size have twice as many

    title: ClassVar[str] = "deep convolutional autoencoder"

    def __post_init__(self) -> None:
        require_divisible(self, by=8, least=8)  # three halvings
        require_positive(self, "width")
        super().__post_init__()

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        self.encoder = Encoder(self.width)
        self.decoder = Decoder(self.width, self.channels)

    def encode(
        self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b p q d"]:
        """Return z, `[b size/8 size/8 width]`."""
        return self.encoder(x, train=train)

    def decode(
        self, z: Float[Array, "b p q d"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the image of z."""
        return self.decoder(z, train=train)


class Encoder(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b p q d"]:
        for i, features in enumerate((2 * self.width, self.width, self.width), 1):
            layer = partial(Convolution, features, kernel_size=3)
            x = Block(layer, nn.relu, name=f"conv_{i}")(x, train=train)
            x = MaxPool(name=f"pool_{i}")(x)
        return x


class Decoder(nn.Module):
    width: int
    channels: int

    @nn.compact
    def __call__(self, z: Float[Array, "b p q d"], *, train: bool) -> Float[Array, "b h w c"]:
        x = z
        for i, features in enumerate((self.width, self.width, 2 * self.width), 1):
            layer = partial(Convolution, features, kernel_size=3)
            x = Block(layer, nn.relu, name=f"conv_{i}")(x, train=train)
            x = Upsample(name=f"up_{i}")(x)
        layer = partial(Convolution, self.channels, kernel_size=3)
        return Block(layer, nn.sigmoid, name="output")(x, train=train)
