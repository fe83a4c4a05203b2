"""Cut the power at every moment of saving checkpoints, and restore from what a disk may then hold.

    python benchmarks/power_loss.py
    python benchmarks/power_loss.py --random 200 --seed 1 --json power_loss.json

Three checkpoints of a small state are saved, two are kept, and every change of a file and of a
folder is recorded. A file system keeps for certain what was flushed (fsync): the content of a file
that was flushed itself, the names in a folder that was flushed. Of everything else it may have kept
any part, in any order: a rename without the content of the file, content without its name, one
write of two, half of a write, zeros or other bytes in its place. Renaming is one step (Pillai et
al., 2014, All File Systems Are Not Created Equal, section 3.3: the block model of ALICE).

Each such state of the disk is built in a folder, and vaejax restores from it. It must find the
newest checkpoint whose saving had returned, or a newer one, bit for bit. Exits with 1 otherwise.
"""

import argparse
import hashlib
import os
import platform
import random
import shutil
import sys
import tempfile
import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vaejax import losses
from vaejax.errors import CheckpointError
from vaejax.files import write_json
from vaejax.models.vae import VAE
from vaejax.training import checkpoint, devices, step
from vaejax.training.config import Recipe

RECIPE = Recipe(
    "quick",
    VAE(size=16, latent_dim=2, width=1),
    partial(losses.mse_kl, kl_weight=0.01),
    epochs=1,
    batch_size=1,
    learning_rate=1e-3,
)
SAVES, KEPT = 3, 2
OTHERS = bytes(byte ^ 0xA5 for byte in range(256))
ROOT = 0  # the number of the recorded folder


# What is recorded ---------------------------------------------------------------------------------


class Names(NamedTuple):
    """A change of names that happens in one step: each (folder, name) leads to a file, or nowhere.

    Files and folders are numbered; a number is never given twice.
    """

    entries: dict[tuple[int, str], int | None]


class Content(NamedTuple):
    """A file holds other bytes than before."""

    file: int
    content: bytes


class Flush(NamedTuple):
    """A file, or the names in a folder, are on the disk when this is over."""

    number: int


Operation = Names | Content | Flush


class Disk(NamedTuple):
    """What lies below a folder: the names in every folder, and the content of every file."""

    folders: dict[int, dict[str, int]]
    files: dict[int, bytes]

    def write(self, place: Path, number: int = ROOT) -> None:
        """Build it in a new folder."""
        place.mkdir()
        for name, child in self.folders.get(number, {}).items():
            if child in self.folders:
                self.write(place / name, child)
            else:
                (place / name).write_bytes(self.files.get(child, b""))

    def tree(self, number: int = ROOT, prefix: str = "") -> dict[str, bytes | None]:
        """Return the content of every file, None for a folder, by path."""
        found: dict[str, bytes | None] = {}
        for name, child in sorted(self.folders.get(number, {}).items()):
            is_folder = child in self.folders
            found[prefix + name] = None if is_folder else self.files.get(child, b"")
            if is_folder:
                found |= self.tree(child, f"{prefix}{name}/")
        return found


class Recorder:
    """Records what happens below a folder, on a real disk.

    It looks at all of the folder before and after each call of Python that changes a name or
    flushes, and so sees what other threads and C++ have done in between. It does not see when those
    flush, and counts their content as not flushed.
    """

    CALLS = ("fsync", "fdatasync", "rename", "replace", "unlink", "rmdir", "mkdir")

    def __init__(self, folder: Path):
        self._folder = folder
        self._numbers: dict[int, int] = {}  # of the inodes that have a name
        self._count = 0
        self._lock = threading.RLock()
        self.operations: list[Operation] = []
        self._present = Disk({}, {})
        self._present = self.before = self._look()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens in the block."""
        originals = {name: getattr(os, name) for name in self.CALLS}
        for name, original in originals.items():
            setattr(os, name, partial(self._call, name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(os, name, original)
            self._record_changes()

    def _call(self, name: str, original: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        with self._lock:
            self._record_changes()
            result = original(*arguments, **more)
            if name in ("fsync", "fdatasync"):
                number = self._numbers.get(os.fstat(arguments[0]).st_ino)
                if number is not None:
                    self.operations.append(Flush(number))
            else:
                self._record_changes()
            return result

    def _look(self) -> Disk:
        while True:
            disk, numbers = Disk({}, {}), {os.stat(self._folder).st_ino: ROOT}
            try:
                self._look_into(self._folder, ROOT, disk, numbers)
            except (FileNotFoundError, NotADirectoryError):
                continue  # another thread has changed a name meanwhile
            self._numbers = numbers
            return disk

    def _look_into(self, place: Path, number: int, disk: Disk, numbers: dict[int, int]) -> None:
        names = disk.folders[number] = {}
        for entry in os.scandir(place):
            inode = entry.inode()
            if inode not in numbers:
                if inode in self._numbers:
                    numbers[inode] = self._numbers[inode]
                else:
                    self._count += 1
                    numbers[inode] = self._count
            names[entry.name] = child = numbers[inode]
            if entry.is_dir(follow_symlinks=False):
                self._look_into(place / entry.name, child, disk, numbers)
            else:
                disk.files[child] = (place / entry.name).read_bytes()

    def _record_changes(self) -> None:
        with self._lock:
            old, new = self._present, self._look()
            self._present = new
        before, after = _links(old), _links(new)
        gone = {link: child for link, child in before.items() if link not in after}
        changed = {link: child for link, child in after.items() if before.get(link) != child}
        for file, content in new.files.items():
            if old.files.get(file, b"") != content:
                self.operations.append(Content(file, content))
        for link, child in changed.items():
            moved = [source for source, number in gone.items() if number == child]
            for source in moved:
                del gone[source]
            self.operations.append(Names({**dict.fromkeys(moved), link: child}))
        for link in reversed(gone):  # a folder after what is in it
            self.operations.append(Names({link: None}))


def _links(disk: Disk) -> dict[tuple[int, str], int]:
    return {
        (folder, name): child
        for folder, names in disk.folders.items()
        for name, child in names.items()
    }


# What a disk may hold -----------------------------------------------------------------------------


class State(NamedTuple):
    """What a disk may hold when the power is cut after so many of the recorded operations."""

    after: int
    disk: Disk


class Unflushed(NamedTuple):
    """What the disk need not have kept at a moment."""

    names: list[int]  # positions of Names among the operations
    contents: dict[int, list[bytes]]  # of each file: what is flushed, then what was written since


def states(
    before: Disk, operations: Sequence[Operation], *, extra: int, chance: random.Random
) -> Iterator[State]:
    """Yield the states that a disk may hold, each once for a moment.

    After each operation: all that was done so far, as after a kill. Before each flush, and at the
    end, when as much as possible is not flushed: nothing of it kept; the names without the content,
    and with half of it, zeros and other bytes; each change of a name alone lost, and alone kept;
    the content of each file alone lost; and `extra` random parts. What can be kept at another
    moment can be kept at the next of these as well.
    """
    folders = {ROOT, *before.folders} | _folders(operations)
    for position in range(len(operations) + 1):
        unflushed = _unflushed(before, operations[:position], folders)
        last = {file: contents[-1] for file, contents in unflushed.contents.items()}
        build = partial(_disk, before, operations[:position], unflushed, folders)
        yield State(position, build(unflushed.names, last))
        if position == len(operations) or isinstance(operations[position], Flush):
            for names, contents in _choices(unflushed, extra, chance):
                yield State(position, build(names, {**last, **contents}))


def _choices(
    unflushed: Unflushed, extra: int, chance: random.Random
) -> Iterator[tuple[list[int], dict[int, bytes]]]:
    """Yield changes of names that are kept, and contents of files other than the last."""
    every, contents = unflushed.names, unflushed.contents
    flushed = {file: versions[0] for file, versions in contents.items()}
    yield [], {}
    yield [], flushed
    yield every, flushed
    for damage in (_half, _zeros, _others):
        yield every, {file: damage(versions[-1]) for file, versions in contents.items()}
    for one in every:
        yield [other for other in every if other != one], {}
        yield [one], {}
        yield [one], flushed
    for file, content in flushed.items():
        yield every, {file: content}
    for _ in range(extra):
        yield (
            [one for one in every if chance.random() < 0.5],
            {
                file: chance.choice([*v, _half(v[-1]), _zeros(v[-1])])
                for file, v in contents.items()
            },
        )


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _zeros(content: bytes) -> bytes:
    return bytes(len(content))


def _others(content: bytes) -> bytes:
    return content.translate(OTHERS)


def _folders(operations: Sequence[Operation]) -> set[int]:
    return {folder for op in operations if isinstance(op, Names) for folder, _ in op.entries}


def _unflushed(before: Disk, operations: Sequence[Operation], folders: set[int]) -> Unflushed:
    names: list[int] = []
    contents: dict[int, list[bytes]] = {}
    for position, operation in enumerate(operations):
        if isinstance(operation, Names):
            names.append(position)
        elif isinstance(operation, Content):
            flushed = [before.files.get(operation.file, b"")]
            contents.setdefault(operation.file, flushed).append(operation.content)
        elif operation.number in folders:
            names = [p for p in names if not _is_in(operations[p], operation.number)]
        elif operation.number in contents:
            del contents[operation.number][:-1]
    return Unflushed(names, {f: versions for f, versions in contents.items() if len(versions) > 1})


def _is_in(operation: Operation, folder: int) -> bool:
    return isinstance(operation, Names) and any(where == folder for where, _ in operation.entries)


def _disk(
    before: Disk,
    operations: Sequence[Operation],
    unflushed: Unflushed,
    folders: set[int],
    kept: Sequence[int],
    contents: dict[int, bytes],
) -> Disk:
    """Return the disk with everything flushed, the names that are kept, and these contents."""
    tree = {folder: dict(before.folders.get(folder, {})) for folder in folders}
    files, lost = dict(before.files), set(unflushed.names) - set(kept)
    for position, operation in enumerate(operations):
        if isinstance(operation, Content):
            files[operation.file] = operation.content
        elif isinstance(operation, Names) and position not in lost:
            for (folder, name), child in operation.entries.items():
                if child is None:
                    tree[folder].pop(name, None)
                else:
                    tree[folder][name] = child
    return Disk(tree, {**files, **contents})


# Checkpoints --------------------------------------------------------------------------------------


@cache
def like() -> step.TrainState:
    """Return the shapes of the state."""
    begin = partial(step.init, trainer=RECIPE.trainer(updates=SAVES))
    return jax.eval_shape(begin, jax.random.key(0))


def record_saves(
    folder: Path, count: int = SAVES, *, keep: int = KEPT
) -> tuple[Recorder, list[int], list[str]]:
    """Save so many checkpoints into a run's folder, of which the newest are kept.

    Returns what was recorded; for each number of saves, after how many operations it had returned;
    and the digests of the states.
    """
    folder.mkdir()
    recorder = Recorder(folder)
    returned, digests = [0], [""]
    for number in range(1, count + 1):
        state = jax.tree.map(lambda leaf, n=number: jnp.full(leaf.shape, n, leaf.dtype), like())
        position = {"epoch": number}
        with recorder.recording():
            checkpoint.save(
                folder, state, position, spec={"number": number}, environment={}, keep=keep
            )
        returned.append(len(recorder.operations))
        digests.append(checkpoint.digest(state, position))
    return recorder, returned, digests


OUTCOMES = ("the newest", "the one before", "none yet", "garbage", "lost")


def saved_and_begun(returned: Sequence[int], after: int) -> tuple[int, int]:
    """Return how many saves had returned, and how many had begun, after so many operations."""
    return bisect_right(returned, after) - 1, bisect_left(returned, after)


class Restorer:
    """Restores from states of a disk, and judges what comes of it."""

    def __init__(self, place: Path, returned: Sequence[int], digests: Sequence[str]):
        self._place, self._returned, self._digests = place, returned, digests
        self._restored: dict[str, str] = {}  # digests, by what lies in the checkpoint's folder
        self._sharding = devices.replicated(devices.choose(1))

    def outcome(self, state: State) -> tuple[str, bool]:
        """Return one of OUTCOMES, and whether any checkpoint is there in part, under its name."""
        saved, begun = saved_and_begun(self._returned, state.after)
        shutil.rmtree(self._place, ignore_errors=True)
        state.disk.write(self._place)
        in_part = not all(map(self._is_whole, checkpoint.steps(self._place)))
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            try:
                found = checkpoint.newest(self._place, expected=saved > 0)
            except CheckpointError:
                return "lost", in_part
        if found is None:
            return "none yet" if saved == 0 else "lost", in_part
        if found.step > begun or self._restore(found) != self._digests[found.step]:
            return "garbage", in_part
        if found.step < saved:
            return "lost", in_part
        return "the newest" if found.step == begun else "the one before", in_part

    def _is_whole(self, number: int) -> bool:
        try:
            checkpoint.check_manifest(checkpoint.path(self._place, number))
        except checkpoint.Damaged:
            return False
        return True

    def _restore(self, found: checkpoint.Checkpoint) -> str:
        key = _sum({str(f.relative_to(found.path)): f.read_bytes() for f in _files(found.path)})
        if key not in self._restored:
            try:
                restored = checkpoint.restore(found, like(), sharding=self._sharding)
                self._restored[key] = checkpoint.digest(*restored)
            except CheckpointError:
                self._restored[key] = "an error"
        return self._restored[key]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sum(tree: dict[str, bytes | None]) -> str:
    total = hashlib.sha256()
    for name, content in tree.items():
        total.update(f"{name}\0{content is None}\0{len(content or b'')}\0".encode())
        total.update(content or b"")
    return total.hexdigest()


class Result(NamedTuple):
    """What became of the states, and in how many a checkpoint is there in part."""

    operations: int
    flushes: int
    outcomes: Counter[str]
    in_part: int


def measure(folder: Path, *, saves: int, extra: int, seed: int) -> Result:
    """Record saves in a folder, and restore from every state of the disk, from equal ones once."""
    recorder, returned, digests = record_saves(folder / "run", saves)
    restorer = Restorer(folder / "state", returned, digests)
    outcomes, in_part = Counter[str](dict.fromkeys(OUTCOMES, 0)), 0
    seen = set()
    chance = random.Random(seed)
    for state in states(recorder.before, recorder.operations, extra=extra, chance=chance):
        key = saved_and_begun(returned, state.after), _sum(state.disk.tree())
        if key not in seen:
            seen.add(key)
            outcome, partly = restorer.outcome(state)
            outcomes[outcome] += 1
            in_part += partly
    flushes = sum(isinstance(operation, Flush) for operation in recorder.operations)
    return Result(len(recorder.operations), flushes, outcomes, in_part)


def main() -> None:
    parser = argparse.ArgumentParser(description="what is restored after a power cut?")
    parser.add_argument("--random", type=int, default=40, help="random states for each flush")
    parser.add_argument("--seed", type=int, default=0, help="of the random states")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), saves=SAVES, extra=options.random, seed=options.seed)
    print(f"{result.operations} operations, of them {result.flushes} flushes")
    print(f"{result.outcomes.total()} different states of the disk; restored was")
    for outcome, count in result.outcomes.items():
        print(f"  {outcome:<16}{count:>8}")
    print(f"there was a checkpoint in part, under its name, in {result.in_part}")
    if options.json:
        write_json(options.json, {"machine": platform.platform(), **result._asdict()})
    failed = result.outcomes["garbage"] + result.outcomes["lost"] + result.in_part
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
