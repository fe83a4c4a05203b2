"""Time an update of the report's VAE in vaejax and in the libraries that one would use instead.

    python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --size 256 --batch 16
    python benchmarks/train_step.py --precision bfloat16 --batch 1024      (on a GPU)

The contenders are vaejax, plain Flax, Keras on TensorFlow, and PyTorch (eager, with channels last,
compiled), with the same weights, images, precision and Adam. Each is a process of its own, with the
same number of threads; they take turns, round by round, so that other load on the machine slows all
of them alike. A contender that is not installed is left out by name. Before anything is timed they
all make two updates with the same noise: if the losses before each do not agree, only that is
printed.

Images per second are medians over the rounds (best in brackets); "of others" is the ratio to the
fastest of the others; "share" is the ratio of the operations per second to those of a large matrix
product, the best rate that any contender measured. Compiling does not include what is in a
compiler's cache already: vaejax' kernels, torch.compile's programs. Memory is the maximum of the
process, libraries included, or of the device.
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

CONTENDERS: dict[str, tuple[str, dict[str, bool]]] = {  # module, settings
    "vaejax": ("vaejax_", {}),
    "plain Flax": ("flax_", {}),
    "Keras": ("keras_", {}),
    "PyTorch eager": ("torch_", {}),
    "PyTorch channels_last": ("torch_", {"channels_last": True}),
    "torch.compile": ("torch_", {"channels_last": True, "compiled": True}),
}
MATRIX_PRODUCT = 2 * 4096**3  # operations
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 5e-2)}  # of the two losses, relative


# A contender's process ----------------------------------------------------------------------------


def work(name: str, task: Task) -> None:
    """Answer each line of the standard input, "COMMAND COUNT", with a line of JSON."""
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
        command, count = line.split()
        started, cpu_started = time.perf_counter(), time.process_time()
        answer: dict[str, Any] = {}
        if command == "losses":
            answer["losses"] = contender.losses()
        elif command == "updates":
            contender.updates(int(count))
        else:
            contender.matrix_products(int(count))
        answer["seconds"] = time.perf_counter() - started
        answer["cpu_seconds"] = time.process_time() - cpu_started
        host = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer["memory"] = contender.device_memory() or host
        print(json.dumps(answer), file=answers)


class Worker:
    """The process of a contender, seen from the process that compares."""

    def __init__(self, name: str, task: Task, log: Path):
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
        # several processes share a GPU: none may take all of it at once
        environment = {**os.environ, **threads, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.name, self._log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                worker_command(name, task), env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            )  # fmt: skip
        self.about = self._read_answer()

    def ask(self, command: str, count: int = 1) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin
        print(command, count, file=self.process.stdin, flush=True)
        return self._read_answer()

    def _read_answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace")[-2000:]
            sys.exit(f"{self.name} failed. The end of its log:\n{tail}")
        return json.loads(line)


def worker_command(name: str, task: Task) -> list[str]:
    """Return the command of a contender's process, or of the one that writes the weights."""
    return [sys.executable, __file__, "--worker", name, json.dumps(task[:-1]), str(task.arrays)]


# The comparison -----------------------------------------------------------------------------------


def check_agreement(losses: dict[str, list[float]], precision: str) -> None:
    """Exit unless the losses of all contenders agree with those of the first."""
    name, expected = next(iter(losses.items()))
    for other, actual in losses.items():
        for a, b, tolerance in zip(expected, actual, TOLERANCE[precision], strict=True):
            if not abs(a - b) <= tolerance * abs(a):
                sys.exit(
                    f"{other} does not compute what {name} does: losses {actual} and {expected} "
                    "on the same weights, images and noise. Nothing was measured."
                )


def measure(task: Task, *, only: list[str], rounds: int, steps: int, folder: Path):
    """Return the rows of the table, the missing package of every contender left out, and the
    largest rate of matrix products, operations per second."""
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
        sys.exit("none of the contenders is installed")
    check_agreement({name: answer["losses"] for name, answer in first.items()}, task.precision)
    second = {worker.name: worker.ask("updates", 2) for worker in workers}
    turns: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    rates = []
    for number in range(rounds):
        for worker in workers:
            turns[worker.name].append(worker.ask("updates", steps))
            if worker.name != "plain Flax" or "vaejax" not in turns:  # both multiply by JAX
                rates.append(matrix_product_rate(worker, 3 if task.threads < 64 else 10))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for worker in workers:
        times = [turn["seconds"] / steps for turn in turns[worker.name]]
        step = statistics.median(times)
        # the first two updates; the next are another program in plain Flax, the same in others
        compiling = first[worker.name]["seconds"] - 2 * step
        rows.append(
            {
                "contender": worker.name,
                "version": worker.about["version"],
                "images_per_second": task.batch / step,
                "best": task.batch / min(times),
                "seconds": times,
                "cpu_seconds": statistics.median(
                    turn["cpu_seconds"] / steps for turn in turns[worker.name]
                ),
                "share": task.batch / step * operations(task) / max(rates),
                "memory": second[worker.name]["memory"],  # before the matrix products
                "compile_seconds": max(0.0, compiling),
                "losses": first[worker.name]["losses"],
            }
        )
    for worker in workers:
        worker.process.kill()
    return rows, missing, max(rates)


def matrix_product_rate(worker: Worker, count: int) -> float:
    """Time so many matrix products after one that is not timed: operations per second."""
    worker.ask("matrix_products", 1)
    return count * MATRIX_PRODUCT / worker.ask("matrix_products", count)["seconds"]


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format a line for each contender, below the titles."""
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
    from vaejax.files import write_json

    parser = argparse.ArgumentParser(description="vaejax against others, one update")
    parser.add_argument("--size", type=int, default=64, choices=(64, 128, 256), help="pixels")
    parser.add_argument("--batch", type=int, default=128, help="images of an update")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=2, help="updates in a turn")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    rounds, steps = options.rounds, options.steps
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        task = Task(options.size, options.batch, options.precision, options.threads, arrays)
        print("writing the weights that all start from …", file=sys.stderr, flush=True)
        subprocess.run(worker_command("weights", task), check=True)
        rows, missing, rate = measure(
            task, only=options.only, rounds=rounds, steps=steps, folder=Path(folder)
        )
    machine = f"{platform.processor() or platform.machine()}, {task.threads} threads"
    print(
        f"{task.size} px, batch {task.batch}, {task.precision}, {machine}; {rounds} "
        f"rounds of {steps} updates; {operations(task) / 1e9:.2f} GFLOP an image, "
        f"matrix product {rate / 1e9:,.0f} GFLOP/s"
    )
    print(format_table(rows))
    for name, package in missing.items():
        print(f"{name} was left out: {package} is not installed")
    for version in dict.fromkeys(row["version"] for row in rows):
        print(version)
    if options.json:
        result = {
            "size": task.size, "batch": task.batch, "precision": task.precision,
            "threads": task.threads, "machine": platform.platform(), "python": sys.version,
            "matrix_product_rate": rate, "missing": missing, "rows": rows,
        }  # fmt: skip
        write_json(options.json, result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, name, settings, arrays = sys.argv
        task = Task(*json.loads(settings), arrays=Path(arrays))
        if name == "weights":
            import_module("benchmarks.contenders.vaejax_").write_arrays(task)
        else:
            work(name, task)
    else:
        main()
