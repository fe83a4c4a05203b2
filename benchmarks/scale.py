"""Does vaejax stay the same when devices or images become many?

    python benchmarks/scale.py --json scale.json
    python benchmarks/scale.py --devices 1 2 --records 10000 1000000

Devices: the report's layers at 32 pixels, batches of 32, on simulated devices of this CPU, by jit
and by pmap, each way in a process of its own. Of the way that all parameters go in two updates by
plain gradient descent: the length of the difference to one device's, as a part of its length; where
that is more than 1e-3 nothing is measured. Then seconds an update, medians of the rounds, in which
all take turns. The devices share the same cores, so that what they take longer than one is the
overhead of the partitioning: this shows no speed.

Records: prepared sets of 4-pixel images, from which batches of 32 are read, each in a fresh
process: milliseconds from opening the set to the first batch, milliseconds a batch of the next 200
(the median over tens, since they are read ahead), and MB of memory, the libraries included: at the
end, and at most. Once in one file, as `vaejax prepare` writes a split, and once in files of 10,000,
as it does by Beam (here one file under many names), which are opened as they are met. The files are
in the system's cache. Ten million records take 1.7 GB in the temporary folder while they are
measured.
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
RATE = 100.0  # or else the parameters' rounding would be as large as a difference that counts
TOLERANCE = 1e-3  # of the way that they go
RECORD_BYTES = 170  # of a 4-pixel image on disk, its place in the file's index included
A_FILE = 10_000  # records, where there are many files


# Devices


def learn(count: int, how: str, out: str) -> None:
    """Write how two updates move the parameters; then time one for each line that comes in."""
    import jax
    import numpy as np
    import optax

    from vaejax import objectives
    from vaejax.models.vae import VAE
    from vaejax.training import parallel, programs
    from vaejax.training.state import init

    jax.config.update("jax_num_cpu_devices", count)
    parallel.configure(keep=False)
    devices = parallel.choose(count, "pmap" if how == "pmap" else "jit")
    everywhere = parallel.whole(devices)
    model, optimizer = VAE(size=32), optax.sgd(RATE)  # Adam would hide the size of a gradient
    loss = partial(objectives.report, model=model, kl_weight=0.01)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=everywhere)()
    begin = partial(init, model=model, optimizer=optimizer)
    state = jax.jit(begin, out_shardings=everywhere)(key)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3), np.uint8)
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    step = programs.compile_train_step(loss, optimizer, state, shape, key, devices=devices)
    before = jax.tree.map(np.array, parallel.here(state.params))
    for _ in range(2):
        state, _ = step.run(state, images, key)
    way = jax.tree.map(np.subtract, parallel.here(state.params), before)
    np.save(out, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(way)]))
    print(json.dumps({"versions": f"jax {jax.__version__}"}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state, _ = step.run(state, images, key)
        jax.block_until_ready(state)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        sys.exit("One of the measuring processes has died; its last words stand above.")
    return json.loads(line)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)


def over_devices(counts: list[int], *, rounds: int, folder: Path) -> list[dict[str, Any]]:
    import numpy as np

    ways = [(1, "jit")] + [(n, how) for n in counts if n > 1 for how in ("jit", "pmap")]
    workers: list[subprocess.Popen[str]] = []
    rows: list[dict[str, Any]] = []
    try:
        expected: Any = None
        for count, how in ways:
            print(f"compiling for {count} by {how} …", file=sys.stderr, flush=True)
            out = folder / f"{count}-{how}.npy"
            workers.append(start("devices", count, how, out))
            about = answer(workers[-1])
            found = np.load(out)
            expected = found if expected is None else expected
            apart = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            if not apart <= TOLERANCE:
                sys.exit(f"{count} devices by {how} learn something else than one: {apart:.1e}")
            rows.append({"devices": count, "how": how, "apart": apart, "seconds": [], **about})
        for _ in range(rounds):
            for worker, row in zip(workers, rows, strict=True):
                assert worker.stdin
                print(file=worker.stdin, flush=True)
                row["seconds"].append(answer(worker)["seconds"])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    for row in rows:
        row["seconds_an_update"] = statistics.median(row["seconds"])
        row["times_one"] = row["seconds_an_update"] / rows[0]["seconds_an_update"]
    return rows


# Records


def write_set(folder: Path, count: int, *, many_files: bool) -> None:
    """A prepared set with a training split only, as far as reading it needs one."""
    import numpy as np

    from vaejax.data import records

    size, random = 4, np.random.default_rng(0)
    features = records.features(size)
    images = random.integers(0, 256, (1000, size, size, 3), np.uint8)
    texts = {"person": "", "path": "", "sha256": ""}
    some = [features.serialize_example({"image": image, **texts}) for image in images]
    data = folder / "records"
    data.mkdir(parents=True)
    lengths = [A_FILE] * (count // A_FILE) if many_files else [count]
    first, *others = (
        data / f"faces-train.array_record-{i:05}-of-{len(lengths):05}" for i in range(len(lengths))
    )
    records.save(os.fspath(first), (some[i % len(some)] for i in range(lengths[0])))
    for other in others:
        other.hardlink_to(first)
    train = records.split_info(data, split="train", lengths=lengths)
    records.describe(data, size=size, splits=[train])
    report = {"format": records.FORMAT, "source": "", "size": size, "accepted": count}
    report = records.complete({**report, "fingerprint": "", "listing": ""}, folder)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def read_set(folder: str) -> None:
    import importlib.metadata

    import psutil
    import tensorflow_datasets  # noqa: F401  (what is imported is not timed)

    from vaejax.data.batches import Images, stream

    began = time.perf_counter()
    batches = stream(Images(Path(folder), "train"), batch_size=BATCH, seed=0)
    next(batches)
    first, tens = time.perf_counter() - began, []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            next(batches)
        tens.append((time.perf_counter() - began) / 10)
    # getrusage would count what the process was before it became this one
    status = Path("/proc/self/status").read_text()
    found = {
        "first_batch_ms": 1e3 * first,
        "batch_ms": 1e3 * statistics.median(tens),
        "memory_mb": psutil.Process().memory_info().rss / 1e6,
        "largest_memory_mb": 1024 * int(status.split("VmHWM:")[1].split()[0]) / 1e6,
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("grain", "array-record", "tensorflow-datasets")
        ),
    }
    print(json.dumps(found), flush=True)


COLUMNS = ("first_batch_ms", "batch_ms", "memory_mb", "largest_memory_mb")


def over_records(counts: list[int], *, folder: Path) -> list[dict[str, Any]]:
    needed, free = RECORD_BYTES * max(counts), shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(
            f"{max(counts):,} records take {needed >> 20:,} MB in {folder}, and {free >> 20:,} MB "
            "are free: ask for fewer --records, or set TMPDIR."
        )
    rows = []
    for many_files in (False, True):
        for count in counts:
            print(f"writing {count:,} records …", file=sys.stderr, flush=True)
            prepared = folder / "prepared"
            write_set(prepared, count, many_files=many_files)
            worker = start("records", prepared)
            found = answer(worker)
            worker.wait()
            shutil.rmtree(prepared)
            rows.append({"records": count, "files": count // A_FILE if many_files else 1, **found})
    return rows


# Both


def device_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'devices':<16}{'they go apart by':>18}{'s an update':>14}{'of one device':>16}")
    for row in rows:
        name = f"{row['devices']} by {row['how']}"
        print(
            f"{name:<16}{row['apart']:>18.1e}{row['seconds_an_update']:>14.3f}"
            f"{row['times_one']:>15.2f}x"
        )


def record_table(rows: list[dict[str, Any]]) -> None:
    titles = ("first batch ms", "batch ms", "memory MB", "at most MB")
    print(f"{'records':>12}{'files':>8}" + "".join(f"{title:>16}" for title in titles))
    for several in (False, True):
        some = [row for row in rows if (rows.index(row) >= len(rows) // 2) == several]
        for row in some:
            numbers = "".join(f"{row[column]:>16,.1f}" for column in COLUMNS)
            print(f"{row['records']:>12,}{row['files']:>8,}{numbers}")
        ends = max(some, key=lambda row: row["records"]), min(some, key=lambda row: row["records"])
        ratios = "".join(f"{ends[0][column] / ends[1][column]:>15.2f}x" for column in COLUMNS)
        print(f"{'largest / smallest':>20}{ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description="vaejax on more devices, on more images")
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2, 4, 8], help="simulated")
    parser.add_argument("--records", type=int, nargs="*", default=[10**n for n in (4, 5, 6, 7)])
    parser.add_argument("--rounds", type=int, default=5, help="timed updates of each way")
    parser.add_argument("--json", type=Path, help="also write the tables there")
    given = parser.parse_args()
    if any(count < 1 or BATCH % count for count in given.devices):
        parser.error(f"--devices: a batch of {BATCH} has to divide over each of them")
    if any(count < A_FILE or count % A_FILE for count in given.records):
        parser.error(f"--records: each has to be a multiple of {A_FILE:,}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    devices, records = [], []
    with tempfile.TemporaryDirectory() as folder:
        if given.devices:
            devices = over_devices(given.devices, rounds=given.rounds, folder=Path(folder))
            print(f"{devices[0]['versions']}; overhead of the partitioning, on the same cores:")
            device_table(devices)
        if given.records:
            records = over_records(given.records, folder=Path(folder))
            print(f"{records[0]['versions']}:")
            record_table(records)
    if given.json:
        result = {
            "machine": platform.platform(), "cores": os.cpu_count(), "python": sys.version,
            "batch": BATCH, "devices": devices, "records": records,
        }  # fmt: skip
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--worker", "devices", count, how, out]:
            learn(int(count), how, out)
        case ["--worker", "records", folder]:
            read_set(folder)
        case _:
            main()
