"""Time the report's convolutions layer by layer: vaejax against plain JAX.

    python benchmarks/convolutions.py --batch 8 --rounds 5 --json convolutions.json

Forward, gradient of the input (dx) and of the kernel (dw) of the ten 5x5 layers of the VAE for 64
pixels, in float32 and in one process, both contenders in turn. Times are milliseconds, medians over
the rounds; the ratio is plain JAX's time divided by vaejax's. The same command runs on a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from vaejax.files import write_json
from vaejax.models.convolution import compiler_options, convolve, convolve_transposed, plain

# name, transposed, size of the input, input channels, output channels, stride
LAYERS = [
    ("c1", False, 64, 3, 32, 1),
    ("c2", False, 64, 32, 64, 2),
    ("c3", False, 32, 64, 128, 2),
    ("c4", False, 16, 128, 256, 2),
    ("c5", False, 8, 256, 512, 2),
    ("t1", True, 4, 512, 256, 2),
    ("t2", True, 8, 256, 128, 2),
    ("t3", True, 16, 128, 64, 2),
    ("t4", True, 32, 64, 32, 2),
    ("t5", True, 64, 32, 3, 1),
]


def plain_convolve(x, kernel, *, stride):
    """Convolve with "same" padding by `jax.lax` alone."""
    low = (kernel.shape[0] - stride) // 2  # "same", for sizes that the stride divides
    return plain(x, kernel, [(low, kernel.shape[0] - stride - low)] * 2, stride)


def plain_convolve_transposed(x, kernel, *, stride):
    """Apply the transpose of `plain_convolve` by `jax.lax` alone."""
    return jax.lax.conv_transpose(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=True,
    )  # fmt: skip


def compile_operations(function, x, kernel, options) -> dict[str, Callable[[], jax.Array]]:
    """Return forward, dx and dw as functions without arguments, which compile at the first call."""
    y = jax.eval_shape(function, x, kernel)
    g = jax.random.normal(jax.random.key(2), y.shape)
    compiled = partial(jax.jit, compiler_options=options)
    forward = compiled(function)
    dx = compiled(lambda x, w, g: jax.vjp(lambda x: function(x, w), x)[1](g)[0])
    dw = compiled(lambda x, w, g: jax.vjp(lambda w: function(x, w), w)[1](g)[0])
    return {
        "forward": lambda: forward(x, kernel),
        "dx": lambda: dx(x, kernel, g),
        "dw": lambda: dw(x, kernel, g),
    }


def milliseconds(call: Callable[[], jax.Array]) -> float:
    """Time a call until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start)


def time_layer(layer: tuple, *, batch: int, rounds: int) -> list[dict]:
    """Return a row of the table for each operation of a layer, after checking that both agree."""
    name, transposed, size, c, o, stride = layer
    x = jax.random.normal(jax.random.key(0), (batch, size, size, c))
    kernel = jax.random.normal(jax.random.key(1), (5, 5, o, c) if transposed else (5, 5, c, o))
    ours = convolve_transposed if transposed else convolve
    theirs = plain_convolve_transposed if transposed else plain_convolve
    contenders = (
        compile_operations(partial(ours, stride=stride), x, kernel, compiler_options()),
        compile_operations(partial(theirs, stride=stride), x, kernel, {}),
    )
    rows = []
    for operation in ("forward", "dx", "dw"):
        a, b = (contender[operation] for contender in contenders)
        actual, expected = a(), b()
        error = jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)
        assert error < 1e-4, f"{name} {operation}: the results differ by {error:.1e}"
        times = [(milliseconds(a), milliseconds(b)) for _ in range(rounds)]
        vaejax_ms, plain_ms = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {"layer": name, "operation": operation, "vaejax_ms": vaejax_ms, "plain_ms": plain_ms}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="vaejax against plain JAX, layer by layer")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each operation")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()

    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, batch {arguments.batch}, {arguments.rounds} rounds")
    print(f"{'layer':<6}{'operation':<11}{'vaejax ms':>10}{'plain ms':>10}{'ratio':>8}")
    table = []
    for layer in LAYERS:
        for row in time_layer(layer, batch=arguments.batch, rounds=arguments.rounds):
            ours, theirs = row["vaejax_ms"], row["plain_ms"]
            label = f"{row['layer']:<6}{row['operation']:<11}"
            print(f"{label}{ours:>10.1f}{theirs:>10.1f}{theirs / ours:>8.1f}", flush=True)
            table.append(row)
    ours, theirs = (sum(row[column] for row in table) for column in ("vaejax_ms", "plain_ms"))
    print(f"{'all':<17}{ours:>10.1f}{theirs:>10.1f}{theirs / ours:>8.1f}")
    if arguments.json:
        result = {"jax": jax.__version__, "device": device, "batch": arguments.batch, "rows": table}
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
