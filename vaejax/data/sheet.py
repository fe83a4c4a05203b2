"""The faces sheet: small pictures with what was found in them, for a person to look at.

A few hundred thumbnails are in memory, however many pictures there are.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vaejax import pictures
from vaejax.data.faces import Box, choose, scaled, square
from vaejax.data.sources import printable
from vaejax.errors import UserError
from vaejax.files import whole

NAME = "faces_sheet.png"

_SIDE = 160  # the longest of a thumbnail, pixels
_COLUMNS, _GAP, _LINE = 10, 8, 16  # _LINE: the height of a line of text, pixels
_FACE, _CROP, _OTHER, _REFUSED = "#ffe600", "#00a2ff", "#ff40ff", "#d00000"
_LEGEND = (("the face", _FACE), ("what is cut out", _CROP), ("other faces", _OTHER))


@dataclass(frozen=True)
class Seen:
    """A picture on the sheet, and how many faces were found in it."""

    thumbnail: UInt8[np.ndarray, "h w 3"]
    faces: int


@dataclass
class _Some:
    """Pictures of one kind, evenly spaced among all of it: from `most` to twice as many."""

    title: str
    most: int
    count: int = 0
    every: int = 1
    kept: list[tuple[str, Seen]] = field(default_factory=list)

    def add(self, path: str, seen: Seen) -> None:
        if self.count % self.every == 0:
            if len(self.kept) == 2 * self.most:
                self.kept, self.every = self.kept[::2], 2 * self.every
            self.kept.append((path, seen))
        self.count += 1

    def shown(self) -> list[tuple[str, Seen]]:
        some = min(self.most, len(self.kept))
        return [self.kept[round(i)] for i in np.linspace(0, len(self.kept) - 1, some)]


class Sheet:
    """What a person should look at first, first: where no face was found, then where several."""

    def __init__(self):
        self._kinds = (
            _Some("refused, no face found", most=100),
            _Some("several faces found, the largest is taken", most=50),
            _Some("one face found", most=50),
        )

    def add(self, path: str, seen: Seen) -> None:
        self._kinds[(0, 2, 1)[min(seen.faces, 2)]].add(path, seen)

    def draw(self, again: Callable[[Seen], Seen]) -> None:
        """Take the thumbnails anew, of those that will be shown."""
        for kind in self._kinds:
            kind.kept = [(path, again(seen)) for path, seen in kind.shown()]

    def save(self, path: Path) -> None:
        """Write a PNG."""
        rows = [row for kind in self._kinds for row in _rows(kind)]
        pictures.save(path, np.concatenate([_legend(), *rows]))


def seen(image: UInt8[np.ndarray, "H W 3"], boxes: Sequence[Box], *, margin: float) -> Seen:
    """A thumbnail with the boxes drawn into it, or in a red frame if there is no face."""
    height, width = image.shape[:2]
    factor = _SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    thumbnail = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(thumbnail)
    right, bottom = thumbnail.width - 1, thumbnail.height - 1
    if not boxes:
        draw.rectangle((0, 0, right, bottom), outline=_REFUSED, width=4)
    else:
        face = choose(boxes)
        around = square(face, margin, (height, width))
        others = [(box, _OTHER, 1) for box in boxes if box != face]
        for box, colour, line in [*others, (around, _CROP, 2), (face, _FACE, 2)]:
            left, top, w, h = scaled(box, factor)
            corners = (left, top, min(left + w - 1, right), min(top + h - 1, bottom))
            draw.rectangle(corners, outline=colour, width=line)
    return Seen(np.asarray(thumbnail), len(boxes))


def refuse_no_place(path: Path | None, *, outside: Iterable[Path]) -> None:
    """UserError where no picture can be written, or one would lie in one of these folders."""
    if path is None:
        return
    name = f"--debug-sheet {printable(path)}"
    if path.suffix.lower() != ".png":
        raise UserError(f"{name}: the sheet is a PNG, its name must end in .png.")
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder: name a file in it, such as {NAME}.")
    for folder in outside:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{name} lies in {printable(folder)}: name a file elsewhere.")
    nearest = next(p for p in path.absolute().parents if os.path.exists(p))
    if not os.path.isdir(nearest):
        raise UserError(f"{name} cannot be written: {printable(nearest)} is a file.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{name} cannot be written: no permission for {printable(nearest)}.")


def hint(path: Path | None) -> str:
    """Where the sheet is to be seen after an error."""
    where = f"--debug-sheet {NAME}" if path is None else printable(path)
    return f" {where} shows where faces were found, and where not."


def copy(folder: Path, path: Path | None) -> None:
    """The sheet of a folder, there as well if that is asked for."""
    if path is None:
        return
    try:
        with whole(path) as partial:
            shutil.copyfile(folder / NAME, partial)
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror}.") from None


def _legend() -> UInt8[np.ndarray, "h w 3"]:
    strip, draw = _paper(_LINE + 2 * _GAP)
    left = _GAP
    for text, colour in _LEGEND:
        draw.rectangle((left, _GAP + 1, left + 12, _GAP + 13), outline=colour, width=3)
        draw.text((left + 18, _GAP), text, fill="black", font=_font())
        left += 160
    return np.asarray(strip)


def _rows(kind: _Some) -> list[UInt8[np.ndarray, "h w 3"]]:
    shown = kind.shown()
    strip, draw = _paper(_LINE + _GAP)
    some = f", of which {len(shown)} here" if len(shown) < kind.count else ""
    draw.text((_GAP, _GAP), f"{kind.title}: {kind.count:,}{some}", fill="black", font=_font())
    rows = [shown[i : i + _COLUMNS] for i in range(0, len(shown), _COLUMNS)]
    return [np.asarray(strip), *map(_row, rows)]


def _row(some: Sequence[tuple[str, Seen]]) -> UInt8[np.ndarray, "h w 3"]:
    """Thumbnails side by side, each with the end of its path below it."""
    tallest = max(seen.thumbnail.shape[0] for _, seen in some)
    strip, draw = _paper(tallest + _LINE + 2 * _GAP)
    for i, (path, seen) in enumerate(some):
        left = _GAP + i * (_SIDE + _GAP)
        strip.paste(Image.fromarray(seen.thumbnail), (left, _GAP))
        draw.text((left, _GAP + tallest), _fitted(path), fill="black", font=_font())
    return np.asarray(strip)


def _paper(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    strip = Image.new("RGB", (_COLUMNS * (_SIDE + _GAP) + _GAP, height), "white")
    return strip, ImageDraw.Draw(strip)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default()


def _fitted(text: str) -> str:
    """As much of the end of a text as there is room for below a thumbnail."""
    font = _font()
    if font.getlength(text) <= _SIDE:
        return text
    start = next(i for i in range(len(text)) if font.getlength("..." + text[i:]) <= _SIDE)
    return "..." + text[start:]
