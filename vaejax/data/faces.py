"""Faces in pictures: an OpenCV cascade detects them, and the largest is cut out as a square.

The faces sheet shows small pictures with the boxes drawn into them, so that a person can check the
detections. Boxes are in integer pixels of the picture in which they were detected.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import cv2.data
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vaejax import pictures
from vaejax.data.decode import MIN_SIDE
from vaejax.errors import UserError
from vaejax.files import atomic, printable, read_bytes

# The longest side in pixels at which faces are detected: a picture of any size then takes some
# 50 ms. The cascade's smallest face, 24 pixels, is a twentieth of that; a finer resolution makes it
# detect faces in curtains and bookshelves.
DETECTION_SIDE = 512

NO_FACE = "no face found"
SHEET_NAME = "faces_sheet.png"

_SCALE, _NEIGHBOURS = 1.1, 5  # ratio between the sizes tried; overlapping hits that make a face
_MAX_CASCADE_BYTES = 64 << 20  # OpenCV's own have up to 3 MB
_FRONTAL = Path(cv2.data.haarcascades, "haarcascade_frontalface_default.xml")


@dataclass(frozen=True)
class Crop:
    """How every picture is cropped to its largest face."""

    cascade: Path | None = None  # XML (none: OpenCV's cascade for frontal faces)
    margin: float = 0.3  # added on each side of the detected face, in sides of its box


def crop_from_flags(*, crop_faces: bool, cascade: Path | None, margin: float | None) -> Crop | None:
    """Return the crop that the command-line flags describe, or None without --crop-faces.

    Raises UserError for --cascade or --margin without --crop-faces.
    """
    flags = {"cascade": cascade, "margin": margin}
    settings: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if settings and not crop_faces:
        raise UserError(f"--{' and --'.join(settings)} without --crop-faces would change nothing")
    return Crop(**settings) if crop_faces else None


# Detection ----------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A rectangle of a picture."""

    left: int
    top: int
    width: int
    height: int


class Detector:
    """A crop whose cascade can be read and whose margin makes sense. Any thread may use it.

    `identity` is equal for equal crops, wherever the cascade lies. Raises UserError if the cascade
    or the margin cannot be used.
    """

    def __init__(self, crop: Crop):
        if not 0 <= crop.margin <= 2:  # NaN is not either
            raise UserError(f"--margin {crop.margin}: from 0 to 2 sides of the face can be added.")
        self._crop, self.margin = crop, float(crop.margin)
        self.cascade = _FRONTAL if crop.cascade is None else Path(crop.cascade)
        digest = hashlib.sha256(_read_cascade(self.cascade)).hexdigest()
        self.identity: dict[str, Any] = {"cascade_sha256": digest, "margin": self.margin}
        self._thread_local = threading.local()
        self.detect(np.zeros((MIN_SIDE, MIN_SIDE, 3), np.uint8))  # raises if it is no cascade

    def __reduce__(self):
        """Pickle the crop alone: another machine reads the cascade that lies there."""
        cascade = self._crop.cascade
        crop = self._crop if cascade is None else replace(self._crop, cascade=cascade.resolve())
        return _unpickle, (crop, self.identity)

    def check_same_crop(self, prepared: Path, crop: Any) -> None:
        """Raise UserError unless "crop" of a prepared set's report describes this crop."""
        if not (isinstance(crop, dict) and self.identity.items() <= crop.items()):
            raise UserError(
                f"{printable(prepared)} is prepared already, "
                f"{'cropped in another way' if crop else 'not cropped to faces'}: leave out "
                "--crop-faces (or say --no-crop-faces), or prepare the original images again."
            )

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> list[Box]:
        """Return every face in a picture that `shrink` has made small enough."""
        local = self._thread_local  # a classifier changes its state while it works
        if not hasattr(local, "classifier"):
            local.classifier = _load_classifier(self.cascade)
        try:
            return detect(image, local.classifier.detectMultiScale)
        except cv2.error:
            raise _not_a_cascade(self.cascade) from None


def _unpickle(crop: Crop, identity: dict[str, Any]) -> Detector:
    """Make a detector, and compare its identity with that of the pickled one."""
    detector = Detector(crop)
    if detector.identity != identity:
        raise UserError(
            f"the cascade {printable(detector.cascade)} is another one on this machine."
        )
    return detector


def shrink(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Shrink a picture so that its longest side has at most `DETECTION_SIDE` pixels."""
    height, width = image.shape[:2]
    factor = DETECTION_SIDE / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def detect(image: UInt8[np.ndarray, "h w 3"], detect_multi_scale: Callable[..., Any]) -> list[Box]:
    """Return every face that a classifier's `detectMultiScale` detects in a picture.

    The boxes are sorted, because OpenCV's threads return them in any order.
    """
    grey = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    boxes = detect_multi_scale(
        grey, scaleFactor=_SCALE, minNeighbors=_NEIGHBOURS, minSize=(MIN_SIDE, MIN_SIDE)
    )
    return sorted(Box(*map(int, box)) for box in boxes)


def _read_cascade(cascade: Path) -> bytes:
    try:
        return read_bytes(cascade, max_bytes=_MAX_CASCADE_BYTES, links=True)
    except FileNotFoundError:
        raise UserError(f"the cascade {printable(cascade)} does not exist.") from None
    except OSError as error:
        raise UserError(
            f"the cascade {printable(cascade)} cannot be read: {error.strerror}."
        ) from None


def _load_classifier(cascade: Path) -> cv2.CascadeClassifier:
    if printable(cascade) != str(cascade):  # on a name that is not UTF-8 OpenCV crashes
        raise UserError(
            f"OpenCV cannot open the cascade {printable(cascade)}: give it a plain name."
        )
    try:
        classifier = cv2.CascadeClassifier(str(cascade))
    except (cv2.error, SystemError):  # its constructor raises the first as the second
        raise _not_a_cascade(cascade) from None
    if classifier.empty():
        raise _not_a_cascade(cascade)
    return classifier


def _not_a_cascade(cascade: Path) -> UserError:
    return UserError(
        f"{printable(cascade)} is no cascade that OpenCV reads: it ships some, such as {_FRONTAL}."
    )


# Boxes --------------------------------------------------------------------------------------------


def largest(boxes: Sequence[Box]) -> Box:
    """Return the largest box; of equal ones the topmost, then the leftmost."""
    return min(boxes, key=lambda box: (-box.width * box.height, box.top, box.left, box.width))


def scale(box: Box, factor: float) -> Box:
    """Return the box of the same part of a picture that is `factor` times as large."""
    return Box(*(round(value * factor) for value in box))


def square_around(box: Box, margin: float, shape: tuple[int, int]) -> Box:
    """Return the square around a box and its margin, inside a picture of shape (height, width).

    It is moved to lie within the picture, and smaller only if the picture is.
    """
    height, width = shape
    side = min(round(max(box.width, box.height) * (1 + 2 * margin)), height, width)
    left = box.left + (box.width - side) // 2
    top = box.top + (box.height - side) // 2
    return Box(min(max(left, 0), width - side), min(max(top, 0), height - side), side, side)


def cut(image: UInt8[np.ndarray, "H W 3"], box: Box) -> UInt8[np.ndarray, "h w 3"]:
    """Return the part of a picture that lies in a box."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


# The faces sheet ----------------------------------------------------------------------------------

_SIDE = 160  # the longest side of a thumbnail, pixels
_COLUMNS, _GAP, _LINE = 10, 8, 16  # _LINE: the height of a line of text, pixels
_FACE, _CROP, _OTHER, _REFUSED = "#ffe600", "#00a2ff", "#ff40ff", "#d00000"
_LEGEND = (("the face", _FACE), ("what is cut out", _CROP), ("other faces", _OTHER))


@dataclass(frozen=True)
class Thumbnail:
    """A small picture for the sheet, and the number of faces that were detected in it."""

    image: UInt8[np.ndarray, "h w 3"]
    faces: int


def draw_thumbnail(
    image: UInt8[np.ndarray, "H W 3"], boxes: Sequence[Box], *, margin: float
) -> Thumbnail:
    """Shrink a picture, and draw its boxes, or a red frame if it has none."""
    height, width = image.shape[:2]
    factor = _SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(small)
    right, bottom = small.width - 1, small.height - 1
    if not boxes:
        draw.rectangle((0, 0, right, bottom), outline=_REFUSED, width=4)
    else:
        face = largest(boxes)
        square = square_around(face, margin, (height, width))
        others = [(box, _OTHER, 1) for box in boxes if box != face]
        for box, colour, line in [*others, (square, _CROP, 2), (face, _FACE, 2)]:
            left, top, w, h = scale(box, factor)
            corners = (left, top, min(left + w - 1, right), min(top + h - 1, bottom))
            draw.rectangle(corners, outline=colour, width=line)
    return Thumbnail(np.asarray(small), len(boxes))


@dataclass
class _Sample:
    """Evenly spaced pictures of one kind: at most `size` are shown, twice as many are held."""

    title: str
    size: int
    count: int = 0
    stride: int = 1
    held: list[tuple[str, Thumbnail]] = field(default_factory=list)

    def add(self, path: str, thumbnail: Thumbnail) -> None:
        if self.count % self.stride == 0:
            if len(self.held) == 2 * self.size:
                self.held, self.stride = self.held[::2], 2 * self.stride
            self.held.append((path, thumbnail))
        self.count += 1

    def shown(self) -> list[tuple[str, Thumbnail]]:
        count = min(self.size, len(self.held))
        return [self.held[round(i)] for i in np.linspace(0, len(self.held) - 1, count)]


class Sheet:
    """Thumbnails of pictures without a face, then with several, then with one.

    A few hundred thumbnails are in memory, however many pictures there are.
    """

    def __init__(self):
        self._samples = (
            _Sample("refused, no face found", size=100),
            _Sample("several faces found, the largest is taken", size=50),
            _Sample("one face found", size=50),
        )

    def add(self, path: str, thumbnail: Thumbnail) -> None:
        """Add a picture; it may be dropped later."""
        self._samples[(0, 2, 1)[min(thumbnail.faces, 2)]].add(path, thumbnail)

    def redraw(self, draw: Callable[[Thumbnail], Thumbnail]) -> None:
        """Replace every thumbnail that will be shown by `draw(thumbnail)`."""
        for sample in self._samples:
            sample.held = [(path, draw(thumbnail)) for path, thumbnail in sample.shown()]

    def save(self, path: Path) -> None:
        """Write a PNG."""
        rows = [row for sample in self._samples for row in _draw_rows(sample)]
        pictures.save_png(path, np.concatenate([_draw_legend(), *rows]))


def check_sheet_path(path: Path | None, *, outside: Iterable[Path]) -> None:
    """Raise UserError if no PNG can be written to a path, or it lies in one of the folders."""
    if path is None:
        return
    name = f"--debug-sheet {printable(path)}"
    if path.suffix.lower() != ".png":
        raise UserError(f"{name}: the sheet is a PNG, its name must end in .png.")
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder: name a file in it, such as {SHEET_NAME}.")
    for folder in outside:
        if path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{name} lies in {printable(folder)}: name a file elsewhere.")
    nearest = next(p for p in path.absolute().parents if os.path.exists(p))
    if not os.path.isdir(nearest):
        raise UserError(f"{name} cannot be written: {printable(nearest)} is a file.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{name} cannot be written: no permission for {printable(nearest)}.")


def sheet_hint(path: Path | None) -> str:
    """Return the sentence of an error message that says where the sheet is, or how to get it."""
    where = f"--debug-sheet {SHEET_NAME}" if path is None else printable(path)
    return f" {where} shows where faces were found, and where not."


def copy_sheet(folder: Path, path: Path | None) -> None:
    """Copy the sheet of a prepared set to a path, if there is one. Raises UserError."""
    if path is None:
        return
    try:
        sheet = read_bytes(folder / SHEET_NAME, max_bytes=pictures.MAX_PNG_BYTES)
        with atomic(path) as partial:
            partial.write_bytes(sheet)
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror}.") from None


def _draw_legend() -> UInt8[np.ndarray, "h w 3"]:
    strip, draw = _blank_strip(_LINE + 2 * _GAP)
    left = _GAP
    for text, colour in _LEGEND:
        draw.rectangle((left, _GAP + 1, left + 12, _GAP + 13), outline=colour, width=3)
        draw.text((left + 18, _GAP), text, fill="black", font=_font())
        left += 160
    return np.asarray(strip)


def _draw_rows(sample: _Sample) -> list[UInt8[np.ndarray, "h w 3"]]:
    shown = sample.shown()
    strip, draw = _blank_strip(_LINE + _GAP)
    part = f", of which {len(shown)} here" if len(shown) < sample.count else ""
    title = f"{sample.title}: {sample.count:,}{part}"
    draw.text((_GAP, _GAP), title, fill="black", font=_font())
    rows = [shown[i : i + _COLUMNS] for i in range(0, len(shown), _COLUMNS)]
    return [np.asarray(strip), *map(_draw_row, rows)]


def _draw_row(row: Sequence[tuple[str, Thumbnail]]) -> UInt8[np.ndarray, "h w 3"]:
    """Draw thumbnails side by side, each with the end of its path below it."""
    tallest = max(thumbnail.image.shape[0] for _, thumbnail in row)
    strip, draw = _blank_strip(tallest + _LINE + 2 * _GAP)
    for i, (path, thumbnail) in enumerate(row):
        left = _GAP + i * (_SIDE + _GAP)
        strip.paste(Image.fromarray(thumbnail.image), (left, _GAP))
        draw.text((left, _GAP + tallest), _shorten(path), fill="black", font=_font())
    return np.asarray(strip)


def _blank_strip(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    strip = Image.new("RGB", (_COLUMNS * (_SIDE + _GAP) + _GAP, height), "white")
    return strip, ImageDraw.Draw(strip)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default()


def _shorten(text: str) -> str:
    """Keep as much of the end of a text as fits below a thumbnail."""
    font = _font()
    if font.getlength(text) <= _SIDE:
        return text
    start = next(i for i in range(len(text)) if font.getlength("..." + text[i:]) <= _SIDE)
    return "..." + text[start:]
