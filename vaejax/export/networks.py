"""The encoder, the decoder and the learned prior of a model as ONNX."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from vaejax import flow
from vaejax.distributions import Normal
from vaejax.export.exported import LATENT, Exported, leaf_names, metadata, prior_weights
from vaejax.export.graph import Network, to_onnx
from vaejax.models import autoencoder
from vaejax.priors import FlowPrior, GaussianMixture, Mixture, latent_dimensions, unraveler

PROPERTY = "vaejax"  # of each ONNX file's metadata: the description as JSON


class Payload(NamedTuple):
    """The ONNX files of a model, and their description."""

    files: dict[str, bytes]  # by name: decoder.onnx, encoder.onnx, prior.onnx
    metadata: dict[str, Any]  # JSON values


def payload(exported: Exported, *, half: bool = False) -> Payload:
    """Write a model's networks as ONNX, and describe them.

    The files are opset 17, compute in float32 and take a batch b of any size; `half` stores large
    arrays of weights as float16 (half the size; images of the same latents differ by less than
    0.001). Images are float32 `[b h w c]` in [0, 1]; those of the report's VAE may leave it, and
    are to be clipped.

    - `decoder.onnx`: `latent` [b ...] -> `image`.
    - `encoder.onnx`: `image` -> `mean`, `log_variance` [b ...], those of q(z|x); of a deterministic
      model `image` -> `latent`. A denoising model's image is the noisy one.
    - `prior.onnx`, of a learned prior alone: `noise` float32 [b d], standard normal, all d latents
      of a face as one vector -> `latent` [b ...]. Noise times a temperature is that temperature's.
      A mixture also takes `component` int32 [b], from 0 on; a flow that knows attributes `labels`
      int32 [b a], the number of each attribute's value from 1 on, 0 for any. The flow's steps are
      inside.

    A model with several latent arrays has `latent.PATH`, `mean.PATH`, ... for each of them.

    The metadata, which are also in each file's metadata as JSON under "vaejax":

    - `format`, `model` (as in config.json), `title` (in words), `size` and `channels` of an image;
    - `latents`: the shape of each input of the decoder, without the batch: {"latent": [64]};
    - `variational`: whether the encoder gives `mean` and `log_variance`; `denoises`; `half`;
    - `prior`: None without one, {"kind": "normal"} for N(0, I) over `latents` (there is no
      prior.onnx then), {"kind": "mixture", "log_weights": [k numbers]} or {"kind": "flow",
      "steps": of Heun's method, "attributes": {name: [values]} in the order of `labels`,
      "network": ...};
    - `parameters`: {"model": n, "prior": n}, numbers of parameters.

    What `vaejax sample` draws for a seed is in `priors`: `seed_keys`, then the `sample` of each.

    Raises UserError, with their names, for operations that have no form in ONNX here.
    """
    facts = metadata(exported, half=half)
    props = {PROPERTY: json.dumps(facts)}
    networks = {"decoder.onnx": _decoder(exported), "encoder.onnx": _encoder(exported)}
    if (prior := _prior(exported)) is not None:
        networks["prior.onnx"] = prior
    files = {n: to_onnx(net, half=half, metadata=props) for n, net in networks.items()}
    return Payload(files, facts)


def _weights(exported: Exported) -> dict[str, PyTree]:
    return {"params": exported.params, "batch_stats": exported.batch_stats}


def _in_full_precision(model: Any) -> Any:
    """Return a model that computes in float32: runtimes lack bfloat16."""
    return model.clone(compute="float32")


def _encoder(exported: Exported) -> Network:
    model = _in_full_precision(exported.model)
    spec = autoencoder.posterior_spec(model)
    leaves, _ = jax.tree.flatten(spec, is_leaf=_is_normal)
    latents = leaf_names(autoencoder.latent_spec(model), LATENT)
    outputs = []
    for name, leaf in zip(latents, leaves, strict=True):
        kinds = ("mean", "log_variance") if _is_normal(leaf) else (LATENT,)
        outputs += [name.replace(LATENT, kind, 1) for kind in kinds]

    def encode(weights: Any, image: Any) -> list:
        posterior = autoencoder.encode(model, weights["params"], weights["batch_stats"], image)
        return jax.tree.leaves(posterior)

    shape = (model.size, model.size, model.channels)
    inputs = {"image": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return Network("encoder", encode, _weights(exported), inputs, outputs)


def _is_normal(node: Any) -> bool:
    return isinstance(node, Normal)


def _decoder(exported: Exported) -> Network:
    model = _in_full_precision(exported.model)
    leaves, tree = jax.tree.flatten(autoencoder.latent_spec(model))
    inputs = dict(zip(leaf_names(tree.unflatten(leaves), LATENT), leaves, strict=True))

    def decode(weights: Any, *latents: Any) -> Any:
        z = tree.unflatten(latents)
        return autoencoder.decode(model, weights["params"], weights["batch_stats"], z)

    return Network("decoder", decode, _weights(exported), inputs, ["image"])


def _prior(exported: Exported) -> Network | None:
    """Return the function from noise to latents; None of N(0, I), or without a prior."""
    model, prior = exported.model, exported.prior
    unravel = jax.vmap(unraveler(model))
    noise = jax.ShapeDtypeStruct((latent_dimensions(model),), jnp.float32)
    outputs = leaf_names(autoencoder.latent_spec(model), LATENT)
    weights = {"prior": prior_weights(exported)}
    match prior:
        case FlowPrior():

            def from_flow(weights: Any, noise: Any, *labels: Any) -> PyTree:
                own = weights["prior"]
                known = labels[0] if labels else jnp.zeros((len(noise), 0), jnp.int32)
                settings = {"flow": prior.network, "steps": prior.steps}
                z = flow.sample(own["params"], own["batch_stats"], noise, known, **settings)
                return unravel(z)

            inputs = {"noise": noise}
            if count := len(prior.network.labels):
                inputs["labels"] = jax.ShapeDtypeStruct((count,), jnp.int32)
            return Network("prior", from_flow, weights, inputs, outputs)
        case GaussianMixture():

            def from_mixture(weights: Any, noise: Any, component: Any) -> PyTree:
                mixture = Mixture(**weights["prior"])
                factors = mixture.choleskys[component]
                return unravel(mixture.means[component] + jnp.einsum("bij,bj->bi", factors, noise))

            component = jax.ShapeDtypeStruct((), jnp.int32)
            inputs = {"noise": noise, "component": component}
            return Network("prior", from_mixture, weights, inputs, outputs)
    return None
