"""Labels of faces: what a CSV says, what it must not be, and what a person may ask for."""

from pathlib import Path

import pytest

from vaejax.data.labels import NO_LABELS, parse_condition, read_labels
from vaejax.data.sources import drawn_attributes, drawn_labels
from vaejax.errors import UserError

TEXT = """file,hair,glasses
a/1.jpg,blue,no
a/2.jpg, red ,
b/3.jpg,blue,yes
"""


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_values_are_numbered_in_order_and_what_is_not_said_is_unknown(tmp_path: Path):
    labels = read_labels(written(tmp_path, TEXT))
    assert labels.attributes == {"hair": ["blue", "red"], "glasses": ["no", "yes"]}
    numbers = labels.of(["b/3.jpg", "a/2.jpg", "other.jpg", "a/1.jpg"])
    assert numbers.tolist() == [[1, 2], [2, 0], [0, 0], [1, 1]]
    assert labels.of([]).shape == (0, 2)
    assert NO_LABELS.of(["a", "b"]).shape == (2, 0)
    again = read_labels(written(tmp_path, b"\xef\xbb\xbf" + TEXT.encode()))  # as Excel writes it
    assert again.files == labels.files
    assert again.sha256 != labels.sha256


def test_the_drawn_faces_have_theirs():
    labels = read_labels(drawn_labels())
    assert len(labels.files) == 3200
    known = drawn_attributes()["00007.webp"]
    numbers = labels.of(["00007.webp"])[0]
    for number, (name, values) in zip(numbers, labels.attributes.items(), strict=True):
        assert values[number - 1] == known[name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,hair\na,b\n", "needs a column 'file'.*its columns are name, hair"),
        ("file\na\n", "a column for each attribute; its columns are file"),
        ("", "its columns are none"),
        ("file,hair\na,x\na,y\n", "a has two rows"),
        ("file,hair\na,\nb,\n", "'hair' has 0 values"),
        ("file,tags\n" + "".join(f"{i},{i}\n" for i in range(300)), "'tags' has 300 values"),
        (b"file,hair\na,\xff\xfe\n", "no CSV in UTF-8"),
    ],
)
def test_what_is_no_table_of_labels_is_refused(tmp_path: Path, text: str | bytes, words: str):
    with pytest.raises(UserError, match=words):
        read_labels(written(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_labels(tmp_path / "none.csv")


def test_a_condition_names_attributes_in_any_order():
    attributes = {"hair": ["blue", "red"], "glasses": ["no", "yes"], "eyes": ["wide"]}
    assert parse_condition("glasses=yes, hair=red", attributes) == [2, 2, 0]
    with pytest.raises(UserError, match=r"there is hair=blue\|red; glasses=no\|yes; eyes=wide"):
        parse_condition("nose=long", attributes)
    with pytest.raises(UserError, match="hair is blue, red"):
        parse_condition("hair=green", attributes)
    with pytest.raises(UserError, match="there is"):
        parse_condition("hair", attributes)
    with pytest.raises(UserError, match="there is none in this run"):
        parse_condition("hair=red", {})
