"""The drawn faces that ship with the package: something to learn from without any data."""

import csv
from pathlib import Path

_FOLDER = Path(__file__).parent


def drawn_faces() -> Path:
    """A zip of 3,200 faces, 64 x 64 RGB; whose art it is, `drawn_faces.md` beside it says."""
    return _FOLDER / "drawn_faces.zip"


def attributes() -> dict[str, dict[str, str]]:
    """What each face shows, by the name of its file: {"00000.webp": {"hair": "bun", ...}}."""
    with (_FOLDER / "drawn_faces.csv").open(newline="", encoding="utf-8") as table:
        return {row.pop("file"): row for row in csv.DictReader(table)}
