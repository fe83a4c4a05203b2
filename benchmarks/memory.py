"""Measure whether the memory of a long run grows, and what the report's runs need at most.

    python benchmarks/memory.py --json memory.json
    python benchmarks/memory.py --epochs 300 --only slope --plot memory.png

slope   1,500 epochs of five updates, the length of the report's training on students, with
        pictures, film, metrics and checkpoints, scaled down to 160 drawn faces of 16 pixels. The
        memory of the process tree is measured after every epoch. The slope of a line through the
        second half is the memory, in KiB, that an epoch leaves behind.
peaks   the report's recipe at the 64 pixels of its anime faces and the 256 of its students, for a
        few updates with pictures and a checkpoint: the largest memory of the process tree, and of
        the device where it has memory of its own.

The runs are those of `experiments/anime.py`, in processes of their own, on a CPU or a GPU.
"""

import argparse
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

from vaejax.data.sources import drawn_faces
from vaejax.files import write_json

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
FACES = 160  # 144 of them are training images
MIN_EPOCHS = 20  # for a line through the second half


def tree_memory(process: psutil.Process) -> int:
    """Return the resident bytes of a process and all that it has started."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.Error:  # it has ended meanwhile
            continue
    return total


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """Start a run on drawn faces; its output goes to `folder / "out"`."""
    faces = folder / "faces"
    with zipfile.ZipFile(drawn_faces()) as drawn:
        names = [name for name in drawn.namelist() if name.endswith((".webp", ".png", ".jpg"))]
        drawn.extractall(faces, names[:FACES])
    command = [sys.executable, "-c", RUN, str(ROOT / "experiments" / "anime.py"), *flags]
    return subprocess.Popen(
        [*command, "--data", str(faces), "--out", str(folder / "run")], cwd=ROOT, text=True,
        stdout=(folder / "out").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


def read_output(process: subprocess.Popen, folder: Path) -> str:
    """Return what a run has printed, or exit with the end of it if the run failed."""
    output = (folder / "out").read_text(encoding="utf-8", errors="replace")
    if process.returncode != 0:
        sys.exit(f"the run ended with {process.returncode}:\n{output[-2000:]}")
    return output


def measure_slope(epochs: int, folder: Path) -> dict[str, Any]:
    """Train for so many epochs and fit a line to the memory after each."""
    process = start(
        folder, "--recipe", "quick", "--prior", "normal", "--size", "32", "--batch-size", "28",
        "--epochs", str(epochs),
        "--log-steps", "5", "--checkpoint-steps", "250",
    )  # fmt: skip
    metrics, last, points = folder / "run" / "metrics.jsonl", 0, []
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.05)
        if metrics.exists():
            done = metrics.read_text(encoding="utf-8").count('"split": "validation"')
            if done > last:
                last = done
                points.append((done, tree_memory(watched)))
                if done % 50 == 0:
                    print(f"epoch {done}: {points[-1][1] / 2**20:,.0f} MiB", file=sys.stderr)
    read_output(process, folder)
    epoch, memory = np.array(points[:-2], float).T  # at the end the film is made
    half = epoch > epochs / 2
    per_epoch = np.polyfit(epoch[half], memory[half], 1)[0] / 1024
    return {
        "epochs": epochs,
        "kib_per_epoch": float(per_epoch),
        "middle_mib": float(memory[half][0] / 2**20),
        "end_mib": float(memory[-1] / 2**20),
        "points": [(int(e), int(m)) for e, m in zip(epoch, memory, strict=True)],
    }


def plot(slope: dict[str, Any], path: Path) -> None:
    """Draw the memory of the process tree after each epoch."""
    epochs, memory = np.array(slope["points"], float).T
    figure = Figure(figsize=(8, 3), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.plot(epochs, memory / 2**20, lw=1)
    axes.set(
        xlabel="epoch",
        ylabel="MiB",
        ylim=(0, 1.2 * memory.max() / 2**20),
        title=f"RAM of a run: {slope['kib_per_epoch']:+.1f} KiB an epoch over the second half",
    )
    axes.grid(alpha=0.3)
    figure.savefig(path)


def measure_peak(flags: tuple[str, ...], folder: Path) -> dict[str, int]:
    """Train with these flags, and return the largest memory of the host and of the device."""
    process = start(folder, *flags)
    watched, largest = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            largest = max(largest, tree_memory(watched))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    process.wait()
    *_, device = read_output(process, folder).split()
    return {"host_bytes": largest, "device_bytes": int(device)}


def measure_peaks() -> dict[str, dict[str, int]]:
    """Measure and print the peak of every run of `PEAKS`."""
    print(f"{'peak':<28}{'host':>11}{'device':>11}")
    peaks = {}
    for name, flags in PEAKS.items():
        with tempfile.TemporaryDirectory() as folder:
            peak = peaks[name] = measure_peak(flags, Path(folder))
        on_device = peak["device_bytes"]
        device = f"{on_device / 2**30:.2f} GiB" if on_device else "the host's"
        print(f"{name:<28}{peak['host_bytes'] / 2**30:>7.2f} GiB{device:>11}", flush=True)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description="does the memory of a run grow?")
    parser.add_argument("--epochs", type=int, default=1500, help="of the long run")
    parser.add_argument("--only", choices=("slope", "peaks"), help="one of the two")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw the memory by epoch, as a PNG")
    options = parser.parse_args()
    if options.epochs < MIN_EPOCHS:
        parser.error(f"--epochs {options.epochs}: a line needs at least {MIN_EPOCHS}")
    if options.plot and options.only == "peaks":
        parser.error("--plot shows the slope, which --only peaks leaves out")
    results: dict[str, Any] = {"machine": platform.platform(), "python": sys.version}
    if options.only != "peaks":
        with tempfile.TemporaryDirectory() as folder:
            slope = results["slope"] = measure_slope(options.epochs, Path(folder))
        print(
            f"{slope['epochs']:,} epochs: {slope['kib_per_epoch']:+.1f} KiB an epoch over the "
            f"second half, from {slope['middle_mib']:,.0f} to {slope['end_mib']:,.0f} MiB",
            flush=True,
        )
        if options.plot:
            plot(slope, options.plot)
    if options.only != "slope":
        results["peaks"] = measure_peaks()
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
