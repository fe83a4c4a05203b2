"""Measure how long commands take to start, and which imports take it.

    python benchmarks/startup.py --json startup.json

Each command runs in a process of its own, `--rounds` times, in turns; the first round, which fills
the system's cache, is not counted. Seconds are medians: of the clock, and of the processor, which
other load on the machine changes less. The first update is that of the quick recipe on the drawn
faces, when metrics.jsonl has it; the round before has prepared the data and compiled the programs.
The packages whose imports take longest follow, with all that they import, as `python -X importtime`
reports them.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ANIME = [sys.executable, str(ROOT / "experiments" / "anime.py")]
VAEJAX = [sys.executable, "-c", "import sys; from vaejax.cli import main; sys.exit(main())"]
COMMANDS = {"vaejax --help": [*VAEJAX, "--help"], "anime.py --help": [*ANIME, "--help"]}
FIRST_UPDATE = "anime.py: first update"
PACKAGES = 10  # that are shown


def measure(command: list[str], *, until: Path | None = None) -> tuple[float, float]:
    """Run a command to its end, or until a file has a line; return its seconds of the clock and of
    the processor."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process_times = psutil.Process(process.pid).cpu_times
    used = process_times()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            used = process_times()
        if until is not None and until.exists() and until.stat().st_size:
            seconds = time.perf_counter() - began
            process.wait()
            break
        time.sleep(0.005)
    else:
        seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{command} has failed")
    return seconds, used.user + used.system


def measure_first_update(folder: Path) -> tuple[float, float]:
    """Run one update of the quick recipe on the drawn faces, in a new folder."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    flags = ["--steps", "1", "--log-steps", "1", "--prior", "normal", "--out", str(run)]
    return measure([*ANIME, *flags], until=run / "metrics.jsonl")


def imports(command: list[str]) -> dict[str, float]:
    """Return the seconds that the import of each package takes, with all that it imports first."""
    command = [command[0], "-X", "importtime", *command[1:]]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    seconds: dict[str, float] = {}
    for microseconds, name in re.findall(r"\| +(\d+) \| +([\w.]+)$", lines, re.MULTILINE):
        package = name.partition(".")[0]
        seconds[package] = max(seconds.get(package, 0.0), int(microseconds) / 1e6)
    return dict(sorted(seconds.items(), key=lambda row: -row[1])[:PACKAGES])


def main() -> None:
    parser = argparse.ArgumentParser(description="how long commands take to start")
    parser.add_argument("--rounds", type=int, default=5, help="that are counted")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in [*COMMANDS, FIRST_UPDATE]}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds + 1):
            for name, command in COMMANDS.items():
                times[name].append(measure(command))
            times[FIRST_UPDATE].append(measure_first_update(Path(folder)))
    rows = []
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"{'':<26}{'s':>8}{'s of processor':>18}")
    for name, measured in times.items():
        clock, processor = (statistics.median(row) for row in zip(*measured[1:], strict=True))
        rows.append({"command": name, "seconds": clock, "processor_seconds": processor})
        print(f"{name:<26}{clock:>8.2f}{processor:>18.2f}")
    packages = {name: imports(command) for name, command in COMMANDS.items()}
    for name, seconds in packages.items():
        print(f"imports of {name}: " + ", ".join(f"{p} {s:.2f}" for p, s in seconds.items()))
    if options.json:
        result = {"machine": platform.platform(), "python": sys.version}
        options.json.write_text(json.dumps({**result, "rows": rows, "imports": packages}, indent=1))


if __name__ == "__main__":
    main()
