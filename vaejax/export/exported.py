"""What an export holds, and its description as JSON, which all of its files carry."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from vaejax import flow
from vaejax.errors import UserError
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.summary import count
from vaejax.priors import FlowPrior, GaussianMixture, Prior, StandardNormal

FORMAT = "vaejax export 1"
LATENT = "latent"
HALF_FROM = 1024  # numbers of an array that is stored as float16; smaller ones take no space


class Exported(NamedTuple):
    """A model with its weights, and the prior that its new faces are drawn from."""

    model: Autoencoder
    params: PyTree  # the moving average where the run has one
    batch_stats: PyTree
    prior: Prior | None  # None: it draws no new faces
    attributes: Mapping[str, Sequence[str]] = {}  # the values of each attribute that a flow knows


def leaf_names(tree: PyTree, name: str) -> list[str]:
    """Name the arrays of a pytree: `name` for a single one, else "name.path" for each."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if len(leaves) == 1:
        return [name]
    return [
        f"{name}.{jax.tree_util.keystr(path, simple=True, separator='.')}" for path, _ in leaves
    ]


def metadata(exported: Exported, *, half: bool) -> dict[str, Any]:
    """Describe an export by JSON values; `payload` says what each of them is.

    Raises UserError for a prior of another kind than vaejax' own.
    """
    model = exported.model
    spec = autoencoder.latent_spec(model)
    names = leaf_names(spec, LATENT)
    return {
        "format": FORMAT,
        "model": autoencoder.to_json(model),
        "title": model.title,
        "size": model.size,
        "channels": model.channels,
        "latents": {n: list(x.shape) for n, x in zip(names, jax.tree.leaves(spec), strict=True)},
        "variational": autoencoder.is_variational(model),
        "denoises": model.denoises,
        "half": half,
        "prior": _describe_prior(exported),
        "parameters": {"model": count(exported.params), "prior": count(prior_weights(exported))},
    }


def _describe_prior(exported: Exported) -> dict[str, Any] | None:
    match exported.prior:
        case None:
            return None
        case StandardNormal():
            return {"kind": "normal"}
        case FlowPrior() as prior:
            return {
                "kind": "flow",
                "network": flow.to_json(prior.network),
                "steps": prior.steps,
                "attributes": {name: list(v) for name, v in exported.attributes.items()},
            }
        case GaussianMixture(mixture=mixture):
            log_weights = np.asarray(mixture.log_weights, np.float64).tolist()
            return {"kind": "mixture", "log_weights": log_weights}
        case prior:
            raise UserError(f"a prior of the kind {prior.name!r} cannot be exported")


def prior_weights(exported: Exported) -> dict[str, PyTree]:
    """Return the arrays of the learned prior; none of N(0, I), or where there is no prior."""
    match exported.prior:
        case FlowPrior() as prior:
            return {"params": prior.params, "batch_stats": prior.stats}
        case GaussianMixture(mixture=mixture):
            return mixture._asdict()
    return {}


def as_half(array: np.ndarray) -> np.ndarray | None:
    """Return a large float32 array as float16; None for one that stays as it is.

    Small ones do, among them those that float16 would spoil, such as frequencies; so do arrays with
    a number beyond 65,504, which float16 has not.
    """
    if array.dtype != np.float32 or array.size < HALF_FROM:
        return None
    if np.abs(array).max() > np.finfo(np.float16).max:
        return None
    return array.astype(np.float16)
