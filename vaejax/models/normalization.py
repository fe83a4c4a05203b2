"""Group norm with SiLU after it, each image by itself.

On a CPU C++ kernels compute it and its gradient, where they can be used: XLA writes and reads the
image a dozen times for what they do in two passes. The result is the same up to rounding.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vaejax import kernels


def norm_silu(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "b c"],
    shift: Float[Array, "b c"],
    *,
    groups: int,
    epsilon: float,
) -> Float[Array, "b h w c"]:
    """Return silu(scale x' + shift), where x' is x by group norm (Wu and He, 2018, equation 1).

    x' = (x - mean) / sqrt(variance + epsilon), where mean and variance are those of each group of
    c / groups successive channels of an image.
    """
    if all(kernels.supports(array.dtype) for array in (x, scale, shift)):
        return native(x, scale, shift, groups, epsilon)
    return plain(x, scale, shift, groups, epsilon)


def plain(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "b c"],
    shift: Float[Array, "b c"],
    groups: int,
    epsilon: float,
) -> Float[Array, "b h w c"]:
    """Compute it in XLA.

    The mean and the variance of each group make one factor and one offset of each channel, so that
    every value is read twice and multiplied once.
    """
    b, _, _, c = x.shape

    def over_groups(values: Float[Array, "b c"]) -> Float[Array, "b c"]:
        means = jnp.mean(values.reshape(b, groups, -1), axis=2)
        return jnp.repeat(means, c // groups, axis=1)

    mean = over_groups(jnp.mean(x, axis=(1, 2)))
    square = over_groups(jnp.mean(x**2, axis=(1, 2)))
    factor = lax.rsqrt(jnp.maximum(square - mean**2, 0) + epsilon) * scale
    offset = shift - mean * factor
    return jax.nn.silu(x * factor[:, None, None] + offset[:, None, None])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def native(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "b c"],
    shift: Float[Array, "b c"],
    groups: int,
    epsilon: float,
) -> Float[Array, "b h w c"]:
    """Compute it by the C++ kernels, in float32."""
    return kernels.norm_silu(x, scale, shift, groups=groups, epsilon=epsilon)[0]


def _native_forward(x, scale, shift, groups, epsilon):
    y, statistics = kernels.norm_silu(x, scale, shift, groups=groups, epsilon=epsilon)
    return y, (x, scale, shift, statistics)


def _native_backward(groups, epsilon, saved, dy):
    return tuple(kernels.norm_silu_gradient(dy, *saved))


native.defvjp(_native_forward, _native_backward)
