"""A prepared set that is not as it was written is an error for people, or gives what it gave."""

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vaejax.data import records
from vaejax.data.batches import Images, stream
from vaejax.data.prepare import builder, find_prepared, prepare
from vaejax.data.records import is_prepared, read_dataset_report
from vaejax.errors import UserError

SPLITS = ("train", "validation", "test")


def make(source: Path, **settings: Any) -> Path:
    return prepare(source, **{"size": 16, "say": lambda _: None} | settings)


@pytest.fixture(scope="module")
def prepared(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, and leave it as it is."""
    return make(faces, out=tmp_path_factory.mktemp("out") / "set")


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """One to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


# The report and the metadata


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_set_is_an_error(faces: Path, copy: Path, damage: str):
    victim = next(copy.glob("records/*train*"))
    if damage == "cut":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    state = r"has \d+ bytes, not \d+" if damage == "cut" else "is missing"
    for use in (
        lambda: builder(copy),
        lambda: make(copy),
        lambda: find_prepared(copy, size=16),
        lambda: make(faces, out=copy),
    ):
        with pytest.raises(UserError, match=rf"damaged: records/.*train.* {state}. Delete"):
            use()


@pytest.mark.parametrize("report", ["", "{", "[]", '{"format": "another"}'])
def test_a_folder_without_a_report_is_no_prepared_set(copy: Path, report: str):
    (copy / "dataset_report.json").write_text(report)
    assert not is_prepared(copy)
    with pytest.raises(UserError, match="is not a prepared data set"):
        builder(copy)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_metadata_that_were_changed_are_damage(copy: Path, name: str):
    text = (copy / "records" / name).read_text()
    changed = text.replace("16", "61") if "16" in text else text.replace("1", "2")
    assert len(changed) == len(text)
    assert changed != text
    (copy / "records" / name).write_text(changed)
    message = rf"is damaged: records/{name} is not as it was written\. Delete that folder"
    with pytest.raises(UserError, match=message):
        builder(copy)


def test_a_changed_report_is_damage_and_a_reordered_one_is_not(copy: Path):
    report = json.loads((copy / "dataset_report.json").read_text())
    (copy / "dataset_report.json").write_text(json.dumps(dict(reversed(report.items()))))
    assert read_dataset_report(copy) == report
    for change in ({"accepted": 56}, {"sha256": None}, {"more": 1}):
        (copy / "dataset_report.json").write_text(json.dumps({**report, **change}))
        with pytest.raises(
            UserError, match=r"is damaged: dataset_report\.json is not as it was written"
        ):
            read_dataset_report(copy)


def test_a_report_without_a_required_field_is_damage(copy: Path):
    report = read_dataset_report(copy)
    del report["files"]
    sealed = {**report, "sha256": records._hash_report(report)}
    (copy / "dataset_report.json").write_text(json.dumps(sealed))
    with pytest.raises(UserError, match=r'is damaged: dataset_report\.json has no "files"'):
        builder(copy)


@pytest.mark.parametrize("key", ["pythonClassName", "type"])
def test_no_class_is_imported_because_metadata_name_it(copy: Path, tmp_path: Path, key: str):
    (tmp_path / "sneaked_in.py").write_text("raise SystemExit('it was imported')")
    features = copy / "records" / "features.json"
    named = json.loads(features.read_text())
    named["featuresDict"]["features"]["path"][key] = "sneaked_in.Text"
    features.write_text(json.dumps(named))
    report = read_dataset_report(copy)
    (copy / "dataset_report.json").unlink()
    (copy / "dataset_report.json").write_text(json.dumps(records.seal(report, copy)))
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(UserError, match="its metadata cannot be read"):
            builder(copy)
    finally:
        sys.path.remove(str(tmp_path))


def test_lists_in_lists_too_deep_to_be_read_are_an_error(copy: Path):
    for levels in [*range(500, 1001), 100_000]:  # the last that can be read cannot be hashed
        nested = "[" * levels + "]" * levels
        text = f'{{"format": "{records.FORMAT}", "more": {nested}}}'
        (copy / "dataset_report.json").write_text(text)
        with pytest.raises(UserError, match=r"is not as it was written|is not a prepared data set"):
            read_dataset_report(copy)


def test_a_pipe_instead_of_the_report_does_not_block(copy: Path):
    (copy / "dataset_report.json").unlink()
    os.mkfifo(copy / "dataset_report.json")
    assert not is_prepared(copy)


# Records


def train_file(folder: Path) -> Path:
    return next(folder.glob("records/*train*"))


def train_pixels(folder: Path) -> Path:
    return next(folder.glob("pixels/*train*"))


UNREADABLE = r"is damaged: pixels/train-00000-of-00001 cannot be read"
IMAGE_7 = UNREADABLE + r": image 7 is not as it was written\. Delete"
UNREADABLE_RECORD = (
    r"is damaged: records/faces-train\.array_record-00000-of-00001 cannot be read\. Delete"
)


def flipped(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def pixels_in(path: Path, image: np.ndarray) -> int:
    """Where in a file the pixels of an image lie: they are not packed."""
    return path.read_bytes().index(image.tobytes())


def test_one_wrong_bit_in_an_image_is_an_error_and_the_other_images_are_read(
    prepared: Path, copy: Path
):
    expected = Images(prepared, "train").read(np.arange(20))
    flipped(train_pixels(copy), pixels_in(train_pixels(copy), expected[7]) + 99)
    images = Images(copy, "train")
    with pytest.raises(UserError, match=IMAGE_7):
        images.read(np.array([3, 7]))
    others = np.delete(np.arange(20), 7)
    assert np.array_equal(images.read(others), expected[others])


def test_one_wrong_bit_in_a_record_is_an_error_where_it_is_read(prepared: Path, copy: Path):
    expected = Images(prepared, "train")
    image = expected.read(np.array([7]))[0]
    flipped(train_file(copy), pixels_in(train_file(copy), image) + 99)
    images = Images(copy, "train")
    with pytest.raises(UserError, match=UNREADABLE_RECORD):
        images.metadata(7)
    assert images.metadata(6) == expected.metadata(6)


def test_a_stream_ends_in_the_same_error_though_other_threads_read(prepared: Path, copy: Path):
    image = Images(prepared, "train").read(np.array([7]))[0]
    flipped(train_pixels(copy), pixels_in(train_pixels(copy), image))
    images = Images(copy, "train")
    batches = stream(images, batch_size=4, seed=0)
    with pytest.raises(UserError, match=IMAGE_7):
        _ = [next(batches) for _ in range(len(images))]


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 0)])
def test_files_that_vanish_after_the_set_was_opened_are_an_error(
    copy: Path, damage: Callable[[Path], None]
):
    images = Images(copy, "train")
    damage(train_pixels(copy))
    damage(train_file(copy))
    with pytest.raises(UserError, match=UNREADABLE):
        images.read(np.array([0]))
    with pytest.raises(UserError, match=UNREADABLE):
        next(stream(images, batch_size=4, seed=0))
    with pytest.raises(UserError, match=UNREADABLE_RECORD):
        images.metadata(0)


def test_no_wrong_bit_of_a_file_of_pixels_changes_an_image(prepared: Path, copy: Path):
    path, chance = train_pixels(copy), random.Random(0)
    original = path.read_bytes()
    everything = np.arange(len(Images(prepared, "train")))
    # the last of them in the checksums
    for offset in [*chance.choices(range(len(original)), k=40), len(original) - 100]:
        flipped(path, offset)
        with pytest.raises(UserError, match=UNREADABLE + r": image \d+ is not as it was written"):
            Images(copy, "train").read(everything)
        path.write_bytes(original)


def test_no_wrong_bit_of_a_record_file_changes_what_is_known_of_an_image(
    prepared: Path, copy: Path
):
    """Each of many bits, of those that say something: the rest of such a file is zeros."""
    path, chance, outcomes = train_file(copy), random.Random(0), set()
    original = path.read_bytes()
    offsets = [offset for offset, byte in enumerate(original) if byte]
    expected = Images(prepared, "train")
    known = [expected.metadata(i) for i in range(len(expected))]
    for offset in chance.sample(offsets, 60):
        flipped(path, offset)
        try:
            images = Images(copy, "train")
            assert [images.metadata(i) for i in range(len(images))] == known
            outcomes.add("the same")
        except UserError:
            outcomes.add("an error")
        path.write_bytes(original)
    assert "an error" in outcomes


# Whatever happens


def some_bytes(data: bytes, chance: random.Random) -> bytes:
    """One change to a file that knows nothing of what is in it."""
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.randint(1, 40))
    flipped = bytes([data[start] ^ 1 << chance.randrange(8)])
    return chance.choice(
        [
            data[:start] + flipped + data[start + 1 :],
            data[:start] + chance.randbytes(end - start) + data[end:],
            data[:start] + data[end:],
            data[:start],
            data[:end] + data[start:end] + data[end:],
            data + data[start:],
        ]
    )


def deep(levels: int) -> Any:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


def some_value(data: bytes, chance: random.Random) -> bytes:
    """One change to a value of a JSON file: it goes, or becomes of another kind."""
    original = json.loads(data)
    locations = list(values(original))
    parent, key = chance.choice(locations)
    strange = [None, True, "", "x", "../../x", "\ud800", "nul\0", -1, 0, 1e308, 10**30, 1 << 64, {}]
    strange += [float("nan"), deep(3), deep(900), {"16": [16]}, str(parent[key]), [parent[key]]]
    if chance.random() < 0.25:
        del parent[key]
    else:
        parent[key] = chance.choice(strange)
    return json.dumps(original).encode()


def values(node: Any) -> Any:
    """Where in a JSON value others lie."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from values(node[key])


def opened(folder: Path) -> list[bytes]:
    """As training opens a set: some images of every split."""
    records.check(folder)
    records.builder(folder)
    splits = [Images(folder, split) for split in SPLITS]
    return [
        images.read(np.array([i])).tobytes()
        for images in splits
        for i in range(min(2, len(images)))
    ]


FILES = ("dataset_report.json", "records/dataset_info.json", "records/features.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [some_bytes, some_value])
def test_damaged_metadata_raise_only_errors_for_people(
    prepared: Path, copy: Path, name: str, damage: Callable[[bytes, random.Random], bytes]
):
    original, chance, expected = (copy / name).read_bytes(), random.Random(name), opened(prepared)
    refused = 0
    for _ in range(35):
        (copy / name).write_bytes(damage(original, chance))
        try:
            assert opened(copy) == expected
        except UserError:
            refused += 1
    assert refused > 25  # the others changed nothing that is said, such as a space


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("damage", [some_bytes, some_value])
def test_forged_metadata_with_a_valid_seal_do_no_worse_than_an_error(
    copy: Path, name: str, damage: Callable[[bytes, random.Random], bytes]
):
    original, chance, report = (
        (copy / name).read_bytes(),
        random.Random(name),
        read_dataset_report(copy),
    )
    (copy / "dataset_report.json").unlink()
    outcomes = set()
    for _ in range(35):
        (copy / name).write_bytes(damage(original, chance))
        sealed = records.seal(report, copy)
        (copy / "dataset_report.json").write_text(json.dumps(sealed))
        try:
            opened(copy)
            outcomes.add("images")
        except UserError:
            outcomes.add("an error")
        (copy / "dataset_report.json").unlink()
    assert outcomes == {"images", "an error"}


# A stranger's set


def sealed(folder: Path, **changes: dict[str, Any]) -> None:
    """The report with other entries, as whoever made it would have sealed it."""
    report = read_dataset_report(folder)
    for field, entries in changes.items():
        report = {**report, field: {**report[field], **entries}}
    report["sha256"] = records._hash_report(report)
    (folder / "dataset_report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("field", ["files", "metadata"])
@pytest.mark.parametrize(
    "name", ["../mine", "/etc/passwd", "records/../../mine", "link", "in/mine"]
)
def test_no_name_in_a_report_leads_out_of_the_set(copy: Path, field: str, name: str):
    mine = copy.parent / "mine"
    mine.write_text("12345")
    (copy / "link").symlink_to(mine)
    (copy / "in").symlink_to(copy.parent)
    sealed(copy, **{field: {name: 1}})
    for use in (lambda: records.check(copy), lambda: Images(copy, "train")):
        with pytest.raises(
            UserError, match=r"names a file, and .*(leads out|no name|link)"
        ) as error:
            use()
        assert "5 bytes" not in str(error.value)  # how large it is, is nobody's business


def test_a_pipe_or_a_huge_file_among_the_metadata_is_not_read(copy: Path):
    os.mkfifo(copy / "pipe")
    with (copy / "huge").open("wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "huge"):
        sealed(copy, metadata={"pipe": "0", name: "0"})
        with pytest.raises(UserError, match="is not as it was written"):
            records.check(copy)


def test_metadata_that_the_report_leaves_out_are_not_read(copy: Path):
    report = {**read_dataset_report(copy), "metadata": {}}
    report["sha256"] = records._hash_report(report)
    (copy / "dataset_report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"records/.*\.json is not as it was written"):
        builder(copy)


def test_records_are_files_of_the_set(copy: Path):
    info = copy / "records" / "dataset_info.json"
    elsewhere = copy.parent / "elsewhere-train.array_record-00000-of-00001"
    shutil.move(next(copy.glob("records/*train*")), elsewhere)
    changed = json.loads(info.read_text())
    for split in changed["splits"]:
        if split["name"] == "train":
            split["filepathTemplate"] = "../../elsewhere-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info.write_text(json.dumps(changed))
    report = read_dataset_report(copy)
    (copy / "dataset_report.json").unlink()
    (copy / "dataset_report.json").write_text(json.dumps(records.seal(report, copy)))
    with pytest.raises(UserError, match=r"its metadata (name records/\.\./\.\./|cannot be read)"):
        builder(copy)
    with pytest.raises(UserError, match="its metadata cannot be used"):
        Images(copy, "train")


def test_a_cached_set_is_that_of_the_listing(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = make(faces)
    assert find_prepared(faces, size=16) == (folder, 60)
    report = read_dataset_report(folder)
    for change in (
        {"listing": "0" * 64},
        {"accepted": 59},
        {"accepted": 59, "refused": [{"path": "never there", "reason": ""}]},
        {"refused": None},
    ):
        forged = {**report, **change}
        forged["sha256"] = records._hash_report(forged)
        (folder / "dataset_report.json").write_text(json.dumps(forged))
        for use in (lambda: make(faces), lambda: find_prepared(faces, size=16)):
            with pytest.raises(UserError, match="holds another prepared set"):
                use()
