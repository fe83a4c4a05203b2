"""The files of an evaluation show what it has computed."""

import errno
import io
import json
import random
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaejax import commands, pictures, plots
from vaejax.errors import StorageError, UserError
from vaejax.evaluation import evaluate, tables
from vaejax.training import run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from power_loss import Recorder, states


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A run that was evaluated before."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


def test_an_evaluation_is_written_with_its_tables_and_pictures(written: Path, evaluation):
    content = read(written)
    place = content.pop("pictures")
    assert content == evaluation.json
    page = (written / "evaluation.md").read_text()
    assert page.startswith("# Evaluation of run on held-out images\n")
    for name in tables.CAPTIONS.keys() - {"samples_mixture.png", "samples_flow.png"}:  # it has none
        assert f"({place}/{name})" in page
    terminal = "\n".join(tables.to_text(evaluation.json))
    for name in {name.split("/")[0] for name in evaluation.json["metrics"]}:
        assert f"| {name} |" in page
        assert f"  {name} " in terminal
    for note in tables.notes(evaluation.json):
        assert note in page
        assert note in terminal
    assert "Left out: memorized_pixels/reconstructions, memorized_pixels/samples" in page


def test_pictures_show_the_arrays_of_the_evaluation(written: Path, evaluation, tmp_path: Path):
    arrays = evaluation.pictures
    place = written / read(written)["pictures"]
    expected = {
        "samples_normal.png": pictures.grid(arrays.samples["normal"], columns=10),
        "reconstructions.png": pictures.stack_rows(arrays.reconstructions),
        "worst_and_best.png": pictures.stack_rows(arrays.worst_and_best, columns=10),
        "nearest.png": pictures.stack_rows(arrays.nearest),
    }
    for name, picture in expected.items():
        with Image.open(place / name) as image:
            np.testing.assert_array_equal(np.asarray(image), picture)
    plots.rates(arrays.rate_per_dimension, tmp_path / "rates.png")
    drawn = (place / "rates.png").read_bytes()
    assert drawn == (tmp_path / "rates.png").read_bytes()


def test_an_evaluation_is_not_written_into_what_a_link_leads_to(
    trained: Path, evaluation, tmp_path: Path
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    (folder / "evaluation").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="evaluation in it is a link"):
        tables.write(folder, evaluation)
    (folder / "evaluation").unlink()
    mine = tmp_path / "mine" / "file"
    mine.write_text("mine")
    for name in ("evaluation.json", "evaluation.md"):
        (folder / f".partial-{name}").symlink_to(mine)
        (folder / name).symlink_to(mine)
    tables.write(folder, evaluation)
    assert mine.read_text() == "mine"
    content = read(folder)
    del content["pictures"]
    assert content == evaluation.json


# Whatever happens while it is written


def other(evaluation: evaluate.Evaluation) -> evaluate.Evaluation:
    """Another evaluation with other pictures, of which one is missing."""
    drawn = evaluation.pictures
    rows = tuple(255 - row for row in drawn.reconstructions)
    drawn = drawn._replace(reconstructions=rows, rate_per_dimension=None)
    return evaluation._replace(json={**evaluation.json, "step": 77}, pictures=drawn)


def test_the_next_evaluation_takes_the_place_of_the_one_before_at_once(
    folder: Path, evaluation: evaluate.Evaluation
):
    """After a kill, and after a power cut, at any moment."""
    shutil.rmtree(folder / "checkpoints")  # which are not looked at
    old = read(folder)
    known = {json.dumps(old): contents(folder / old["pictures"])}
    recorder = Recorder(folder)
    with recorder.recording():
        tables.write(folder, other(evaluation))
    new = read(folder)
    known[json.dumps(new)] = contents(folder / new["pictures"])
    assert new["step"] == 77
    assert "reconstructions.png" in known[json.dumps(new)]
    assert old["pictures"] != new["pictures"]
    found = []
    chance = random.Random(0)
    for state in states(recorder.before, recorder.operations, extra=3, chance=chance):
        tree = {name: content or b"" for name, content in state.disk.tree().items()}
        shown = json.loads(tree["evaluation.json"])
        found.append(shown)
        for name, content in known[json.dumps(shown)].items():
            assert tree[f"{shown['pictures']}/{name}"] == content
        links = re.findall(r"\]\((.*?)\)", tree["evaluation.md"].decode())
        assert len(links) >= 4
        assert tree.keys() >= set(links)
    assert found[0] == old
    assert found[-1] == new


def test_the_pictures_of_earlier_evaluations_are_deleted_and_nothing_else(
    folder: Path, evaluation: evaluate.Evaluation
):
    place, mine = folder / "evaluation", folder.parent / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    (place / "0badcafe").symlink_to(mine)
    (place / "rates.png").write_bytes(b"of an older version")
    (place / "my notes.txt").write_text("mine")
    tables.write(folder, evaluation)
    present = Path(read(folder)["pictures"]).name
    assert {path.name for path in place.iterdir()} == {present, "my notes.txt", "0badcafe"}
    assert (mine / "file").exists()


def test_what_a_full_disk_does_not_take_is_named_and_the_rest_is_written(
    folder: Path, evaluation: evaluate.Evaluation
):
    before, room = read(folder), len(tables.json_text(read(folder)).encode())
    drawn = contents(folder / before["pictures"])
    too_large = {name for name, content in drawn.items() if len(content) > room}
    assert too_large
    write_with_room(folder, evaluation, room // 2, ["evaluation.json"])
    assert read(folder) == before  # and its pictures
    assert contents(folder / before["pictures"]) == drawn
    write_with_room(folder, evaluation, room, [*too_large])
    after = read(folder)
    assert after["pictures"] != before["pictures"]
    assert contents(folder / after["pictures"]).keys() == drawn.keys() - too_large
    assert contents(folder / before["pictures"]) == drawn  # they stay until one is whole


def write_with_room(folder: Path, evaluation, room: int, names: list[str]) -> None:
    """No file can have more bytes than that; these cannot be written."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most[1]))
        with pytest.raises(StorageError) as raised:
            tables.write(folder, evaluation)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    told = re.findall(r"([a-z_]+\.[a-z]+): File too large", str(raised.value))
    assert sorted(told) == sorted(names)


class Broken(io.TextIOBase):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_the_table_is_printed_first_and_the_files_do_not_depend_on_it(
    folder: Path, evaluation: evaluate.Evaluation, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: other(evaluation))

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(tables, "fsync", full)
        with pytest.raises(StorageError, match=r"evaluation\.json: No space left on device$"):
            commands.evaluate(commands.Evaluate(str(folder)))
    assert "bits_per_dim" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(BrokenPipeError):
        commands.evaluate(commands.Evaluate(str(folder)))
    assert read(folder)["step"] == 77


def test_one_evaluation_at_a_time_beside_training(folder: Path):
    busy = pytest.raises(UserError, match=r"already being evaluated by process \d+ on .*: wait")
    with run.locked(folder), run.evaluating(folder), busy:
        commands.evaluate(commands.Evaluate(str(folder)))
    with run.evaluating(folder):
        pass
