"""A run that goes on writes every step once."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from vaejax.log import Metrics, duration, size


def steps(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["split"]) for line in map(json.loads, lines)]


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path):
    with closing(Metrics(tmp_path, step=0)) as metrics:
        metrics.write(step=0, epoch=1, split="train", figures={"loss": 0.5})
        line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 0, "epoch": 1, "split": "train", "loss": 0.5}


def test_going_on_from_a_checkpoint_drops_what_came_after_it(tmp_path: Path):
    with closing(Metrics(tmp_path, step=0)) as metrics:
        for step in range(6):
            metrics.write(step=step, epoch=1, split="train", figures={"loss": 1.0})
            if step % 2:
                metrics.write(step=step + 1, epoch=1, split="validation", figures={"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "sp')  # a kill in the middle of a line
    # a checkpoint at step 4 has made updates 0 to 3, and was validated at 2 and at 4
    with closing(Metrics(tmp_path, step=4)):
        pass
    train = [(step, "train") for step in range(4)]
    assert sorted(steps(tmp_path)) == sorted([*train, (2, "validation"), (4, "validation")])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.0, "59 s"), (61.0, "1 min 01 s"), (3600.0, "1 h 00 min")],
)
def test_durations_read_as_people_say_them(seconds: float, text: str):
    assert duration(seconds) == text


def test_sizes_have_a_unit_that_fits():
    assert size(5 * 2**20) == "5 MiB"
    assert size(3 * 2**29) == "1.5 GiB"
