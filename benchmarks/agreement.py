"""Compare updates on one device, on four by jit, on four by pmap, and on two processes of two.

    python benchmarks/agreement.py

The report's layers at 32 pixels are trained for three updates on batches of 16 images, by plain
gradient descent, since Adam would hide the size of a gradient. Every setup runs in processes of its
own, on simulated devices of this CPU.

The table compares each setup with one device: the gradients of the first update, and the parameters
after the third. Both columns show the norm of the difference, relative to the norm on one device,
and the largest absolute difference of a single value.
"""

import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import optax

from vaejax import losses
from vaejax.models.layers import Norm
from vaejax.models.vae import VAE
from vaejax.training import devices as dev
from vaejax.training.compiled import compile_init, compile_train_step
from vaejax.training.step import Trainer

LEARNING_RATE = 0.01
SIZE, BATCH = 32, 16  # pixels, images
NORMS: tuple[Norm, ...] = ("affine", "batch")

Arrays = dict[str, np.ndarray]  # leaves of the trees "gradients" and "parameters"


class Setup(NamedTuple):
    """How an update is computed."""

    devices: int  # of all processes together
    how: Literal["jit", "pmap"]
    processes: int


REFERENCE = "one device"
SETUPS = {
    REFERENCE: Setup(1, "jit", 1),
    "one device again": Setup(1, "jit", 1),
    "four devices, jit": Setup(4, "jit", 1),
    "four devices, pmap": Setup(4, "pmap", 1),
    "two processes of two devices": Setup(4, "jit", 2),
}


def train(setup: Setup, norm: Norm, process: int, coordinator: str, out: str) -> None:
    """Make three updates as one of the processes of a setup; the first process writes `out`."""
    jax.config.update("jax_num_cpu_devices", setup.devices // setup.processes)
    dev.configure()
    if setup.processes > 1:
        dev.initialize_processes(coordinator, setup.processes, process)
    devices = dev.choose(None, setup.how)
    optimizer = optax.chain(optax.trace(decay=0), optax.sgd(LEARNING_RATE))  # keeps the gradient
    trainer = Trainer(VAE(size=SIZE, norm=norm), partial(losses.mse_kl, kl_weight=0.01), optimizer)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=dev.replicated(devices))()
    state = compile_init(trainer, devices=devices)(key)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    step = compile_train_step(trainer, state, None, shape, key, devices=devices)
    trees = {}
    for update in range(3):
        state, _ = step.run(state, images[dev.rows(devices, len(images))], key)
        if update == 0:
            trees["gradients"] = jax.tree.map(np.array, dev.local(state.opt_state[0].trace))
    trees["parameters"] = jax.tree.map(np.array, dev.local(state.params))
    if dev.is_first():
        arrays = {
            f"{name}/{i}": leaf
            for name, tree in trees.items()
            for i, leaf in enumerate(jax.tree.leaves(tree))
        }
        np.savez(out, **arrays)


def run(name: str, norm: Norm, folder: Path) -> Arrays:
    """Train with a setup in new processes, and return its gradients and parameters."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    out = folder / f"{name}-{norm}.npz"
    commands = [
        [sys.executable, __file__, name, norm, str(process), coordinator, str(out)]
        for process in range(SETUPS[name].processes)
    ]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    for process in processes:
        _, error = process.communicate()
        if process.returncode:
            sys.exit(error.decode())
    with np.load(out) as arrays:
        return dict(arrays)


def difference(expected: Arrays, actual: Arrays, tree: str) -> tuple[float, float]:
    """Return the relative norm of the difference of a tree, and its largest absolute value."""
    a, b = (
        np.concatenate([arrays[name].ravel() for name in arrays if name.startswith(tree)])
        for arrays in (expected, actual)
    )
    distances = np.abs(a - b)
    return float(np.linalg.norm(distances) / np.linalg.norm(a)), float(distances.max())


def main() -> None:
    print(f"{'norm':<8}{'against one device':<30}{'gradients':>20}{'parameters':>22}")
    with tempfile.TemporaryDirectory() as folder:
        for norm in NORMS:
            expected = run(REFERENCE, norm, Path(folder))
            for name in [name for name in SETUPS if name != REFERENCE]:
                actual = run(name, norm, Path(folder))
                line = f"{norm:<8}{name:<30}"
                for tree in ("gradients", "parameters"):
                    relative, largest = difference(expected, actual, tree)
                    line += f"{relative:>11.1e} {largest:>9.1e}"
                print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _, name, norm_name, process, coordinator, out = sys.argv
        norm: Norm = "batch" if norm_name == "batch" else "affine"
        train(SETUPS[name], norm, int(process), coordinator, out)
    else:
        main()
