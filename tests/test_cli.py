"""A person's mistake is one line and exit code 2, and nothing is left behind."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax import cli
from vaejax.errors import UserError

ROOT = Path(__file__).parents[1]


def vaejax(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["vaejax", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "prepare, sample, reconstruct"),
        (["smple"], "smple"),
        (["sample"], "run's folder"),
        (["sample", "latest"], "there is no run"),
        (["sample", "7"], "no run '7'"),
        (["sample", "latest", "--seeds", "0-x"], "neither a number nor a range"),
        (["sample", "latest", "--seeds", "5-1"], "an empty range"),
        (["sample", "latest", "--seeds", "5-"], "neither a number nor a range"),
        (["sample", "latest", "--out", "faces.jpg"], "must end in .png"),
        (["sample", "latest", "--seeds", "0-99999999999999"], "at most 10,000"),
        (["reconstruct", "latest"], "no image"),
        (["prepare", "nowhere"], "nowhere"),
        (["prepare", ".", "--size", "x"], "--size"),
        (["prepare", "."], "no images"),
        (["prepare", ".", "--margin", "0.5"], "--margin without --crop-faces"),
        (["prepare", ".", "--cascade", "a.xml"], "--cascade without --crop-faces"),
        (["prepare", ".", "--debug-sheet", "a.png"], "add --crop-faces"),
        (["prepare", ".", "--crop-faces", "--cascade", "a.xml"], "a.xml does not exist"),
        (["prepare", ".", "--crop-faces", "--debug-sheet", "a.jpg"], "must end in .png"),
        (["prepare", ".", "--crop-faces", "--margin", "3"], "--margin 3.0: from 0 to 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_numbers_and_ranges():
    assert cli.parse_seeds("0,7,10-12") == [0, 7, 10, 11, 12]
    with pytest.raises(UserError):
        cli.parse_seeds("")


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--norm", "best"], ["--data", "nowhere"]])
def test_an_experiment_refuses_a_mistake_in_one_line(flags: list[str], tmp_path: Path):
    command = [sys.executable, str(ROOT / "experiments" / "anime.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_prepare_leaves_its_report_where_it_was_told(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "set"
    arguments = ["prepare", str(faces), "--size", "32", "--out", str(out)]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 0
    assert {"report.json", "contact_sheet.png"} <= {path.name for path in out.iterdir()}


def test_prepare_crops_to_faces_and_shows_where_there_are_none(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    sheet = tmp_path / "sheet.png"
    arguments = ["prepare", str(faces), "--crop-faces", "--debug-sheet", str(sheet)]
    assert vaejax(*arguments, "--margin", "0.5", monkeypatch=monkeypatch) == 2
    assert "(0 of 60 files): 60 no face found" in capsys.readouterr().err  # discs are none
    with Image.open(sheet) as image:
        assert image.width > 1000


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates of a small model: enough to draw with."""
    sys.path.insert(0, str(ROOT / "tests" / "training"))
    try:
        from test_fit import train
    finally:
        sys.path.pop(0)
    from vaejax.data.prepare import prepare

    out = tmp_path_factory.mktemp("trained") / "run"
    train(prepare(faces, size=16, say=lambda _: None), out, steps=2)
    return out


def test_sample_draws_the_same_face_for_a_seed_whoever_stands_beside_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, seeds in (("four", "0-3"), ("one", "2")):
        arguments = ["sample", str(trained), "--seeds", seeds, "--out", f"{tmp_path}/{name}.png"]
        assert vaejax(*arguments, monkeypatch=monkeypatch) == 0
    four, one = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("four", "one"))
    assert four.shape == (38, 38, 3)
    assert np.array_equal(one[2:18, 2:18], four[20:36, 2:18])  # the third of two rows


def test_the_runs_grid_is_what_sample_draws(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "faces.png"
    assert vaejax("sample", str(trained), "--out", str(out), monkeypatch=monkeypatch) == 0
    grid = Image.open(trained / "samples" / "epoch-0001-end.png")
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(grid))


def test_reconstruct_shows_images_of_any_size_above_what_becomes_of_them(
    trained: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.jpg")
    out = tmp_path / "out.png"
    images = [str(faces / "000.png"), str(tmp_path / "grey.jpg")]
    arguments = ["reconstruct", str(trained), *images, "--out", str(out)]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 0
    picture = np.asarray(Image.open(out))
    assert np.array_equal(picture[2:18, 2:18], np.asarray(Image.open(images[0])))
    assert abs(int(picture[10, 28, 0]) - 128) <= 2


def test_reconstruct_refuses_what_is_no_image_by_its_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    (tmp_path / "page.jpg").write_text("<html>")
    arguments = ["reconstruct", str(trained), str(tmp_path / "page.jpg")]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    assert "page.jpg is no usable image" in capsys.readouterr().err
