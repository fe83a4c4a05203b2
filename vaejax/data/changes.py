"""What has changed between two prepared sets of one source."""

from pathlib import Path
from typing import Any, NamedTuple

from vaejax.data.batches import Images
from vaejax.data.records import is_prepared, read_report


class Changes(NamedTuple):
    """Images, by their paths in the source; `known` is false where the older set is gone."""

    added: int
    removed: int
    changed: int
    known: bool = True

    def __str__(self) -> str:
        if not self.known:
            return "how, is not known: what was prepared of them is gone"
        return f"{self.added:,} added, {self.removed:,} removed, {self.changed:,} changed"


def changes(before: Path, after: Path) -> Changes | None:
    """None where the sets differ in more than their images: in their size, or their crop."""
    if not is_prepared(before):
        return Changes(0, 0, 0, known=False)
    old, new = read_report(before), read_report(after)
    if old["size"] != new["size"] or _crop(old) != _crop(new):
        return None
    there, here = _hashes(before), _hashes(after)
    both = there.keys() & here.keys()
    return Changes(
        added=len(here) - len(both),
        removed=len(there) - len(both),
        changed=sum(there[path] != here[path] for path in both),
    )


def _crop(report: dict[str, Any]) -> tuple[Any, ...]:
    crop = report.get("crop") or {}
    return crop.get("cascade_sha256"), crop.get("margin")


def _hashes(prepared: Path) -> dict[str, str]:
    """The hash of every file, by its path."""
    texts = (
        images.texts(i)
        for split in read_report(prepared)["splits"]
        for images in [Images(prepared, split)]
        for i in range(len(images))
    )
    return {text["path"]: text["sha256"] for text in texts}
