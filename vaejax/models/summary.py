"""The table of a model: each layer's output and parameters, in the order in which they run."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import PyTree

from vaejax.models.autoencoder import Autoencoder, init


class Row(NamedTuple):
    """A layer of a model."""

    branch: str  # the submodule that it lies in, "" for a layer of the model itself
    name: str
    layer: str
    output: tuple[int, ...]  # of one image
    parameters: tuple[int, ...]  # the layer's own; then its norm's, moving statistics included


def count(tree: PyTree) -> int:
    """Count the numbers in a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def rows(model: Autoencoder) -> list[Row]:
    """Return a row for each layer of the model's submodules; only shapes are computed."""
    calls: dict[tuple[str, ...], Row] = {}

    def interceptor(call, args, kwargs, context):
        output = call(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and 1 <= len(layer.path) <= 2:
            variables = layer.variables
            params, stats = variables.get("params", {}), variables.get("batch_stats", {})
            own = count({name: leaf for name, leaf in params.items() if name != "norm"})
            norm = count((params.get("norm", {}), stats))
            shape = jax.tree.leaves(output)[0].shape[1:]
            branch = "".join(layer.path[:-1])
            parameters = tuple(n for n in (own, norm) if n)
            calls[layer.path] = Row(branch, layer.path[-1], _label(layer), shape, parameters)
        return output

    with nn.intercept_methods(interceptor):
        jax.eval_shape(partial(init, model), jax.random.key(0, impl="threefry2x32"))
    # a submodule that has layers of its own is the title of their table, and no layer
    branches = {path[0] for path in calls if len(path) == 2}
    return [row for path, row in calls.items() if path[0] not in branches or len(path) == 2]


def _label(layer: nn.Module) -> str:
    """Name a layer in words: as it does itself, or, of Flax's own, by its class and features."""
    if type(layer).__str__ is not nn.Module.__str__:
        return str(layer)
    return f"{type(layer).__name__} {getattr(layer, 'features', '')}".rstrip()


def table(model: Autoencoder) -> str:
    """Format the report's tables: the encoder's layers, the decoder's, and the totals."""
    lines = []
    layers = rows(model)
    for branch in dict.fromkeys(row.branch for row in layers):
        mine = [row for row in layers if row.branch == branch]
        title = branch.capitalize() or type(model).__name__
        lines.append(f"{title:<42}{'output':>12}{'parameters':>20}")
        for row in mine:
            output = "×".join(map(str, row.output))
            parameters = " + ".join(f"{n:,}" for n in row.parameters)
            lines.append(f"  {row.name:<14}{row.layer[:25]:<26}{output:>12}{parameters:>20}")
        total = sum(sum(row.parameters) for row in mine)
        lines.append(f"{'':<42}{'total':>12}{total:>20,}")
    params, batch_stats = jax.eval_shape(
        partial(init, model), jax.random.key(0, impl="threefry2x32")
    )
    trainable, moving = count(params), count(batch_stats)
    lines.append(
        f"{trainable + moving:,} parameters: {trainable:,} trainable, {moving:,} moving statistics"
    )
    return "\n".join(lines)
