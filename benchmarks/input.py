"""Compare vaejax's data pipeline, from image files to batches, with tf.data and PyTorch.

    python benchmarks/input.py --data faces.zip --json input.json
    python benchmarks/input.py --threads 2 --only vaejax tf.data

Preparing: all files are decoded and resized to uint8 once. vaejax's `prepare` also checks and
hashes the files and writes the data set; tf.data and PyTorch's DataLoader (Pillow, one worker per
thread) yield the pixels and keep nothing. They read only files that vaejax accepts.

Reading: shuffled batches of the training images, all of which are in the system's cache. vaejax
streams from its prepared set; the others read one file of raw pixels: tf.data through a buffer of
10,000 images, PyTorch image by image from a memory map, in the process itself and with workers, and
batch by batch. Complete epochs are timed for at least `--seconds`, after one that is not.

Every turn is a process of its own on `--threads` cores. The contenders take turns, round by round,
so that other load on the machine slows all of them alike. Images per second are medians over the
rounds; "of others" is the ratio to the fastest of the others. Memory is the maximum of the process
and its workers (PSS: shared pages count once; mapped files count), libraries included. A contender
that is not installed is left out by name. If the contenders do not all yield the same number of
images, or in reading the same mean brightness, only that is printed.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contenders.inputs import PREPARING, READING, Task

PACKAGES = ("numpy", "pillow", "grain", "array-record", "tensorflow", "tensorflow-cpu", "torch")


# A turn -------------------------------------------------------------------------------------------


def turn(what: str, name: str, task: Task) -> dict[str, Any]:
    """Measure one contender in this process, whose memory the parent process measures."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    try:
        if what == "preparing":
            run = PREPARING[name](task)
            began = time.perf_counter()
            images = run()
            return {"images": images, "rate": images / (time.perf_counter() - began)}
        batches = READING[name](task)
        batch = next(batches)
    except ModuleNotFoundError as error:
        return {"missing": error.name}
    steps = task.images // task.batch
    images, mean = len(batch), batch.mean() / steps
    for _ in range(steps - 1):
        batch = next(batches)
        images, mean = images + len(batch), mean + batch.mean() / steps
    assert batch.shape[1:] == (task.size, task.size, 3)
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < task.seconds:
        count += sum(len(next(batches)) for _ in range(steps))
    return {"images": images, "mean": mean, "rate": count / seconds}


def run_turn(what: str, name: str, task: Task, folder: Path) -> dict[str, Any]:
    """Run one turn in a new process, and add the memory that it used, in bytes."""
    import psutil

    task_file, log = folder / "task.json", folder / "log"
    task_file.write_text(json.dumps(task), encoding="utf-8")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
    command = [sys.executable, __file__, "--worker", what, name, str(task_file)]
    largest = 0
    with log.open("w+") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **threads}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        root = psutil.Process(process.pid)
        while process.poll() is None:
            used = 0
            for member in [root, *root.children(recursive=True)]:
                try:
                    used += member.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            largest = max(largest, used)
            time.sleep(0.1)
    assert process.stdout
    lines = process.stdout.read().splitlines()
    if process.returncode or not lines:
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{name} failed in {what}. The end of its log:\n{tail}")
    return {**json.loads(lines[-1]), "memory": largest}


# All turns ----------------------------------------------------------------------------------------


def make_task(source: Path, folder: Path, options: argparse.Namespace) -> Task:
    """Write the files, the prepared set and its raw pixels, which is not measured."""
    from vaejax.data import prepare, records, sources
    from vaejax.data.batches import Images, steps_per_epoch
    from vaejax.data.decode import Refused

    if not source.is_dir():
        files = folder / "files"
        files.mkdir()
        with sources.open_source(source) as listing:
            for number, entry in enumerate(listing.entries):
                try:
                    data = listing.read(entry)
                except Refused:
                    continue
                (files / f"{number:07}{Path(entry.path).suffix}").write_bytes(data)
        source = files
    prepared, pixels = folder / "prepared", folder / "pixels"
    prepare.prepare(source, size=options.size, out=prepared, allow_refused=True, say=lambda _: None)
    refused = {refusal["path"] for refusal in records.read_dataset_report(prepared)["refused"]}
    with sources.open_source(source) as listing:
        accepted = [str(e.location) for e in listing.entries if e.path not in refused]
    images = Images(prepared, "train")
    steps_per_epoch(len(images), options.batch)  # raises if the batch is too large
    with pixels.open("wb") as file:
        for start in range(0, len(images), 1000):
            some = np.arange(start, min(start + 1000, len(images)))
            file.write(images.read(some).tobytes())
    return Task(
        str(source), accepted, str(prepared), str(pixels), len(images),
        options.size, options.batch, options.seconds, threads=1,
    )  # fmt: skip


def check_agreement(turns: dict[str, list[dict[str, Any]]], what: str) -> None:
    """Exit unless all contenders have yielded the same images."""
    for key, tolerance in (("images", 0), ("mean", 2.0)):  # of 255; an epoch leaves images out
        values = {name: results[0].get(key, 0) for name, results in turns.items()}
        if values and max(values.values()) - min(values.values()) > tolerance:
            sys.exit(f"{what}: the contenders do not agree in {key}: {values}.")


def compare(what: str, names: list[str], task: Task, rounds: int, folder: Path):
    """Return the rows of the table, and the missing package of every contender left out."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    missing: dict[str, str] = {}
    for number in range(rounds):
        for name in [name for name in names if name not in missing]:
            result = run_turn(what, name, task, folder)
            if package := result.get("missing"):
                missing[name] = package
                del turns[name]
                continue
            turns[name].append(result)
        progress = f"{what}, {task.threads} threads: round {number + 1} of {rounds}"
        print(progress, file=sys.stderr, flush=True)
    check_agreement(turns, what)
    rows = []
    for name, results in turns.items():
        rates = [result["rate"] for result in results]
        memory = max(result["memory"] for result in results)
        rows.append(
            {
                "what": what, "threads": task.threads, "contender": name, "rates": rates,
                "images_per_second": statistics.median(rates), "memory": memory,
                "images": results[0]["images"],
            }
        )  # fmt: skip
    return rows, missing


def versions() -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def show(rows: list[dict[str, Any]]) -> None:
    """Print a line for each contender."""
    for row in rows:
        rate = row["images_per_second"]
        others = [other["images_per_second"] for other in rows if other is not row]
        ratio = f"{rate / max(others):.2f}x" if others else ""
        print(
            f"{row['what']:<11}{row['threads']:>7}  {row['contender']:<24}{rate:>12,.0f}"
            f"{ratio:>11}{row['memory'] / 1e6:>11,.0f}"
        )


def main() -> None:
    from vaejax.data.sources import drawn_faces
    from vaejax.errors import UserError
    from vaejax.files import write_json

    names, cores = list(PREPARING | READING), len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="vaejax against others, from files to batches")
    parser.add_argument("--data", type=Path, default=drawn_faces(), help="folder or zip of images")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=3.0, help="of reading in a turn, at least")
    parser.add_argument("--step-rate", type=float, help="images/s of a training step")
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    if any(not 1 <= threads <= cores for threads in options.threads):
        parser.error(f"--threads: from 1 to {cores}, which is what there is here")
    machine = f"{platform.processor() or platform.machine()}, {cores} cores"
    rows, missing = [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            task = make_task(options.data, Path(folder), options)
        except UserError as error:
            sys.exit(f"error: {error}")
        files = f"{len(task.files):,} files to {task.size} px, batches of {task.batch}"
        print(f"{machine}; {files}, {task.images:,} training images; {options.rounds} rounds")
        print(f"{'':<11}{'threads':>7}  {'':<24}{'images/s':>12}{'of others':>11}{'MB':>11}")
        for what, contenders in (("preparing", PREPARING), ("reading", READING)):
            for threads in options.threads:
                chosen = [name for name in contenders if name in options.only]
                at = task._replace(threads=threads)
                new_rows, left_out = compare(what, chosen, at, options.rounds, Path(folder))
                show(new_rows)
                rows, missing = rows + new_rows, missing | left_out
    for row in rows:
        if options.step_rate and (row["what"], row["contender"]) == ("reading", "vaejax"):
            times = row["images_per_second"] / options.step_rate
            print(
                f"{row['threads']} threads read for {times:,.0f} steps of "
                f"{options.step_rate:,.0f} images/s at once"
            )
    for name, package in missing.items():
        print(f"{name} was left out: {package} is not installed")
    if options.json:
        result = {
            "machine": machine, "platform": platform.platform(), "python": sys.version,
            "versions": versions(),
            "files": len(task.files), "size": options.size, "batch": options.batch,
            "missing": missing, "rows": rows,
        }  # fmt: skip
        write_json(options.json, result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, what, name, task_file = sys.argv
        print(json.dumps(turn(what, name, Task(*json.loads(Path(task_file).read_text())))))
    else:
        main()
