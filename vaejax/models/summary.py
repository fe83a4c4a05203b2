"""The table of a model: each layer's output and parameters, in the order in which they run."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from vaejax.models import vae
from vaejax.models.layers import Block


class Row(NamedTuple):
    name: str
    layer: str
    output: tuple[int, ...]  # of one image
    parameters: tuple[int, ...]  # the layer's own; then its norm's, moving statistics included


def count(tree: PyTree) -> int:
    """How many numbers a tree of arrays (or of their shapes) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def rows(module: nn.Module, inputs: jax.ShapeDtypeStruct) -> list[Row]:
    """A row for each block of the module; nothing is computed but shapes."""
    found: list[Row] = []

    def interceptor(call, args, kwargs, context):
        output = call(*args, **kwargs)
        block = context.module
        if isinstance(block, Block) and context.method_name == "__call__":
            variables = block.variables
            norm = count((variables["params"].get("norm", {}), variables.get("batch_stats", {})))
            own = count(variables["params"]["layer"])
            found.append(
                Row(block.name or "", str(block), output.shape[1:], (own, norm) if norm else (own,))
            )
        return output

    def run(key, x):
        return module.init(key, x, train=False)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(run, jax.random.key(0), inputs)
    return found


def table(model: vae.VAE) -> str:
    """The report's tables: the encoder's layers, the decoder's, and the totals."""
    image = jax.ShapeDtypeStruct((1, model.size, model.size, vae.CHANNELS), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, model.latent_dim), jnp.float32)
    lines = []
    for name, module, inputs in (
        ("Encoder", vae.Encoder(model), image),
        ("Decoder", vae.Decoder(model), latent),
    ):
        lines.append(f"{name:<42}{'output':>12}{'parameters':>20}")
        for row in rows(module, inputs):
            output = "×".join(map(str, row.output))
            parameters = " + ".join(f"{n:,}" for n in row.parameters)
            lines.append(f"  {row.name:<14}{row.layer:<26}{output:>12}{parameters:>20}")
        total = sum(sum(row.parameters) for row in rows(module, inputs))
        lines.append(f"{'':<42}{'total':>12}{total:>20,}")
    params, statistics = jax.eval_shape(lambda key: vae.init(model, key), jax.random.key(0))
    trainable, moving = count(params), count(statistics)
    lines.append(
        f"{trainable + moving:,} parameters: {trainable:,} trainable, {moving:,} moving statistics"
    )
    return "\n".join(lines)
