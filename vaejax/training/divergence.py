"""Updates that are no numbers: which they were, and what they would have been learned from."""

import json
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from vaejax.errors import DivergedError
from vaejax.files import whole

IN_A_ROW = 3  # after which a run stops
LATE = 2  # updates later their figures are looked at: an accelerator need not wait for that
NAME = "diverged.json"


class Watch:
    """Looks at the figures of each update; `sources` tells the images of an update by their paths,
    and `last_good` the last checkpoint."""

    def __init__(
        self,
        folder: Path,
        *,
        per_epoch: int,
        advice: str,
        sources: Callable[[int], list[str]],
        last_good: Callable[[], Path | None],
        write: bool,
    ):
        self._folder, self._per_epoch, self._advice = folder, per_epoch, advice
        self._sources, self._last_good, self._write = sources, last_good, write
        self._unseen: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._finite: tuple[int, Mapping[str, Any]] | None = None
        self._bad: list[tuple[int, dict[str, float]]] = []

    def see(self, step: int, figures: Mapping[str, Any]) -> None:
        """The figures of update `step`, from 0. Raises DivergedError when those of so many in a row
        were not applied, of which there is a list of images then."""
        self._unseen.append((step, figures))
        while len(self._unseen) > LATE:
            self._look(*self._unseen.popleft())

    def catch_up(self) -> bool:
        """Look at all that was not yet looked at; whether the last update was applied."""
        while self._unseen:
            self._look(*self._unseen.popleft())
        return not self._bad

    def held_out(self, figures: Mapping[str, float], *, step: int) -> None:
        """DivergedError where a figure of the held-out images is no number."""
        for name, value in figures.items():
            if not np.isfinite(value):
                raise self._error(f"the held-out images' {_words(name)} is {value}", step)

    def _look(self, step: int, figures: Mapping[str, Any]) -> None:
        in_a_row = int(figures["skipped"])
        if not in_a_row:
            self._finite = (step, figures)
            self._bad.clear()
            return
        values = {name: float(value) for name, value in figures.items()}
        self._bad.append((step, values))
        name = next((n for n in ("loss", "gradient_norm") if not np.isfinite(values[n])), "loss")
        what = f"the {_words(name)} is {values[name]}"
        if in_a_row < IN_A_ROW:
            print(
                f"warning: update {step:,} was not applied: {what} ({in_a_row} in a row; after "
                f"{IN_A_ROW} the run stops)",
                file=sys.stderr,
            )
            return
        raise self._error(
            f"{what}, in {in_a_row} updates in a row, of which none was applied", step
        )

    def _error(self, what: str, step: int) -> DivergedError:
        good, finite = self._last_good(), self._last_finite()
        epoch = step // self._per_epoch + 1
        parts = [f"diverged in epoch {epoch:,} at step {step:,}: {what}"]
        if finite:
            words = ", ".join(f"{_words(n)} {finite[n]:.4g}" for n in ("loss", "gradient_norm"))
            parts.append(f"The last finite figures, of step {finite['step']:,}: {words}")
        if self._bad:
            updates = [
                {"step": n, "figures": _json(values), "images": self._sources(n)}
                for n, values in self._bad
            ]
            if self._write:
                found = {
                    "epoch": epoch,
                    "step": step,
                    "last_finite": finite,
                    "last_good_checkpoint": str(good) if good else None,
                    "updates": updates,
                }
                with suppress(OSError), whole(self._folder / NAME) as partial:
                    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            some = ", ".join(updates[0]["images"][:3])
            parts.append(f"The images of these batches are in {self._folder / NAME} ({some}, …)")
        parts.append(f"The last good checkpoint is {good}" if good else "No checkpoint was due yet")
        return DivergedError(". ".join([*parts, self._advice]))

    def _last_finite(self) -> dict[str, Any]:
        if self._finite is None:
            return {}
        step, figures = self._finite
        return {"step": step, **{name: float(value) for name, value in figures.items()}}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _json(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no number for what is none."""
    return {name: v if np.isfinite(v) else str(v) for name, v in values.items()}
