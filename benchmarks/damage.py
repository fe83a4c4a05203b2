"""Damage the files of a checkpoint: who notices?

    python benchmarks/damage.py 80
    python benchmarks/damage.py 400 --seed 1 --json damage.json

A small run leaves a checkpoint. In copies of it a bit is flipped so many times, every other time in
its largest file, and then each file is cut in half, emptied, and deleted. Each copy is read by
Orbax alone, as any program would, and checked by vaejax. Exits with 1 if vaejax lets one pass.
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

from vaejax.training import manifest

ROOT = Path(__file__).parents[1]
FLAGS = ("--size", "16", "--batch-size", "16", "--steps", "8")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def by_orbax(folder: Path) -> str:
    """A digest of all that it reads."""
    parts = {"state": ocp.args.StandardRestore(), "data": ocp.args.JsonRestore()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        read = reader.restore(folder, ocp.args.Composite(**parts))
    total = hashlib.sha256(json.dumps(read["data"]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(read["state"]):
        total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


def outcome(folder: Path, expected: str) -> tuple[str, bool]:
    """What Orbax makes of it, and whether vaejax notices."""
    try:
        alone = "read as it was" if by_orbax(folder) == expected else "read as something else"
    except Exception:  # it has many
        alone = "an error"
    try:
        manifest.check(folder)
    except manifest.Damaged:
        return alone, True
    return alone, False


def flips(whole: Path, number: int, chance: random.Random) -> Iterator[Callable[[Path], object]]:
    """So many ways of flipping a bit in a copy."""
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    files = sorted(name for name in files if (whole / name).stat().st_size)
    largest = max(files, key=lambda name: (whole / name).stat().st_size)
    for i in range(number):
        name = largest if i % 2 else chance.choice(files)
        at, bit = chance.randrange((whole / name).stat().st_size), chance.randrange(8)

        def flip(copy: Path, name: Path = name, at: int = at, bit: int = bit) -> None:
            content = bytearray((copy / name).read_bytes())
            content[at] ^= 1 << bit
            (copy / name).write_bytes(content)

        yield flip


def main() -> None:
    parser = argparse.ArgumentParser(description="who notices a damaged checkpoint?")
    parser.add_argument("flips", type=int, help="how many bits to flip, one at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args()
    if given.flips < 1:
        parser.error(f"{given.flips}: at least 1")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of each error at length
    with tempfile.TemporaryDirectory() as place:
        run, copy = Path(place) / "run", Path(place) / "copy"
        command = [
            sys.executable,
            str(ROOT / "experiments" / "anime.py"),
            *FLAGS,
            "--out",
            str(run),
        ]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        whole = run / "checkpoints" / "0000008"
        expected = by_orbax(whole)
        manifest.check(whole)
        found: dict[str, Counter[str]] = {"a bit flipped": Counter()}
        noticed = total = 0

        def one(kind: str, damage: Callable[[Path], object]) -> None:
            nonlocal noticed, total
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            damage(copy)
            alone, ours = outcome(copy, expected)
            found.setdefault(kind, Counter())[alone] += 1
            noticed, total = noticed + ours, total + 1

        for flip in flips(whole, given.flips, random.Random(given.seed)):
            one("a bit flipped", flip)
        for kind, damage in DAMAGES.items():
            for path in sorted(whole.rglob("*")):
                if path.is_file() and (path.stat().st_size or kind == "deleted"):
                    name = path.relative_to(whole)
                    one(kind, lambda copy, name=name, damage=damage: damage(copy / name))
    columns = ("read as something else", "read as it was", "an error")
    print(f"{'by Orbax alone':<16}" + "".join(f"{name:>24}" for name in columns))
    for kind, counts in found.items():
        print(f"{kind:<16}" + "".join(f"{counts[name]:>24}" for name in columns))
    print(f"noticed by vaejax: {noticed} of {total}")
    if given.json:
        report = {"machine": platform.platform(), "seed": given.seed, "by_orbax": found}
        report |= {"noticed": noticed, "total": total}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if noticed == total else 1)


if __name__ == "__main__":
    main()
