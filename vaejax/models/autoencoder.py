"""The base of every model: a Linen module per model, and pure functions over its arrays.

A model's fields are its hyperparameters. Its modules draw no random numbers: whoever wants noise
passes keys, one an image. `params` and `batch_stats` (the moving mean and variance of batch norms,
empty without them) are trees of arrays; x is float `[b h w c]` in [0, 1]; z is a pytree of arrays
`[b ...]`: one for most models, several for some.
"""

import pkgutil
import sys
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from vaejax.distributions import Normal
from vaejax.errors import UserError

MAX_INTEGER = 2**20  # of a model's field: more than that is a damaged description


class Autoencoder(nn.Module):
    """An encoder and a decoder as one Linen module. Subclasses define `encode` and `decode`.

    `encode` returns the posterior q(z|x) as a pytree of `Normal`, or, for a deterministic model, z
    itself as a pytree of arrays; `decode` returns the mean of p(x|z). Both get `train` (whether
    batch norms use the statistics of this batch) and `axis` (the name of the device axis under
    `jax.pmap`, for batch norms). Submodules are created in `setup`; one that only a loss calls,
    such as a critic, must be called once where `self.is_initializing()`, or it has no parameters. A
    model whose z has another prior or order than independent N(0, I) overrides `__call__`.
    """

    size: int = 64  # height and width of an image, pixels
    channels: int = 3
    # what the layers multiply; parameters, batch_stats, losses, Adam's moments are float32 always
    compute: Literal["float32", "bfloat16"] = "float32"

    title: ClassVar[str] = "autoencoder"  # in words, for tables and messages
    denoises: ClassVar[bool] = False  # whether `corrupt` is more than the identity

    def encode(self, x: Float[Array, "b h w c"], *, train: bool, axis: str | None = None) -> Any:
        """Return q(z|x) as a pytree of `Normal`, or z as a pytree of arrays `[b ...]`."""
        raise NotImplementedError(f"{type(self).__name__} defines no encode")

    def decode(self, z: PyTree, *, train: bool, axis: str | None = None) -> Float[Array, "b h w c"]:
        """Return the mean of p(x|z), in [0, 1] or near it."""
        raise NotImplementedError(f"{type(self).__name__} defines no decode")

    def corrupt(self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "..."]:
        """Return what the encoder is shown in place of x; one key an image."""
        return x

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        keys: Key[Array, " b"],
        *,
        train: bool,
        axis: str | None = None,
    ) -> tuple[Array, Array | None, PyTree]:
        """Encode, sample and decode: the output, the rate (nats per image, None for a deterministic
        model) and z."""
        noise_keys, sample_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        posterior = self.encode(self.corrupt(x, noise_keys), train=train, axis=axis)
        posterior = _to_full_precision(posterior)
        z = sample(posterior, sample_keys)
        inputs = jax.tree.map(lambda leaf: leaf.astype(x.dtype), z)
        output = self.decode(inputs, train=train, axis=axis)
        return output, rate(posterior), z

    @property
    def batch_coupled(self) -> bool:
        """Whether the output for an image depends on the others of its training batch."""
        return getattr(self, "norm", None) == "batch"


class Pass(NamedTuple):
    """What a forward pass gives."""

    output: Float[Array, "b h w c"]  # mean of p(x|z)
    rate: Float[Array, " b"] | None  # KL(q(z|x) || p(z)), nats per image; None if deterministic
    z: PyTree  # drawn from q(z|x), or the code of a deterministic model
    batch_stats: PyTree  # after this batch; unchanged unless `train`

    @property
    def latents(self) -> int:
        """The number of latent dimensions of an image."""
        return sum(leaf[0].size for leaf in jax.tree.leaves(self.z))


# Pure functions over the arrays of a model --------------------------------------------------------


def init(model: Autoencoder, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
    """Return initial `params` and `batch_stats`, by the initializers of the layers."""
    params_key, pass_key = jax.random.split(key)
    x = jnp.zeros((1, model.size, model.size, model.channels))
    variables = model.init(params_key, x, jax.random.split(pass_key, 1), train=False)
    return variables["params"], variables.get("batch_stats", {})


def apply(
    model: Autoencoder,
    params: PyTree,
    batch_stats: PyTree,
    *inputs: Any,
    method: str,
    **settings: Any,
) -> tuple[Any, PyTree]:
    """Call a method of the model on its arrays; return its result and the new `batch_stats`.

    Parameters and floating inputs are converted to the model's `compute` type, results to float32.
    """
    if model.compute != "float32":
        params, inputs = jax.tree.map(caster(model.compute), (params, inputs))
    variables = {"params": params, "batch_stats": batch_stats}
    outputs, updated = model.apply(
        variables, *inputs, **settings, method=method, mutable=["batch_stats"]
    )
    return _to_full_precision(outputs), updated.get("batch_stats", batch_stats)


def forward(
    model: Autoencoder,
    params: PyTree,
    batch_stats: PyTree,
    x: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    train: bool,
    axis: str | None = None,
) -> Pass:
    """Encode x, sample z with each image's key, and decode."""
    (output, rate_, z), batch_stats = apply(
        model, params, batch_stats, x, keys, method="__call__", train=train, axis=axis
    )
    return Pass(output, rate_, z, batch_stats)


def encode(
    model: Autoencoder, params: PyTree, batch_stats: PyTree, x: Float[Array, "b h w c"]
) -> Any:
    """Return q(z|x) as a pytree of `Normal`, or z of a deterministic model, in evaluation mode."""
    return apply(model, params, batch_stats, x, method="encode", train=False)[0]


def decode(
    model: Autoencoder, params: PyTree, batch_stats: PyTree, z: PyTree
) -> Float[Array, "b h w c"]:
    """Return the mean of p(x|z), in evaluation mode."""
    return apply(model, params, batch_stats, z, method="decode", train=False)[0]


def caster(dtype: str):
    """Return a function that converts floating arrays to `dtype` and leaves keys and counts."""

    def cast(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return cast


def _to_full_precision(tree: PyTree) -> PyTree:
    """Convert bfloat16 to float32; other types stay, as float64 in gradient checks."""
    return jax.tree.map(lambda a: a.astype("float32") if a.dtype == jnp.bfloat16 else a, tree)


# Latents ------------------------------------------------------------------------------------------


def sample(posterior: Any, keys: Key[Array, " b"]) -> PyTree:
    """Draw z from each `Normal` of a posterior with each image's key; arrays stay as they are."""
    leaves, tree = jax.tree.flatten(posterior, is_leaf=_is_normal)
    split = jax.vmap(lambda key: jax.random.split(key, len(leaves)))(keys)
    drawn = [
        jax.vmap(Normal.sample)(leaf, split[:, i]) if _is_normal(leaf) else leaf
        for i, leaf in enumerate(leaves)
    ]
    return tree.unflatten(drawn)


def mode(posterior: Any) -> PyTree:
    """Return the most probable z of a posterior; arrays stay as they are."""
    return jax.tree.map(
        lambda leaf: leaf.mean if _is_normal(leaf) else leaf, posterior, is_leaf=_is_normal
    )


def rate(posterior: Any) -> Float[Array, " b"] | None:
    """Return KL(q(z|x) || N(0, I)) over all latents, nats per image; None without a posterior."""
    normals = [leaf for leaf in jax.tree.leaves(posterior, is_leaf=_is_normal) if _is_normal(leaf)]
    if not normals:
        return None
    return jnp.sum(jnp.stack([normal.rate() for normal in normals]), axis=0)


def log_prob(posterior: Any, z: PyTree) -> Float[Array, " b"]:
    """Return log q(z|x) over all latents of an image, nats."""
    normals, latents = jax.tree.leaves(posterior, is_leaf=_is_normal), jax.tree.leaves(z)
    logs = [normal.log_prob(latent) for normal, latent in zip(normals, latents, strict=True)]
    return jnp.sum(jnp.stack(logs), axis=0)


def _is_normal(node: Any) -> bool:
    return isinstance(node, Normal)


def _hashable(model: Autoencoder) -> Any:
    """Return the model; Linen makes it hashable in a way that type checkers do not see."""
    return model


@cache
def posterior_spec(model: Any) -> Any:
    """Return what `encode` gives for one image, as shapes `[1 ...]`; nothing is computed."""

    def encode_one(key: Key[Array, ""]) -> Any:
        x = jnp.zeros((1, model.size, model.size, model.channels))
        return encode(model, *init(model, key), x)

    return jax.eval_shape(encode_one, jax.random.key(0, impl="threefry2x32"))


def latent_spec(model: Autoencoder) -> PyTree:
    """Return z of one image as a pytree of `jax.ShapeDtypeStruct`, without the batch axis."""
    z = mode(posterior_spec(_hashable(model)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), z)


def is_variational(model: Autoencoder) -> bool:
    """Tell whether every latent has a posterior, and so N(0, I) as its prior."""
    return all(
        map(_is_normal, jax.tree.leaves(posterior_spec(_hashable(model)), is_leaf=_is_normal))
    )


# JSON ---------------------------------------------------------------------------------------------


def hyperparameters(kind: type[Autoencoder]) -> list[str]:
    """Return the names of a model's fields, without those that Linen adds."""
    return [field.name for field in fields(kind) if field.name not in ("parent", "name")]


def to_json(model: Autoencoder) -> dict[str, Any]:
    """Describe the model by JSON values, from which `from_json` builds it again."""
    kind = type(model)
    return {
        "kind": kind.__name__,
        **{name: _plain(getattr(model, name)) for name in hyperparameters(kind)},
    }


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_json(description: Mapping[str, Any]) -> Autoencoder:
    """Build the model of a description. Its class is one of vaejax.models, or of what was imported.

    Raises UserError for an unknown class, an unknown field or a value of another type. Nothing is
    imported because a description names it.
    """
    folder = __package__ or ""
    for module in pkgutil.iter_modules(import_module(folder).__path__):
        import_module(f"{folder}.{module.name}")
    values = dict(description)
    name = str(values.pop("kind", None))[:40]
    kinds = {kind for kind in _subclasses(Autoencoder) if kind.__name__ == name}
    if len(kinds) > 1:  # a file that was imported again has replaced its classes
        current = {k for k in kinds if vars(sys.modules[k.__module__]).get(name) is k}
        kinds = current or kinds
    if len(kinds) != 1:
        several = "several imported classes are" if kinds else "no imported class is"
        raise UserError(
            f"there is no model {name!r}: {several} called so. `vaejax --import FILE.py ...` "
            "imports the file that defines it"
        )
    kind = kinds.pop()
    hints = get_type_hints(kind)
    known = hyperparameters(kind)
    if unknown := [field for field in values if field not in known]:
        raise UserError(f"a {kind.title} has no {str(unknown[0])[:40]!r}")
    for field, value in values.items():
        values[field] = value = _tuples(value, hints[field])
        if not _has_type(value, hints[field]):
            raise UserError(f"a {kind.title} has no {field} of {str(value)[:40]!r}")
    return kind(**values)


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*(_subclasses(below) for below in kind.__subclasses__()))


def _tuples(value: Any, hint: Any) -> Any:
    """Turn JSON's lists into the tuples that a type asks for."""
    if get_origin(hint) in (Union, UnionType):
        options = [_tuples(value, option) for option in get_args(hint)]
        return next((v for v in options if isinstance(v, tuple)), value)
    if not isinstance(value, list) or get_origin(hint) is not tuple:
        return value
    inner = get_args(hint)
    if inner[1:] == (...,):
        inner = (inner[0],) * len(value)
    return tuple(map(_tuples, value, inner)) if len(inner) == len(value) else tuple(value)


def _has_type(value: Any, hint: Any) -> bool:
    """Tell whether a value, which may come from anybody, has the type of a field."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return isinstance(value, str | int) and value in inner
    if origin in (Union, UnionType):
        return any(_has_type(value, option) for option in inner)
    if origin is tuple and isinstance(value, tuple):
        expected = (inner[0],) * len(value) if inner[1:] == (...,) else inner
        return len(expected) == len(value) and all(map(_has_type, value, expected))
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is int:
        return isinstance(value, int) and abs(value) < MAX_INTEGER
    if hint is float:
        return isinstance(value, int | float) and abs(value) < float("inf")
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


# What the constructors of models refuse -----------------------------------------------------------


def require_positive(model: Autoencoder, *names: str) -> None:
    """Raise UserError unless each of these fields is at least 1."""
    for name in names:
        if getattr(model, name) < 1:
            raise UserError(f"a {model.title} has no {name} of {getattr(model, name)}: at least 1")


def require_divisible(model: Autoencoder, *, by: int, least: int) -> None:
    """Raise UserError, with the nearest sizes that do, unless the layers admit the image size."""
    require_positive(model, "channels")
    if model.size < least or model.size % by:
        below = max(least, model.size // by * by)
        above = max(least, (model.size // by + 1) * by)
        nearest = f"{below}" if below == above else f"{below} or {above}"
        raise UserError(
            f"the layers of the {model.title} do not admit images of {model.size} pixels: "
            f"take a multiple of {by}, the nearest is {nearest}"
        )
