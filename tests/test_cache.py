"""What is found in the cache is our own, or it is not used."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vaejax import cache
from vaejax.cache import cache_folder
from vaejax.errors import UserError

NOBODY = 65534


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the environment names; those of other users lie in tmp_path/tmp."""
    (tmp_path / "tmp").mkdir(mode=0o777)
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vaejax"


@pytest.fixture
def of_others(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """of_others(path) -> the path belongs to somebody else, as the system tells."""
    theirs: set[tuple[int, int]] = set()

    def ask(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def asked(*arguments: object, **settings: object) -> os.stat_result:
            info = call(*arguments, **settings)
            if (info.st_dev, info.st_ino) in theirs:
                return os.stat_result([*info[:4], NOBODY, *info[5:10]])
            return info

        return asked

    def give(path: Path) -> None:
        info = os.lstat(path)
        theirs.add((info.st_dev, info.st_ino))

    monkeypatch.setattr(os, "lstat", ask(os.lstat))
    monkeypatch.setattr(os, "stat", ask(os.stat))
    return give


def test_looking_for_it_makes_none(wanted: Path):
    assert cache_folder(make=False) == wanted
    assert not wanted.parent.exists()
    assert cache_folder() == cache_folder(make=False) == wanted


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_follows_the_environment_and_is_ours_alone(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert cache_folder() == wanted
    assert rights(wanted) == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vaejax"
    assert capsys.readouterr().err == ""


def test_a_user_without_a_home_has_one(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() == tmp_path / "tmp" / f"vaejax-{os.geteuid()}"


def test_looser_rights_are_taken_away_and_nothing_is_lost(wanted: Path, capsys):
    wanted.mkdir(parents=True)
    wanted.chmod(0o755)
    (wanted / "a").write_text("kept")
    assert cache_folder() == wanted
    assert rights(wanted) == 0o700
    assert (wanted / "a").read_text() == "kept"
    assert capsys.readouterr().err == ""


def test_what_others_could_change_is_deleted_when_it_is_closed_to_them(wanted: Path, capsys):
    for name in ("kernels", "xla"):
        (wanted / name).mkdir(parents=True)
        (wanted / name / "kept").write_text("kept")
    (wanted / "kernels" / "a.so").touch()
    (wanted / "kernels" / "a.so").chmod(0o666)
    (wanted / "xla").chmod(0o770)  # where they could have put one file in the place of another
    wanted.chmod(0o777)
    assert cache_folder() == wanted
    assert rights(wanted) == 0o700
    assert [path.name for path in wanted.rglob("*")] == ["kernels", "kept"]
    assert (
        "closed to them now, and 2 of its files and folders were deleted" in capsys.readouterr().err
    )


@pytest.mark.parametrize("whose", ["folder", "link", "file", "subfolder"])
def test_what_belongs_to_others_is_not_used_and_one_warning_says_so(
    whose: str, wanted: Path, tmp_path: Path, of_others: Callable[[Path], None], capsys
):
    (wanted / "kernels").mkdir(parents=True, mode=0o700)
    (wanted / "kernels" / "a.so").write_text("code")
    if whose == "link":
        wanted.rename(tmp_path / "other")
        wanted.symlink_to(tmp_path / "other")
    of_others(
        {"file": wanted / "kernels" / "a.so", "subfolder": wanted / "kernels"}.get(whose, wanted)
    )
    found = cache_folder()
    assert found.parent == tmp_path / "tmp"
    assert found.name.startswith(f"vaejax-{os.geteuid()}-")
    assert rights(found) == 0o700
    assert list(found.iterdir()) == []
    assert cache_folder() == found
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "XDG_CACHE_HOME" in warning
    assert "belongs to" in warning
    assert (
        tmp_path / "other" / "kernels" / "a.so" if whose == "link" else wanted / "kernels" / "a.so"
    ).read_text() == "code"
    cache._checked.cache_clear()
    assert cache_folder() == found  # another process finds it again


def test_a_place_of_others_in_the_private_one_is_not_used(
    wanted: Path, tmp_path: Path, of_others: Callable[[Path], None]
):
    planted = tmp_path / "tmp" / f"vaejax-{os.geteuid()}-0000"
    for folder in (wanted, planted):
        folder.mkdir(parents=True)
        of_others(folder)
    assert cache_folder() not in (wanted, planted)


def test_a_folder_that_everybody_can_put_another_in_the_place_of_is_not_used(
    wanted: Path, tmp_path: Path, capsys
):
    wanted.mkdir(parents=True)
    wanted.parent.chmod(0o777)
    assert cache_folder().parent == tmp_path / "tmp"
    assert "everybody may write to" in capsys.readouterr().err


def test_a_folder_that_cannot_be_closed_is_not_used(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    wanted.mkdir(parents=True)
    wanted.chmod(0o777)
    monkeypatch.setattr(os, "chmod", refuse)
    assert cache_folder().parent == tmp_path / "tmp"
    assert "it cannot be closed" in capsys.readouterr().err


def test_a_link_of_ours_may_lead_to_another_disk(wanted: Path, tmp_path: Path, capsys):
    (tmp_path / "disk").mkdir()
    wanted.parent.mkdir()
    wanted.symlink_to(tmp_path / "disk")
    assert cache_folder() == wanted
    assert rights(tmp_path / "disk") == 0o700
    assert capsys.readouterr().err == ""


def test_a_file_in_its_place_is_told_and_so_is_a_machine_without_any_place(
    wanted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    wanted.parent.mkdir()
    wanted.touch()
    assert cache_folder().parent == tmp_path / "tmp"
    assert "it is no folder" in capsys.readouterr().err
    cache._checked.cache_clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        cache_folder()
