"""A prepared set that another version of vaejax has written is refused, and stays as it is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vaejax.data import records
from vaejax.data.batches import Images
from vaejax.data.prepare import builder, find_prepared, prepare
from vaejax.errors import UserError

OTHERS = [
    ("vaejax prepared set 2", "report.json"),  # as format 2 and older called it
    ("vaejax prepared set 3", "dataset_report.json"),  # which had no index
    ("vaejax prepared set 99", "dataset_report.json"),
]


def make(source: Path, out: Path | None = None) -> Path:
    return prepare(source, size=16, out=out, say=lambda _: None)


def write_as(monkeypatch: pytest.MonkeyPatch, version: tuple[str, str], *args: Path) -> Path:
    """Prepare a set as another version does."""
    with monkeypatch.context() as patch:
        patch.setattr(records, "FORMAT", version[0])
        patch.setattr(records, "REPORT", version[1])
        folder = make(*args)
    assert json.loads((folder / version[1]).read_text())["format"] == version[0]
    return folder


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The contents and modification times of all files, and the names of all folders."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
    }


USES: dict[str, Callable[[Path, Path], object]] = {
    "as source": lambda folder, _: make(folder),
    "as source, to a folder": lambda folder, faces: make(folder, folder.parent / "other"),
    "as --out": lambda folder, faces: make(faces, folder),
    "to find": lambda folder, _: find_prepared(folder, size=16),
    "to read": lambda folder, _: Images(folder, "train"),
    "by TFDS": lambda folder, _: builder(folder),
    "its report": lambda folder, _: records.read_dataset_report(folder),
    "to check": lambda folder, _: records.check(folder),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("version", OTHERS)
def test_a_set_of_another_version_is_refused_and_left_as_it_is(
    faces: Path, tmp_path: Path, monkeypatch, version: tuple[str, str], use: str
):
    folder = write_as(monkeypatch, version, faces, tmp_path / "set")
    before = state(tmp_path)
    message = rf'set was written by another version of vaejax \(as "{version[0]}"'
    with pytest.raises(UserError, match=message):
        USES[use](folder, faces)
    assert state(tmp_path) == before


@pytest.mark.parametrize("version", OTHERS)
def test_a_cached_set_of_another_version_is_prepared_anew_beside_it(
    faces: Path, monkeypatch, tmp_path: Path, version: tuple[str, str]
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = write_as(monkeypatch, version, faces)
    before = state(old)
    assert find_prepared(faces, size=16) == (None, 60)
    new = make(faces)
    assert new.parent == old.parent
    assert set(new.parent.iterdir()) == {old, new}
    assert records.check(new)["accepted"] == 60
    assert find_prepared(faces, size=16) == (new, 60)
    assert state(old) == before


@pytest.mark.parametrize("version", ["another", "vaejax prepared set", "vaejax prepared set two"])
def test_a_report_of_another_program_makes_no_prepared_set(tmp_path: Path, version: str):
    for name in ("report.json", "dataset_report.json"):
        (tmp_path / name).write_text(json.dumps({"format": version}))
    assert not records.is_prepared(tmp_path)
    with pytest.raises(UserError, match=r"is not a prepared data set: no dataset_report\.json"):
        records.read_dataset_report(tmp_path)


def test_the_format_of_this_version_is_neither_of_them(faces: Path, tmp_path: Path):
    folder = make(faces, tmp_path / "set")
    assert records.format_of(folder) == records.FORMAT == "vaejax prepared set 4"
    assert not (folder / "report.json").exists()
    assert json.loads((folder / "dataset_report.json").read_text())["accepted"] == 60
