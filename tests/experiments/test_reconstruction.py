"""The deterministic experiments as a person starts them: a few updates, tiny images, then on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax.training import run

ROOT = Path(__file__).parents[2]


def experiment(name: str, *flags: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--size", "16", *flags]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "flags", "setting"),
    [
        ("feed_forward", ["--latent-dim", "8"], ("latent_dim", 8)),
        ("convolutional", ["--width", "2"], ("width", 2)),
        ("denoising", ["--width", "2", "--noise", "0.2", "--norm", "frozen"], ("noise", 0.2)),
    ],
)
def test_own_faces_are_learned_by_the_notebooks_recipe_and_the_same_command_goes_on(
    name: str, flags: list[str], setting: tuple, faces: Path, tmp_path: Path
):
    flags = ["--data", str(faces), "--batch-size", "8", "--log-steps", "1", *flags]
    text = experiment(name, *flags, "--steps", "3", cwd=tmp_path)
    assert "recipe   report" in text
    assert "Adam     0.001, b1 0.9" in text
    [folder] = (tmp_path / "runs").iterdir()
    model = run.read(folder)["model"]
    assert model[setting[0]] == setting[1]
    assert "3 of 9 updates" in experiment(name, *flags, "--steps", "9", cwd=tmp_path)
    assert [*(tmp_path / "runs").iterdir()] == [folder]

    # what is watched are reconstructions, which also make the film
    names = {path.name for path in folder.iterdir()}
    assert names >= {"README.md", "curves.png", "learning.mp4", "learning.gif", "reconstructions"}
    assert not names & {"samples", "faces.png"}
    shown = {path.name for path in (folder / "reconstructions").iterdir()}
    assert shown >= {"epoch-0001-begin.png", "epoch-0001-end.png", "epoch-0002-end.png"}
    page = (folder / "README.md").read_text()
    assert "vaejax sample" not in page
    assert ("with noise, what the model makes of them" in page) == (name == "denoising")
    assert ("vaejax denoise runs" in page) == (name == "denoising")
    assert "vaejax reconstruct runs" in page
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        assert line["loss"] == line["bce" if name == "denoising" else "mse"]
        assert "kl" not in line


def test_drawn_faces_are_denoised_by_the_quick_recipe(tmp_path: Path):
    text = experiment("denoising", "--steps", "1", "--out", "run", cwd=tmp_path)
    assert "drawn faces that ship with vaejax, quick recipe" in text
    sheet = np.asarray(Image.open(tmp_path / "run" / "reconstructions" / "epoch-0001-end.png"))
    assert sheet.shape == (3 * 18 + 2, 10 * 18 + 2, 3)
    noisy, denoised, clean = sheet[2:].reshape(3, 18, -1, 3)[:, :16].astype(float) / 255
    assert 0.05 < np.std(noisy - clean) < 0.12  # of 0.1, what is cut off at black and white
    assert np.std(denoised - clean) > 0
    assert np.array_equal(clean[:, -2:], np.ones((16, 2, 3)))
