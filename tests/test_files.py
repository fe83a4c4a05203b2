"""Files and folders appear complete or not at all, and JSON is strict."""

import errno
import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from vaejax import files
from vaejax.errors import UserError
from vaejax.files import (
    atomic,
    atomic_folder,
    cache_folder,
    printable,
    read_json,
    write_json,
    write_text,
)

# Atomic files


def fail_in(block: AbstractContextManager[Path], error: BaseException) -> None:
    """Write half of a file, or of a folder, and raise an exception."""
    with block as partial:
        (partial / "file" if partial.is_dir() else partial).write_text("half")
        raise error


def test_a_file_has_its_content_and_no_other_file_is_left(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_text(path, "again")
    assert path.read_text() == "again"
    assert list(path.parent.iterdir()) == [path]


def test_an_exception_leaves_the_old_content_and_no_other_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (ValueError("no"), KeyboardInterrupt()):
        for target in (path, tmp_path / "new.txt"):
            with pytest.raises(type(error)):
                fail_in(atomic(target), error)
            assert path.read_text() == "old"
            assert list(tmp_path.iterdir()) == [path]


def test_the_old_content_stays_until_the_new_one_is_complete(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_temporary_file_has_the_suffix_of_its_format(tmp_path: Path):
    with atomic(tmp_path / "a.png") as partial:
        partial.touch()
        assert partial.parent == tmp_path
        assert partial.suffix == ".png"


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[str, str]] = []
    fsync, replace = files.fsync, os.replace

    def record_fsync(path: Path | str) -> None:
        calls.append(("fsync", Path(path).name))
        fsync(path)

    def record_replace(source: Path, target: Path) -> None:
        calls.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr(files, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_text(tmp_path / "a.txt", "new")
    assert calls == [
        ("fsync", f"{files.PARTIAL}a.txt"),
        ("rename", "a.txt"),
        ("fsync", tmp_path.name),
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from vaejax.files import atomic, atomic_folder
with (atomic_folder if sys.argv[1] == "folder" else atomic)(Path(sys.argv[2])) as partial:
    (partial / "file" if sys.argv[1] == "folder" else partial).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(kind: str, path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, kind, str(path)])
    assert process.returncode == -signal.SIGKILL


def test_a_kill_leaves_the_old_content_and_the_next_write_cleans_up(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    kill_while_writing("file", path)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# JSON


@pytest.mark.parametrize("value", [{"ä": [1, 2.5, None, True], "b": {}}, [], "text", 0], ids=str)
def test_json_is_read_back_as_it_was_written(tmp_path: Path, value: Any):
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().endswith("\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_nan_and_no_infinity(tmp_path: Path, value: float):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": [1, value]})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[" * 200_000, "nested too deep"),
    ],
    ids=["empty", "truncated", "not UTF-8", "deep"],
)
def test_unreadable_json_is_a_value_error_with_its_reason(
    tmp_path: Path, content: bytes, message: str
):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_only_regular_files_are_read_and_a_pipe_does_not_block(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_json(tmp_path / name)


def test_a_missing_json_file_is_file_not_found_and_an_impossible_name_a_value_error(tmp_path: Path):
    for path in (tmp_path / "none.json", tmp_path / "none" / "a.json"):
        with pytest.raises(FileNotFoundError):
            read_json(path)
    with pytest.raises(ValueError, match="File name too long"):
        read_json(tmp_path / ("a" * 300))


def test_json_that_may_not_be_read_is_a_value_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        read_json(tmp_path / "a.json")


# Atomic folders


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    folder = tmp_path / "new" / "set"
    with atomic_folder(folder) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("mine")
        assert not folder.exists()
        assert partial.parent == folder.parent
    assert (folder / "sub" / "file").read_text() == "mine"
    assert list(folder.parent.iterdir()) == [folder]


def test_an_exception_leaves_no_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="no"):
        fail_in(atomic_folder(tmp_path / "set"), ValueError("no"))
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_one_with_files_is_kept(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    with atomic_folder(folder) as partial:
        (partial / "file").write_text("first")
    with pytest.raises(FileExistsError), atomic_folder(folder) as partial:
        (partial / "file").write_text("second")
    assert (folder / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_made_meanwhile_by_another_process_is_kept(tmp_path: Path):
    folder = tmp_path / "set"

    def make() -> None:
        with atomic_folder(folder) as partial:
            (partial / "file").write_text("ours")
            write_text(folder / "file", "theirs")

    with pytest.raises(FileExistsError):
        make()
    assert (folder / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/set", "cannot write .*/file: File exists"),
        ("file", "cannot write .*/file: Not a directory"),
        ("a" * 300, "cannot write .*: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, name: str, message: str):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=message), atomic_folder(tmp_path / name) as partial:
        (partial / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_kill_leaves_no_folder_and_the_next_call_cleans_up(tmp_path: Path):
    folder = tmp_path / "set"
    kill_while_writing("folder", folder)
    assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 1  # the unfinished folder, unlocked by the kernel
    with atomic_folder(folder) as partial:
        assert list(tmp_path.iterdir()) == [partial]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_unfinished_folder_of_a_running_process_is_kept(tmp_path: Path):
    with atomic_folder(tmp_path / "first") as partial:
        (partial / "file").write_text("first")
        with atomic_folder(tmp_path / "second"):
            pass
    assert (tmp_path / "first" / "file").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


def test_all_of_a_folder_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flushed: list[str] = []
    fsync, rename = files.fsync, os.rename
    monkeypatch.setattr(files, "fsync", lambda p: (flushed.append(Path(p).name), fsync(p)))

    def check(source: Path, target: Path) -> None:
        assert {"sub", "a", "b", source.name} <= set(flushed)
        rename(source, target)

    monkeypatch.setattr(os, "rename", check)
    with atomic_folder(tmp_path / "set") as partial:
        (partial / "sub").mkdir()
        (partial / "a").write_text("a")
        (partial / "sub" / "b").write_text("b")
    assert (tmp_path / "set" / "sub" / "b").exists()


# Names


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain.png", "plain.png"),
        ("é ä.png".encode(), "é ä.png"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"a\nb\x1b[31m", "a\\x0ab\\x1b[31m"),
        (b"\xc2\x9b1m", "\\x9b1m"),  # a control character beyond ASCII
    ],
)
def test_any_path_can_be_printed(name: bytes, text: str):
    assert printable(os.fsdecode(name)) == text
    printable(Path(os.fsdecode(name))).encode()  # would raise for what is not UTF-8


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vaejax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/vaejax")


def test_a_user_without_a_home_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert str(os.getuid()) in cache_folder().name
