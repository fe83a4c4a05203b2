"""Kill a run at random moments, resume it, and compare its result with that of an unkilled run.

    python benchmarks/kill.py 50
    python benchmarks/kill.py 50 --random-cores
    python benchmarks/kill.py 4 --seed 1 --json kill.json

A small run that does everything (streamed images, pictures, film, metrics, checkpoints, a flow as
its prior) is made once without interruption. Other runs of the same command are killed with
SIGKILL, as often in all as the first argument says, each time after they have made progress: every
second kill is at a random moment, every other one as soon as a checkpoint begins to be written, or
some milliseconds later. Half of the kills are in the autoencoder's training, the others in the
flow's: those let the autoencoder be. With --random-cores every start may use other cores, and
another number of them, than the one before.

Whenever a run finishes, everything is compared, of both: the SHA-256 over parameters, batch_stats,
optimizer, step and position in the data; every line of metrics.jsonl except for the speed; every
picture, and the film, byte by byte. Exits with 1 if anything differs, or if a start takes twenty
times as long as the whole of the unkilled run.
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
from typing import Any, NoReturn

from vaejax.data.sources import drawn_faces
from vaejax.files import PARTIAL, read_json, write_json
from vaejax.training import checkpoint
from vaejax.training.flow_prior import flow_folder

ROOT = Path(__file__).parents[1]
FACES = 130  # about 117 of them are training images; a flow wants 100
CHECKPOINT_STEPS = 7
PATIENCE = 20  # how many times as long as the unkilled run a start may take
FLAGS = (
    *("--recipe", "quick", "--size", "32", "--batch-size", "9", "--epochs", "3"),
    *("--prior", "flow", "--prior-steps", "40", "--prior-width", "32"),
    *("--log-steps", "1", "--checkpoint-steps", str(CHECKPOINT_STEPS)),
)


@dataclass(frozen=True)
class Kill:
    """The state of a run's autoencoder, or of its flow, when it was killed."""

    of_flow: bool  # which of the two was being trained
    resumed_at: int  # updates of the checkpoint that this start resumed from
    reached: int  # updates made, when it was killed
    kept: int  # updates of the newest complete checkpoint at that time
    in_a_save: bool  # whether an unfinished checkpoint was left
    cores: list[int]  # that the process could use
    seconds_to_first_step: float  # from the start of the process


# a process that starts another program in its place, on some cores
ON_CORES = """
import json, os, sys
os.sched_setaffinity(0, json.loads(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


class Training:
    """What is trained in a folder: the autoencoder of a run, or its flow."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metrics = folder / "metrics.jsonl"

    def steps(self) -> list[int]:
        """Return the updates that metrics.jsonl has lines of."""
        return [line["step"] for line in self.lines() if line["split"] == "train"]

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the complete lines of metrics.jsonl, without the speed."""
        text = self._metrics.read_text(encoding="utf-8") if self._metrics.exists() else ""
        for line in text.splitlines():
            try:
                values = json.loads(line)
            except ValueError:  # it is being written
                return
            yield {name: v for name, v in values.items() if name != "images_per_second"}

    def metrics_size(self) -> int:
        """Return the bytes of metrics.jsonl, 0 without one."""
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def metrics_inode(self) -> int:
        """Return which file metrics.jsonl is: every start of the training replaces it."""
        return self._metrics.stat().st_ino if self._metrics.exists() else 0

    def checkpoints(self) -> list[str]:
        """List the folder of checkpoints, unfinished ones included."""
        folder = self.folder / checkpoint.FOLDER
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def newest(self) -> int:
        """Return the updates of the newest checkpoint, 0 without one."""
        return max((int(name) for name in self.checkpoints() if name.isdigit()), default=0)

    def is_saving(self) -> bool:
        """Tell whether there is an unfinished checkpoint."""
        return any(name.startswith(PARTIAL) for name in self.checkpoints())

    def result(self) -> dict[str, Any]:
        """Return everything of it that must not depend on whether the run was interrupted."""
        newest = checkpoint.path(self.folder, self.newest())
        return {
            "state": read_json(newest / checkpoint.MANIFEST)["state"],
            "checkpoints": self.checkpoints(),
            "lines": list(self.lines()),
        }


class Run:
    """A run in a folder of its own, which can be started and killed any number of times.

    Its processes use the cores that `choose_cores` returns, and may take `limit` seconds each.
    """

    def __init__(
        self,
        folder: Path,
        faces: Path,
        *,
        choose_cores: Callable[[], list[int]],
        limit: float | None = None,
    ):
        self.folder, self._choose_cores, self._limit = folder, choose_cores, limit
        self.cores, self._deadline = choose_cores(), float("inf")
        self.autoencoder, self.flow = Training(folder), Training(flow_folder(folder))
        self._command = [
            *(sys.executable, str(ROOT / "experiments" / "anime.py"), *FLAGS),
            *("--data", str(faces), "--out", str(folder)),
        ]

    def start(self) -> subprocess.Popen:
        """Start the run, or resume it, in a process of its own."""
        self.cores = self._choose_cores()
        if self._limit is not None:
            self._deadline = time.monotonic() + self._limit
        words = [sys.executable, "-c", ON_CORES, json.dumps(self.cores), *self._command]
        return subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def wait_for(
        self, condition: Callable[[], bool], process: subprocess.Popen, *, interval: float
    ) -> bool:
        """Wait until a condition holds; False if the process ended before.

        It is asked every `interval` seconds. Exits if the process takes too long.
        """
        while process.poll() is None:
            if condition():
                return True
            if time.monotonic() > self._deadline:
                self._give_up(process)
            time.sleep(interval)
        return False

    def _give_up(self, process: subprocess.Popen) -> NoReturn:
        process.kill()
        sys.exit(f"{self.folder}: the process took more than {self._limit:.0f} s")

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for the end of the process, and exit with its error if it failed."""
        left = None if self._limit is None else self._deadline - time.monotonic()
        try:
            _, errors = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            self._give_up(process)
        if process.returncode != 0:
            sys.exit(f"{self.folder} ended with {process.returncode}:\n{errors[-2000:]}")

    def result(self) -> dict[str, Any]:
        """Return everything that must not depend on whether the run was interrupted."""
        pictures = {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.suffix in (".png", ".gif", ".mp4") and path.name != "curves.png"
        }
        both = {"": self.autoencoder.result(), "flow's ": self.flow.result()}
        parts = {f"{of}{part}": v for of, result in both.items() for part, v in result.items()}
        status = read_json(self.folder / "run.json")["status"]
        return {**parts, "status": status, "pictures": pictures}


def start_and_kill(
    run: Run, chance: random.Random, *, of_flow: bool, in_a_save: bool, duration: float
) -> Kill | None:
    """Start the run and kill it after the training of its autoencoder, or that of its flow, has
    made progress; None if that, or the run, finished before.

    `duration` is the number of seconds that this takes: the kill comes within it.
    """
    training = run.flow if of_flow else run.autoencoder
    resumed_at, started = training.newest(), time.monotonic()
    inode = training.metrics_inode()
    process = run.start()

    def has_progressed() -> bool:
        # until metrics.jsonl is replaced it is that of the process that was killed
        replaced = training.metrics_inode() != inode and training.metrics_size() > 0
        return replaced and max(training.steps(), default=-1) >= resumed_at

    if not run.wait_for(has_progressed, process, interval=0.002):
        run.finish(process)
        return None
    seconds_to_first_step = time.monotonic() - started
    delay = chance.uniform(0, duration)
    if in_a_save:
        if not run.wait_for(training.is_saving, process, interval=0.0005):
            run.finish(process)
            return None
        delay = chance.uniform(0, 0.05)
    time.sleep(delay)
    process.kill()
    process.communicate()
    if process.returncode == 0:
        return None
    reached = max(training.steps(), default=-1) + 1
    saving = training.is_saving()
    kept, cores = training.newest(), run.cores
    return Kill(of_flow, resumed_at, reached, kept, saving, cores, seconds_to_first_step)


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """List the parts of two results, and the pictures, that differ."""
    parts = [name for name in expected if name != "pictures" and expected[name] != actual[name]]
    before, after = expected["pictures"], actual["pictures"]
    names = before.keys() | after.keys()
    return parts + sorted(name for name in names if before.get(name) != after.get(name))


def kill_runs(
    folder: Path, faces: Path, *, count: int, chance: random.Random, random_cores: bool
) -> tuple[dict[str, Any], list[Kill], list[list[str]]]:
    """Kill runs until there are `count` kills.

    Returns the result of the unkilled run, the kills, and the differences of every killed run.
    """
    present = sorted(os.sched_getaffinity(0))

    def choose_cores() -> list[int]:
        if not random_cores:
            return present
        return sorted(chance.sample(present, chance.randint(1, len(present))))

    reference, began = (
        Run(folder / "reference", faces, choose_cores=lambda: present),
        time.monotonic(),
    )
    durations = time_both(reference)
    limit = PATIENCE * (time.monotonic() - began)
    expected = reference.result()
    seconds = " and ".join(f"{duration:.1f} s" for duration in durations)
    print(f"an unkilled run trains its autoencoder and its flow in {seconds}", flush=True)
    kills: list[Kill] = []
    different: list[list[str]] = []
    while len(kills) < count:
        name = f"run-{len(different)}"
        run = Run(folder / name, faces, choose_cores=choose_cores, limit=limit)
        while len(kills) < count:
            of_flow, in_a_save = len(kills) % 2 == 1, len(kills) % 4 in (1, 2)
            if not of_flow and run.flow.steps():
                break  # its autoencoder is trained
            kill = start_and_kill(
                run, chance, of_flow=of_flow, in_a_save=in_a_save, duration=durations[of_flow]
            )
            if kill is None:
                break
            kills.append(kill)
            where = " in a save" if kill.in_a_save else ""
            steps = f"resumed at {kill.resumed_at}, killed at {kill.reached}"
            what = "flow" if of_flow else "autoencoder"
            cores = f", on {len(kill.cores)} cores" if random_cores else ""
            print(f"kill {len(kills)}, in the {what}: {steps}{where}{cores}", flush=True)
        run.finish(run.start())
        different.append(differences(expected, run.result()))
        text = ", ".join(different[-1]) or "no difference"
        print(f"run {len(different)} has finished: {text}", flush=True)
    return expected, kills, different


def time_both(run: Run) -> tuple[float, float]:
    """Make a run; return the seconds that the training of its autoencoder and its flow take."""
    process = run.start()
    run.wait_for(lambda: bool(run.autoencoder.steps()), process, interval=0.01)
    began = time.monotonic()
    run.wait_for(lambda: bool(run.flow.steps()), process, interval=0.01)
    between = time.monotonic()
    run.finish(process)
    return between - began, time.monotonic() - between


def main() -> None:
    parser = argparse.ArgumentParser(description="does a run that is killed end the same?")
    parser.add_argument("kills", type=int, help="how many times to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--random-cores", action="store_true", help="other cores at each start")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"{options.kills}: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        faces = Path(folder) / "faces"
        with zipfile.ZipFile(drawn_faces()) as drawn:
            names = [name for name in drawn.namelist() if name.endswith(".webp")]
            drawn.extractall(faces, names[:FACES])
        chance = random.Random(options.seed)
        expected, kills, runs = kill_runs(
            Path(folder),
            faces,
            count=options.kills,
            chance=chance,
            random_cores=options.random_cores,
        )
    different = [name for names in runs for name in names]
    in_saves = sum(kill.in_a_save for kill in kills)
    lost = max(kill.reached - kill.kept for kill in kills)
    both = [expected[name] for name in ("lines", "flow's lines")]
    updates, of_flow = (sum(line["split"] == "train" for line in lines) for lines in both)
    in_flows = sum(kill.of_flow for kill in kills)
    print(
        f"{len(kills)} kills, {in_flows} of them in a flow, {in_saves} in a save, in {len(runs)} "
        f"runs of {updates} + {of_flow} updates: {len(different)} differences; at most {lost} "
        f"updates were lost, with a checkpoint every {CHECKPOINT_STEPS}"
    )
    if resumed := [kill.seconds_to_first_step for kill in kills if kill.resumed_at]:
        median = statistics.median(resumed)
        print(f"from the start of a resumed run to its first update: {median:.1f} s (median)")
    if options.json:
        result = {
            "machine": platform.platform(),
            "seed": options.seed,
            "differences": different,
            "runs": len(runs),
            "kills": [asdict(kill) for kill in kills],
        }
        write_json(options.json, result)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
