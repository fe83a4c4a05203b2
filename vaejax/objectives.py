"""What is learned from: the report's loss, with the field's figures beside it.

A loss is `(params, statistics, images, key) -> (scalar, (figures, statistics))`: images are uint8
`[b h w c]`, the key draws z, and batch norm's moving statistics travel as auxiliary output.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vaejax.distributions import LEVELS, DiscretizedNormal, Normal
from vaejax.models import vae

Figures = dict[str, Float[Array, ""]]
Loss = Callable[..., tuple[Float[Array, ""], tuple[Figures, PyTree]]]


def to_float(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """x in [0, 1], the only scale that the models know; in JAX's default precision."""
    return images.astype(float) / (LEVELS - 1)


def to_uint8(x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """The nearest levels; what lies outside [0, 1] is clipped."""
    return jnp.round(jnp.clip(x, 0, 1) * (LEVELS - 1)).astype(jnp.uint8)


def report(
    params: PyTree,
    statistics: PyTree,
    images: UInt8[Array, "b h w c"],
    key: Key[Array, ""],
    *,
    model: vae.VAE,
    kl_weight: float,
    train: bool,
) -> tuple[Float[Array, ""], tuple[Figures, PyTree]]:
    """mse + kl_weight * kl, both means over everything: the report's loss (its weight is 0.01)."""
    x = to_float(images)
    posterior, statistics = vae.encode(model, params, statistics, x, train=train)
    z = posterior.sample(key)
    mean, statistics = vae.decode(model, params, statistics, z, train=train)

    mse = jnp.mean((x - mean) ** 2)
    kl = jnp.mean(posterior.kl())  # per latent dimension, unlike the rate
    loss = mse + kl_weight * kl
    figures = {"loss": loss, "mse": mse, "kl": kl}
    figures |= in_nats(posterior, mean, images, mse=mse, kl_weight=kl_weight)
    return loss, (figures, statistics)


def in_nats(
    posterior: Normal,
    mean: Float[Array, "b h w c"],
    images: UInt8[Array, "b h w c"],
    *,
    mse: Float[Array, ""],
    kl_weight: float,
) -> Figures:
    """The ELBO's terms, nats per image, for a run that was trained on means.

    The likelihood, over the 256 levels, is the one whose variance is the mse of these very images,
    the best that one variance for all of them can be (Rybkin et al., 2021, sigma-VAE, equation 4):
    a code of that length would have to send the variance as well, once for the batch. Against that
    likelihood, mse + kl_weight * kl is a beta-VAE's loss with `effective_beta` (Higgins et al.,
    2017): n / 2 mse of the one is one nat of the other.
    """
    values, latents = mean[0].size, posterior.mean.shape[-1]
    variance = jnp.maximum(mse, 1e-12)  # a perfect copy has no finite density
    distortion = -jnp.mean(DiscretizedNormal(mean, jnp.log(variance)).log_prob(images))
    rate = jnp.mean(jnp.sum(posterior.kl(), axis=-1))
    figures = {
        "distortion": distortion,
        "rate": rate,
        "elbo": -(distortion + rate),
        "bits_per_dim": (distortion + rate) / (values * jnp.log(2.0)),
        "effective_beta": kl_weight * values / (2 * variance * latents),
    }
    return jax.tree.map(jax.lax.stop_gradient, figures)
