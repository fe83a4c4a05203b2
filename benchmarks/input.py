"""From image files to batches: vaejax against what its user would take instead.

    python benchmarks/input.py --data faces.zip --json input.json
    python benchmarks/input.py --threads 2 --only vaejax tf.data

Preparing: files are decoded and resized to uint8, once through all of them. vaejax's own `prepare`,
which also judges and hashes the files and writes the set; tf.data and PyTorch's DataLoader (Pillow,
a worker a thread) hand out the pixels and keep nothing. They are given only files that vaejax
accepts.

Reading: shuffled batches of the training images, all of which lie in the system's cache. vaejax's
stream from its prepared set; the others from one file of raw pixels: tf.data through a buffer of
10,000 images, PyTorch by images from a mapped array, in the process itself and with workers, and by
whole batches. In whole passes for at least so many seconds, after one that is not timed.

Every turn is a process of its own on so many cores, and all take their turns round by round, so
that a busy machine slows all of them alike. Images a second are medians over the rounds; "of
others" is the ratio to the fastest of the others. Memory is the largest that the process and its
workers had (PSS: what they share counts once; mapped files count), libraries included. One that is
not installed is left out by name. Where they do not all give as many images, and in reading as
bright ones, nothing is printed but that.
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


# A turn


def turn(what: str, name: str, task: Task) -> dict[str, Any]:
    """In a process of its own, whose memory the one that started it looks at."""
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


def measured(what: str, name: str, task: Task, folder: Path) -> dict[str, Any]:
    import psutil

    settings, said = folder / "task.json", folder / "log"
    settings.write_text(json.dumps(task), encoding="utf-8")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(task.threads))
    command = [sys.executable, __file__, "--worker", what, name, str(settings)]
    largest = 0
    with said.open("w+") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **threads}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        root = psutil.Process(process.pid)
        while process.poll() is None:
            used = 0
            for one in [root, *root.children(recursive=True)]:
                try:
                    used += one.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            largest = max(largest, used)
            time.sleep(0.1)
    assert process.stdout
    lines = process.stdout.read().splitlines()
    if process.returncode or not lines:
        words = said.read_text(errors="replace")[-2000:]
        sys.exit(f"{name} has died {what}, and with it the comparison. Its last words:\n{words}")
    return {**json.loads(lines[-1]), "memory": largest}


# All turns


def made(source: Path, folder: Path, given: argparse.Namespace) -> Task:
    """What all begin with: files, the prepared set and its pixels; no part of the measurement."""
    from vaejax.data import prepare, records, sources
    from vaejax.data.batches import Images, steps_per_epoch
    from vaejax.data.decode import Refused

    if not source.is_dir():
        files = folder / "files"
        files.mkdir()
        with sources.listing(source) as found:
            for number, entry in enumerate(found.entries):
                try:
                    data = found.read(entry)
                except Refused:
                    continue
                (files / f"{number:07}{Path(entry.path).suffix}").write_bytes(data)
        source = files
    prepared, pixels = folder / "prepared", folder / "pixels"
    prepare.prepare(source, size=given.size, out=prepared, allow_refused=True, say=lambda _: None)
    refused = {refusal["path"] for refusal in records.read_report(prepared)["refused"]}
    with sources.listing(source) as found:
        accepted = [str(e.name) for e in found.entries if e.path not in refused]
    images = Images(prepared, "train")
    steps_per_epoch(len(images), given.batch)  # or it says how large a batch can be
    with pixels.open("wb") as file:
        for start in range(0, len(images), 1000):
            some = np.arange(start, min(start + 1000, len(images)))
            file.write(images.read(some).tobytes())
    return Task(
        str(source), accepted, str(prepared), str(pixels), len(images),
        given.size, given.batch, given.seconds, threads=1,
    )  # fmt: skip


def refuse_to_disagree(turns: dict[str, list[dict[str, Any]]], what: str) -> None:
    for key, tolerance in (("images", 0), ("mean", 2.0)):  # of 255; a pass leaves images out
        found = {name: some[0].get(key, 0) for name, some in turns.items()}
        if found and max(found.values()) - min(found.values()) > tolerance:
            sys.exit(f"{what} does not give all the same {key}: {found}. Nothing is printed.")


def compared(what: str, names: list[str], task: Task, rounds: int, folder: Path):
    """The turns of all contenders, and what is missing."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    missing: dict[str, str] = {}
    for number in range(rounds):
        for name in [name for name in names if name not in missing]:
            found = measured(what, name, task, folder)
            if package := found.get("missing"):
                missing[name] = package
                del turns[name]
                continue
            turns[name].append(found)
        progress = f"{what}, {task.threads} threads: round {number + 1} of {rounds}"
        print(progress, file=sys.stderr, flush=True)
    refuse_to_disagree(turns, what)
    rows = []
    for name, some in turns.items():
        rates = [one["rate"] for one in some]
        memory = max(one["memory"] for one in some)
        rows.append(
            {
                "what": what, "threads": task.threads, "contender": name, "rates": rates,
                "images_per_second": statistics.median(rates), "memory": memory,
                "images": some[0]["images"],
            }
        )  # fmt: skip
    return rows, missing


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        rate = row["images_per_second"]
        others = [other["images_per_second"] for other in rows if other is not row]
        ratio = f"{rate / max(others):.2f}x" if others else ""
        print(
            f"{row['what']:<11}{row['threads']:>7}  {row['contender']:<24}{rate:>12,.0f}"
            f"{ratio:>11}{row['memory'] / 1e6:>11,.0f}"
        )


def main() -> None:
    from vaejax.data.demo import drawn_faces
    from vaejax.errors import UserError

    names, cores = list(PREPARING | READING), len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="vaejax against others, from files to batches")
    parser.add_argument("--data", type=Path, default=drawn_faces(), help="folder or zip of images")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=3.0, help="of reading in a turn, at least")
    parser.add_argument("--step-rate", type=float, help="images/s that an update learns from")
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--json", type=Path, help="also write the table there")
    given = parser.parse_args()
    if any(not 1 <= threads <= cores for threads in given.threads):
        parser.error(f"--threads: from 1 to {cores}, which is what there is here")
    machine = f"{platform.processor() or platform.machine()}, {cores} cores"
    rows, missing = [], {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            task = made(given.data, Path(folder), given)
        except UserError as error:
            sys.exit(f"error: {error}")
        files = f"{len(task.files):,} files to {task.size} px, batches of {task.batch}"
        print(f"{machine}; {files}, {task.images:,} images to learn from; {given.rounds} rounds")
        print(f"{'':<11}{'threads':>7}  {'':<24}{'images/s':>12}{'of others':>11}{'MB':>11}")
        for what, contenders in (("preparing", PREPARING), ("reading", READING)):
            for threads in given.threads:
                chosen = [name for name in contenders if name in given.only]
                at = task._replace(threads=threads)
                some, without = compared(what, chosen, at, given.rounds, Path(folder))
                show(some)
                rows, missing = rows + some, missing | without
    for row in rows:
        if given.step_rate and (row["what"], row["contender"]) == ("reading", "vaejax"):
            times = row["images_per_second"] / given.step_rate
            print(
                f"{row['threads']} threads read for {times:,.0f} steps of "
                f"{given.step_rate:,.0f} images/s at once"
            )
    for name, package in missing.items():
        print(f"{name} was left out: {package} is not installed")
    if given.json:
        result = {
            "machine": machine, "platform": platform.platform(), "python": sys.version,
            "versions": versions(),
            "files": len(task.files), "size": given.size, "batch": given.batch,
            "missing": missing, "rows": rows,
        }  # fmt: skip
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, what, name, settings = sys.argv
        print(json.dumps(turn(what, name, Task(*json.loads(Path(settings).read_text())))))
    else:
        main()
