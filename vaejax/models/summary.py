"""The table of a model: each layer's output and parameters, in the order in which they run."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import PyTree

from vaejax.models.autoencoder import Autoencoder, branches, init


class Row(NamedTuple):
    name: str
    layer: str
    output: tuple[int, ...]  # of one image
    parameters: tuple[int, ...]  # the layer's own; then its norm's, moving statistics included


def count(tree: PyTree) -> int:
    """How many numbers a tree of arrays (or of their shapes) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def rows(module: nn.Module, inputs: jax.ShapeDtypeStruct) -> list[Row]:
    """A row for each layer of the module; nothing is computed but shapes."""
    found: list[Row] = []

    def interceptor(call, args, kwargs, context):
        output = call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and len(layer.path) == 1:
            params = layer.variables.get("params", {})
            norm = count((params.get("norm", {}), layer.variables.get("batch_stats", {})))
            own = count(params.get("layer", {}))
            parameters = tuple(n for n in (own, norm) if n)
            found.append(Row(layer.name or "", str(layer), output.shape[1:], parameters))
        return output

    def run(key, x):
        return module.init(key, x, train=False)

    with nn.intercept_methods(interceptor):
        jax.eval_shape(run, jax.random.key(0), inputs)
    return found


def table(model: Autoencoder) -> str:
    """The report's tables: the encoder's layers, the decoder's, and the totals."""
    lines = []
    for branch, (module, inputs) in branches(model).items():
        layers = rows(module, inputs)
        lines.append(f"{branch.capitalize():<42}{'output':>12}{'parameters':>20}")
        for row in layers:
            output = "×".join(map(str, row.output))
            parameters = " + ".join(f"{n:,}" for n in row.parameters)
            lines.append(f"  {row.name:<14}{row.layer:<26}{output:>12}{parameters:>20}")
        total = sum(sum(row.parameters) for row in layers)
        lines.append(f"{'':<42}{'total':>12}{total:>20,}")
    params, statistics = jax.eval_shape(partial(init, model), jax.random.key(0))
    trainable, moving = count(params), count(statistics)
    lines.append(
        f"{trainable + moving:,} parameters: {trainable:,} trainable, {moving:,} moving statistics"
    )
    return "\n".join(lines)
