"""What every autoencoder here is: an encoder and a decoder, and pure functions over their arrays.

A model is a frozen dataclass of hyperparameters that builds two Linen modules. The modules are
deterministic: whoever wants noise draws it with a key of their own. `params` and `statistics`
(batch norm's moving mean and variance, empty where there is no norm) are trees of arrays with the
branches "encoder" and "decoder"; x is float `[b h w c]` in [0, 1].
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from vaejax.errors import UserError


@dataclass(frozen=True)
class Autoencoder:
    """What must be known to build a model, and nothing else: hashable, so that jit takes it."""

    size: int = 64  # height and width of an image, pixels
    channels: int = 3
    # what the layers multiply; parameters, statistics, losses and Adam's moments are float32 always
    compute: Literal["float32", "bfloat16"] = "float32"

    title: ClassVar[str]  # what a person calls it
    has_prior: ClassVar[bool] = False  # whether the codes of new faces can be drawn
    denoises: ClassVar[bool] = False  # whether `corrupt` is more than the identity

    @property
    def code(self) -> tuple[int, ...]:
        """The shape of what stands between encoder and decoder, for one image."""
        raise NotImplementedError

    def encoder(self, *, axis: str | None) -> nn.Module:
        """Takes x to its code, or to the posterior over it, as `__call__(x, *, train)`; batch norm
        goes over all devices of the `axis`."""
        raise NotImplementedError

    def decoder(self, *, axis: str | None) -> nn.Module:
        """Takes a code to an image, in the same manner."""
        raise NotImplementedError

    def corrupt(self, x: Float[Array, "b h w c"], keys: Key[Array, " b"]) -> Float[Array, "..."]:
        """What the encoder is shown in training in the place of x; one key an image."""
        return x


def init(model: Autoencoder, key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
    """Parameters and statistics, by Keras' rules: Glorot's uniform kernels, biases of zero."""
    params, statistics = {}, {}
    for (branch, (module, inputs)), own in zip(
        branches(model).items(), jax.random.split(key), strict=True
    ):
        variables = module.init(own, jnp.zeros(inputs.shape), train=False)
        params[branch] = variables["params"]
        statistics[branch] = variables.get("batch_stats", {})
    return params, statistics


def encode(
    model: Autoencoder,
    params: PyTree,
    statistics: PyTree,
    x: Float[Array, "b h w c"],
    *,
    train: bool = False,
    axis: str | None = None,
) -> tuple[Any, PyTree]:
    """The code of x, an array `[b ...]`, or q(z|x) where the model is variational; and the
    statistics as they stand after this batch (unchanged unless `train`)."""
    module = model.encoder(axis=axis)
    return _apply(module, "encoder", params, statistics, x, train, model.compute)


def decode(
    model: Autoencoder,
    params: PyTree,
    statistics: PyTree,
    code: Float[Array, "b ..."],
    *,
    train: bool = False,
    axis: str | None = None,
) -> tuple[Float[Array, "b h w c"], PyTree]:
    """The image of a code (the mean of p(x|z)), and the statistics as they stand afterwards."""
    module = model.decoder(axis=axis)
    return _apply(module, "decoder", params, statistics, code, train, model.compute)


def _apply(module, branch, params, statistics, inputs, train, kind):
    own = params[branch]
    if kind != "float32":
        own, inputs = jax.tree.map(lambda leaf: leaf.astype(kind), (own, inputs))
    variables = {"params": own, "batch_stats": statistics[branch]}
    outputs, updated = module.apply(variables, inputs, train=train, mutable=["batch_stats"])
    if kind != "float32":
        outputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), outputs)
    return outputs, {**statistics, branch: updated.get("batch_stats", {})}


def branches(model: Autoencoder) -> dict[str, tuple[nn.Module, jax.ShapeDtypeStruct]]:
    """The two modules, each with the shape of what one image gives it."""
    image = (1, model.size, model.size, model.channels)
    return {
        "encoder": (model.encoder(axis=None), jax.ShapeDtypeStruct(image, jnp.float32)),
        "decoder": (model.decoder(axis=None), jax.ShapeDtypeStruct((1, *model.code), jnp.float32)),
    }


def describe(model: Autoencoder) -> dict[str, Any]:
    """The model as JSON, from which `build` makes it again."""
    return {"kind": type(model).__name__, **asdict(model)}


def build(settings: Mapping[str, Any]) -> Autoencoder:
    """The model of a description; every class of this folder's modules is known by its name.

    Raises UserError for a description of no such model.
    """
    folder = __package__ or ""
    for module in pkgutil.iter_modules(import_module(folder).__path__):
        import_module(f"{folder}.{module.name}")
    kinds = {kind.__name__: kind for kind in Autoencoder.__subclasses__()}
    given = dict(settings)
    kind = kinds.get(str(given.pop("kind", None)))
    if kind is None:
        raise UserError(f"there is no model {str(settings.get('kind'))[:40]!r}")
    hints = get_type_hints(kind)
    for field in fields(kind):
        value = given.pop(field.name, field.default)
        if not _is(value, hints[field.name]):
            raise UserError(f"a {kind.title} has no {field.name} of {str(value)[:40]!r}")
    if given:
        raise UserError(f"a {kind.title} has no {str(next(iter(given)))[:40]!r}")
    return kind(**{name: value for name, value in settings.items() if name != "kind"})


def _is(value: Any, hint: Any) -> bool:
    """Whether a value, which may be anybody's, is of the type of a field. Integers are counts."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is int:
        return isinstance(value, int) and 0 < value < 2**20
    return isinstance(value, (int, float) if hint is float else hint)


def divisible(model: Autoencoder, *, by: int, least: int) -> None:
    """UserError, with the nearest sizes that do, unless the model's layers admit its images."""
    if model.size < least or model.size % by:
        below = max(least, model.size // by * by)
        above = max(least, (model.size // by + 1) * by)
        nearest = f"{below}" if below == above else f"{below} or {above}"
        raise UserError(
            f"the layers of the {model.title} do not admit images of {model.size} pixels: "
            f"take a multiple of {by}, the nearest is {nearest}"
        )
