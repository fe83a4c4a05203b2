"""The students as a person starts it: photographs of people, cropped, split by person."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

ROOT = Path(__file__).parents[2]


def students(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments" / "students.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_without_photographs_it_says_in_a_line_how_they_should_lie(tmp_path: Path):
    done = students(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no photographs ship with vaejax")
    assert "students/anna/1.jpg" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_photographs_are_cropped_and_learned_in_micro_batches_of_people_who_are_not_held_out(
    tmp_path: Path,
):
    photograph = skimage.data.astronaut()[:300, 100:400]
    for person in range(6):
        (tmp_path / "students" / f"person {person}").mkdir(parents=True)
        for number in range(3):
            seen = np.roll(photograph, (5 * person, 7 * number), axis=(0, 1))
            path = tmp_path / "students" / f"person {person}" / f"{number}.png"
            Image.fromarray(seen).save(path)
    flags = ["--size", "32", "--latent-dim", "8", "--batch-size", "4", "--micro-batch", "2"]
    done = students("--data", "students", *flags, "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "00000-students"
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["persons"] == 6
    assert sum(config["data"]["splits"].values()) == 18
    assert all(count % 3 == 0 for count in config["data"]["splits"].values())  # whole people
    report = json.loads((Path(config["schedule"]["prepared"]) / "report.json").read_text())
    assert report["crop"]
    assert (run / "faces.png").exists()
