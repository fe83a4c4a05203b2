"""Which run a command means: the same command finds its folder by the settings that identify it,
and a folder that was made by another command refuses to go on."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vaejax.data.changes import Changes, changes
from vaejax.errors import UserError
from vaejax.files import PARTIAL
from vaejax.training import checkpoint, run
from vaejax.training.settings import differences, without_data


def choose(
    name: str,
    settings: Mapping[str, Any],
    *,
    out: Path | None,
    fresh: bool,
    accept_changed_data: bool,
) -> Path:
    """The folder of the run that these settings describe; it need not exist yet.

    Without `out`: the newest `runs/NNNNN-name` with the same identity, else the next number.
    With it: that folder, unless another run lies there (UserError with the fields that differ).
    `fresh` takes a new number, or moves the old folder aside. A run from the same source, of which
    the images have changed meanwhile, is the same one if that is accepted, and else a UserError.
    """
    if out is None:
        there = [] if fresh else list(_readable(name))
        mine = [folder for folder, known in there if not differences(known, settings)]
        for folder, known in reversed(there if not mine else []):
            open_ = accept_changed_data or run.standing(folder) != "finished"
            if open_ and (found := changed(known, settings)):
                _refuse(folder, found, accept=accept_changed_data)
                return folder
        return mine[-1] if mine else run.ROOT / f"{_next_number():05}-{name}"
    run.refuse_running(out)
    if not _is_run(out):
        names = os.listdir(out) if out.exists() else []
        # a kill in the first moment leaves the lock alone
        if not all(n == "run.lock" or n.startswith(PARTIAL) for n in names):
            raise UserError(f"{out} is neither empty nor a run's folder: take another --out")
    elif fresh:
        aside = next(p for i in range(1, 10**6) if not (p := Path(f"{out}.{i}")).exists())
        try:
            os.rename(out, aside)
        except OSError as error:
            raise UserError(f"{out} cannot be moved to {aside}: {error.strerror}") from None
        print(f"{out} was kept as {aside}")
    elif found := changed(known := read(out), settings):
        _refuse(out, found, accept=accept_changed_data)
    elif fields := differences(known, settings):
        raise UserError(
            f"cannot go on with {out}: {'; '.join(fields)} (there → in this command). "
            "Repeat the command it was made by, name another --out, or add --fresh"
        )
    return out


def read(folder: Path) -> dict[str, Any]:
    """The settings of the run that lies in a folder: those of `config.json`, or, with a warning,
    those that its newest checkpoint was saved with. UserError where neither can be read."""
    try:
        return run.read(folder)
    except UserError as error:
        known = checkpoint.settings(folder)
        if known is None or run.problem(known, "config.json"):
            raise UserError(
                f"{error}, and no checkpoint tells what it held. Put it back, or start anew with "
                "--fresh, which keeps the folder"
            ) from None
        print(f"warning: {error}; its newest checkpoint tells what it held", file=sys.stderr)
        return known


def _is_run(folder: Path) -> bool:
    """Whether a run was begun there, whatever has become of its files since."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    ours = {"run.json", "metrics.jsonl", checkpoint.FOLDER}
    return "config.json" in names or ("run.lock" in names and bool(ours & names))


def changed(there: Mapping[str, Any], settings: Mapping[str, Any]) -> Changes | None:
    """How the images have changed since, if a run differs in nothing but them, and they come from
    the same source and were cropped in the same way; else None."""
    if not differences(there, settings) or differences(without_data(there), without_data(settings)):
        return None
    before, after = there["schedule"], settings["schedule"]
    if before["source"] != after["source"]:
        return None
    return changes(Path(before["prepared"]), Path(after["prepared"]))


def _refuse(folder: Path, found: Changes, *, accept: bool) -> None:
    text = f"the images have changed since {folder} last learned from them: {found}"
    if not accept:
        raise UserError(
            f"{text}. --accept-changed-data goes on with them, --fresh starts anew; or put the "
            "images back as they were"
        )
    print(f"{text}; taking them as they are")


def _next_number() -> int:
    return 1 + max((int(folder.name[:5]) for folder in run.numbered()), default=-1)


def _readable(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The numbered runs, oldest first, with their settings; what cannot be read is told."""
    for folder in run.numbered(name):
        if _is_run(folder):
            try:
                yield folder, read(folder)
            except UserError as error:
                print(f"warning: {error}. It is left alone", file=sys.stderr)
