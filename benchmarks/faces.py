"""Draw faces from scratch on a CPU, in equal time: vaejax and peers, before one judge.

    python benchmarks/faces.py --out faces --measure      first, on an idle machine: minutes
    python benchmarks/faces.py --out faces                5 minutes, two seeds, the drawn faces
    python benchmarks/faces.py --out anime --data anime.zip --minutes 30 --seeds 0 [--measure]
    python benchmarks/faces.py --out faces --ablation     the quick recipe with one part removed

The contenders are vaejax's recipes (report, quick, faces), pythae's VAE with its mixture sampler,
a DCGAN of torchgan's networks, and a small DDPM of diffusers, drawn from by 50 steps of DDIM: each
a process of its own on two cores, all with the same training images.

Equal time is a number of minutes of an idle machine. --measure takes the contenders in turn and
stores the seconds of their updates, and of what they do before and after them: starting, compiling,
fitting a prior, vaejax's pictures. What remains of the minutes gives the number of updates, which
each contender then makes, however busy the machine is.

The judge compares 1,000 samples with 1,000 training faces by VGG16's features, which no contender
has seen. Reconstructions are those of another 1,000 training faces; the mse is that of the test
images. Every result is kept in --out: the same command goes on where it was stopped.

PyTorch's contenders need `pip install torch pythae torchgan diffusers`.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from vaejax import pictures
from vaejax.data.batches import Images
from vaejax.data.prepare import prepare
from vaejax.data.records import read_dataset_report
from vaejax.data.sources import drawn_faces
from vaejax.evaluation import features
from vaejax.evaluation.set_metrics import compare_sets
from vaejax.files import atomic, read_json, write_json, write_text
from vaejax.metrics import Estimate
from vaejax.nearest import nearest_of_sets
from vaejax.system import processor_id, versions
from vaejax.training.budget import Speed

ROOT = Path(__file__).parents[1]
CONTENDERS = ROOT / "benchmarks" / "contenders"
SIZE, THREADS = 64, 2
COMPARED = 1000  # faces of each set, at most
SMALL = 32  # pixels at which the nearest training face is looked for
BLOCK = 1024  # training images that are compared at a time
ROUNDS = 3  # of measuring
MIN_UPDATES = 20  # where the minutes are too few for more
SHOWN = 10  # samples of each contender in the picture
METRICS = ("frechet", "precision", "recall", "coverage")
# A program that asks Linux to terminate it when this one is gone, even by SIGKILL (prctl 1 is
# PR_SET_PDEATHSIG), and becomes the one that is named. A preexec_fn would fork JAX's threads.
END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Contender(NamedTuple):
    """How faces are drawn: by a recipe of vaejax, by its run with another prior, or by a peer."""

    title: str
    flags: tuple[str, ...] = ()  # of the command of vaejax; "--plain" is no flag of it
    prior: str = ""  # instead of the one that was trained, of the run of the whole recipe
    program: str = ""  # of a peer
    packages: tuple[str, ...] = ()


QUICK = ("--recipe", "quick")
NO_GRADIENT, NO_L1 = ("--gradient-weight", "0"), ("--l1-weight", "0")
DRAWING = {
    "report": Contender("vaejax, report", ("--recipe", "report")),
    "quick": Contender("vaejax, quick", QUICK),
    "faces": Contender("vaejax, faces", ("--recipe", "faces")),
    "pythae": Contender("pythae, VAE", program="draw_pythae.py", packages=("torch", "pythae")),
    "dcgan": Contender("DCGAN", program="draw_dcgan.py", packages=("torch", "torchgan")),
    "ddpm": Contender("DDPM", program="draw_ddpm.py", packages=("torch", "diffusers")),
}
ABLATION = {
    "quick": DRAWING["quick"],
    "no-gradient": Contender("without gradient term", (*QUICK, *NO_GRADIENT)),
    "no-l1": Contender("without L1 term", (*QUICK, *NO_L1)),
    "neither": Contender("without both terms", (*QUICK, *NO_GRADIENT, *NO_L1)),
    "plain": Contender("without adaptive group norm", ("--plain",)),
    "no-ema": Contender("without moving average", (*QUICK, "--ema-decay", "0")),
    "mixture": Contender("mixture as the prior", prior="mixture"),
    "normal": Contender("N(0, I) as the prior", prior="normal"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder or zip of faces (none: the drawn faces)")
    parser.add_argument("--out", type=Path, default=Path("faces"))
    parser.add_argument("--measure", action="store_true", help="measure what is not measured yet")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=[*DRAWING, *ABLATION])
    options = parser.parse_args()
    chosen = ABLATION if options.ablation else DRAWING
    if unknown := [name for name in options.only or [] if name not in chosen]:
        parser.error(f"--only {unknown[0]}: there are {', '.join(chosen)}")
    chosen = installed({name: chosen[name] for name in options.only or chosen})
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # the contenders' as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    bench = Benchmark(options.out, options.data)
    if options.measure:
        bench.measure(chosen)
        return
    cells = [Cell(n, m, s) for m in options.minutes for s in options.seeds for n in chosen]
    for cell in cells:
        bench.fill(cell, chosen[cell.name])
    lines = bench.table(cells, chosen)
    write_text(options.out / f"{'ablation' if options.ablation else 'faces'}.md", "\n".join(lines))
    print("\n".join(lines))


def installed(chosen: dict[str, Contender]) -> dict[str, Contender]:
    """Return the contenders whose packages are there, and say of the others what is missing."""
    found = {}
    for name, contender in chosen.items():
        missing = [package for package in contender.packages if find_spec(package) is None]
        if missing:
            print(f"{name} is left out: pip install {' '.join(missing)}", file=sys.stderr)
        else:
            found[name] = contender
    return found


class Cell(NamedTuple):
    """One training: who, for how long, from which seed."""

    name: str
    minutes: float
    seed: int

    def __str__(self) -> str:
        return f"{self.name}-{self.minutes:g}-{self.seed}"


class Benchmark:
    """The folder of the results: `results.json`, the images, and a folder for each cell."""

    def __init__(self, out: Path, data: Path | None):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self._path = out, out / "results.json"
        self.results: dict[str, Any] = {"speeds": {}, "cells": {}}
        if self._path.exists():
            self.results = read_json(self._path)
        self.prepared = prepare(data or drawn_faces(), size=SIZE).absolute()
        self._write_images()
        self._judge: Judge | None = None

    def _write_images(self) -> None:
        report = read_dataset_report(self.prepared)
        identity = {field: report[field] for field in ("fingerprint", "persons", "splits")}
        if self.results.setdefault("data", identity) != identity:
            sys.exit(f"{self.out} has results of other images: name another --out")
        self.images = self.out / "images"
        self.images.mkdir(exist_ok=True)
        training = Images(self.prepared, "train")
        n = min(COMPARED, len(training) // 2)
        splits = {
            "train": (training, 0, len(training)),
            "half": (training, n, 2 * n),
            "test": (held_out := Images(self.prepared, "test"), 0, len(held_out)),
        }
        for name, (images, first, end) in splits.items():
            if not (self.images / f"{name}.npy").exists():
                with atomic(self.images / f"{name}.npy") as path, path.open("wb") as file:
                    np.save(file, images.read(np.arange(first, end)))

    def measure(self, chosen: dict[str, Contender]) -> None:
        """Measure the contenders that are trained, in turn, and store the medians."""
        names = [n for n, c in chosen.items() if not c.prior and n not in self.results["speeds"]]
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for i in range(ROUNDS):
            for name in names:
                line = run(self._speed_command(chosen[name]), self.out / f"{name}.log")
                answer = json.loads(line)
                rounds[name].append(answer)
                print(f"round {i + 1}, {name}: {words(answer)}", flush=True)
        for name, answers in rounds.items():
            values = {k: statistics.median(a[k] for a in answers) for k in answers[0]}
            self.results["speeds"][name] = values
        self.results |= {"machine": processor_id(), "versions": versions()}
        write_json(self._path, self.results)

    def _speed_command(self, contender: Contender) -> list[str]:
        program = contender.program or "draw_vaejax.py"
        data = self.images if contender.program else self.prepared
        began = str(time.monotonic())
        return [str(CONTENDERS / program), "speed", str(data), began, *contender.flags]

    def fill(self, cell: Cell, contender: Contender) -> None:
        """Train and evaluate a cell, unless it is there."""
        if str(cell) in self.results["cells"]:
            return
        folder = self.out / "cells" / str(cell)
        folder.mkdir(parents=True, exist_ok=True)
        source = cell._replace(name="quick") if contender.prior else cell
        lengths = self._lengths(source)
        print(f"{cell}: {lengths[0]:,} updates, {lengths[1]:,} of a prior …", flush=True)
        for command in self._commands(folder, source, contender, lengths):
            run(command, folder / "log.txt")
        facts = {"updates": lengths[0], "prior_updates": lengths[1]}
        facts |= read_json(folder / "facts.json") | self.judge().evaluate(folder)
        self.results["cells"][str(cell)] = facts
        write_json(self._path, self.results)

    def _lengths(self, cell: Cell) -> tuple[int, int]:
        speed = self.results["speeds"].get(cell.name)
        if speed is None:
            sys.exit(f"the speed of {cell.name} is not known: --measure first, on an idle machine")
        updates, prior_updates = Speed(**{f: speed[f] for f in Speed._fields}).updates_in(
            cell.minutes
        )
        if updates < MIN_UPDATES:
            print(f"{cell.name}: {cell.minutes:g} minutes are too few: {MIN_UPDATES} updates")
        least = MIN_UPDATES if speed["prior_update"] else 0
        return max(updates, MIN_UPDATES), max(prior_updates, least)

    def _commands(
        self, folder: Path, source: Cell, contender: Contender, lengths: tuple[int, int]
    ) -> list[list[str]]:
        seed = str(source.seed)
        if contender.program:
            shutil.rmtree(folder / "pythae", ignore_errors=True)
            arguments = [str(self.images), str(folder), *map(str, lengths), seed]
            return [[str(CONTENDERS / contender.program), "train", *arguments]]
        draw = [str(CONTENDERS / "draw_vaejax.py"), "draw", str(self.images), str(folder)]
        if contender.prior:
            trained = self.out / "cells" / str(source) / "run"
            if not trained.exists():
                sys.exit(f"{source} is not trained yet, whose prior {contender.prior} is")
            return [[*draw, str(trained), contender.prior]]
        plain = "--plain" in contender.flags
        program = CONTENDERS / "plain_vae.py" if plain else ROOT / "experiments" / "anime.py"
        flags = [flag for flag in contender.flags if flag != "--plain"]
        flags += ["--data", str(self.prepared), "--out", str(folder / "run"), "--seed", seed]
        flags += ["--steps", str(lengths[0]), "--epochs", "1000000"]
        flags += ["--prior-steps", str(lengths[1])] if lengths[1] else []
        return [[str(program), *flags], [*draw, str(folder / "run"), ""]]

    def judge(self) -> "Judge":
        """Return the judge, who takes seconds to come."""
        self._judge = self._judge or Judge(self.images)
        return self._judge

    def table(self, cells: list[Cell], chosen: dict[str, Contender]) -> list[str]:
        """Write the table in Markdown, and a picture of the first samples of each."""
        lines = [
            "| contender | minutes | seed | images seen | parameters | held-out mse | Fréchet: "
            "reconstructions | samples | precision | recall | coverage | nearest | ms a sample |",
            "|---" * 13 + "|",
            f"| *training faces* | | | | | | | {numbers(self._floor())} | | |",
        ]
        rows, titles = [np.load(self.images / "test.npy")[:SHOWN]], ["test images"]
        for cell in cells:
            facts = self.results["cells"][str(cell)]
            speed = self.results["speeds"].get(cell.name, {})
            title = chosen[cell.name].title
            lines.append(
                f"| {title} | {cell.minutes:g} | {cell.seed} | {facts['seen']:,} | "
                f"{facts['parameters'] / 1e6:.1f} M | {number(facts, 'mse')} | "
                f"{number(facts, 'frechet_reconstructions')} | {numbers(facts)} | "
                f"{number(facts, 'nearest')} | {number(speed, 'sample', 1000)} |"
            )
            if cell.seed == cells[0].seed:
                folder = self.out / "cells" / str(cell)
                rows.append(np.load(folder / "samples.npy", mmap_mode="r")[:SHOWN])
                titles.append(f"{title} ({cell.minutes:g} min)")
        pictures.save_png(self.out / "samples.png", pictures.stack_rows(rows))
        return [*lines, "", f"samples.png: {', '.join(titles)}."]

    def _floor(self) -> dict[str, Any]:
        if "floor" not in self.results:
            self.results["floor"] = self.judge().compare(np.load(self.images / "half.npy"))
            write_json(self._path, self.results)
        return self.results["floor"]


def number(facts: dict[str, Any], name: str, factor: float = 1.0) -> str:
    """Format a number of a cell; a dash where there is none."""
    return "–" if facts.get(name) is None else f"{factor * facts[name]:.3g}"


def numbers(facts: dict[str, Any]) -> str:
    """Format the metrics of samples."""
    return " | ".join(number(facts, metric) for metric in METRICS)


def words(answer: dict[str, float]) -> str:
    """Format the seconds of a contender."""
    return ", ".join(f"{name} {seconds:.4g} s" for name, seconds in answer.items())


# Processes ----------------------------------------------------------------------------------------


def run(command: list[str], log: Path) -> str:
    """Run a Python program to its end, and return the last line that it printed.

    It is stopped when this process is. Exits with the end of its log if it fails.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(THREADS))
    environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", END_WITH_PARENT, *command], env=environment,
            stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
        try:
            output = process.communicate()[0]
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        file.write(output)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{' '.join(command)} ended with {process.returncode}. The end of {log}:\n{tail}")
    return output.strip().rpartition("\n")[2]


# The judge ----------------------------------------------------------------------------------------


class Judge:
    """Compares faces with training faces and test images."""

    def __init__(self, images: Path):
        self._network = features.vgg16(SIZE)
        self._train = np.load(images / "train.npy", mmap_mode="r")
        self._small = pictures.shrink(np.asarray(self._train), SMALL)
        self._test = np.load(images / "test.npy")
        self._count = len(np.load(images / "half.npy", mmap_mode="r"))
        self._real = self._features(self._train)
        self._held_out = self._distance(self._test)

    def evaluate(self, folder: Path) -> dict[str, float | None]:
        """Return the metrics of what a contender has left in a folder, and save 100 samples."""
        samples = np.load(folder / "samples.npy")
        pictures.save_png(folder / "samples.png", pictures.grid(samples[:100], columns=10))
        nearest = self._distance(samples) / self._held_out
        facts: dict[str, float | None] = {**self.compare(samples), "nearest": nearest}
        if (folder / "half.npy").exists():
            again = self.compare(np.load(folder / "half.npy"))
            facts["frechet_reconstructions"] = again["frechet"]
            error = np.load(folder / "test.npy").astype(float) - self._test
            facts["mse"] = float(np.mean(error**2)) / 255**2
        return facts

    def compare(self, faces: np.ndarray) -> dict[str, float | None]:
        """Compare faces with as many training faces; None for what so few do not tell."""
        results = compare_sets({"faces": self._features(faces)}, self._real)
        found = {metric: results[f"{metric}/faces"] for metric in METRICS}
        return {name: e.value if isinstance(e, Estimate) else None for name, e in found.items()}

    def _features(self, faces: np.ndarray) -> np.ndarray:
        return self._network.of(faces[: self._count], batch_size=100)

    def _distance(self, faces: np.ndarray) -> float:
        """Return the median distance of faces from their nearest training faces."""
        blocks = (self._small[i : i + BLOCK] for i in range(0, len(self._small), BLOCK))
        small = {"faces": pictures.shrink(faces, SMALL)}
        found = nearest_of_sets(small, blocks, self._small.__getitem__)
        return float(np.median(found["faces"].distances))


if __name__ == "__main__":
    main()
