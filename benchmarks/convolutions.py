"""The report's convolutions one by one, as vaejax computes them against plain JAX.

    python benchmarks/convolutions.py --batch 8 --rounds 5 --json convolutions.json

Forward, gradient by the input (dx) and by the kernel (dw) of the ten 5x5 layers of the 64-pixel
VAE, float32, in one process, the two contenders in turn. Milliseconds, medians of the rounds; the
ratio says how many times longer the plain form takes. Runs unchanged on a GPU.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from vaejax.models.convolution import compiler_options, convolve, convolve_transposed, plain

# name, transposed, size of the input, channels in, channels out, stride
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
    low = (kernel.shape[0] - stride) // 2  # "same", for sizes that the stride divides
    return plain(x, kernel, [(low, kernel.shape[0] - stride - low)] * 2, stride)


def plain_convolve_transposed(x, kernel, *, stride):
    return jax.lax.conv_transpose(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        transpose_kernel=True,
    )  # fmt: skip


def maps(function, x, kernel, options):
    """Forward, dx and dw as compiled programs without arguments of their own."""
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


def milliseconds(call) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description="vaejax against plain JAX, layer by layer")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--json", type=Path, help="also write the table there")
    arguments = parser.parse_args()

    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, batch {arguments.batch}, {arguments.rounds} rounds")
    print(f"{'layer':<6}{'map':<9}{'vaejax ms':>10}{'plain ms':>10}{'ratio':>8}")
    table = []
    for name, transposed, size, c, o, stride in LAYERS:
        x = jax.random.normal(jax.random.key(0), (arguments.batch, size, size, c))
        kernel = jax.random.normal(jax.random.key(1), (5, 5, o, c) if transposed else (5, 5, c, o))
        ours, theirs = (
            (convolve_transposed, plain_convolve_transposed)
            if transposed
            else (convolve, plain_convolve)
        )
        contenders = (
            maps(partial(ours, stride=stride), x, kernel, compiler_options()),
            maps(partial(theirs, stride=stride), x, kernel, {}),
        )
        for which in ("forward", "dx", "dw"):
            a, b = (contender[which] for contender in contenders)
            found, expected = a(), b()
            error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
            assert error < 1e-4, f"{name} {which}: they differ by {error:.1e}"
            times = [(milliseconds(a), milliseconds(b)) for _ in range(arguments.rounds)]
            vaejax_ms, plain_ms = (statistics.median(column) for column in zip(*times, strict=True))
            table.append(
                {"layer": name, "map": which, "vaejax_ms": vaejax_ms, "plain_ms": plain_ms}
            )
            ratio = plain_ms / vaejax_ms
            row = f"{name:<6}{which:<9}{vaejax_ms:>10.1f}{plain_ms:>10.1f}{ratio:>8.1f}"
            print(row, flush=True)
    total = [sum(row[column] for row in table) for column in ("vaejax_ms", "plain_ms")]
    print(f"{'all':<15}{total[0]:>10.1f}{total[1]:>10.1f}{total[1] / total[0]:>8.1f}")
    if arguments.json:
        result = {"jax": jax.__version__, "device": device, "batch": arguments.batch, "rows": table}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
