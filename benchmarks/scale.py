"""Measure how vaejax scales with the number of devices and with the number of images.

    python benchmarks/scale.py --json scale.json
    python benchmarks/scale.py --devices 1 2 --records 10000 1000000

Devices: the report's layers at 32 pixels, batches of 32, on simulated devices of this CPU, by jit
and by pmap, each in a process of its own. First, two steps of plain gradient descent: the change of
all parameters is compared with the change on one device, as the relative norm of the difference. If
that is more than 1e-3, nothing is timed. Then seconds per step, as medians of the rounds, in which
the processes take turns. The devices share the same cores, so that the additional time is the
overhead of the partitioning: this does not show the speed of real devices.

Records: prepared sets of 4-pixel images, from which batches of 32 are read, each in a new process:
milliseconds from opening the set to the first batch, milliseconds per batch of the next 200 (the
median over tens, because they are read ahead), and MB of memory at the end, libraries included:
what the process holds, and what it has mapped of files, which the kernel takes back when it needs
the memory. Once in one file, as `vaejax prepare` writes a split, and once in files of 10,000, as it
does on Beam (here one file under many names), which are opened when they are needed. The files are
in the system's cache. Ten million records take 2.3 GB in the temporary folder.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

BATCH = 32
LEARNING_RATE = 100.0  # large, so that rounding of the parameters is small beside their change
TOLERANCE = 1e-3  # of the relative difference
RECORD_BYTES = 230  # of a 4-pixel image on disk: its record, the pixels and their checksum
RECORDS_PER_FILE = 10_000  # where there are many files


# Devices ------------------------------------------------------------------------------------------


def train(count: int, how: str, out: str) -> None:
    """Write the change of the parameters in two steps; then time a step for each line of stdin."""
    import jax
    import numpy as np
    import optax

    from vaejax import losses
    from vaejax.models.vae import VAE
    from vaejax.training import devices as dev
    from vaejax.training.compiled import compile_init, compile_train_step
    from vaejax.training.step import Trainer

    jax.config.update("jax_num_cpu_devices", count)
    dev.configure(keep=False)
    devices = dev.choose(count, "pmap" if how == "pmap" else "jit")
    optimizer = optax.sgd(LEARNING_RATE)  # Adam would hide the size of a gradient
    trainer = Trainer(VAE(size=32), partial(losses.mse_kl, kl_weight=0.01), optimizer)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=dev.replicated(devices))()
    state = compile_init(trainer, devices=devices)(key)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    step = compile_train_step(trainer, state, None, shape, key, devices=devices)
    before = jax.tree.map(np.array, dev.local(state.params))
    for _ in range(2):
        state, _ = step.run(state, images, key)
    change = jax.tree.map(np.subtract, dev.local(state.params), before)
    np.save(out, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(change)]))
    print(json.dumps({"versions": f"jax {jax.__version__}"}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state, _ = step.run(state, images, key)
        jax.block_until_ready(state)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def read_answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Read a worker's next line of JSON, or exit if it has failed."""
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        sys.exit("One of the measuring processes has failed; its error is above.")
    return json.loads(line)


def start_worker(*arguments: object) -> subprocess.Popen[str]:
    """Start this program as a measuring process, which answers on its standard output."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def measure_devices(counts: list[int], *, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Compare and time steps on these numbers of devices; return the rows of the table."""
    import numpy as np

    setups = [(1, "jit")] + [(n, how) for n in counts if n > 1 for how in ("jit", "pmap")]
    workers: list[subprocess.Popen[str]] = []
    rows: list[dict[str, Any]] = []
    try:
        expected: Any = None
        for count, how in setups:
            print(f"compiling for {count} by {how} …", file=sys.stderr, flush=True)
            out = folder / f"{count}-{how}.npy"
            workers.append(start_worker("devices", count, how, out))
            versions = read_answer(workers[-1])
            change = np.load(out)
            expected = change if expected is None else expected
            difference = float(np.linalg.norm(change - expected) / np.linalg.norm(expected))
            if not difference <= TOLERANCE:
                sys.exit(f"{count} devices by {how} differ from one by {difference:.1e}")
            rows.append(
                {"devices": count, "how": how, "difference": difference, "seconds": [], **versions}
            )
        for _ in range(rounds):
            for worker, row in zip(workers, rows, strict=True):
                assert worker.stdin
                print(file=worker.stdin, flush=True)
                row["seconds"].append(read_answer(worker)["seconds"])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for row in rows:
        row["seconds_per_step"] = statistics.median(row["seconds"])
        row["times_one"] = row["seconds_per_step"] / rows[0]["seconds_per_step"]
    return rows


# Records ------------------------------------------------------------------------------------------


def write_set(folder: Path, count: int, *, many_files: bool) -> None:
    """Write a prepared set with a training split only: what reading needs, and no more."""
    import numpy as np

    from vaejax.data import records
    from vaejax.files import write_json

    size, random = 4, np.random.default_rng(0)
    features = records.features(size)
    images = random.integers(0, 256, (1000, size, size, 3), np.uint8)
    metadata = {"person": "", "path": "", "sha256": ""}
    examples = [features.serialize_example({"image": image, **metadata}) for image in images]
    data = folder / "records"
    data.mkdir(parents=True)
    lengths = [RECORDS_PER_FILE] * (count // RECORDS_PER_FILE) if many_files else [count]
    first, *others = (
        data / f"faces-train.array_record-{i:05}-of-{len(lengths):05}" for i in range(len(lengths))
    )
    pairs = [(example, image.data) for example, image in zip(examples, images, strict=True)]
    records.write_records(first, (pairs[i % len(pairs)] for i in range(lengths[0])))
    for other in others:
        other.hardlink_to(first)
        Path(f"{other}.pixels").hardlink_to(f"{first}.pixels")
    train = records.finish_split(data, split="train", lengths=lengths)
    records.write_metadata(data, size=size, splits=[train])
    report = {"format": records.FORMAT, "source": "", "size": size, "accepted": count}
    report = records.seal({**report, "fingerprint": "", "listing": ""}, folder)
    write_json(folder / records.REPORT, report)


def read_set(folder: str) -> None:
    """Open a prepared set, read batches, and print times and memory as JSON."""
    import importlib.metadata

    import grain  # noqa: F401  (its import is not timed)
    import psutil

    from vaejax.data.batches import Images, stream
    from vaejax.system import process_memory

    began = time.perf_counter()
    batches = stream(Images(Path(folder), "train"), batch_size=BATCH, seed=0)
    next(batches)
    first, tens = time.perf_counter() - began, []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            next(batches)
        tens.append((time.perf_counter() - began) / 10)
    result = {
        "first_batch_ms": 1e3 * first,
        "batch_ms": 1e3 * statistics.median(tens),
        "memory_mb": process_memory() / 1e6,
        "mapped_mb": psutil.Process().memory_info().shared / 1e6,
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("grain", "numpy", "xxhash")
        ),
    }
    print(json.dumps(result), flush=True)


COLUMNS = ("first_batch_ms", "batch_ms", "memory_mb", "mapped_mb")


def measure_records(counts: list[int], *, folder: Path) -> list[dict[str, Any]]:
    """Write and read sets of these numbers of records; return the rows of the table."""
    needed, free = RECORD_BYTES * max(counts), shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(
            f"{max(counts):,} records take {needed >> 20:,} MB in {folder}, and {free >> 20:,} MB "
            "are free: use fewer --records, or set TMPDIR."
        )
    rows = []
    for many_files in (False, True):
        for count in counts:
            print(f"writing {count:,} records …", file=sys.stderr, flush=True)
            prepared = folder / "prepared"
            write_set(prepared, count, many_files=many_files)
            worker = start_worker("records", prepared)
            result = read_answer(worker)
            worker.wait()
            shutil.rmtree(prepared)
            files = count // RECORDS_PER_FILE if many_files else 1
            rows.append({"records": count, "files": files, **result})
    return rows


# Both ---------------------------------------------------------------------------------------------


def show_devices(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(f"{'devices':<16}{'difference':>18}{'s per step':>14}{'of one device':>16}")
    for row in rows:
        name = f"{row['devices']} by {row['how']}"
        print(
            f"{name:<16}{row['difference']:>18.1e}{row['seconds_per_step']:>14.3f}"
            f"{row['times_one']:>15.2f}x"
        )


def show_records(rows: list[dict[str, Any]]) -> None:
    """Print a table, and the ratio of the largest to the smallest set."""
    titles = ("first batch ms", "batch ms", "memory MB", "mapped MB")
    print(f"{'records':>12}{'files':>8}" + "".join(f"{title:>16}" for title in titles))
    for several in (False, True):
        half = rows[len(rows) // 2 :] if several else rows[: len(rows) // 2]
        for row in half:
            numbers = "".join(f"{row[column]:>16,.2f}" for column in COLUMNS)
            print(f"{row['records']:>12,}{row['files']:>8,}{numbers}")
        ends = max(half, key=lambda row: row["records"]), min(half, key=lambda row: row["records"])
        ratios = "".join(f"{ends[0][column] / ends[1][column]:>15.2f}x" for column in COLUMNS)
        print(f"{'largest / smallest':>20}{ratios}")


def main() -> None:
    from vaejax.files import write_json

    parser = argparse.ArgumentParser(description="vaejax on more devices, on more images")
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2, 4, 8], help="simulated")
    parser.add_argument("--records", type=int, nargs="*", default=[10**n for n in (4, 5, 6, 7)])
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--json", type=Path, help="also write the tables there")
    options = parser.parse_args()
    if any(count < 1 or BATCH % count for count in options.devices):
        parser.error(f"--devices: a batch of {BATCH} has to divide over each of them")
    if any(count < RECORDS_PER_FILE or count % RECORDS_PER_FILE for count in options.records):
        parser.error(f"--records: each has to be a multiple of {RECORDS_PER_FILE:,}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    devices, records = [], []
    with tempfile.TemporaryDirectory() as folder:
        if options.devices:
            devices = measure_devices(options.devices, rounds=options.rounds, folder=Path(folder))
            print(f"{devices[0]['versions']}; overhead of the partitioning, on the same cores:")
            show_devices(devices)
        if options.records:
            records = measure_records(options.records, folder=Path(folder))
            print(f"{records[0]['versions']}:")
            show_records(records)
    if options.json:
        result = {
            "machine": platform.platform(), "cores": os.cpu_count(), "python": sys.version,
            "batch": BATCH, "devices": devices, "records": records,
        }  # fmt: skip
        write_json(options.json, result)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--worker", "devices", count, how, out]:
            train(int(count), how, out)
        case ["--worker", "records", folder]:
            read_set(folder)
        case _:
            main()
