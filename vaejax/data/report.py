"""What a preparation found, in figures."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from vaejax.data.faces import NO_FACE, Finder
from vaejax.data.gather import Gathered
from vaejax.data.sources import printable


def of_images(found: Gathered, size: int, finder: Finder | None) -> dict[str, Any]:
    """With a finder, "crop" tells how the faces were found."""
    report = {
        "accepted": len(found.paths),
        "refused": found.refused,
        "duplicates": _duplicates(found),
        "sizes": _sizes(found.dimensions),
        "fingerprint": _fingerprint(found.hashes, size, finder),
    }
    if finder is not None:
        cascade = {"cascade": printable(finder.cascade.name)}
        report["crop"] = {**cascade, **finder.identity, "several_faces": found.several_faces}
    return report


def summary(report: dict[str, Any]) -> str:
    """One sentence for people."""
    parts = ", ".join(f"{count:,} {name}" for name, count in report["splits"].items())
    copies = sum(len(paths) - 1 for paths in report["duplicates"])
    persons = f" of {report['persons']:,} persons" if report["persons"] else ""
    faces = ""
    if "crop" in report:
        none = sum(refusal["reason"] == NO_FACE for refusal in report["refused"])
        faces = f" {report['crop']['several_faces']:,} with several faces and {none:,} with none,"
    return (
        f"Prepared {report['accepted']:,} images{persons} from {report['source']} at "
        f"{report['size']}x{report['size']} ({parts}); {len(report['refused']):,} files "
        f"refused,{faces} {copies:,} copies kept, {report['seconds']:.1f} s."
    )


def _duplicates(found: Gathered) -> list[list[str]]:
    copies: dict[str, list[str]] = {}
    for path, digest in zip(found.paths, found.hashes, strict=True):
        copies.setdefault(digest, []).append(path)
    return [paths for paths in copies.values() if len(paths) > 1]


def _sizes(dimensions: Counter[tuple[int, int]]) -> dict[str, Any]:
    """How large the images were, in pixels, as the files have them."""
    each = np.repeat(np.array(list(dimensions)), list(dimensions.values()), axis=0)
    sides = {
        side: {
            "min": int(values.min()),
            "median": float(np.median(values)),
            "max": int(values.max()),
        }
        for side, values in zip(("width", "height"), each.T, strict=True)
    }
    common = {f"{w}x{h}": count for (w, h), count in dimensions.most_common(5)}
    return {**sides, "most_common": common}


def _fingerprint(hashes: Iterable[str], size: int, finder: Finder | None) -> str:
    """The same for the same images at the same size, cropped in the same way, wherever they lay
    and whatever their names."""
    crop = [] if finder is None else [json.dumps(finder.identity)]
    return hashlib.sha256("\n".join([*sorted(hashes), str(size), *crop]).encode()).hexdigest()
