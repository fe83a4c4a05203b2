"""Losses: the scalar that is minimized, with its terms; and the terms of the ELBO, for every loss.

A loss is a pure function `(x, out, context, *, <its settings>) -> (scalar, metrics)`: `x` is the
batch `[b h w c]` in [0, 1], `out` what the model's forward pass gave for it (`Pass`), `context` all
the rest, for losses that need it. `batch_loss` applies one to a batch of images and adds the
metrics in nats. One scalar is enough for several networks: `jax.lax.stop_gradient` decides which of
them a term trains.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vaejax.distributions import LEVELS, DiscretizedNormal
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder, Pass

Metrics = dict[str, Float[Array, ""]]
Loss = Callable[..., tuple[Float[Array, ""], Metrics]]

MIN_VARIANCE = 1e-12  # of the likelihood: a perfect copy has no finite density


def to_float(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Convert levels to x in [0, 1], the scale of all models, in JAX's default precision."""
    return images.astype(float) / (LEVELS - 1)


def to_uint8(x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Round x to the nearest levels; values outside [0, 1] are clipped."""
    return jnp.round(jnp.clip(x, 0, 1) * (LEVELS - 1)).astype(jnp.uint8)


class Context(NamedTuple):
    """Everything that a forward pass and a loss may need besides the batch."""

    model: Autoencoder
    params: PyTree
    batch_stats: PyTree
    keys: Key[Array, " b"]  # one an image
    train: bool = True
    frozen: PyTree = None  # networks that are not trained, such as LPIPS'; the recipe loads them
    axis: str | None = None  # the name of the device axis under `jax.pmap`
    # of the likelihood; None: the mse of these images, of all devices
    variance: Float[Array, ""] | None = None

    def apply(self, method: str, *inputs: Any, params: PyTree = None) -> Any:
        """Call another method of the model, such as a critic, on its parameters or on others."""
        params = self.params if params is None else params
        model, stats = self.model, self.batch_stats
        return autoencoder.apply(model, params, stats, *inputs, method=method)[0]

    def likelihood_variance(self, mse: Float[Array, ""]) -> Float[Array, ""]:
        """Return the variance of the likelihood, through which no gradient goes.

        Without a given one it is the mse of the batch: the best that one variance for all values
        can be (Rybkin et al., 2021, sigma-VAE, equation 4).
        """
        if self.variance is not None:
            return self.variance
        mse = jax.lax.stop_gradient(mse)
        mean = mse if self.axis is None else jax.lax.pmean(mse, self.axis)
        return jnp.maximum(mean, MIN_VARIANCE)


# Losses -------------------------------------------------------------------------------------------


def mse_kl(
    x: Float[Array, "b h w c"], out: Pass, context: Context, *, kl_weight: float
) -> tuple[Float[Array, ""], Metrics]:
    """Compute mse + kl_weight * kl, both means over everything: the report's loss, weight 0.01."""
    mse = jnp.mean((x - out.output) ** 2)
    kl = jnp.mean(_rate(out)) / out.latents  # nats per dimension of z, unlike the rate
    return mse + kl_weight * kl, {"mse": mse, "kl": kl}


def batch_coupled(loss: Loss) -> Loss:
    """Mark a loss in which the images of a batch meet: with micro-batches it is another loss."""
    loss.batch_coupled = True  # pyright: ignore[reportFunctionMemberAccess]
    return loss


@batch_coupled
def sigma_vae(
    x: Float[Array, "b h w c"], out: Pass, context: Context, *, beta: float = 1.0
) -> tuple[Float[Array, ""], Metrics]:
    """Compute the negative ELBO of a normal likelihood with the best variance, nats per value.

    Rybkin et al. (2021), sigma-VAE, section 3, up to the constant log(2 pi) / 2: there is no weight
    to choose. The variance is the mse of the batch (of all devices, but of one micro-batch); since
    it is its own optimum, no gradient goes through it. In nats per value the loss is of order one
    at any size of image; Adam takes the same steps at any scale.
    """
    mse, rate = jnp.mean((x - out.output) ** 2), jnp.mean(_rate(out))
    variance = context.likelihood_variance(mse)
    distortion = 0.5 * (mse / variance + jnp.log(variance))
    return distortion + beta * rate / x[0].size, {"mse": mse, "kl": rate / out.latents}


@batch_coupled
def sigma_vae_sharp(
    x: Float[Array, "b h w c"],
    out: Pass,
    context: Context,
    *,
    beta: float = 1.0,
    gradient_weight: float = 0.5,
    l1_weight: float = 0.5,
) -> tuple[Float[Array, ""], Metrics]:
    """Compute `sigma_vae`, with two terms that sharpen what is drawn: of edges, and of flat areas.

    `gradient_weight` weighs the squared error of the differences between neighbouring pixels
    (Mathieu et al., 2016, equation 6, with squares), `l1_weight` the absolute error. Both are
    calibrated as the likelihood is: their gradients are those of log(gradient_mse) / 2 and of
    log(l1), the negative log-likelihoods of a normal and of a Laplace distribution with the best
    scale, up to constants. Their values are 0, so that the loss has the value of `sigma_vae`.
    """
    likelihood, terms = sigma_vae(x, out, context, beta=beta)
    error = out.output - x
    rows, columns = jnp.diff(error, axis=1), jnp.diff(error, axis=2)
    gradient_mse = jnp.mean(rows**2) + jnp.mean(columns**2)
    l1 = jnp.mean(jnp.abs(error))
    sharpness = 0.5 * gradient_weight * _relative(gradient_mse, context)
    sharpness += l1_weight * _relative(l1, context)
    return likelihood + sharpness, {**terms, "gradient_mse": gradient_mse, "l1": l1}


def _relative(value: Float[Array, ""], context: Context) -> Float[Array, ""]:
    """Return 0, with the gradient of the value's logarithm; the value is that of all devices."""
    constant = jax.lax.stop_gradient(value)
    mean = constant if context.axis is None else jax.lax.pmean(constant, context.axis)
    return (value - constant) / jnp.maximum(mean, MIN_VARIANCE)


def reconstruction(
    x: Float[Array, "b h w c"], out: Pass, context: Context, *, error: Literal["mse", "bce"]
) -> tuple[Float[Array, ""], Metrics]:
    """Compute the error of a deterministic autoencoder, a mean over everything.

    "bce" is the cross-entropy of each value in [0, 1] with a sigmoid's output, nats. An exact
    reproduction does not have 0 but the entropy of its own values.
    """
    metrics = {"mse": jnp.mean((x - out.output) ** 2)}
    if error == "bce":
        inside = jnp.clip(out.output, 1e-7, 1 - 1e-7)  # a sigmoid that is saturated in float32
        metrics["bce"] = -jnp.mean(x * jnp.log(inside) + (1 - x) * jnp.log1p(-inside))
    return metrics[error], metrics


def _rate(out: Pass) -> Float[Array, " b"]:
    if out.rate is None:
        raise ValueError("this loss needs a posterior: the model's `encode` returns no Normal")
    return out.rate


def is_batch_coupled(loss: partial) -> bool:
    """Tell whether the images of a batch meet in a loss."""
    return getattr(loss.func, "batch_coupled", False)


def settings(loss: Loss) -> dict[str, Any]:
    """Return the settings of a loss by name: what `partial` has bound, and the defaults."""
    return keyword_settings(loss) if isinstance(loss, partial) else {}


def keyword_settings(function: partial) -> dict[str, Any]:
    """Return the keyword-only arguments of a partial: those that are bound, and the defaults."""
    parameters = inspect.signature(function.func).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    known = {
        name: value for name, value in defaults.items() if value is not inspect.Parameter.empty
    }
    return {**known, **function.keywords}


# A batch ------------------------------------------------------------------------------------------


def batch_loss(
    images: UInt8[Array, "b h w c"], context: Context, *, loss: Loss
) -> tuple[Float[Array, ""], tuple[Metrics, PyTree]]:
    """Run the model on a batch and apply a loss: (scalar, (metrics, new batch_stats)).

    The metrics are the loss, the mse, the loss's terms and those of the ELBO; no gradient goes
    through them.
    """
    x = to_float(images)
    model, params, batch_stats, keys = context[:4]
    out = autoencoder.forward(
        model, params, batch_stats, x, keys, train=context.train, axis=context.axis
    )
    scalar, terms = loss(x, out, context)
    mse = jnp.mean((x - out.output) ** 2)
    variance = context.likelihood_variance(mse)
    metrics = {**terms, "loss": scalar, "mse": mse, **elbo_terms(images, out, variance)}
    if out.rate is not None:
        beta = effective_beta(settings(loss), variance, values=x[0].size, latents=out.latents)
        metrics |= {} if beta is None else {"effective_beta": jnp.asarray(beta, scalar.dtype)}
    return scalar, jax.lax.stop_gradient((metrics, out.batch_stats))


def elbo_terms(images: UInt8[Array, "b h w c"], out: Pass, variance: Float[Array, ""]) -> Metrics:
    """Compute distortion, rate and ELBO, nats per image, and bits per dimension: batch means.

    The distortion is -log p(x|z) over the 256 levels of a normal likelihood with this variance, so
    that models which were trained on a plain mse have these metrics too. Only the distortion exists
    for a model without a posterior.
    """
    log_prob = DiscretizedNormal(out.output, jnp.log(variance)).log_prob(images)
    distortion = -jnp.mean(log_prob)
    if out.rate is None:
        return {"distortion": distortion}
    rate = jnp.mean(out.rate)
    return {
        "distortion": distortion,
        "rate": rate,
        "elbo": -(distortion + rate),
        "bits_per_dim": (distortion + rate) / (images[0].size * jnp.log(2.0)),
    }


def effective_beta(
    loss_settings: Mapping[str, Any],
    variance: float | Float[Array, ""],
    *,
    values: int,
    latents: int,
) -> float | Float[Array, ""] | None:
    """Return the weight that a loss puts on the rate against the distortion, 1 for the ELBO.

    It follows from the loss's settings: `beta` is that weight (Higgins et al., 2017); `kl_weight`
    weighs the kl per latent dimension against the mse, of which n / (2 variance) is a nat, n being
    the values of an image. None for a loss that has neither.
    """
    if "kl_weight" in loss_settings:
        return loss_settings["kl_weight"] * values / (2 * variance * latents)
    return loss_settings.get("beta")
