"""The experiment as a person starts it: the report's whole model, a few updates, then on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def start(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments" / "anime.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def anime(*flags: str, cwd: Path) -> str:
    done = start(*flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for i, image in enumerate(draw(24, 64)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_own_faces_are_learned_by_the_reports_recipe_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path
):
    flags = ["--data", str(folder), "--batch-size", "4", "--log-steps", "1", "--keep", "1"]
    text = anime(*flags, "--steps", "2", cwd=tmp_path)
    assert "27,085,711 parameters" in text
    run = tmp_path / "runs" / "00000-anime"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["kl"] < 0.003
    assert 0.01 < first["mse"] < 0.3
    assert "2 of 3 updates" in anime(*flags, "--steps", "3", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["00000-anime"]


def test_without_data_it_says_that_it_takes_the_drawn_faces(tmp_path: Path):
    text = anime("--steps", "1", "--out", "run", cwd=tmp_path)
    assert "drawn faces that ship with vaejax, quick recipe" in text
    assert (tmp_path / "run" / "faces.png").exists()


def test_the_calibrated_objective_learns_and_has_no_weight(folder: Path, tmp_path: Path):
    flags = ["--data", str(folder), "--recipe", "quick", "--objective", "calibrated"]
    refused = start(*flags, "--kl-weight", "0.01", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--kl-weight 0.01: the calibrated objective has no weight" in refused.stderr
    assert list(tmp_path.iterdir()) == []

    flags += ["--size", "16", "--batch-size", "4", "--log-steps", "1", "--steps", "30"]
    text = anime(*flags, "--epochs", "100", "--out", "run", cwd=tmp_path)
    assert "\nloss     calibrated\n" in text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["loss"] == {"kind": "calibrated"}
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in metrics.splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 0.1
    assert train[-1]["mse"] < 0.7 * train[0]["mse"]
    assert all(abs(line["effective_beta"] - 1) < 1e-4 for line in lines)
