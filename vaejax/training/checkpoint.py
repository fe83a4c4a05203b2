"""Checkpoints: the state and the position in the data, atomic, and verified before they are used.

A checkpoint is written under a temporary name; its manifest, with the SHA-256 sum of every file,
comes last; everything is flushed to the disk and then renamed. Orbax alone restores a checkpoint in
which a bit has flipped without a word. This is the only user of Orbax.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from vaejax.errors import CheckpointError
from vaejax.files import (
    fsync,
    is_partial,
    open_regular,
    partial_name,
    printable,
    read_json,
    write_json,
)
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.training import devices
from vaejax.training.step import TrainState

FOLDER = "checkpoints"
DAMAGED = "damaged"  # the folder beside the checkpoints that damaged ones are moved to
FORMAT = "vaejax checkpoint 2"  # another number when old checkpoints can no longer be read
MANIFEST = "manifest.json"

T = TypeVar("T")


class Checkpoint(NamedTuple):
    """A checkpoint whose files are all as they were written."""

    path: Path
    step: int  # updates made so far
    state_digest: str
    spec: Mapping[str, Any]  # of the run, as JSON
    environment: Mapping[str, str]  # in which it was written


class Damaged(Exception):
    """What is wrong with a checkpoint, as half a sentence."""


def path(run: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint after so many updates."""
    return run / FOLDER / f"{step:07}"


def steps(run: Path) -> list[int]:
    """List the updates after which a run has a checkpoint, damaged or not, oldest first."""
    names = os.listdir(run / FOLDER) if (run / FOLDER).is_dir() else []
    numbers = (int(name) for name in names if re.fullmatch(r"[0-9]{7,}", name))
    return sorted(step for step in numbers if path(run, step).name in names)


def newest_path(run: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, damaged since or not."""
    complete = [step for step in steps(run) if (path(run, step) / MANIFEST).is_file()]
    return path(run, complete[-1]) if complete else None


def saved_spec(run: Path) -> Mapping[str, Any] | None:
    """Return the spec that the newest checkpoint with a valid manifest was saved with, if any."""
    for step in reversed(steps(run)):
        try:
            return _read(run, step).spec
        except Damaged:
            continue
    return None


# Writing ------------------------------------------------------------------------------------------


def save(
    run: Path,
    state: TrainState,
    position: Mapping[str, Any],
    *,
    spec: Mapping[str, Any],
    environment: Mapping[str, str],
    keep: int,
) -> None:
    """Write the state and the position in the data; then delete all but the newest `keep`.

    A kill in between leaves nothing that looks complete. The call waits until all is written: the
    step donates its state, and a copy in the background of a buffer that the next step overwrites
    would not be the state it is said to be.

    Raises OSError if the disk does not take it; the older checkpoints are all there then.
    """
    step, final = int(state.step), path(run, int(state.step))
    if not devices.broadcast((final / MANIFEST).exists):
        # random, so that nobody can have put a link in its place
        partial_path = final.with_name(devices.broadcast(lambda: partial_name(final.name)))
        try:
            if devices.is_first():
                final.parent.mkdir(exist_ok=True)
                fsync(run)  # with the folder of the first checkpoint, a power cut would take it
            with _quiet():
                arguments = ocp.args.Composite(
                    state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(position))
                )
                _orbax().save(partial_path.absolute(), arguments)
            if devices.is_first():
                content = {
                    "format": FORMAT,
                    "step": step,
                    "state": digest(state, position),
                    "spec": dict(spec),
                    "environment": dict(environment),
                }
                write_manifest(partial_path, content)
                os.rename(partial_path, final)
                fsync(final.parent)
        except Exception as error:  # Orbax has many for a disk that is full
            # what it leaves behind would be reported later, when it is collected
            warnings.filterwarnings("ignore", "coroutine .* was never awaited")
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            if devices.is_first():
                delete_unfinished(run)
            raise _as_os_error(error) from error
        devices.broadcast(lambda: None)  # no process goes on before it is there
    if devices.is_first():
        _delete_old(run, step, keep=keep)


def _delete_old(run: Path, step: int, *, keep: int) -> None:
    # what is newer, or has no manifest, was put there by somebody else
    older = [n for n in steps(run) if n < step and (path(run, n) / MANIFEST).is_file()]
    doomed = []
    for old in older[: max(0, len(older) - (keep - 1))]:
        doomed.append(path(run, old).with_name(partial_name(path(run, old).name)))
        os.rename(path(run, old), doomed[-1])  # so that a kill leaves no half of it
    if doomed:
        fsync(run / FOLDER)  # nor a power cut, which could undo the renaming
    for folder in doomed:
        shutil.rmtree(folder, ignore_errors=True)


def delete_unfinished(run: Path) -> None:
    """Delete what a kill in the middle of a save has left."""
    for name in os.listdir(run / FOLDER) if (run / FOLDER).is_dir() else []:
        if is_partial(name, r"[0-9]{7,}(\.orbax-checkpoint-tmp.*)?"):
            shutil.rmtree(run / FOLDER / name, ignore_errors=True)


def digest(state: TrainState, position: Mapping[str, Any]) -> str:
    """Return the SHA-256 over every bit of a state, and the position in the data."""
    total = hashlib.sha256(json.dumps(position, sort_keys=True).encode())
    for name, leaf in jax.tree_util.tree_leaves_with_path(devices.local(state)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(name)} {array.dtype} {array.shape}".encode())
        total.update(array.data)
    return total.hexdigest()


def _as_os_error(error: Exception) -> OSError:
    """Convert what Orbax raises; of TensorStore's words only the system's number is clear."""
    if isinstance(error, OSError) and error.strerror:
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    return OSError(0, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax' traceback for every file that cannot be written; it raises as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# Reading ------------------------------------------------------------------------------------------


def newest(run: Path, *, expected: bool) -> Checkpoint | None:
    """Return a run's newest undamaged checkpoint; move damaged ones aside, with a warning.

    None where there is none yet. Raises CheckpointError where one is `expected` and none can be
    used, and where one was written by another version of vaejax, which stays where it is.
    """
    wrong = []
    for step in reversed(steps(run)):
        try:
            checkpoint = _checked(run, step)
        except Damaged as damage:
            wrong.append(f"{path(run, step).name}: {damage}")
            text = f"the checkpoint of update {step:,} is damaged: {damage}. It "
            try:
                aside = _move_aside(run, step)
            except OSError as error:
                raise CheckpointError(f"{text}cannot be moved: {error.strerror}") from None
            print(printable(f"warning: {text}was moved to {aside}"), file=sys.stderr)
            continue
        if wrong:
            print(f"resuming from update {step:,}, whose checkpoint is undamaged", file=sys.stderr)
        return checkpoint
    aside = run / FOLDER / DAMAGED
    if wrong or expected or aside.is_dir():
        lost = f" ({'; '.join(wrong)})" if wrong else ""
        raise CheckpointError(
            f"no checkpoint in {run / FOLDER} can be used{lost}: "
            + (f"damaged ones are in {aside}. " if aside.is_dir() else "they are gone. ")
            + "--fresh starts anew and keeps this folder under another name"
        )
    return None


def restore(
    checkpoint: Checkpoint, like: TrainState, *, sharding: Sharding
) -> tuple[TrainState, Mapping[str, Any]]:
    """Return the state of a checkpoint, laid out as requested, and the position in the data.

    Raises CheckpointError if it is not what was saved.
    """
    arguments = ocp.args.Composite(
        state=ocp.args.StandardRestore(_shapes(like, sharding)), data=ocp.args.JsonRestore()
    )
    restored = _restored(checkpoint.path, arguments)
    if digest(restored["state"], restored["data"]) != checkpoint.state_digest:
        raise CheckpointError(f"{checkpoint.path} is read as another state than the saved one")
    return restored["state"], restored["data"]


class Weights(NamedTuple):
    """What samples, pictures and evaluations need of a run."""

    params: PyTree  # the moving average where the run has one
    batch_stats: PyTree
    step: int  # updates they were trained for
    digest: str  # SHA-256 of params and batch_stats


def load_weights(run: Path, model: Autoencoder, *, ema: bool) -> Weights:
    """Load the newest undamaged weights of a run, or their moving average, without its optimizer.

    Raises CheckpointError where there are none yet, or all are damaged, of another model or written
    by another version of vaejax.
    """
    like = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0, impl="threefry2x32"))

    def load(checkpoint: Checkpoint) -> Weights:
        saved, present = checkpoint.spec.get("model"), autoencoder.to_json(model)
        if saved != present:
            saved = saved if isinstance(saved, dict) else {}
            fields = sorted(n for n in {*saved, *present} if saved.get(n) != present.get(n))
            other = "; ".join(f"model.{n} {saved.get(n)} → {present.get(n)}" for n in fields)
            raise CheckpointError(
                f"{checkpoint.path} is of another model than {run / 'config.json'} says: "
                f"{other[:500]} (saved → in config.json)"
            )
        return restore_weights(checkpoint, like, ema=ema)

    return with_newest(run, load)


def with_newest(run: Path, use: Callable[[Checkpoint], T]) -> T:
    """Call a function with the newest undamaged checkpoint of a run, which may be alive.

    Nothing is moved or deleted. Raises CheckpointError where there is none.
    """
    while True:
        before = steps(run)
        try:
            return use(_newest_checked(run, before))
        except CheckpointError:
            if steps(run) == before:
                raise
            # otherwise the run is alive, and has just replaced that checkpoint


def _newest_checked(run: Path, candidates: list[int]) -> Checkpoint:
    wrong = []
    for step in reversed(candidates):
        try:
            checkpoint = _checked(run, step)
        except Damaged as damage:
            wrong.append(f"{path(run, step)} is damaged: {damage}")
            continue
        if wrong:
            text = f"warning: {wrong[0]}; taking that of update {step:,}"
            print(printable(text), file=sys.stderr)
        return checkpoint
    if wrong:
        raise CheckpointError(f"no checkpoint of {run} can be used: {'; '.join(wrong)}")
    raise CheckpointError(f"{run} has no checkpoint yet: let it train for a while")


def weights_digest(params: PyTree, batch_stats: PyTree) -> str:
    """Return the SHA-256 of the arrays that a model computes with."""
    total = hashlib.sha256()
    for name, leaf in jax.tree_util.tree_leaves_with_path((params, batch_stats)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(name)} {array.dtype} {array.shape}".encode())
        total.update(array.data)
    return total.hexdigest()


def restore_weights(checkpoint: Checkpoint, like: tuple[PyTree, PyTree], *, ema: bool) -> Weights:
    """Restore `params` (or their moving average) and `batch_stats` of these shapes alone."""
    params, batch_stats = like
    name = "ema" if ema else "params"
    sharding = SingleDeviceSharding(jax.devices()[0])
    item = _shapes({name: params, "batch_stats": batch_stats}, sharding)
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    restored = _restored(checkpoint.path, ocp.args.Composite(state=arguments))["state"]
    params, batch_stats = restored[name], restored["batch_stats"]
    return Weights(params, batch_stats, checkpoint.step, weights_digest(params, batch_stats))


def _checked(run: Path, step: int) -> Checkpoint:
    """Return a checkpoint of which every file is what was written. Raises Damaged."""
    checkpoint = _read(run, step)
    check_manifest(checkpoint.path)
    return checkpoint


def _read(run: Path, step: int) -> Checkpoint:
    """Read the manifest of a checkpoint, not its files.

    Raises Damaged, and CheckpointError for one that was written by another version of vaejax.
    """
    folder = path(run, step)
    content = read_manifest(folder)
    format_ = content.get("format")
    if format_ != FORMAT:
        if isinstance(format_, str) and format_.startswith("vaejax checkpoint "):
            raise CheckpointError(
                f"{folder} was written by another version of vaejax ({format_[:40]}, this one "
                f"reads {FORMAT!r}) and stays as it is: use that version, or start anew with "
                "--fresh, which keeps the folder under another name"
            )
        raise Damaged(f"{MANIFEST} is of a {str(format_)[:40]}")
    if content.get("step") != step:
        raise Damaged(f"{MANIFEST} is of update {str(content.get('step'))[:40]}")
    content.setdefault("environment", content.get("versions"))  # all that was once recorded of it
    kinds = {"state": str, "spec": dict, "environment": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if not wrong and not all(isinstance(fact, str) for fact in content["environment"].values()):
        wrong = ["environment"]
    if wrong:
        raise Damaged(f"{MANIFEST} has no valid {' and no valid '.join(wrong)}")
    return Checkpoint(folder, step, content["state"], content["spec"], content["environment"])


def _move_aside(run: Path, step: int) -> Path:
    aside = run / FOLDER / DAMAGED
    aside.mkdir(exist_ok=True)
    target = aside / f"{step:07}"
    for number in itertools.count(1):
        if not target.exists():
            break
        target = aside / f"{step:07}.{number}"
    os.rename(path(run, step), target)
    return target


def _restored(place: Path, arguments: Any) -> Any:
    try:
        with _quiet():
            return _orbax().restore(place.absolute(), arguments)
    except Exception as error:  # it has many, and the files are those that were written
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{place} cannot be read by this Orbax: {reason}") from error


def _orbax() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _shapes(tree: PyTree, sharding: Sharding) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


# The manifest -------------------------------------------------------------------------------------


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Flush all files of a folder to the disk, then write the content and every file's sum."""
    files = {name: _file_facts(folder / name) for name in _names(folder)}
    for where, _, names in os.walk(folder):
        for file in (*(os.path.join(where, name) for name in names), where):
            fsync(file)
    content = {**content, "files": files}
    write_json(folder / MANIFEST, {"sha256": _content_sum(content), **content})


def check_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest. Raises Damaged, with the file's name, if a file is not as written."""
    content = read_manifest(folder)
    present = _names(folder)
    for name, expected in content["files"].items():
        if name not in present:
            raise Damaged(f"{name} is missing")
        facts = _file_facts(folder / name)
        if facts["bytes"] != expected["bytes"]:
            raise Damaged(f"{name} has {facts['bytes']:,} bytes, not {expected['bytes']:,}")
        if facts["sha256"] != expected["sha256"]:
            raise Damaged(f"{name} has changed since it was written (its SHA-256 differs)")
    if stray := sorted(present - content["files"].keys()):
        raise Damaged(f"{printable(stray[0])} does not belong there")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest without looking at the files. Raises Damaged."""
    try:
        content = read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except ValueError:
        raise Damaged(f"{MANIFEST} cannot be read") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != _content_sum(content):
        raise Damaged(f"{MANIFEST} has changed since it was written")
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(facts, dict)
        and isinstance(facts.get("bytes"), int)
        and isinstance(facts.get("sha256"), str)
        for facts in files.values()
    ):
        raise Damaged(f"{MANIFEST} does not say which files there are")
    return content


def _content_sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _names(folder: Path) -> set[str]:
    """Return all files but the manifest; a link or a pipe is none of ours, but it counts."""
    names = {
        os.path.relpath(os.path.join(where, name), folder)
        for where, folders, files in os.walk(folder)
        for name in (*files, *(n for n in folders if os.path.islink(os.path.join(where, n))))
    }
    return names - {MANIFEST}


def _file_facts(file_path: Path) -> dict[str, Any]:
    try:
        with open_regular(file_path) as file:
            total = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": total}
    except OSError as error:
        raise Damaged(f"{file_path.name} cannot be read: {error.strerror}") from None
