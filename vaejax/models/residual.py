"""Residual variational autoencoders, with a vector as z or a grid of vectors.

No layer but the last sees more than a quarter of the pixels: the encoder begins by moving squares
of 4 × 4 pixels into channels, the decoder ends by moving 12 channels into squares of 2 × 2. The
blocks are those of pre-activation residual networks (He et al., 2016) with group norm (Wu and He,
2018), of which the second convolution is zero at first.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vaejax.distributions import Normal
from vaejax.errors import UserError
from vaejax.models.autoencoder import Autoencoder, require_divisible, require_positive
from vaejax.models.layers import Convolution, Dense, GroupNormSilu

GROUPS = 8  # of a group norm
BOTTOM = 8  # pixels of the smallest grid; up to 15 where the size is no power of 2
LOG_VARIANCE_BOUND = 6.0
SQUEEZED = 24  # channels of a grid before it becomes a vector
STYLE = 384  # numbers that the norms of a decoder are conditioned on, at width 48


class ResidualVAE(Autoencoder):
    """A residual VAE whose z is one vector, `[b latent_dim]`.

    The decoder's norms take their scale and shift from z (adaptive group norm, as in Dhariwal and
    Nichol, 2021, section 3.1), so that every block knows which face it draws.
    """

    latent_dim: int = 64
    width: int = 48  # channels at twice the size of the smallest grid, which has twice as many
    blocks: int = 1  # residual blocks at every size; one more at the smallest

    title: ClassVar[str] = "residual VAE"

    def __post_init__(self) -> None:
        halvings = _halvings(self.size)
        require_divisible(self, by=2**halvings, least=32)
        require_positive(self, "latent_dim", "width", "blocks")
        _widths(self.width, halvings)  # refused here, before any work
        super().__post_init__()

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        widths = _widths(self.width, _halvings(self.size))
        side = self.size // 2 ** _halvings(self.size)
        self.encoder = VectorEncoder(widths, self.blocks, self.latent_dim)
        style = STYLE * self.width // 48
        self.decoder = VectorDecoder(widths, self.blocks, side, self.channels, style)

    def encode(self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None = None) -> Normal:
        """Return q(z|x), with mean and log-variance `[b latent_dim]`."""
        return self.encoder(x)

    def decode(
        self, z: Float[Array, "b d"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the mean of p(x|z)."""
        return self.decoder(z)


class SpatialVAE(Autoencoder):
    """A residual VAE whose z is a grid of vectors, `[b size/8 size/8 latent_channels]`.

    Each vector tells of its own region, as in latent diffusion (Rombach et al., 2022): many, varied
    faces are reconstructed better, and a prior has more to learn.
    """

    latent_channels: int = 4
    width: int = 48  # channels at twice the size of the grid of z, which has twice as many
    blocks: int = 1  # residual blocks at every size; one more at the smallest

    title: ClassVar[str] = "residual VAE with spatial latents"

    def __post_init__(self) -> None:
        require_divisible(self, by=8, least=32)
        require_positive(self, "latent_channels", "width", "blocks")
        _widths(self.width, 3)  # refused here, before any work
        super().__post_init__()

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        widths = _widths(self.width, 3)
        self.encoder = SpatialEncoder(widths, self.blocks, self.latent_channels)
        self.decoder = SpatialDecoder(widths, self.blocks, self.channels)

    def encode(self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None = None) -> Normal:
        """Return q(z|x), with mean and log-variance `[b size/8 size/8 latent_channels]`."""
        return self.encoder(x)

    def decode(
        self, z: Float[Array, "b p q d"], *, train: bool, axis: str | None = None
    ) -> Float[Array, "b h w c"]:
        """Return the mean of p(x|z)."""
        return self.decoder(z)


def _halvings(size: int) -> int:
    """Return how often an image is halved to the smallest grid, of 8 to 15 pixels."""
    return max(2, (max(size, 1) // BOTTOM).bit_length() - 1)


def _widths(width: int, halvings: int) -> tuple[int, ...]:
    """Return the channels of the blocks by size, from the smallest grid to half the image's size.

    They are halved as the side doubles, but are never less than 16, and multiples of the groups.
    """
    if width % GROUPS:
        below, above = width // GROUPS * GROUPS, (width // GROUPS + 1) * GROUPS
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"a width of {width}: must be a multiple of {GROUPS}, such as {nearest}")
    widths = (max(16, 2 * width // 2**level) for level in range(halvings))
    return tuple(-(-w // GROUPS) * GROUPS for w in widths)


# Encoders and decoders ----------------------------------------------------------------------------


class VectorEncoder(nn.Module):
    widths: tuple[int, ...]
    blocks: int
    latent_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Normal:
        x = _contract(x, self.widths, self.blocks)
        x = Dense(SQUEEZED, name="squeeze")(x)
        return _normal(Dense(2 * self.latent_dim, name="posterior")(x.reshape(len(x), -1)))


class VectorDecoder(nn.Module):
    widths: tuple[int, ...]
    blocks: int
    side: int
    channels: int
    style: int

    @nn.compact
    def __call__(self, z: Float[Array, "b d"]) -> Float[Array, "b h w c"]:
        style = nn.silu(Dense(self.style, name="style")(z))
        x = Dense(self.side**2 * self.widths[0], name="grid")(style)
        x = x.reshape(-1, self.side, self.side, self.widths[0])
        return _expand(x, self.widths, self.blocks, self.channels, style)


class SpatialEncoder(nn.Module):
    widths: tuple[int, ...]
    blocks: int
    latent_channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Normal:
        x = _contract(x, self.widths, self.blocks)
        return _normal(Dense(2 * self.latent_channels, name="posterior")(x))


class SpatialDecoder(nn.Module):
    widths: tuple[int, ...]
    blocks: int
    channels: int

    @nn.compact
    def __call__(self, z: Float[Array, "b p q d"]) -> Float[Array, "b h w c"]:
        x = Convolution(self.widths[0], kernel_size=3, name="grid")(z)
        return _expand(x, self.widths, self.blocks, self.channels, None)


def _contract(
    x: Float[Array, "b h w c"], widths: tuple[int, ...], blocks: int
) -> Float[Array, "b p q d"]:
    """Bring images to the smallest grid; called within a module's `__call__`, which owns the
    layers."""
    x = space_to_depth(x - 0.5, 4)  # the images' middle, about
    for level in range(len(widths) - 2, -1, -1):
        if level < len(widths) - 2:
            x = space_to_depth(x, 2)
        scale = 2**level
        x = Dense(widths[level], name=f"to_{scale}x")(x)
        for i in range(blocks + (level == 0)):
            x = ResidualBlock(widths[level], name=f"block_{scale}x_{i + 1}")(x)
    return GroupNormSilu(GROUPS, name="norm")(x)


def _expand(
    x: Float[Array, "b p q d"],
    widths: tuple[int, ...],
    blocks: int,
    channels: int,
    style: Float[Array, "b s"] | None,
) -> Float[Array, "b h w c"]:
    """Bring the smallest grid to images; called within a module's `__call__`."""
    for level, width in enumerate(widths):
        scale = 2**level
        if level:
            x = depth_to_space(Dense(4 * width, name=f"to_{scale}x")(x), 2)
        for i in range(blocks + (level == 0)):
            x = ResidualBlock(width, name=f"block_{scale}x_{i + 1}")(x, style)
    x = GroupNormSilu(GROUPS, name="norm")(x)
    x = Convolution(4 * channels, kernel_size=3, name="output")(x)
    return nn.sigmoid(depth_to_space(x, 2))


def _normal(parameters: Float[Array, "b *z"]) -> Normal:
    """Split the last axis into means and log-variances, which are bounded smoothly."""
    mean, log_variance = jnp.split(parameters, 2, axis=-1)
    return Normal(mean, LOG_VARIANCE_BOUND * jnp.tanh(log_variance / LOG_VARIANCE_BOUND))


# Layers -------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with 3 × 3 convolutions, of as many channels as x.

    With a style `[b s]` each norm is followed by h (1 + a) + b, where a and b are linear in it.
    """

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], style: Float[Array, "b s"] | None = None
    ) -> Float[Array, "b h w c"]:
        convolution = partial(Convolution, self.features, kernel_size=3)
        h = AdaptiveNormSilu(name="norm_1")(x, style)
        h = convolution(name="conv_1")(h)
        h = AdaptiveNormSilu(name="norm_2")(h, style)
        return x + convolution(initializer=nn.initializers.zeros, name="conv_2")(h)

    def __str__(self) -> str:
        return f"Residual block {self.features}"


class AdaptiveNormSilu(nn.Module):
    """SiLU of a group norm, scaled and shifted as a style asks for, if there is one."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], style: Float[Array, "b s"] | None
    ) -> Float[Array, "b h w c"]:
        modulation = None
        if style is not None:
            small = nn.initializers.normal(0.02)
            modulation = Dense(2 * x.shape[-1], initializer=small, name="modulation")(style)
            modulation = modulation.reshape(len(x), 2, -1)
        return GroupNormSilu(GROUPS, name="group")(x, modulation)


def space_to_depth(x: Float[Array, "b h w c"], n: int) -> Float[Array, "b p q d"]:
    """Move each square of n × n pixels into the channels of one; sides must be multiples of n."""
    b, h, w, c = x.shape
    squares = x.reshape(b, h // n, n, w // n, n, c).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(b, h // n, w // n, n * n * c)


def depth_to_space(x: Float[Array, "b p q d"], n: int) -> Float[Array, "b h w c"]:
    """Move the channels of each pixel into a square of n × n: the inverse of `space_to_depth`."""
    b, p, q, d = x.shape
    squares = x.reshape(b, p, q, n, n, d // n**2).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(b, p * n, q * n, d // n**2)
