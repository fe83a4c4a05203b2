"""The face in a picture: found by one of OpenCV's cascades, and cut out with a margin, as a square.

Boxes are in whole pixels of the picture that they were found in.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import cv2.data
import numpy as np
from jaxtyping import UInt8

from vaejax.data.decode import LEAST_SIDE
from vaejax.data.sources import printable
from vaejax.errors import UserError

# The longest side of a picture that faces are looked for in, pixels: a photograph of any size then
# takes some 50 ms. The cascade's smallest face, of 24 pixels, is a twentieth of that; finer grain
# makes it see faces in curtains and bookshelves.
LOOK = 512

NO_FACE = "no face found"

_SCALE, _NEIGHBOURS = 1.1, 5  # steps between the sizes looked for; hits that make a face
_FRONTAL = Path(cv2.data.haarcascades, "haarcascade_frontalface_default.xml")


@dataclass(frozen=True)
class Crop:
    """Every picture is cut down to its largest face."""

    cascade: Path | None = None  # XML (none: the one for frontal faces that comes with OpenCV)
    margin: float = 0.3  # added on each side of the face that is found, in sides of its box


def asked(*, crop_faces: bool, cascade: Path | None, margin: float | None) -> Crop | None:
    """What a person's flags ask for; UserError for settings of a crop that there is not."""
    flags = {"cascade": cascade, "margin": margin}
    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if given and not crop_faces:
        raise UserError(f"--{' and --'.join(given)} without --crop-faces would change nothing")
    return Crop(**given) if crop_faces else None


class Box(NamedTuple):
    """A rectangle of a picture."""

    left: int
    top: int
    width: int
    height: int


class Finder:
    """A crop that can be made: its cascade is one, its margin makes sense. Any thread may use it.

    `identity` is the same for the same crop wherever the cascade lies.
    """

    def __init__(self, crop: Crop):
        if not 0 <= crop.margin <= 2:  # nor is nan
            raise UserError(f"--margin {crop.margin}: from 0 to 2 sides of the face can be added.")
        self._crop, self.margin = crop, float(crop.margin)
        self.cascade = _FRONTAL if crop.cascade is None else Path(crop.cascade)
        digest = hashlib.sha256(_content(self.cascade)).hexdigest()
        self.identity: dict[str, Any] = {"cascade_sha256": digest, "margin": self.margin}
        self._of_thread = threading.local()
        self.find(np.zeros((LEAST_SIDE, LEAST_SIDE, 3), np.uint8))  # for its UserError, if any

    def __reduce__(self):
        """On another machine it is made anew, of the cascade that lies there."""
        cascade = self._crop.cascade
        crop = self._crop if cascade is None else replace(self._crop, cascade=cascade.resolve())
        return _like, (crop, self.identity)

    def refuse_other(self, prepared: Path, crop: Any) -> None:
        """UserError unless "crop" of a prepared set's report tells of this crop."""
        if not (isinstance(crop, dict) and self.identity.items() <= crop.items()):
            raise UserError(
                f"{printable(prepared)} is prepared already, "
                f"{'cropped in another way' if crop else 'not cropped to faces'}: leave out "
                "--crop-faces (or say --no-crop-faces), or prepare the original images again."
            )

    def find(self, image: UInt8[np.ndarray, "h w 3"]) -> list[Box]:
        """Every face in a picture, which is meant to be no larger than `small` makes it."""
        local = self._of_thread  # a classifier keeps notes while it works
        if not hasattr(local, "classifier"):
            local.classifier = _classifier(self.cascade)
        try:
            return find(image, local.classifier.detectMultiScale)
        except cv2.error:
            raise _no_cascade(self.cascade) from None


def _like(crop: Crop, identity: dict[str, Any]) -> Finder:
    """A finder of the same identity as one elsewhere."""
    finder = Finder(crop)
    if finder.identity != identity:
        raise UserError(f"the cascade {printable(finder.cascade)} is another one on this machine.")
    return finder


def small(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, its longest side at most `LOOK`."""
    height, width = image.shape[:2]
    factor = LOOK / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def find(image: UInt8[np.ndarray, "h w 3"], detect: Callable[..., Any]) -> list[Box]:
    """Every face that a classifier's `detectMultiScale` finds in the picture, sorted: OpenCV's
    threads hand them over in any order."""
    grey = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    found = detect(
        grey, scaleFactor=_SCALE, minNeighbors=_NEIGHBOURS, minSize=(LEAST_SIDE, LEAST_SIDE)
    )
    return sorted(Box(*map(int, box)) for box in found)


def choose(boxes: Sequence[Box]) -> Box:
    """The largest; of those the topmost, and of those the leftmost."""
    return min(boxes, key=lambda box: (-box.width * box.height, box.top, box.left, box.width))


def scaled(box: Box, factor: float) -> Box:
    """The same in a picture that is so many times as large."""
    return Box(*(round(value * factor) for value in box))


def square(box: Box, margin: float, shape: tuple[int, int]) -> Box:
    """The box with its margin as a square inside a picture of this height and width.

    It is moved to where there is picture, and smaller only where the picture itself is.
    """
    height, width = shape
    side = min(round(max(box.width, box.height) * (1 + 2 * margin)), height, width)
    left = box.left + (box.width - side) // 2
    top = box.top + (box.height - side) // 2
    return Box(min(max(left, 0), width - side), min(max(top, 0), height - side), side, side)


def crop(image: UInt8[np.ndarray, "H W 3"], box: Box) -> UInt8[np.ndarray, "h w 3"]:
    """What of the picture is in the box."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def _content(cascade: Path) -> bytes:
    if not cascade.is_file():  # to open a pipe would be to wait
        state = "is no file" if cascade.exists() else "does not exist"
        raise UserError(f"the cascade {printable(cascade)} {state}.")
    try:
        return cascade.read_bytes()
    except OSError as error:
        raise UserError(
            f"the cascade {printable(cascade)} cannot be read: {error.strerror}."
        ) from None


def _classifier(cascade: Path) -> cv2.CascadeClassifier:
    if printable(cascade) != str(cascade):  # on a name that is not UTF-8 OpenCV crashes
        raise UserError(
            f"OpenCV cannot open the cascade {printable(cascade)}: give it a plain name."
        )
    try:
        classifier = cv2.CascadeClassifier(str(cascade))
    except (cv2.error, SystemError):  # the second is how its constructor raises the first
        raise _no_cascade(cascade) from None
    if classifier.empty():
        raise _no_cascade(cascade)
    return classifier


def _no_cascade(cascade: Path) -> UserError:
    return UserError(
        f"{printable(cascade)} is no cascade that OpenCV reads: it ships some, such as {_FRONTAL}."
    )
