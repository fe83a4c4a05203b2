"""Exports of tiny models whose weights are far from the initial ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from vaejax import flow
from vaejax.export import Exported
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import FlowPrior, GaussianMixture, Mixture, Prior, latent_dimensions

ATTRIBUTES = {"hair": ["blue", "red", "white"], "glasses": ["no", "yes"]}


def arrays_like(shapes, seed: int = 0):
    """Draw weights that no initializer gives, so that biases and moving statistics count too."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim < 2:  # biases, scales, moving means and variances
            array = random.uniform(0.5, 1.5, leaf.shape)
        else:
            array = random.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
        return jnp.asarray(array, leaf.dtype)

    return jax.tree.map(draw, shapes)


def export_of(model: Autoencoder, prior: Prior | None = None, **fields) -> Exported:
    shapes = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
    return Exported(model, *arrays_like(shapes), prior, **fields)


def flow_prior(model: Autoencoder, **settings) -> FlowPrior:
    labels = tuple(map(len, settings.pop("attributes", {}).values()))
    network = flow.FlowMLP(latent_dimensions(model), 16, 2, labels)
    shapes = jax.eval_shape(partial(flow.init, network), jax.random.key(0))
    return FlowPrior(network, *arrays_like(shapes, 1), model, **settings)


def mixture_prior(model: Autoencoder, components: int = 3) -> GaussianMixture:
    random, d = np.random.default_rng(2), latent_dimensions(model)
    factors = np.tril(random.normal(size=(components, d, d)))
    weights = np.log(random.dirichlet(np.ones(components)))
    return GaussianMixture(Mixture(weights, random.normal(size=(components, d)), factors), model)


def run_onnx(content: bytes, **inputs) -> dict[str, np.ndarray]:
    """Compute the outputs of an ONNX file by onnxruntime, by their names."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = {name: np.asarray(x) for name, x in inputs.items()}
    return dict(zip(names, session.run(names, given), strict=True))


def images(model: Autoencoder, count: int) -> jax.Array:
    shape = (count, model.size, model.size, model.channels)
    return jnp.asarray(np.random.default_rng(3).uniform(size=shape), jnp.float32)
