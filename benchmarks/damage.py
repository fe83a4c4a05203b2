"""Damage the files of a checkpoint, and count who detects it: Orbax alone, and vaejax.

    python benchmarks/damage.py 80
    python benchmarks/damage.py 400 --seed 1 --json damage.json

A short run leaves a checkpoint. In copies of it, as many single bits are flipped as the first
argument says, every other one in the largest file; then each file is cut in half, emptied and
deleted. Orbax alone reads every copy, as any program would, and vaejax compares it with its
manifest. Exits with 1 if vaejax accepts a damaged copy.
"""

import argparse
import hashlib
import json
import logging
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vaejax.files import write_json
from vaejax.training import checkpoint

ROOT = Path(__file__).parents[1]
UPDATES = 8
FLAGS = ("--size", "16", "--batch-size", "16", "--steps", str(UPDATES))
FLIP = "a bit flipped"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}
OUTCOMES = ("read as something else", "read as it was", "an error")  # of reading by Orbax

Damage = Callable[[Path], object]  # changes a copy of the checkpoint


def read_by_orbax(folder: Path) -> str:
    """Return a hash of all that Orbax reads from a checkpoint."""
    parts = {"state": ocp.args.StandardRestore(), "data": ocp.args.JsonRestore()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        content = reader.restore(folder, ocp.args.Composite(**parts))
    total = hashlib.sha256(json.dumps(content["data"]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(content["state"]):
        total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


def examine(folder: Path, expected: str) -> tuple[str, bool]:
    """Return what Orbax makes of a checkpoint, and whether vaejax detects the damage."""
    try:
        outcome = OUTCOMES[1] if read_by_orbax(folder) == expected else OUTCOMES[0]
    except Exception:  # Orbax raises many kinds
        outcome = OUTCOMES[2]
    try:
        checkpoint.check_manifest(folder)
    except checkpoint.Damaged:
        return outcome, True
    return outcome, False


def bit_flips(original: Path, count: int, chance: random.Random) -> Iterator[Damage]:
    """Yield functions that flip one bit of a copy, every other one in the largest file."""
    files = [path.relative_to(original) for path in original.rglob("*") if path.is_file()]
    files = sorted(name for name in files if (original / name).stat().st_size)
    largest = max(files, key=lambda name: (original / name).stat().st_size)
    for i in range(count):
        name = largest if i % 2 else chance.choice(files)
        position = chance.randrange((original / name).stat().st_size)
        bit = chance.randrange(8)

        def flip(copy: Path, name: Path = name, position: int = position, bit: int = bit) -> None:
            content = bytearray((copy / name).read_bytes())
            content[position] ^= 1 << bit
            (copy / name).write_bytes(content)

        yield flip


def all_damages(original: Path, flips: int, seed: int) -> Iterator[tuple[str, Damage]]:
    """Yield the kind of every damage, and the function that does it to a copy."""
    for flip in bit_flips(original, flips, random.Random(seed)):
        yield FLIP, flip
    for kind, damage in DAMAGES.items():
        for path in sorted(original.rglob("*")):
            if path.is_file() and (path.stat().st_size or kind == "deleted"):
                name = path.relative_to(original)
                yield kind, lambda copy, name=name, damage=damage: damage(copy / name)


def measure(folder: Path, *, flips: int, seed: int) -> tuple[dict[str, Counter[str]], int]:
    """Train, and damage copies of the checkpoint: Orbax' outcomes by the kind of damage, and the
    number of damages that vaejax detects."""
    run, copy = folder / "run", folder / "copy"
    command = [sys.executable, str(ROOT / "experiments" / "anime.py"), *FLAGS, "--out", str(run)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    original = checkpoint.path(run, UPDATES)
    expected = read_by_orbax(original)
    checkpoint.check_manifest(original)
    outcomes = {kind: Counter() for kind in (FLIP, *DAMAGES)}
    detected = 0
    for kind, damage in all_damages(original, flips, seed):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        damage(copy)
        outcome, is_detected = examine(copy, expected)
        outcomes[kind][outcome] += 1
        detected += is_detected
    return outcomes, detected


def main() -> None:
    parser = argparse.ArgumentParser(description="who detects a damaged checkpoint?")
    parser.add_argument("flips", type=int, help="how many bits to flip, one at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of bits")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    if options.flips < 1:
        parser.error(f"{options.flips}: at least 1")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs each error at length
    with tempfile.TemporaryDirectory() as folder:
        outcomes, detected = measure(Path(folder), flips=options.flips, seed=options.seed)
    total = sum(counts.total() for counts in outcomes.values())
    print(f"{'by Orbax alone':<16}" + "".join(f"{outcome:>24}" for outcome in OUTCOMES))
    for kind, counts in outcomes.items():
        print(f"{kind:<16}" + "".join(f"{counts[outcome]:>24}" for outcome in OUTCOMES))
    print(f"noticed by vaejax: {detected} of {total}")
    if options.json:
        result = {"machine": platform.platform(), "seed": options.seed, "by_orbax": outcomes}
        write_json(options.json, {**result, "noticed": detected, "total": total})
    sys.exit(0 if detected == total else 1)


if __name__ == "__main__":
    main()
