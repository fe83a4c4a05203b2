"""Files of weights are read as their own programs read them, and nothing in them is executed.

torch 2.13 wrote `tensors_*.pth`: the weights of a convolution and a batch norm, and two views.
"""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vaejax.errors import UserError
from vaejax.evaluation.weights import parse_pickle, read_numpy, read_torch, take

HERE = Path(__file__).parent
TENSORS = [HERE / "tensors_zipped.pth", HERE / "tensors_in_sequence.pth"]


def pickled(path: Path, value: object, protocol: int = 3) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_what_was_pickled(tmp_path: Path, protocol: int):
    random = np.random.default_rng(0)
    a = random.normal(size=(3, 4)).astype(np.float32)
    path = pickled(
        tmp_path / "a", {"one": {"a": a, "b": np.asfortranarray(a[:2])}, "c": a}, protocol
    )
    weights = read_numpy(path)
    np.testing.assert_array_equal(take(weights, "one", "a", shape=(3, 4)), a)
    np.testing.assert_array_equal(take(weights, "one", "b", shape=(2, 4)), a[:2])
    np.testing.assert_array_equal(take(weights, "c", shape=(3, 4)), a)


@pytest.mark.parametrize("path", TENSORS, ids=lambda path: path.stem)
def test_tensors_are_what_was_saved(path: Path):
    weights = read_torch(path)
    kernel = np.arange(36, dtype=np.float32).reshape(3, 2, 3, 2) / 8
    np.testing.assert_array_equal(take(weights, "0.weight", shape=(3, 2, 3, 2)), kernel)
    np.testing.assert_array_equal(take(weights, "0.bias", shape=(3,)), [-1, 0.5, 2])
    np.testing.assert_array_equal(take(weights, "1.running_var", shape=(3,)), [1, 1, 1])
    turned = take(weights, "transposed", shape=(3, 2, 2, 3))
    np.testing.assert_array_equal(turned, kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(take(weights, "part", shape=(3,)), [4, 5, 6])


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("2.weight", (3,), "it has no 2.weight"),
        ("1.num_batches_tracked", (), "no 1.num_batches_tracked, of float32"),
        ("0.bias", (4,), r"0.bias has shape \(3,\) instead of \(4,\)"),
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named(name, shape, what):
    with pytest.raises(UserError, match=f"tensors_zipped.pth.*{what}"):
        take(read_torch(TENSORS[0]), name, shape=shape)


class Command:
    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("read", [read_numpy, read_torch])
def test_a_file_that_asks_for_a_command_is_refused_and_runs_nothing(tmp_path, read, protocol):
    made = tmp_path / "made"
    path = pickled(tmp_path / "a", {"a": Command(made)}, protocol)
    if read is read_torch:
        inside, path = path.read_bytes(), tmp_path / "a.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", inside)
    with pytest.raises(UserError, match=f"{path.name} is no file of weights.*'system of posix'"):
        read(path)
    assert not made.exists()
    pickle.loads(pickle.dumps(Command(made)))  # the same, as a program does that trusts it
    assert made.exists()


def test_a_truncated_file_is_refused(tmp_path: Path):
    a = np.ones((2, 3), np.float32)
    sources = [(read_numpy, pickled(tmp_path / "a", {"a": a, "b": a})), (read_torch, TENSORS[1])]
    for read, source in sources:
        data, part = source.read_bytes(), tmp_path / "part"
        for length in range(len(data)):
            part.write_bytes(data[:length])
            with pytest.raises(UserError, match="part is no file of weights"):
                read(part)
    data = TENSORS[0].read_bytes()
    for length in range(0, len(data), 97):
        part.write_bytes(data[:length])
        with pytest.raises(UserError, match="part is no file of weights"):
            read_torch(part)


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R(K\x03X\x01\x00\x00\x00<NNNtb"
GIANT = b"\0\0\0\0\x40"  # 2**38 of them


@pytest.mark.parametrize(
    ("program", "what"),
    [
        (b"", "exhausted"),
        (b"no pickle at all", ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\x80\x03B\xff\xff\xff\xffabc.", "expected 4294967295 bytes"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**63 - 1) + b"abc.", "bytes in a bytes8"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.", "bytes in a unicodestring8"),
        (b"\x80\x03r\xff\xff\xff\xff.", "index"),  # an empty entry of the memo
        (b"\x80\x03)" + 100_000 * b"\x85" + b".", "no dictionary"),  # a tuple in a tuple in ...
        (b"\x80\x03)" + 300_000 * b"\x85" + b".", "more than 200,000 instructions"),
        (b"\x80\x03}" + 100 * b"(" + b".", "too many values"),
        (b"\x80\x03}N}s.", "a NoneType instead of a str"),
        (b"\x80\x03}(](e" + b"]s.", ""),
        (b"\x80\x03I" + 5000 * b"9" + b"\n.", ""),
        (b"\x80\x03c__builtin__\neval\n(X\x01\x00\x00\x001tR.", "'eval of __builtin__'"),
        (b"\x80\x03c__builtin__\nstr\n)\x81.", "do not need, NEWOBJ"),
        (b"\x80\x03cos\nenviron\n}b.", "state of a Name"),
        (
            b"\x80\x03" + ARRAY + b"(K\x01\x8a\x05" + GIANT + b"\x85" + DTYPE + b"\x89C\x04abcdtb.",
            "cannot reshape",
        ),
        (
            b"\x80\x03" + ARRAY + b"(K\x01\x8a\x01\xff\x85" + DTYPE + b"\x89C\x04abcdtb.",
            "an impossible shape",  # -1
        ),
    ],
)  # fmt: skip
def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, program: bytes, what: str):
    path = tmp_path / "weights"
    path.write_bytes(program)
    with pytest.raises(UserError, match=f"weights is no file of weights.*{what}") as refusal:
        read_numpy(path)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="weights is no file of weights"):
        read_torch(path)


def test_a_dictionary_inside_itself_is_refused(tmp_path: Path):
    itself: dict[str, object] = {}
    itself["a"] = itself
    weights = read_numpy(pickled(tmp_path / "a", itself))
    with pytest.raises(UserError, match="has no a/a/a"):
        take(weights, "a", "a", "a", shape=(1,))


def rewritten(path: Path, change) -> Path:
    """The zipped tensors, with the bytes of each part as `change(name, bytes)` has them."""
    with zipfile.ZipFile(TENSORS[0]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return path


@pytest.mark.parametrize(
    ("part", "old", "new", "what"),
    [
        ("data.pkl", b"K$tq", b"J\xff\xff\xff\x7ftq", "36 values of 2,147,483,647"),
        ("data/0", b"", b"\0\0\0\0", "37 values of 36"),
        ("byteorder", b"little", b"big", "little-endian"),
        ("data.pkl", b"FloatStorage", b"HalfStorage", "tensors of a type"),
        ("data.pkl", b"_rebuild_tensor_v2", b"_rebuild_other", "'_rebuild_other of torch._utils'"),
    ],
)
def test_tensors_that_do_not_fit_their_file_are_refused(tmp_path, part, old, new, what):
    def change(name: str, data: bytes) -> bytes:
        if not name.endswith(part):
            return data
        assert old in data
        return data + new if not old else data.replace(old, new, 1)

    with pytest.raises(UserError, match=what):
        read_torch(rewritten(tmp_path / "a.pth", change))


def test_a_tensor_stays_within_its_values(tmp_path: Path):
    data = TENSORS[1].read_bytes()
    kernel = b"(K\x03K\x02K\x03K\x02t"  # the shape of 0.weight, 3 x 2 x 3 x 2
    part = b"QK\x04K\x03\x85"  # 3 values after 4 others of 10
    for name, old, new in [
        ("0.weight", kernel, b"(K\x04K\x02K\x03K\x02t"),
        ("0.weight", kernel, b"(K\x03K\x02K\x03K\xfft"),
        ("part", part, b"QK\x08K\x03\x85"),
        ("part", part, b"QJ\xff\xff\xff\xffK\x03\x85"),
    ]:
        assert data.count(old) == 1
        (tmp_path / "a.pth").write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match=f"'{name}' reaches beyond"):
            read_torch(tmp_path / "a.pth")


def test_no_small_zip_grows_large(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(UserError, match="compressed"):
        read_torch(tmp_path / "a.pth")
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("a/data.pkl", b"abc")
    data = bytearray(stored.getvalue())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = 2 * struct.pack("<I", 2**31)  # what it says of its size
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(UserError, match="declare more bytes"):
        read_torch(tmp_path / "a.pth")


def test_missing_special_and_too_large_files_are_not_read(tmp_path: Path):
    with pytest.raises(UserError, match="nothing: No such file"):
        read_torch(tmp_path / "nothing")
    with pytest.raises(UserError, match="weights /dev/null: it is not a regular file"):
        read_torch(Path("/dev/null"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**31)  # a hole, which takes no disk
    with pytest.raises(UserError, match="more than 1,073,741,824 bytes"):
        read_torch(tmp_path / "large")


def test_the_pickle_ends_where_the_next_begins():
    file = io.BytesIO(pickle.dumps(1, 2) + pickle.dumps({"a": ()}, 2) + b"rest")
    assert (parse_pickle(file), parse_pickle(file), file.read()) == (1, {"a": ()}, b"rest")
