"""A run that goes on writes every step once."""

import json
import resource
import struct
from contextlib import closing
from pathlib import Path

import pytest

from vaejax.metrics import read_lines
from vaejax.system import format_bytes, format_duration
from vaejax.training.logger import Event, MetricsWriter


def steps(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["split"]) for line in map(json.loads, lines)]


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path):
    with closing(MetricsWriter(tmp_path, step=0)) as metrics:
        metrics.write(step=0, epoch=1, split="train", metrics={"loss": 0.5})
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 0, "epoch": 1, "split": "train", "loss": 0.5}


def test_going_on_from_a_checkpoint_drops_what_came_after_it(tmp_path: Path):
    with closing(MetricsWriter(tmp_path, step=0)) as metrics:
        for step in range(6):
            metrics.write(step=step, epoch=1, split="train", metrics={"loss": 1.0})
            if step % 2:
                metrics.write(step=step + 1, epoch=1, split="validation", metrics={"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "sp')  # a kill in the middle of a line
    # a checkpoint at step 4 has made updates 0 to 3, and was validated at 2 and at 4
    with closing(MetricsWriter(tmp_path, step=4)):
        pass
    train = [(step, "train") for step in range(4)]
    assert sorted(steps(tmp_path)) == sorted([*train, (2, "validation"), (4, "validation")])


def test_lines_that_a_full_disk_did_not_take_are_written_when_there_is_room(tmp_path: Path):
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    line = {"epoch": 1, "split": "train", "metrics": {"loss": 1.0}}
    with closing(MetricsWriter(tmp_path, step=0)) as metrics:
        metrics.write(step=0, **line)
        there = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (there + 10, most[1]))  # half of the next one
        try:
            for step in (1, 2):
                with pytest.raises(OSError, match="too large"):
                    metrics.write(step=step, **line)
            with pytest.raises(OSError, match="too large"):
                metrics.sync()
            assert (tmp_path / "metrics.jsonl").stat().st_size == there + 10
            assert [entry["step"] for _, entry in read_lines(tmp_path / "metrics.jsonl")] == [0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
        metrics.sync()
        assert steps(tmp_path) == [(0, "train"), (1, "train"), (2, "train")]
        metrics.write(step=3, **line)
    assert [step for step, _ in steps(tmp_path)] == [0, 1, 2, 3]
    found = {e.step for e in shown(tmp_path) if e.summary.value}
    assert found == {0, 1, 2, 3}


def shown(folder: Path) -> list:
    """What TensorBoard reads, file by file; of one that was cut off, what comes before."""
    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while len(data) >= 16:
            (size,) = struct.unpack("Q", data[:8])
            if len(data) < size + 16:
                break
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[size + 16 :]
    return events


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.0, "59 s"), (61.0, "1 min 01 s"), (3600.0, "1 h 00 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_sizes_have_a_unit_that_fits():
    assert format_bytes(5 * 2**20) == "5 MiB"
    assert format_bytes(3 * 2**29) == "1.5 GiB"
