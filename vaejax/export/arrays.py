"""The weights of a model and its prior as one safetensors file, and read again from it.

An array is called as its path in the tree: `params.decoder.grid.kernel`, `batch_stats. ...`, and of
the prior `prior.params. ...`. The file's metadata have the description of the model as JSON, under
"vaejax".
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import PyTree
from safetensors import numpy as format_

from vaejax import flow
from vaejax.errors import UserError
from vaejax.export.exported import FORMAT, Exported, as_half, metadata, prior_weights
from vaejax.files import printable
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.priors import (
    FlowPrior,
    GaussianMixture,
    Mixture,
    Prior,
    StandardNormal,
    latent_dimensions,
)

ARRAYS = "model.safetensors"  # its name in a folder
PROPERTY = "vaejax"  # of its metadata
# what JSON of another form than ours raises
MALFORMED = AttributeError, KeyError, RecursionError, TypeError, ValueError


def to_safetensors(exported: Exported, *, half: bool = False) -> bytes:
    """Write the arrays of a model and its prior; with `half` large ones as float16."""
    tree = {"params": exported.params, "batch_stats": exported.batch_stats}
    tree |= {"prior": prior_weights(exported)}
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf, order="C")
        smaller = as_half(array) if half else None
        arrays[_name(path)] = array if smaller is None else smaller
    return format_.save(arrays, {PROPERTY: json.dumps(metadata(exported, half=half))})


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def load(folder: Path) -> Exported:
    """Read the model, the weights and the prior of an export, bit for bit as they were.

    An export with `half` has rounded weights, which are float32 again. Raises UserError where the
    file is missing, damaged, of an unknown model, or has not the arrays that its model needs.
    """
    path = Path(folder) / ARRAYS
    name = printable(path)
    try:
        with safetensors.safe_open(path, "np") as file:
            properties = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = json.loads(properties[PROPERTY])
        if facts["format"] != FORMAT:
            raise UserError(f"{name} was written by another version of vaejax")
        model = autoencoder.from_json(facts["model"])
        described, attributes = facts["prior"], _attributes(facts["prior"])
        like = _like(model, described)
    except FileNotFoundError:
        raise UserError(f"there is no {name}: `vaejax export RUN --out FOLDER` writes it") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, *MALFORMED) as error:
        raise UserError(f"{name} is no export of vaejax, or damaged: {error}") from None
    tree = _take(arrays, like, name)
    prior = _prior(described, model, tree["prior"])
    return Exported(model, tree["params"], tree["batch_stats"], prior, attributes)


def _attributes(prior: Any) -> dict[str, list[str]]:
    """Return the attributes that the description of a flow names. Raises ValueError if damaged."""
    match prior:
        case {"attributes": dict(found), "network": {"labels": list(counts)}}:
            attributes = {str(name): list(map(str, values)) for name, values in found.items()}
            if list(map(len, attributes.values())) != counts:
                raise ValueError("its attributes are not those of its network")
            return attributes
    return {}


def _like(model: Autoencoder, prior: Any) -> dict[str, PyTree]:
    """Return the shapes of the arrays of a model and a described prior, or raise ValueError."""
    params, batch_stats = jax.eval_shape(
        partial(autoencoder.init, model), jax.random.key(0, impl="threefry2x32")
    )
    d, own = latent_dimensions(model), {}
    match prior:
        case {"kind": "flow", "steps": int(steps), "network": network} if steps > 0:
            weights = jax.eval_shape(
                partial(flow.init, flow.from_json(network, latents=d)),
                jax.random.key(0, impl="threefry2x32"),
            )
            own = dict(zip(("params", "batch_stats"), weights, strict=True))
        case {"kind": "mixture", "log_weights": [*components]}:
            k = len(components)
            shapes = zip(Mixture._fields, ((k,), (k, d), (k, d, d)), strict=True)
            own = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in shapes}
        case None | {"kind": "normal"}:
            pass
        case _:
            raise ValueError("it describes an unknown prior")
    return {"params": params, "batch_stats": batch_stats, "prior": own}


def _prior(description: Any, model: Autoencoder, arrays: Any) -> Prior | None:
    match description:
        case {"kind": "flow", "steps": steps, "network": described}:
            network = flow.from_json(described, latents=latent_dimensions(model))
            params, stats = arrays["params"], arrays["batch_stats"]
            return FlowPrior(network, params, stats, model, steps=steps)
        case {"kind": "mixture"}:
            return GaussianMixture(Mixture(**arrays), model)
        case {"kind": "normal"}:
            return StandardNormal(model)
    return None


def _take(arrays: dict[str, np.ndarray], like: PyTree, name: str) -> Any:
    """Return the arrays in the tree that is wanted, as float32.

    Raises UserError, with the names, if they are others than those, or of other shapes.
    """
    wanted = {_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(like)}
    wrong = [f"{key} is missing" for key in wanted if key not in arrays]
    wrong += [f"{key} is not of this model" for key in arrays if key not in wanted]
    for key in wanted.keys() & arrays.keys():
        array, shape = arrays[key], wanted[key].shape
        if array.shape != shape or array.dtype not in (np.float32, np.float16):
            found, needed = "×".join(map(str, array.shape)), "×".join(map(str, shape))
            wrong.append(f"{key} is {array.dtype} {found}, not float32 {needed}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{name} does not fit its model: {'; '.join(sorted(wrong)[:5])}{more}")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(arrays[_name(path)], jnp.float32), like
    )
