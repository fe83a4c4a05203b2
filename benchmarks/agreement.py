"""Do one device, four by jit, four by pmap, and two processes of two devices learn the same?

    python benchmarks/agreement.py

The report's layers at 32 pixels, batches of 16, three updates by plain gradient descent (Adam would
hide the size of a gradient), on simulated devices of this CPU; each way in a process of its own.
Against one device, of the first update's gradients and the parameters after the third: the length
of the difference of all together, as a part of their own, and the largest difference in any number.
"""

import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from vaejax import objectives
from vaejax.models.vae import VAE
from vaejax.training import parallel, programs
from vaejax.training.state import init

WAYS = {
    "one device": (1, "jit", 1),
    "one device again": (1, "jit", 1),
    "four devices, jit": (4, "jit", 1),
    "four devices, pmap": (4, "pmap", 1),
    "two processes of two devices": (4, "jit", 2),
}
RATE = 0.01


def learn(way: str, norm: str, process: int, coordinator: str, out: str) -> None:
    """Three updates; the first process writes the first's gradients and the last's parameters."""
    devices, how, processes = WAYS[way]
    jax.config.update("jax_num_cpu_devices", devices // processes)
    parallel.configure()
    if processes > 1:
        parallel.join(coordinator, processes, process)
    chosen = parallel.choose(None, "pmap" if how == "pmap" else "jit")
    everywhere = parallel.whole(chosen)
    model = VAE(size=32, norm="batch" if norm == "batch" else "frozen")
    loss = partial(objectives.report, model=model, kl_weight=0.01)
    optimizer = optax.chain(optax.trace(decay=0), optax.sgd(RATE))  # keeps the last gradient
    key = jax.jit(lambda: jax.random.key(0), out_shardings=everywhere)()
    begin = partial(init, model=model, optimizer=optimizer)
    state = jax.jit(begin, out_shardings=everywhere)(key)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    step = programs.compile_train_step(loss, optimizer, state, shape, key, devices=chosen)
    kept = []
    for number in range(3):
        state, _ = step.run(state, images[parallel.rows(chosen, len(images))], key)
        if number == 0:
            kept = [jax.tree.map(np.array, parallel.here(state.opt_state[0].trace))]
    kept.append(jax.tree.map(np.array, parallel.here(state.params)))
    if parallel.is_first():
        names = ("gradients", "parameters")
        arrays = {
            f"{name}/{i}": leaf
            for name, tree in zip(names, kept, strict=True)
            for i, leaf in enumerate(jax.tree.leaves(tree))
        }
        np.savez(out, **arrays)


def run(way: str, norm: str, folder: Path) -> dict[str, np.ndarray]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    out = folder / f"{way}-{norm}.npz"
    commands = [
        [sys.executable, __file__, way, norm, str(process), coordinator, str(out)]
        for process in range(WAYS[way][2])
    ]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for command in commands]
    for process in processes:
        _, error = process.communicate()
        if process.returncode:
            sys.exit(error.decode())
    with np.load(out) as arrays:
        return dict(arrays)


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray], what: str) -> tuple[float, float]:
    """The length of the difference as a part of the first one's, and its largest number."""
    one, other = (
        np.concatenate([found[n].ravel() for n in found if n.startswith(what)]) for found in (a, b)
    )
    difference = np.abs(one - other)
    return float(np.linalg.norm(difference) / np.linalg.norm(one)), float(difference.max())


def main() -> None:
    print(f"{'norm':<8}{'against one device':<30}{'gradients':>20}{'parameters':>22}")
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("frozen", "batch"):
            alone = run("one device", norm, Path(folder))
            for way in list(WAYS)[1:]:
                other = run(way, norm, Path(folder))
                line = f"{norm:<8}{way:<30}"
                for what in ("gradients", "parameters"):
                    part, largest = apart(alone, other, what)
                    line += f"{part:>11.1e} {largest:>9.1e}"
                print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        learn(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
    else:
        main()
