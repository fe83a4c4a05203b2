"""Which run a command means.

Whatever stands in `config.json` outside its "schedule" identifies a run: the same command finds
its folder by it, and a folder that was made by another command refuses to go on.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaejax.data.changes import Changes, changes
from vaejax.errors import UserError
from vaejax.files import PARTIAL
from vaejax.training import run


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
        there = [] if fresh else [f for f in run.numbered(name) if _is_readable(f)]
        mine = [f for f in there if not differences(run.read(f), settings)]
        for folder in reversed(there if not mine else []):
            if run.standing(folder) != "finished" and (found := changed(folder, settings)):
                _refuse(folder, found, accept=accept_changed_data)
                return folder
        return mine[-1] if mine else run.ROOT / f"{_next_number():05}-{name}"
    run.refuse_running(out)
    names = [f.name for f in out.iterdir()] if out.exists() else []
    if "config.json" not in names:
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
    elif found := changed(out, settings):
        _refuse(out, found, accept=accept_changed_data)
    elif fields := differences(run.read(out), settings):
        raise UserError(
            f"cannot go on with {out}: {'; '.join(fields)} (there → in this command). "
            "Repeat the command it was made by, name another --out, or add --fresh"
        )
    return out


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a run is this one and no other."""
    return {name: value for name, value in settings.items() if name != "schedule"}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The fields by which a run is another one: "model.size 64 → 128"."""
    old, new = _flat(there), _flat(here)
    keys = sorted(old.keys() | new.keys())
    values = ((k, str(old.get(k)), str(new.get(k))) for k in keys if old.get(k) != new.get(k))
    return [f"{k[:60]} {there[:60]} → {here[:60]}" for k, there, here in values]


def changed(folder: Path, settings: Mapping[str, Any]) -> Changes | None:
    """How the images have changed since, if a run differs in nothing but them, and they come from
    the same source and were cropped in the same way; else None."""
    there = run.read(folder)
    if not differences(there, settings) or differences(without_data(there), without_data(settings)):
        return None
    before, after = there["schedule"], settings["schedule"]
    if before["source"] != after["source"]:
        return None
    return changes(Path(before["prepared"]), Path(after["prepared"]))


def without_data(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The identity but for the images, and what follows from their number."""
    left = {name: value for name, value in identity(settings).items() if name != "data"}
    left["optimizer"] = {**left.get("optimizer", {}), "cosine_decay_updates": None}
    return left


def _refuse(folder: Path, found: Changes, *, accept: bool) -> None:
    text = f"the images have changed since {folder} last learned from them: {found}"
    if not accept:
        raise UserError(
            f"{text}. --accept-changed-data goes on with them, --fresh starts anew; or put the "
            "images back as they were"
        )
    print(f"{text}; going on with them as they are")


def _next_number() -> int:
    return 1 + max((int(folder.name[:5]) for folder in run.numbered()), default=-1)


def _is_readable(folder: Path) -> bool:
    try:
        run.read(folder)
    except UserError:
        return False
    return True


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if prefix or key != "schedule":
            flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat
