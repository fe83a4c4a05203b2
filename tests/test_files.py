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
    inside,
    open_regular,
    open_to_append,
    printable,
    read_bytes,
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
    assert files.is_partial(calls[0][1], r"a\.txt")
    assert calls == [("fsync", calls[0][1]), ("rename", "a.txt"), ("fsync", tmp_path.name)]


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


def test_leftovers_are_deleted_and_only_ours(tmp_path: Path):
    path = tmp_path / "a.txt"
    kill_while_writing("file", path)
    (leftover,) = tmp_path.iterdir()
    mine = tmp_path / "mine"
    mine.write_text("mine")
    others = [".partial-a.txt", ".partial-0123456-a.txt", ".partial-01234567-b.txt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    link = tmp_path / ".partial-01234567-a.txt"
    link.symlink_to(mine)
    with atomic(path) as partial:
        partial.write_text("a")
        write_text(path, "b")  # of another process, say: what is in use is no leftover
        assert partial.exists()
    assert path.read_text() == "a"
    assert mine.read_text() == "mine"
    assert not leftover.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "mine", link.name, *others}


# What a stranger may have put there


def test_a_planted_temporary_name_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mine, path = tmp_path / "mine", tmp_path / "a.txt"
    mine.write_text("mine")
    (tmp_path / ".partial-a.txt").symlink_to(mine)
    tokens = iter(["01234567", "89abcdef"])
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: next(tokens))
    (tmp_path / ".partial-01234567-a.txt").symlink_to(mine)  # even if the number was known
    with pytest.raises(FileExistsError):
        write_text(path, "overwritten")
    write_text(path, "new")
    assert mine.read_text() == "mine"
    assert path.read_text() == "new"


def test_a_link_in_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path):
    mine, path = tmp_path / "mine", tmp_path / "a.txt"
    mine.write_text("mine")
    path.symlink_to(mine)
    write_text(path, "new")
    assert mine.read_text() == "mine"
    assert not path.is_symlink()


def test_links_are_read_only_where_a_person_named_them(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to("a")
    assert read_bytes(tmp_path / "link", max_bytes=1, links=True) == b"a"
    with pytest.raises(OSError, match="it is a link"):
        read_bytes(tmp_path / "link", max_bytes=1)


@pytest.mark.parametrize("links", [False, True])
def test_pipes_devices_and_folders_are_refused_before_they_are_opened(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "open", pytest.fail)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="it is not a regular file"):
            open_regular(path, links=links)


def test_a_file_that_becomes_a_pipe_at_the_last_moment_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(__file__)
    regular = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda *_, **__: regular)
    with pytest.raises(OSError, match="it is not a regular file"):
        open_regular(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link")


def test_no_more_is_read_than_was_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no disk
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        read_bytes(tmp_path / "a", max_bytes=1000)
    with pytest.raises(ValueError, match="more than 16,777,216 bytes"):
        read_json(tmp_path / "a")
    # a file that grows, or of which the system does not know how large it is
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_bytes("/proc/self/maps", max_bytes=10)


def test_what_is_appended_to_is_a_regular_file_with_one_name(tmp_path: Path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "dangling").symlink_to(tmp_path / "created")
    os.link(mine, tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "hard", "pipe"):
        with pytest.raises(OSError, match=r"link|not a regular file"):
            open_to_append(tmp_path / name)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "created").exists()
    for _ in range(2):
        with open_to_append(tmp_path / "new") as file:
            file.write(b"a")
    assert (tmp_path / "new").read_bytes() == b"aa"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "a/../../b", "../a", "a//b", "./a", "a/", "a\0b", 3, None,
     "link", "folder/a", "dangling"],
)  # fmt: skip
def test_no_name_leads_out_of_a_folder(name: object, tmp_path: Path):
    folder = tmp_path / "folder of a stranger"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "dangling").symlink_to(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no name below a folder|leads out|is a link"):
        inside(folder, name)


def test_a_name_below_a_folder_may_not_exist_and_the_folder_may_be_a_link(tmp_path: Path):
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path / "link", "sub/a..b") == tmp_path / "link" / "sub" / "a..b"


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
    (tmp_path / "link").symlink_to("a.json")
    write_json(tmp_path / "a.json", 1)
    for name in ("folder", "pipe", "link"):
        with pytest.raises(ValueError, match=r"it is (not a regular file|a link)"):
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
    monkeypatch.setattr(os, "open", refuse)
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
        ("a\u202egnp.exe\u2028".encode(), "a\\u202egnp.exe\\u2028"),  # shown as aexe.png
    ],
)
def test_any_path_can_be_printed(name: bytes, text: str):
    assert printable(os.fsdecode(name)) == text
    printable(Path(os.fsdecode(name))).encode()  # would raise for what is not UTF-8


def test_any_text_of_a_json_file_can_be_printed():
    assert printable("\x1b[2J\ud800\n\u2066") == "\\x1b[2J\\ud800\\x0a\\u2066"
