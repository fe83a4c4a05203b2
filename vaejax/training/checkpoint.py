"""Checkpoints of the state and the position in the data, together. The only user of Orbax.

A checkpoint is written under another name, its manifest last, put onto the disk and then renamed:
what stands under a number was whole. It is compared with its manifest before it is believed.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from vaejax.errors import CheckpointError
from vaejax.files import PARTIAL, flush
from vaejax.models import autoencoder
from vaejax.training import manifest, parallel, run
from vaejax.training.settings import differences, without_data
from vaejax.training.state import TrainState

FOLDER = "checkpoints"
DAMAGED = "damaged"  # the folder beside the checkpoints where what is set aside lies
FORMAT = "vaejax checkpoint 1"


def path(folder: Path, step: int) -> Path:
    """Where a run has its checkpoint of so many updates."""
    return folder / FOLDER / f"{step:07}"


def steps(folder: Path) -> list[int]:
    """The updates after which a run has a checkpoint, be it damaged; oldest first."""
    names = os.listdir(folder / FOLDER) if (folder / FOLDER).is_dir() else []
    numbers = (int(name) for name in names if re.fullmatch(r"[0-9]{7,}", name))
    return sorted(step for step in numbers if path(folder, step).name in names)


def is_finished(folder: Path, step: int) -> bool:
    """Whether a checkpoint was written to its end there; not whether it is still whole."""
    return (path(folder, step) / manifest.NAME).is_file()


def settings(folder: Path) -> dict[str, Any] | None:
    """Those that the newest checkpoint with a whole manifest was saved with, if there is one."""
    for step in reversed(steps(folder)):
        try:
            return _read(folder, step)["settings"]
        except manifest.Damaged:
            continue
    return None


def digest(state: TrainState, position: Mapping[str, Any]) -> str:
    """SHA-256 over all of a state, bit for bit, and the position in the data."""
    total = hashlib.sha256(json.dumps(position, sort_keys=True).encode())
    for where, leaf in jax.tree_util.tree_leaves_with_path(parallel.here(state)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(where)} {array.dtype} {array.shape}".encode())
        total.update(array.data)
    return total.hexdigest()


# Writing ------------------------------------------------------------------------------------------


def save(
    folder: Path,
    state: TrainState,
    batches: grain.DatasetIterator,
    *,
    settings: Mapping[str, Any],
    keep: int,
) -> None:
    """Write the state and the position of a run; when they are on the disk, only the newest `keep`
    stay. A kill in between leaves nothing that looks whole.

    It waits until all is written: the step donates its state, and a copy in the background of a
    buffer that the next step writes over would not be the state it is said to be.

    Raises OSError where the disk does not take it; the older ones are all there then.
    """
    step, position = int(state.step), dict(batches.get_state())
    final = path(folder, step)
    if not parallel.agreed((final / manifest.NAME).exists):
        unfinished = final.with_name(f"{PARTIAL}{final.name}")
        try:
            with _quiet():
                _orbax().save(
                    unfinished.absolute(),
                    ocp.args.Composite(
                        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position)
                    ),
                    force=True,
                )
            if parallel.is_first():
                facts = {
                    "format": FORMAT,
                    "step": step,
                    "state": digest(state, position),
                    "settings": dict(settings),
                    "versions": run.versions(),
                }
                manifest.write(unfinished, facts)
                os.rename(unfinished, final)
                flush(final.parent)
        except Exception as error:  # Orbax has many for a disk that is full
            # what it leaves behind would be told later, when it is collected
            warnings.filterwarnings("ignore", "coroutine .* was never awaited")
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            if parallel.is_first():
                clear(folder)
            raise _as_os_error(error) from error
        parallel.agreed(lambda: None)  # none goes on before it is there
    if parallel.is_first():
        # what is newer, or has no manifest, was put there by somebody else
        older = [old for old in steps(folder) if old < step and is_finished(folder, old)]
        for old in older[: max(0, len(older) - (keep - 1))]:
            gone = path(folder, old).with_name(f"{PARTIAL}{old:07}")
            os.rename(path(folder, old), gone)  # so that a kill leaves no half of it
            shutil.rmtree(gone, ignore_errors=True)


def clear(folder: Path) -> None:
    """Take away what a kill in the middle of a save has left."""
    for left in (folder / FOLDER).glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _as_os_error(error: Exception) -> OSError:
    """Of TensorStore's words only the system's number says what the matter is."""
    if isinstance(error, OSError) and error.strerror:
        return error
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return OSError(int(code[1]), os.strerror(int(code[1])))
    return OSError(0, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax' traceback for every file that cannot be written; what is raised is told."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# Reading ------------------------------------------------------------------------------------------


def newest(folder: Path, settings: Mapping[str, Any], *, begun: bool) -> dict[str, Any] | None:
    """The facts of a run's newest whole checkpoint; damaged ones are set aside, with a warning.

    None where there is none yet. Raises CheckpointError where there was one (`begun` says that the
    run remembers one) and none is whole, and where it is one of other settings.
    """
    wrong = []
    for step in reversed(steps(folder)):
        try:
            facts = _checked(folder, step)
        except manifest.Damaged as damage:
            wrong.append(f"{path(folder, step).name}: {damage}")
            text = f"the checkpoint of update {step:,} is damaged: {damage}. It "
            try:
                aside = _set_aside(folder, step)
            except OSError as error:
                raise CheckpointError(f"{text}cannot be set aside: {error.strerror}") from None
            print(f"warning: {text}was set aside: {aside}", file=sys.stderr)
            continue
        # whether the images are those of the run was settled when its folder was found
        if fields := differences(without_data(facts["settings"]), without_data(settings)):
            raise CheckpointError(
                f"{path(folder, step)} is of another run: {'; '.join(fields)} (there → here). "
                "Take it away, or start anew with --fresh, which keeps the folder"
            )
        if wrong:
            print(f"going on from update {step:,}, whose checkpoint is whole", file=sys.stderr)
        return facts
    aside = folder / FOLDER / DAMAGED
    if wrong or begun or aside.is_dir():
        lost = f" ({'; '.join(wrong)})" if wrong else ""
        raise CheckpointError(
            f"no checkpoint in {folder / FOLDER} can be used{lost}: "
            + (f"what was damaged lies in {aside}. " if aside.is_dir() else "they are gone. ")
            + "--fresh starts anew and keeps this folder under another name"
        )
    return None


def restore(
    folder: Path,
    facts: Mapping[str, Any],
    like: TrainState,
    batches: grain.DatasetIterator,
    *,
    sharding: Sharding,
) -> TrainState:
    """The state of the checkpoint of these facts, laid out as asked for, wherever it came from, and
    `batches` set to its position. Raises CheckpointError if it is not what was saved."""
    place = path(folder, facts["step"])
    arguments = ocp.args.Composite(
        state=ocp.args.StandardRestore(_shapes(like, sharding)), data=ocp.args.JsonRestore()
    )
    restored = _restored(place, arguments)
    if digest(restored["state"], restored["data"]) != facts["state"]:
        raise CheckpointError(f"{place} is read as another state than the one that was saved")
    batches.set_state(restored["data"])
    return restored["state"]


class Weights(NamedTuple):
    params: PyTree
    statistics: PyTree
    step: int  # the updates that they were learned in


def weights(folder: Path, model: autoencoder.Autoencoder) -> Weights:
    """The newest whole ones of a run, without the optimiser's share.

    Raises CheckpointError where there are none yet, or all are damaged or of another model.
    """
    while True:
        there = steps(folder)
        try:
            return _newest_weights(folder, model, there)
        except CheckpointError:
            if steps(folder) == there:
                raise
            # or else the run is alive, and has just put another one in the place of that


def _newest_weights(folder: Path, model: autoencoder.Autoencoder, there: list[int]) -> Weights:
    wrong = []
    for step in reversed(there):
        try:
            facts = _checked(folder, step)
        except manifest.Damaged as damage:
            wrong.append(f"{path(folder, step)} is damaged: {damage}")
            continue
        if wrong:
            print(f"warning: {wrong[0]}; taking that of update {step:,}", file=sys.stderr)
        here = {"model": autoencoder.describe(model)}
        if fields := differences({"model": facts["settings"].get("model")}, here):
            raise CheckpointError(
                f"{path(folder, step)} is of another model than {folder / 'config.json'} says: "
                f"{'; '.join(fields)} (there → in config.json)"
            )
        return Weights(*_weights(path(folder, step), model), step)
    if wrong:
        raise CheckpointError(f"no checkpoint of {folder} can be used: {'; '.join(wrong)}")
    if run.status(folder) == "diverged":
        raise CheckpointError(f"{folder} diverged before its first checkpoint: it has learned none")
    raise CheckpointError(f"{folder} has no checkpoint yet: let it train for a while")


def _weights(place: Path, model: autoencoder.Autoencoder) -> tuple[PyTree, PyTree]:
    params, statistics = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
    here = SingleDeviceSharding(jax.devices()[0])
    item = _shapes({"params": params, "statistics": statistics}, here)
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    restored = _restored(place, ocp.args.Composite(state=arguments))["state"]
    return restored["params"], restored["statistics"]


def _checked(folder: Path, step: int) -> dict[str, Any]:
    """The facts of a checkpoint of which every file is what was written."""
    facts = _read(folder, step)
    manifest.check(path(folder, step))
    return facts


def _read(folder: Path, step: int) -> dict[str, Any]:
    facts = manifest.read(path(folder, step))
    if facts.get("format") != FORMAT or facts.get("step") != step:
        raise manifest.Damaged(
            f"{manifest.NAME} is of a {facts.get('format')} of update {facts.get('step')}"
        )
    kinds = {"state": str, "settings": dict, "versions": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]:
        raise manifest.Damaged(f"{manifest.NAME} has no {' and no '.join(wrong)} as it should")
    return facts


def _set_aside(folder: Path, step: int) -> Path:
    aside = folder / FOLDER / DAMAGED
    aside.mkdir(exist_ok=True)
    free = aside / f"{step:07}"
    for number in itertools.count(1):
        if not free.exists():
            break
        free = aside / f"{step:07}.{number}"
    os.rename(path(folder, step), free)
    return free


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
