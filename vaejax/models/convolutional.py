"""The deep convolutional autoencoder: convolutions and pooling, upsampling and convolutions."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from vaejax.models.autoencoder import Autoencoder, divisible
from vaejax.models.layers import Block, Convolution, MaxPool, Upsample, relu, sigmoid


@dataclass(frozen=True)
class Convolutional(Autoencoder):
    """The recipe has 16, 8 and 8 channels.

    Its digits of 28 pixels went to 14, 7 and, rounded up, 4, and came back to 28 by way of a
    convolution without padding; here every side is halved and doubled.
    """

    width: int = 8  # channels of the code; the layers at the image's own size have twice as many

    title: ClassVar[str] = "deep convolutional autoencoder"

    def __post_init__(self) -> None:
        divisible(self, by=8, least=8)  # three halvings

    @property
    def code(self) -> tuple[int, ...]:
        return (self.size // 8, self.size // 8, self.width)

    def encoder(self, *, axis: str | None) -> nn.Module:
        return Encoder(self)

    def decoder(self, *, axis: str | None) -> nn.Module:
        return Decoder(self)


class Encoder(nn.Module):
    model: Convolutional

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b p q d"]:
        width = self.model.width
        for i, features in enumerate((2 * width, width, width), 1):
            layer = partial(Convolution, features, kernel_size=3)
            x = Block(layer, relu, name=f"conv_{i}")(x, train=train)
            x = MaxPool(name=f"pool_{i}")(x)
        return x


class Decoder(nn.Module):
    model: Convolutional

    @nn.compact
    def __call__(self, code: Float[Array, "b p q d"], *, train: bool) -> Float[Array, "b h w c"]:
        x, width = code, self.model.width
        for i, features in enumerate((width, width, 2 * width), 1):
            layer = partial(Convolution, features, kernel_size=3)
            x = Block(layer, relu, name=f"conv_{i}")(x, train=train)
            x = Upsample(name=f"up_{i}")(x)
        layer = partial(Convolution, self.model.channels, kernel_size=3)
        return Block(layer, sigmoid, name="output")(x, train=train)
