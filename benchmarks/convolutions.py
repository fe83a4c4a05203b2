"""Time convolutions layer by layer: vaejax against XLA, plain JAX and PyTorch.

    python benchmarks/convolutions.py --batch 8 --rounds 5 --json convolutions.json
    python benchmarks/convolutions.py --layers residual --batch 16 --rounds 25

Forward, gradient of the input (dx) and of the kernel (dw) in float32 and in one process, all
contenders in turn. The layers are the ten 5x5 layers of the report's VAE for 64 pixels, or the 3x3
layers of residual VAEs. The contenders:

    vaejax    `convolve` and `convolve_transposed`, compiled as vaejax compiles them
    XLA       the same without the C++ kernels
    plain     `jax.lax` alone, the gradients derived by JAX, with the compiler's default options
    PyTorch   the 3x3 layers, with channels last, if it is installed

Times are medians over the rounds. GFLOP/s count the direct convolution's operations, two for each
product, so that Winograd's algorithm may exceed what the machine can do. "of dot" is the ratio of
vaejax's GFLOP/s and those of a large `jnp.dot`, and a ratio is a contender's time divided by
vaejax's. The same command runs on a GPU.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from vaejax.files import write_json
from vaejax.models import convolution
from vaejax.models.convolution import compiler_options, convolve, convolve_transposed, plain
from vaejax.training import devices

Call = Callable[[], Any]  # returns an array
OPERATIONS = ("forward", "dx", "dw")
MIN_SECONDS = 0.005  # of a measurement; a shorter call is repeated


class Layer(NamedTuple):
    name: str
    transposed: bool
    size: int  # of the input
    channels: int  # of the input
    features: int  # channels of the output
    taps: int
    stride: int

    def operations(self, batch: int) -> int:
        """Count the direct convolution's operations: two for each product."""
        outputs = (self.size if self.transposed else self.size // self.stride) ** 2
        return 2 * batch * outputs * self.taps**2 * self.channels * self.features


LAYERS = {
    "report": [
        Layer("c1", False, 64, 3, 32, 5, 1),
        Layer("c2", False, 64, 32, 64, 5, 2),
        Layer("c3", False, 32, 64, 128, 5, 2),
        Layer("c4", False, 16, 128, 256, 5, 2),
        Layer("c5", False, 8, 256, 512, 5, 2),
        Layer("t1", True, 4, 512, 256, 5, 2),
        Layer("t2", True, 8, 256, 128, 5, 2),
        Layer("t3", True, 16, 128, 64, 5, 2),
        Layer("t4", True, 32, 64, 32, 5, 2),
        Layer("t5", True, 64, 32, 3, 5, 1),
    ],
    "residual": [
        Layer(f"{size}x{size} {c}->{o}", False, size, c, o, 3, 1)
        for size, c, o in [
            (8, 96, 96), (16, 48, 48), (32, 24, 24), (32, 24, 12),
            (32, 48, 48), (16, 64, 64), (8, 128, 128), (16, 192, 192),
        ]
    ],
}  # fmt: skip


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


def compile_operations(function, x, kernel, g, options) -> dict[str, Call]:
    """Return the operations as functions without arguments, compiled."""
    compiled = partial(jax.jit, compiler_options=options)
    # a new function at every call: JAX would take the program of one that it has seen from a cache
    forward = compiled(lambda x, w: function(x, w))
    dx = compiled(lambda x, w, g: jax.vjp(lambda x: function(x, w), x)[1](g)[0])
    dw = compiled(lambda x, w, g: jax.vjp(lambda w: function(x, w), w)[1](g)[0])
    return {
        "forward": partial(forward.lower(x, kernel).compile(), x, kernel),
        "dx": partial(dx.lower(x, kernel, g).compile(), x, kernel, g),
        "dw": partial(dw.lower(x, kernel, g).compile(), x, kernel, g),
    }


def contenders(layer: Layer, batch: int) -> dict[str, dict[str, Call]]:
    """Return the operations of every contender."""
    _, transposed, size, c, o, taps, stride = layer
    x = jax.random.normal(jax.random.key(0), (batch, size, size, c))
    kernel = jax.random.normal(jax.random.key(1), (taps, taps, *((o, c) if transposed else (c, o))))
    ours = partial(convolve_transposed if transposed else convolve, stride=stride)
    theirs = partial(plain_convolve_transposed if transposed else plain_convolve, stride=stride)
    g = jax.random.normal(jax.random.key(2), jax.eval_shape(ours, x, kernel).shape)
    calls = {"vaejax": compile_operations(ours, x, kernel, g, compiler_options())}
    with mock.patch.object(convolution, "native_algorithm", return_value=None):
        calls["XLA"] = compile_operations(ours, x, kernel, g, compiler_options())
    calls["plain"] = compile_operations(theirs, x, kernel, g, {})
    if find_spec("torch") and not transposed and stride == 1 and taps == 3:
        from benchmarks.contenders import torch_convolution

        calls["PyTorch"] = torch_convolution.operations(*map(np.asarray, (x, kernel, g)))
    return calls


def milliseconds(call: Call, repeats: int = 1) -> float:
    """Time a call until its result is there: the mean of the repeats."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start) / repeats


def dot_gflops(rounds: int, side: int = 2048) -> float:
    """Return the GFLOP/s of a matrix product: the median over the rounds."""
    a = jax.random.normal(jax.random.key(0), (side, side))
    dot = partial(jax.jit(jnp.dot), a, a)
    jax.block_until_ready(dot())
    return 2e-6 * side**3 / statistics.median(milliseconds(dot) for _ in range(rounds))


def time_layer(layer: Layer, *, batch: int, rounds: int) -> Iterator[dict]:
    """Yield a row of the table for each operation, after checking that all contenders agree."""
    calls = contenders(layer, batch)
    for operation in OPERATIONS:
        expected = calls["plain"][operation]()
        repeats = {}
        for name, functions in calls.items():
            error = jnp.linalg.norm(functions[operation]() - expected) / jnp.linalg.norm(expected)
            assert error < 1e-4, f"{layer.name} {operation}: {name} differs by {error:.1e}"
            once = milliseconds(functions[operation]) / 1e3
            repeats[name] = max(1, round(MIN_SECONDS / once))
        times = {name: [] for name in calls}
        for _ in range(rounds):
            for name, functions in calls.items():
                times[name].append(milliseconds(functions[operation], repeats[name]))
        yield {
            "layer": layer.name,
            "operation": operation,
            "operations": layer.operations(batch),
            "ms": {name: statistics.median(column) for name, column in times.items()},
        }


def total(name: str, rows: list[dict]) -> dict:
    """Return the sum of some rows, for the contenders that all of them have."""
    names = [name for name in rows[0]["ms"] if all(name in row["ms"] for row in rows)]
    return {
        "layer": name,
        "operation": "all",
        "operations": sum(row["operations"] for row in rows),
        "ms": {name: sum(row["ms"][name] for row in rows) for name in names},
    }


def format_row(row: dict, names: list[str], dot: float) -> str:
    ms, ours = row["ms"], row["ms"]["vaejax"]
    rates = {name: 1e-6 * row["operations"] / ms[name] for name in ms}
    cells = [f"{row['layer']:<15}{row['operation']:<9}{ours:>10.2f}"]
    cells += [f"{rates[name]:>9.0f}" if name in ms else f"{'-':>9}" for name in names]
    cells += [f"{rates['vaejax'] / dot:>8.2f}"]
    cells += [f"{ms[name] / ours:>9.2f}" if name in ms else f"{'-':>9}" for name in names[1:]]
    return "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="vaejax's convolutions, layer by layer")
    parser.add_argument("--layers", choices=LAYERS, default="report", help="which layers")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each operation")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()

    devices.configure(keep=False)  # memory is allocated as in a run
    device, dot = jax.devices()[0].device_kind, dot_gflops(arguments.rounds)
    print(f"jax {jax.__version__}, {device}, batch {arguments.batch}, {arguments.rounds} rounds")
    print(f"jnp.dot: {dot:.0f} GFLOP/s")
    names = ["vaejax", "XLA", "plain"]
    if arguments.layers == "residual":
        if find_spec("torch"):
            names.append("PyTorch")
        else:
            print("PyTorch is not installed: left out")
    header = "".join(f"{name:>9}" for name in names)
    ratios = "".join(f"{name:>9}" for name in names[1:])
    print(f"{'':<34}{'GFLOP/s':>{9 * len(names)}}{'':>8}{'ratio':>{9 * len(names[1:])}}")
    print(f"{'layer':<15}{'operation':<9}{'vaejax ms':>10}{header}{'of dot':>8}{ratios}")
    table = []
    for layer in LAYERS[arguments.layers]:
        rows = []
        for row in time_layer(layer, batch=arguments.batch, rounds=arguments.rounds):
            print(format_row(row, names, dot), flush=True)
            rows.append(row)
        print(format_row(total(layer.name, rows), names, dot), flush=True)
        table += rows
    print(format_row(total("all", table), names, dot))
    if arguments.json:
        result = {"jax": jax.__version__, "device": device, "batch": arguments.batch}
        write_json(arguments.json, result | {"dot_gflops": dot, "rows": table})


if __name__ == "__main__":
    main()
