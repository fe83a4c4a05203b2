"""Memory: does a long run stay as large as it was, and what do the report's runs need?

    python benchmarks/memory.py --json memory.json
    python benchmarks/memory.py --epochs 300 --only slope --plot memory.png

slope   1,500 epochs of five updates, the students' schedule, with pictures, film, metrics and
        checkpoints, scaled down to 160 drawn faces of 16 pixels. The memory of the whole process
        tree is looked at after every epoch; a line through the second half says how many KiB an
        epoch leaves behind.
peaks   the report's recipe at the 64 pixels of its anime faces and the 256 of its students, a few
        updates with the pictures and a checkpoint: the largest memory of the process tree, and of
        the device where it has its own.

The runs are those of `experiments/anime.py`, in processes of their own. Runs unchanged on a GPU.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from matplotlib.figure import Figure

from vaejax.data.demo import drawn_faces

ROOT = Path(__file__).parents[1]
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
import jax
print("device", (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
"""
PEAKS = {
    "64 px, batch 128": ("--steps", "4"),
    "256 px, batch 16": ("--size", "256", "--batch-size", "16", "--steps", "2"),
    "256 px, batch 128 in 16s": ("--size", "256", "--micro-batch", "16", "--steps", "1"),
}
FACES = 160  # 144 of which are learned from


def tree_memory(process: psutil.Process) -> int:
    """Resident bytes of a process and all that it has started."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


def start(folder: Path, *flags: str) -> subprocess.Popen:
    faces = folder / "faces"
    with zipfile.ZipFile(drawn_faces()) as drawn:
        pictures = [name for name in drawn.namelist() if name.endswith((".webp", ".png", ".jpg"))]
        drawn.extractall(faces, pictures[:FACES])
    command = [sys.executable, "-c", RUN, str(ROOT / "experiments" / "anime.py"), *flags]
    return subprocess.Popen(
        [*command, "--data", str(faces), "--out", str(folder / "run")], cwd=ROOT, text=True,
        stdout=(folder / "out").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen, folder: Path) -> str:
    said = (folder / "out").read_text(encoding="utf-8", errors="replace")
    if process.returncode != 0:
        sys.exit(f"the run ended with {process.returncode}:\n{said[-2000:]}")
    return said


def slope(epochs: int, folder: Path) -> dict[str, Any]:
    process = start(
        folder, "--recipe", "quick", "--size", "16", "--batch-size", "28", "--epochs", str(epochs),
        "--log-steps", "5", "--checkpoint-steps", "250",
    )  # fmt: skip
    metrics, seen, points = folder / "run" / "metrics.jsonl", 0, []
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.05)
        if metrics.exists():
            text = metrics.read_text(encoding="utf-8")
            done = text.count('"split": "validation"')
            if done > seen:
                seen = done
                points.append((done, tree_memory(watched)))
                if done % 50 == 0:
                    print(f"epoch {done}: {points[-1][1] / 2**20:,.0f} MiB", file=sys.stderr)
    ended(process, folder)
    at, memory = np.array(points[:-2], float).T  # the end makes a film
    half = at > epochs / 2
    per_epoch = np.polyfit(at[half], memory[half], 1)[0] / 1024
    return {
        "epochs": epochs,
        "kib_per_epoch": float(per_epoch),
        "middle_mib": float(memory[half][0] / 2**20),
        "end_mib": float(memory[-1] / 2**20),
        "points": [(int(a), int(m)) for a, m in zip(at, memory, strict=True)],
    }


def plot(line: dict[str, Any], path: Path) -> None:
    """The memory of the process tree after each epoch."""
    epochs, memory = np.array(line["points"], float).T
    figure = Figure(figsize=(8, 3), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.plot(epochs, memory / 2**20, lw=1)
    axes.set(
        xlabel="epoch",
        ylabel="MiB",
        ylim=(0, 1.2 * memory.max() / 2**20),
        title=f"RAM of a run: {line['kib_per_epoch']:+.1f} KiB an epoch over the second half",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path)


def peak(arguments: tuple[str, ...], folder: Path) -> dict[str, Any]:
    process = start(folder, *arguments)
    watched, largest = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            largest = max(largest, tree_memory(watched))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    process.wait()
    *_, device = ended(process, folder).split()
    return {"host_bytes": largest, "device_bytes": int(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description="does a run stay as large as it was?")
    parser.add_argument("--epochs", type=int, default=1500, help="of the long run")
    parser.add_argument("--only", choices=("slope", "peaks"), help="one of the two")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--plot", type=Path, help="draw the memory by epoch, as a PNG")
    given = parser.parse_args()
    if given.epochs < 20:
        parser.error(f"--epochs {given.epochs}: a line needs at least 20")
    if given.plot and given.only == "peaks":
        parser.error("--plot shows the slope, which --only peaks leaves out")
    found: dict[str, Any] = {"machine": platform.platform(), "python": sys.version}
    if given.only != "peaks":
        with tempfile.TemporaryDirectory() as folder:
            found["slope"] = slope(given.epochs, Path(folder))
        line = found["slope"]
        print(
            f"{line['epochs']:,} epochs: {line['kib_per_epoch']:+.1f} KiB an epoch over the second "
            f"half, from {line['middle_mib']:,.0f} to {line['end_mib']:,.0f} MiB",
            flush=True,
        )
        if given.plot:
            plot(line, given.plot)
    if given.only != "slope":
        print(f"{'peak':<28}{'host':>11}{'device':>11}")
        found["peaks"] = {}
        for name, arguments in PEAKS.items():
            with tempfile.TemporaryDirectory() as folder:
                one = found["peaks"][name] = peak(arguments, Path(folder))
            own = one["device_bytes"]
            device = f"{own / 2**30:.2f} GiB" if own else "the host's"
            print(f"{name:<28}{one['host_bytes'] / 2**30:>7.2f} GiB{device:>11}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
