"""Layers with Keras' conventions: its initializers, its "same" padding, its batch norm."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaejax.models.convolution import convolve, convolve_transposed
from vaejax.models.normalization import norm_silu

Norm = Literal["batch", "affine"]
Activation = Callable[[Array], Array]
Initializer = nn.initializers.Initializer

glorot = nn.initializers.glorot_uniform()
leaky_relu = partial(nn.leaky_relu, negative_slope=0.02)


class Convolution(nn.Module):
    """A convolution with "same" padding and a bias: `[b h w c]` -> `[b h/stride w/stride o]`."""

    features: int
    stride: int = 1
    kernel_size: int = 5
    initializer: Initializer = glorot

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q o"]:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.initializer, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return convolve(x, kernel, stride=self.stride) + bias.reshape(1, 1, 1, -1)

    def __str__(self) -> str:
        return f"Conv {self.features}, stride {self.stride}"


class TransposedConvolution(nn.Module):
    """The transpose of a convolution, with a bias: `[b h w c]` -> `[b h*stride w*stride o]`."""

    features: int
    stride: int = 1
    kernel_size: int = 5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q o"]:
        # outputs before inputs, as in Keras: it is the kernel of the convolution it transposes
        shape = (self.kernel_size, self.kernel_size, self.features, x.shape[-1])
        kernel = self.param("kernel", glorot, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return convolve_transposed(x, kernel, stride=self.stride) + bias.reshape(1, 1, 1, -1)

    def __str__(self) -> str:
        return f"ConvT {self.features}, stride {self.stride}"


class Dense(nn.Module):
    """A dense layer with a bias, on the last axis: `[b ... i]` -> `[b ... features]`."""

    features: int
    initializer: Initializer = glorot

    @nn.compact
    def __call__(self, x: Float[Array, "b *axes i"]) -> Float[Array, "b *axes o"]:
        kernel = self.param("kernel", self.initializer, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return x @ kernel + bias.reshape(*(1,) * (x.ndim - 1), -1)

    def __str__(self) -> str:
        return f"Dense {self.features}"


class MaxPool(nn.Module):
    """The largest of each square of 2 × 2 pixels; sides must be even."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
        # a window reduction is no faster forward, and on a CPU its gradient takes XLA five to ten
        # times as long
        a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
        return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))

    def __str__(self) -> str:
        return "Max-pool 2"


class Upsample(nn.Module):
    """Each pixel as a square of 2 × 2 (nearest neighbour)."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        b, h, w, c = x.shape
        squares = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return squares.reshape(b, 2 * h, 2 * w, c)

    def __str__(self) -> str:
        return "Upsample 2"


class GroupNormSilu(nn.Module):
    """SiLU of a group norm, whose parameters are those of `flax.linen.GroupNorm`.

    With a modulation `[b 2 c]` the norm is followed by h (1 + a) + b, for a and b of each image,
    and SiLU comes last.
    """

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], modulation: Float[Array, "b 2 c"] | None = None
    ) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        if modulation is None:
            modulation = jnp.zeros((len(x), 2, c), x.dtype)
        return norm_silu(x, scale, bias, modulation, groups=self.groups, epsilon=self.epsilon)

    def __str__(self) -> str:
        return f"Group norm {self.groups}, SiLU"


class Block(nn.Module):
    """A layer, its activation, its norm, in the report's order: the norm comes last.

    "batch" is batch norm. "affine" is what the report's notebook trained without knowing it: its
    model was called without `training=True`, so that the moving mean and variance stay 0 and 1 and
    nothing is normalized: the layer is a learned scale and shift.
    """

    layer: Callable[..., nn.Module]  # builds it, so that its parameters lie within the block's
    activation: Activation | None = None
    norm: Norm | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ..."], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b ..."]:
        x = self.layer(name="layer")(x)
        if self.activation is not None:
            x = self.activation(x)
        if self.norm is None:
            return x
        moving = self.norm == "affine" or not train
        axis = None if moving else axis
        norm = nn.BatchNorm(moving, momentum=0.99, epsilon=1e-3, axis_name=axis, name="norm")
        return norm(x)

    def __str__(self) -> str:
        return str(self.layer(parent=None)) + (" + BN" if self.norm else "")
