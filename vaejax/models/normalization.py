"""Group norm, its modulation and SiLU, in one function: each image by itself.

On a CPU the C++ kernels compute it where they can be used: they go over an image a few times while
it is in a cache, where XLA writes it to memory and reads it again for every step of the formula.
The result is the same up to rounding. `jax.custom_vjp` connects the kernel and that of its
gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vaejax import kernels


def norm_silu(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    modulation: Float[Array, "b 2 c"],
    *,
    groups: int,
    epsilon: float,
) -> Float[Array, "b h w c"]:
    """Return silu((scale x' + bias) (1 + a) + b), where a and b are the modulation of each image.

    x' = (x - mean) / sqrt(variance + epsilon), with the mean and the variance of each group of
    c / groups successive channels of an image (Wu and He, 2018, equations 1 and 7).
    """
    arguments = (x, scale, bias, modulation)
    native = all(kernels.supports(array.dtype) for array in arguments)
    return (_native if native else plain)(*arguments, groups, epsilon)


def plain(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    modulation: Float[Array, "b 2 c"],
    groups: int,
    epsilon: float,
) -> Float[Array, "b h w c"]:
    """Compute it in XLA.

    All factors and all offsets of a channel make one of each, so that every value is read twice and
    multiplied once.
    """
    b, _, _, c = x.shape

    def over_groups(values: Float[Array, "b c"]) -> Float[Array, "b c"]:
        means = jnp.mean(values.reshape(b, groups, -1), axis=2)
        return jnp.repeat(means, c // groups, axis=1)

    mean = over_groups(jnp.mean(x, axis=(1, 2)))
    square = over_groups(jnp.mean(x**2, axis=(1, 2)))
    modulating = 1 + modulation[:, 0]
    inverse = lax.rsqrt(jnp.maximum(square - mean**2, 0) + epsilon)
    factor = inverse * scale[None] * modulating
    offset = bias[None] * modulating + modulation[:, 1] - mean * factor
    return jax.nn.silu(x * factor[:, None, None] + offset[:, None, None])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _native(x, scale, bias, modulation, groups, epsilon):
    return _native_forward(x, scale, bias, modulation, groups, epsilon)[0]


def _native_forward(x, scale, bias, modulation, groups, epsilon):
    arguments = (x, scale, bias, modulation)
    y, statistics = kernels.norm_silu(*arguments, groups=groups, epsilon=epsilon)
    return y, (*arguments, statistics)


def _native_backward(groups, epsilon, saved, dy):
    return tuple(kernels.norm_silu_gradient(dy, *saved))


_native.defvjp(_native_forward, _native_backward)
