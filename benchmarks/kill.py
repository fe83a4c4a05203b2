"""Kill a run at random, again and again, and start the same command again: does it end the same?

    python benchmarks/kill.py 50
    python benchmarks/kill.py 4 --seed 1 --json kill.json

A small but whole run, streamed images, pictures, film, figures and checkpoints on, is made once
without interruption. Others like it are then killed with SIGKILL so many times in all, each time
after they have made progress: every second time at a random moment, every other time as soon as a
checkpoint begins to be written, or some milliseconds later. Whenever one of them comes to its end,
everything is compared: the SHA-256 over parameters, statistics, optimiser, step and position in the
data; every line of metrics.jsonl but for the speed; every picture, and the film, byte by byte.
Exits with 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vaejax.data.demo import drawn_faces

ROOT = Path(__file__).parents[1]
FACES = 100  # 90 of which are learned from
FLAGS = (
    *("--recipe", "quick", "--size", "16", "--batch-size", "9", "--epochs", "6"),
    *("--log-steps", "1", "--checkpoint-steps", "7"),
)


@dataclass(frozen=True)
class Kill:
    """One of them."""

    resumed_at: int  # updates that the checkpoint had which it had begun with
    reached: int  # updates, when it was killed
    kept: int  # updates that the newest whole checkpoint had then
    in_a_save: bool  # whether an unfinished checkpoint was left
    seconds_to_first_step: float  # from its start


class Run:
    """A run in a folder of its own, begun and killed as often as one likes."""

    def __init__(self, folder: Path, faces: Path):
        self.folder = folder
        self._command = [
            *(sys.executable, str(ROOT / "experiments" / "anime.py"), *FLAGS),
            *("--data", str(faces), "--out", str(folder)),
        ]

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self._command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def end(self, process: subprocess.Popen) -> None:
        _, errors = process.communicate()
        if process.returncode != 0:
            sys.exit(f"{self.folder} ended with {process.returncode}:\n{errors[-2000:]}")

    def steps(self) -> list[int]:
        """The updates that are written down."""
        return [entry["step"] for entry in self.lines() if entry["split"] == "train"]

    def lines(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # it is being written
                return
            yield {name: v for name, v in entry.items() if name != "images_per_second"}

    def log(self) -> int:
        """Which file holds the lines, by a number."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def checkpoints(self) -> list[str]:
        folder = self.folder / "checkpoints"
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def newest(self) -> int:
        """Updates of the newest checkpoint."""
        return max((int(name) for name in self.checkpoints() if name.isdigit()), default=0)

    def saving(self) -> bool:
        return any(name.startswith(".partial-") for name in self.checkpoints())

    def result(self) -> dict[str, Any]:
        """All that must not depend on whether it was interrupted."""
        newest = self.folder / "checkpoints" / f"{self.newest():07}" / "manifest.json"
        seen = {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.suffix in (".png", ".gif", ".mp4") and path.name != "curves.png"
        }
        return {
            "state": json.loads(newest.read_text(encoding="utf-8"))["state"],
            "checkpoints": self.checkpoints(),
            "status": json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["status"],
            "lines": list(self.lines()),
            "pictures": seen,
        }


def killed(run: Run, chance: random.Random, *, in_a_save: bool, moment: float) -> Kill | None:
    """Start the run, and kill it after it made progress; None if it came to its end before."""
    resumes, began = run.newest(), time.monotonic()
    process = run.start()
    # the file is made anew before the first line: until then it is that of the run that was killed
    log, old = run.folder / "metrics.jsonl", run.log()
    if not _until(lambda: run.log() != old and log.stat().st_size > 0, process, 0.002):
        return _ended(run, process)
    if not _until(lambda: max(run.steps(), default=-1) >= resumes, process, 0.002):
        return _ended(run, process)
    first_step = time.monotonic() - began
    wait = chance.uniform(0, moment)
    if in_a_save:
        if not _until(run.saving, process, 0.0005):
            return _ended(run, process)
        wait = chance.uniform(0, 0.05)
    time.sleep(wait)
    process.kill()
    process.communicate()
    if process.returncode == 0:
        return None
    reached = max(run.steps(), default=-1) + 1
    return Kill(resumes, reached, run.newest(), run.saving(), first_step)


def _ended(run: Run, process: subprocess.Popen) -> None:
    run.end(process)


def _until(there: Callable[[], bool], process: subprocess.Popen, pause: float) -> bool:
    """Whether it came before the process ended."""
    while process.poll() is None:
        if there():
            return True
        time.sleep(pause)
    return False


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    found = [name for name in one if name != "pictures" and one[name] != other[name]]
    names = one["pictures"].keys() | other["pictures"].keys()
    return found + sorted(
        name for name in names if one["pictures"].get(name) != other["pictures"].get(name)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="does a run that is killed end the same?")
    parser.add_argument("runs", type=int, help="how many times to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    if given.runs < 1:
        parser.error(f"{given.runs}: at least 1")
    chance = random.Random(given.seed)
    kills: list[Kill] = []
    compared, different = 0, []
    with tempfile.TemporaryDirectory() as place:
        faces = Path(place) / "faces"
        with zipfile.ZipFile(drawn_faces()) as drawn:
            names = [name for name in drawn.namelist() if name.endswith(".webp")]
            drawn.extractall(faces, names[:FACES])
        whole = Run(Path(place) / "whole", faces)
        process = whole.start()
        _until(lambda: bool(whole.steps()), process, 0.01)
        began = time.monotonic()
        whole.end(process)
        moment, expected = time.monotonic() - began, whole.result()
        print(f"a whole run takes {moment:.1f} s from its first update to its end", flush=True)
        while len(kills) < given.runs:
            run = Run(Path(place) / f"run-{compared}", faces)
            while len(kills) < given.runs:
                one = killed(run, chance, in_a_save=len(kills) % 2 == 1, moment=moment)
                if one is None:
                    break
                kills.append(one)
                print(
                    f"kill {len(kills)}: begun at {one.resumed_at}, killed at {one.reached}"
                    + (" in a save" if one.in_a_save else ""),
                    flush=True,
                )
            run.end(run.start())
            found = differences(expected, run.result())
            compared, different = compared + 1, different + found
            print(
                f"run {compared} is at its end: {', '.join(found) or 'no difference'}", flush=True
            )
    inside = sum(kill.in_a_save for kill in kills)
    lost = max(kill.reached - kill.kept for kill in kills)
    updates = sum(line["split"] == "train" for line in expected["lines"])
    resumes = [kill.seconds_to_first_step for kill in kills if kill.resumed_at]
    print(
        f"{len(kills)} kills, {inside} of them in a save, in {compared} runs of {updates} updates: "
        f"{len(different)} differences; at most {lost} updates lost, of an interval of 7"
    )
    if resumes:
        print(
            f"from the start to the first update again: {statistics.median(resumes):.1f} s (median)"
        )
    if given.json:
        found = {
            "machine": platform.platform(),
            "seed": given.seed,
            "differences": different,
            "runs": compared,
            "kills": [asdict(kill) for kill in kills],
        }
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
