"""Every file of a folder or zip is listed once, and none of them leads out, hangs or explodes."""

import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vaejax.data.decode import Refused
from vaejax.data.sources import open_source
from vaejax.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_hangs() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fill(folder: Path, *names: str) -> Path:
    """Files that contain their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name))
    return folder


def paths(source: Path) -> list[str]:
    with open_source(source) as files:
        return [entry.path for entry in files.entries if entry.refused is None]


def refused(source: Path) -> dict[str, str]:
    with open_source(source) as files:
        return {entry.path: entry.refused for entry in files.entries if entry.refused}


def ignored(source: Path) -> int:
    with open_source(source) as files:
        return files.ignored


def contents(source: Path) -> dict[str, bytes]:
    with open_source(source) as files:
        return {e.path: files.read(e) for e in files.entries if e.refused is None}


def make_zip(path: Path, members: dict[Any, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# A folder


def test_a_folder_is_listed_recursively_in_the_order_of_the_paths(tmp_path: Path):
    fill(tmp_path, "b/2.png", "a.png", "b/1.png", "b/c/d/0.png", "B.jpg")
    assert paths(tmp_path) == ["B.jpg", "a.png", "b/1.png", "b/2.png", "b/c/d/0.png"]
    assert contents(tmp_path)["b/c/d/0.png"] == b"b/c/d/0.png"


class Shuffled:
    """What another file system would hand out."""

    def __init__(self, items: list[os.DirEntry[str]]):
        self.items = random.sample(items, len(items))

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(self.items)


def test_the_order_is_not_that_of_the_file_system(tmp_path: Path, monkeypatch):
    fill(tmp_path, *(f"{i % 7}/{i}.png" for i in range(50)))
    for i in range(10):
        (tmp_path / f"{i}-link").symlink_to(tmp_path / f"{i % 3}")
        (tmp_path / f"{i % 7}" / f"copy-{i}.png").hardlink_to(tmp_path / "0" / "7.png")
    with open_source(tmp_path) as files:
        expected = files.entries
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Shuffled(list(scandir(path))))
    for seed in range(5):
        random.seed(seed)
        with open_source(tmp_path) as files:
            assert files.entries == expected


def test_junk_is_ignored_and_counted(tmp_path: Path):
    junk = [".DS_Store", "Thumbs.db", "desktop.ini", "a/._1.png", "README", "labels.csv", "a/n.txt"]
    fill(tmp_path, "a/1.png", *junk)
    fill(tmp_path / "__MACOSX", "1.png")
    fill(tmp_path / ".git", "1.png")
    assert paths(tmp_path) == ["a/1.png"]
    assert refused(tmp_path) == {}
    assert ignored(tmp_path) == len(junk) + 2


def test_pipes_devices_and_broken_links_are_refused_with_their_reasons(tmp_path: Path):
    fill(tmp_path, "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    assert paths(tmp_path) == ["1.png"]
    assert refused(tmp_path) == {
        "gone.png": "broken symlink",
        "null.png": "not a regular file",
        "pipe.png": "not a regular file",
        "self.png": "symlink loop",
    }


def test_a_file_that_became_a_pipe_does_not_block(tmp_path: Path):
    fill(tmp_path, "1.png", "2.png")
    with open_source(tmp_path) as files:
        (tmp_path / "1.png").unlink()
        os.mkfifo(tmp_path / "1.png")
        (tmp_path / "2.png").unlink()
        with pytest.raises(Refused, match="not a regular file"):
            files.read(files.entries[0])
        with pytest.raises(Refused, match="unreadable"):
            files.read(files.entries[1])


@pytest.fixture
def anybody() -> Iterator[Path]:
    """A folder of somebody who may not read everything, as root may."""
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to others
    if is_root := os.geteuid() == 0:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_files_without_permission_are_refused(anybody: Path):
    fill(anybody, "1.png", "closed/2.png", "3.png")
    (anybody / "closed").chmod(0)
    (anybody / "3.png").chmod(0)
    assert refused(anybody) == {"closed": "unreadable"}
    with open_source(anybody) as files:
        assert [e.path for e in files.entries if e.refused is None] == ["1.png", "3.png"]
        with pytest.raises(Refused, match="unreadable"):
            files.read(files.entries[1])


def test_every_file_is_listed_once_under_its_real_name(tmp_path: Path):
    source = fill(tmp_path / "source", "z/1.png", "z/2.png")
    fill(tmp_path / "elsewhere", "3.png")
    (source / "a").symlink_to("z")
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "c").symlink_to(tmp_path / "elsewhere")
    (source / "z" / "0.png").symlink_to("1.png")
    assert paths(source) == ["c/3.png", "z/1.png", "z/2.png"]


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_a_link_upwards_is_a_loop_and_not_followed(tmp_path: Path, target: str):
    source = fill(tmp_path / "source", "a/1.png")
    fill(tmp_path, "not-mine.png")
    (source / "up").symlink_to(target)
    assert paths(source) == ["a/1.png"]
    assert refused(source) == {"up": "symlink loop"}


def test_a_link_to_a_folder_around_it_ends(tmp_path: Path):
    fill(tmp_path, "a/b/1.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    assert paths(tmp_path) == ["a/b/1.png"]


ODD_NAMES = {
    b"\xff\xfe.png": "\\xff\\xfe.png",
    b"new\nline.png": "new\\x0aline.png",
    b"\x1b[2J.png": "\\x1b[2J.png",
    "😀.png".encode(): "😀.png",
    b" -rf a b.png": " -rf a b.png",
    "é".encode() * 125 + b".jpeg": "é" * 125 + ".jpeg",  # 255 bytes, the most that there can be
}


def test_odd_names_are_read_and_printable(tmp_path: Path):
    for name in ODD_NAMES:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    assert contents(tmp_path) == {text: name for name, text in ODD_NAMES.items()}
    "".join(paths(tmp_path)).encode()  # would raise on what is not UTF-8


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(300 << 20)  # which takes no room on the disk
    assert refused(tmp_path) == {"1.png": "too large: more than 256 MB"}


@pytest.mark.parametrize("name", ["nowhere", "a" * 300, "nul\0"])
def test_a_source_that_is_not_there_is_an_error(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="does not exist"):
        paths(tmp_path / name)


# A zip


def test_a_zip_is_read_in_place(tmp_path: Path):
    members = {
        "b/1.png": b"one",
        "a.png": b"two",
        "b/": b"",
        "__MACOSX/b/._1.png": b"",
        "n.txt": b"",
    }
    source = make_zip(tmp_path / "faces.zip", members)
    assert list(contents(source).items()) == [("a.png", b"two"), ("b/1.png", b"one")]
    assert ignored(source) == 2
    assert list(tmp_path.iterdir()) == [source]


def test_a_zip_is_read_by_many_threads(tmp_path: Path):
    members = {f"{i:03}.png": random.Random(i).randbytes(20_000) for i in range(200)}
    with (
        open_source(make_zip(tmp_path / "faces.zip", members)) as files,
        ThreadPoolExecutor(16) as pool,
    ):
        assert list(pool.map(files.read, files.entries)) == list(members.values())


def test_folders_of_windows_are_folders(tmp_path: Path):
    assert paths(make_zip(tmp_path / "a.zip", {"Anna\\1.png": b"one"})) == ["Anna/1.png"]


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "C:\\evil.png", "..\\evil.png"]
)
def test_a_name_that_leads_out_of_the_zip_is_refused(tmp_path: Path, name: str):
    source = make_zip(tmp_path / "faces.zip", {name: b"evil", "good.png": b"good"})
    assert list(refused(source).values()) == ["its name leads out of the zip"]
    assert contents(source) == {"good.png": b"good"}
    assert list(tmp_path.iterdir()) == [source]


def test_a_link_in_a_zip_is_refused(tmp_path: Path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert refused(make_zip(tmp_path / "a.zip", {link: b"/etc/passwd"})) == {
        "link.png": "symlink in a zip"
    }


def test_an_encrypted_member_is_refused(tmp_path: Path):
    data = bytearray(make_zip(tmp_path / "a.zip", {"1.png": b"one"}).read_bytes())
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert refused(tmp_path / "a.zip") == {"1.png": "encrypted"}


def test_a_bomb_is_refused_by_its_ratio_and_a_white_picture_is_none(tmp_path: Path):
    source = make_zip(
        tmp_path / "a.zip", {"bomb.png": bytes(20 << 20), "white.bmp": bytes(1 << 20)}
    )
    assert source.stat().st_size < 100_000
    assert refused(source) == {"bomb.png": "zip bomb"}
    assert contents(source) == {"white.bmp": bytes(1 << 20)}


def test_a_member_larger_than_declared_is_damaged(tmp_path: Path):
    data = bytearray(make_zip(tmp_path / "a.zip", {"1.png": bytes(1 << 20)}).read_bytes())
    for header, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.index(header) + offset
        data[start : start + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    with (
        open_source(tmp_path / "a.zip") as files,
        pytest.raises(Refused, match="damaged in the zip"),
    ):
        files.read(files.entries[0])


MEASURE = """
import resource, sys
from pathlib import Path
from vaejax.data.decode import Refused
from vaejax.data.sources import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open_source(Path(sys.argv[1])) as files:
    entry = files.entries[0]
    try:
        print(len(files.entries), files.read(entry))
    except Refused as refused:
        print(len(files.entries), refused)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def measured(source: Path) -> tuple[str, int]:
    """How many are listed, what is read of the first, and the megabytes that it took."""
    command = [sys.executable, "-c", MEASURE, str(source)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return lines[0], int(lines[1])


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_bomb_that_lies_about_its_size_is_not_unpacked(tmp_path: Path, compression: int):
    source = tmp_path / "a.zip"
    with zipfile.ZipFile(source, "w", compression) as archive, archive.open("1.png", "w") as file:
        for _ in range(300):
            file.write(bytes(1 << 20))
    data = bytearray(source.read_bytes())
    struct.pack_into("<I", data, 22, 1000)  # in the member's own header, and in the directory
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 1000)
    source.write_bytes(data)
    output, megabytes = measured(source)
    assert output == "1 damaged in the zip"
    assert megabytes < 20


def zip_of(path: Path, count: int) -> Path:
    """A zip whose many members are all the same few bytes."""
    name, data = b"0123456.png", b"none"
    facts = struct.pack("<5H3I2H", 20, 0, 0, 0, 0, zlib.crc32(data), 4, 4, len(name), 0)
    central = b"PK\1\2" + struct.pack("<H", 20) + facts + bytes(14)
    members = b"".join(central + b"%07d.png" % i for i in range(count))
    local = b"PK\3\4" + facts + b"0000000.png" + data
    most = min(count, 0xFFFF)  # which zipfile does not believe either
    end = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, most, most, len(members), len(local), 0)
    path.write_bytes(local + members + end)
    return path


def test_a_hundred_thousand_members_take_bounded_memory(tmp_path: Path):
    """A million take ten times as much: 700 MB, most of them zipfile's, and ten seconds."""
    output, megabytes = measured(zip_of(tmp_path / "a.zip", 100_000))
    assert output == "100000 b'none'"
    assert megabytes < 150


def test_a_directory_that_would_fill_the_memory_is_not_read(tmp_path: Path):
    with (tmp_path / "a.zip").open("wb") as file:
        file.seek(200 << 20)  # which takes no room on the disk
        file.write(b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 1, 1, 200 << 20, 0, 0))
    message = r"a\.zip has too many members .* takes 200 MB\. Unpack it, and name the folder"
    with pytest.raises(UserError, match=message):
        paths(tmp_path / "a.zip")


def test_overlapping_members_are_a_bomb_together(tmp_path: Path):
    data = bytearray(make_zip(tmp_path / "a.zip", {"1.png": bytes(16 << 20)}).read_bytes())
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    assert refused(tmp_path / "a.zip") == {}
    count = 300
    struct.pack_into("<2HI", data, end + 8, count, count, count * (end - start))
    (tmp_path / "a.zip").write_bytes(data[:start] + data[start:end] * count + data[end:])
    with pytest.raises(UserError, match=r"a\.zip is a zip bomb: it would unpack to 4 GB"):
        paths(tmp_path / "a.zip")


def raw_zip(path: Path, names: list[bytes]) -> Path:
    """Members with names of any bytes, which no flag says are UTF-8, and their names in them."""
    stand_ins = {b"%03d" % i + b"x" * (len(name) - 3): name for i, name in enumerate(names)}
    data = make_zip(path, {stand.decode(): name for stand, name in stand_ins.items()}).read_bytes()
    for stand, name in stand_ins.items():
        data = data.replace(stand, name)
    path.write_bytes(data)
    return path


def test_names_in_a_zip_are_utf_8_where_valid_and_else_msdos(tmp_path: Path):
    names = {
        "Zoë/😀.png".encode(): "Zoë/😀.png",  # as a Mac packs
        b"Zo\x89/1.png": "Zoë/1.png",  # as Windows does
        b"\xff\xfe\x0a.png": "\xa0■\\x0a.png",
    }
    source = raw_zip(tmp_path / "a.zip", list(names))
    assert contents(source) == {text: name for name, text in names.items()}
    flagged = make_zip(tmp_path / "b.zip", {"├⌐.png": b"box", "é.png": b"accent"})
    assert contents(flagged) == {"├⌐.png": b"box", "é.png": b"accent"}


def test_a_zip_that_is_cut_after_the_listing_is_damaged(tmp_path: Path):
    noise = random.Random(0).randbytes(200_000)
    source = make_zip(tmp_path / "a.zip", {"1.png": noise, "2.png": noise})
    with open_source(source) as files:
        os.truncate(source, 300_000)
        assert files.read(files.entries[0]) == noise
        with pytest.raises(Refused, match="damaged in the zip"):
            files.read(files.entries[1])


def test_an_unusual_compression_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("1.png", b"one")
    assert refused(tmp_path / "a.zip") == {"1.png": "unusual compression"}


def test_a_damaged_member_is_refused_and_the_others_are_read(tmp_path: Path):
    source = tmp_path / "a.zip"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("1.png", b"the first one")
        archive.writestr("2.png", b"the second one")
    source.write_bytes(source.read_bytes().replace(b"first", b"worst"))
    with open_source(source) as files:
        with pytest.raises(Refused, match="damaged in the zip"):
            files.read(files.entries[0])
        assert files.read(files.entries[1]) == b"the second one"


def test_a_damaged_zip_raises_only_errors_for_people(tmp_path: Path):
    source = make_zip(tmp_path / "a.zip", {f"{i}.png": bytes(100 * i) for i in range(4)})
    original, chance = source.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(original[: chance.randint(len(original) // 2, 2 * len(original))])
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        source.write_bytes(data)
        try:
            with open_source(source) as files:
                for entry in files.entries:
                    assert len(files.read(entry)) <= entry.size
        except (UserError, Refused):
            pass


def test_a_source_that_is_neither_folder_nor_zip_is_an_error(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "text.zip").write_text("not a zip")
    (tmp_path / "empty.zip").touch()
    for name in ("pipe.zip", "text.zip", "empty.zip"):
        with pytest.raises(
            UserError, match=f"{name} is neither a folder of images nor a readable zip"
        ):
            paths(tmp_path / name)
