"""One update of the report's VAE: vaejax against what its user would take instead.

    python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --size 256 --batch 16
    python benchmarks/train_step.py --precision bfloat16 --batch 1024      (on a GPU)

The same weights, images, precision and Adam in vaejax, plain Flax, Keras on TensorFlow, and PyTorch
(eager, with channels last, compiled). Each contender is a process of its own, on the same number of
threads; they take their turns round by round, so that a busy machine slows all of them alike. One
that is not installed is left out by name. Before anything is timed they all make two updates on
the same noise: where the losses before each do not agree, nothing is printed but that.

Images a second are medians over the rounds (best in brackets); "of others" is the ratio to the
fastest of the others; "share" that of the rate of a large matrix product, of those measured in any
contender the best. Compiling does not count what a compiler's cache already has: vaejax' kernels,
torch.compile's. Memory is the process' largest, the library itself included, or the device's.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contenders import Task, operations

CONTENDERS: dict[str, tuple[str, dict[str, bool]]] = {
    "vaejax": ("vaejax_", {}),
    "plain Flax": ("flax_", {}),
    "Keras": ("keras_", {}),
    "PyTorch eager": ("torch_", {}),
    "PyTorch channels_last": ("torch_", {"channels_last": True}),
    "torch.compile": ("torch_", {"channels_last": True, "compiled": True}),
}
MATRIX_PRODUCT = 2 * 4096**3  # operations
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 5e-2)}  # of the two losses, relative


def work(name: str, task: Task) -> None:
    """Answer each line of the standard input by one of JSON, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is not an answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    module, settings = CONTENDERS[name]
    try:
        contender = import_module(f"benchmarks.contenders.{module}").contender(task, **settings)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}), file=answers)
        return
    print(json.dumps({"version": contender.version}), file=answers)
    for line in sys.stdin:
        what, count = line.split()
        began, busy = time.perf_counter(), time.process_time()
        found: dict[str, Any] = {}
        if what == "losses":
            found["losses"] = contender.losses()
        elif what == "steps":
            contender.steps(int(count))
        else:
            contender.matrix_products(int(count))
        found["seconds"] = time.perf_counter() - began
        found["cpu_seconds"] = time.process_time() - busy
        host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["memory"] = contender.device_memory() or host
        print(json.dumps(found), file=answers)


class Worker:
    def __init__(self, name: str, task: Task, log: Path):
        command = [sys.executable, __file__, "--worker", name, json.dumps([*task[:-1]])]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
        # several processes share a GPU: none may take all of it at once
        environment = {**os.environ, **threads, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.name, self._log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, str(task.arrays)], env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            )  # fmt: skip
        self.about = self._answer()

    def ask(self, what: str, count: int = 1) -> dict[str, Any]:
        assert self.process.stdin
        print(what, count, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace")[-2000:]
            sys.exit(f"{self.name} has died, and with it the comparison. Its last words:\n{said}")
        return json.loads(line)


def refuse_to_disagree(losses: dict[str, list[float]], precision: str) -> None:
    name, expected = next(iter(losses.items()))
    for other, found in losses.items():
        for a, b, tolerance in zip(expected, found, TOLERANCE[precision], strict=True):
            if not abs(a - b) <= tolerance * abs(a):
                sys.exit(
                    f"{other} does not compute what {name} does: losses {found} and {expected} "
                    "on the same weights, images and noise. Nothing was measured."
                )


def measure(task: Task, *, only: list[str], rounds: int, steps: int, folder: Path):
    workers, missing, first = [], {}, {}
    for name in only:
        worker = Worker(name, task, folder / f"{name}.log")
        if package := worker.about.get("missing"):
            missing[name] = package
            print(f"{name} is left out: {package} is not installed", file=sys.stderr)
            continue
        workers.append(worker)
        first[name] = worker.ask("losses")
        print(f"{name}: losses {first[name]['losses']}", file=sys.stderr, flush=True)
    if not workers:
        sys.exit("none of them is installed")
    refuse_to_disagree({name: found["losses"] for name, found in first.items()}, task.precision)
    second = {worker.name: worker.ask("steps", 2) for worker in workers}
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    rates = []
    for number in range(rounds):
        for worker in workers:
            found[worker.name].append(worker.ask("steps", steps))
            if worker.name != "plain Flax" or "vaejax" not in found:  # the same
                products = 3 if task.threads < 64 else 10
                worker.ask("matrix_products", 1)
                seconds = worker.ask("matrix_products", products)["seconds"]
                rates.append(products * MATRIX_PRODUCT / seconds)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for worker in workers:
        times = [one["seconds"] / steps for one in found[worker.name]]
        step = statistics.median(times)
        busy = statistics.median(one["cpu_seconds"] / steps for one in found[worker.name])
        # the first updates of all; the next are another program in plain Flax, the same again
        compiling = first[worker.name]["seconds"] - 2 * step
        rows.append(
            {
                "contender": worker.name,
                "version": worker.about["version"],
                "images_per_second": task.batch / step,
                "best": task.batch / min(times),
                "seconds": times,
                "cpu_seconds": busy,
                "share": task.batch / step * operations(task) / max(rates),
                "memory": second[worker.name]["memory"],  # before the matrix products
                "compile_seconds": max(0.0, compiling),
                "losses": first[worker.name]["losses"],
            }
        )
    for worker in workers:
        worker.process.kill()
    return rows, missing, max(rates)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':<23}{'images/s':>10}{'(best)':>10}{'of others':>10}{'share':>7}"
        f"{'CPU s':>8}{'memory':>10}{'compiling':>11}"
    ]
    for row in rows:
        others = [o["images_per_second"] for o in rows if o is not row] or [float("nan")]
        lines.append(
            f"{row['contender']:<23}{row['images_per_second']:>10,.1f}"
            f"{'(' + format(row['best'], ',.1f') + ')':>10}"
            f"{row['images_per_second'] / max(others):>9.2f}x{row['share']:>7.0%}"
            f"{row['cpu_seconds']:>8.2f}{row['memory'] / 2**30:>6.2f} GiB"
            f"{row['compile_seconds']:>9.1f} s"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="vaejax against others, one update")
    parser.add_argument("--size", type=int, default=64, choices=(64, 128, 256), help="pixels")
    parser.add_argument("--batch", type=int, default=128, help="images an update")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=2, help="updates in a turn")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="also write the table there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        task = Task(given.size, given.batch, given.precision, given.threads, arrays)
        print("writing the weights that all begin with …", file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, __file__, "--worker", "weights", json.dumps(task[:-1]), str(arrays)],
            check=True,
        )
        rows, missing, rate = measure(
            task, only=given.only, rounds=given.rounds, steps=given.steps, folder=Path(folder)
        )
    machine = f"{platform.processor() or platform.machine()}, {given.threads} threads"
    print(
        f"{given.size} px, batch {given.batch}, {given.precision}, {machine}; {given.rounds} "
        f"rounds of {given.steps} updates; {operations(task) / 1e9:.2f} GFLOP an image, "
        f"matrix product {rate / 1e9:,.0f} GFLOP/s"
    )
    print(table(rows))
    for name, package in missing.items():
        print(f"{name} was left out: {package} is not installed")
    for version in dict.fromkeys(row["version"] for row in rows):
        print(version)
    if given.json:
        result = {
            "size": given.size, "batch": given.batch, "precision": given.precision,
            "threads": given.threads, "machine": platform.platform(), "python": sys.version,
            "matrix_product_rate": rate, "missing": missing, "rows": rows,
        }  # fmt: skip
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, who, settings, where = sys.argv
        size, batch, precision, threads = json.loads(settings)
        found = Task(size, batch, precision, threads, Path(where))
        if who == "weights":
            import_module("benchmarks.contenders.vaejax_").write_arrays(found)
        else:
            work(who, found)
    else:
        main()
