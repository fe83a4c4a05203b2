"""Each experiment trains a few updates of small images, resumes, and leaves what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from vaejax import cli
from vaejax.errors import UserError
from vaejax.training import run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# The VAE ------------------------------------------------------------------------------------------


def test_own_faces_are_trained_on_by_the_reports_recipe_and_the_same_command_resumes(
    experiment, faces: Path, capsys
):
    anime = experiment("anime")
    settings = {"data": faces, "size": 16, "batch_size": 4, "log_steps": 1, "devices": 1}
    anime.main(anime.Flags(**settings, steps=2))
    text = capsys.readouterr().out
    assert "recipe   report" in text
    assert "Conv 512, stride 2 + BN" in text  # the report's widths
    folder = Path("runs/00000-anime")
    first = lines(folder)[0]
    assert first["step"] == 0
    assert first["kl"] < 0.003
    assert 0.01 < first["mse"] < 0.3
    anime.main(anime.Flags(**settings, steps=3))
    assert "2 of 3 updates" in capsys.readouterr().out
    assert list(Path("runs").iterdir()) == [folder]


def test_a_person_starts_it_without_data_and_gets_new_faces(tmp_path: Path):
    """As a process of its own: the quick recipe, on the drawn faces."""
    command = [sys.executable, str(ROOT / "experiments" / "anime.py"), "--size", "32"]
    done = subprocess.run(
        [*command, "--steps", "1", "--prior-steps", "2", "--out", "run"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "training on the drawn faces of vaejax, quick recipe" in done.stdout
    with Image.open(tmp_path / "run" / "faces.png") as picture:
        assert picture.size == (10 * 34 + 2, 10 * 34 + 2)


def test_sigma_vae_trains_and_has_no_weight(experiment, faces: Path, tmp_path: Path):
    anime = experiment("anime")
    settings = {"data": faces, "loss": "sigma_vae", "size": 16, "devices": 1}
    with pytest.raises(UserError, match=r"--kl-weight 0.01: it sets nothing in the report recipe"):
        anime.main(anime.Flags(**settings, kl_weight=0.01))
    with pytest.raises(UserError, match="only the report's recipe has another loss"):
        anime.main(anime.Flags(**settings | {"size": 32, "recipe": "quick"}))
    assert list(tmp_path.iterdir()) == []

    settings |= {"batch_size": 4, "log_steps": 1, "steps": 30, "epochs": 100, "out": Path("run")}
    settings |= {"learning_rate": 2e-3, "norm": "batch"}
    anime.main(anime.Flags(**settings))
    assert run.read_spec(Path("run")).loss == {"kind": "sigma_vae", "beta": 1.0}
    train = [line for line in lines(Path("run")) if line["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 0.1
    assert train[-1]["mse"] < 0.95 * train[0]["mse"]
    assert all(line["effective_beta"] == 1 for line in train)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "--epochs 0: must be from 1 to"),
        (["--norm", "best"], "--norm"),
        (["--data", "nowhere"], "nowhere"),
        (["--objective", "calibrated"], r"--objective is called --loss mse_kl\|sigma_vae now"),
        (["--norm", "frozen"], "--norm frozen is called --norm affine now"),
        (["--recipe", "best"], "--recipe"),
    ],
)
def test_a_mistake_is_refused_and_nothing_is_written(
    arguments: list[str], words: str, experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    anime = experiment("anime")
    monkeypatch.setattr(sys, "argv", ["anime.py", *arguments])
    with pytest.raises(UserError, match=words):
        anime.main(cli.parse(anime.Flags, description=anime.__doc__))
    assert list(tmp_path.iterdir()) == []


# The other three ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "field"),
    [
        ("feed_forward", {"latent_dim": 8}, "latent_dim"),
        ("convolutional", {"width": 2}, "width"),
        ("denoising", {"width": 2, "noise": 0.2, "norm": "affine"}, "noise"),
    ],
)
def test_own_faces_are_trained_on_by_the_notebooks_recipe_and_the_same_command_resumes(
    name: str, settings: dict, field: str, experiment, faces: Path, capsys
):
    module = experiment(name)
    flags = {"data": faces, "size": 16, "batch_size": 8, "log_steps": 1, "devices": 1, **settings}
    module.main(module.Flags(**flags, steps=3))
    text = capsys.readouterr().out
    assert "recipe   report" in text
    assert "adam: b1 0.9" in text
    [folder] = Path("runs").iterdir()
    assert run.read_spec(folder).model[field] == settings[field]
    module.main(module.Flags(**flags, steps=9))
    assert "3 of 9 updates" in capsys.readouterr().out
    assert [*Path("runs").iterdir()] == [folder]

    # the watched pictures are reconstructions, which also make the film
    names = {path.name for path in folder.iterdir()}
    assert names >= {"README.md", "curves.png", "learning.mp4", "learning.gif", "reconstructions"}
    assert not names & {"samples", "faces.png"}
    pictures = {path.name for path in (folder / "reconstructions").iterdir()}
    assert pictures >= {"epoch-0001-begin.png", "epoch-0001-end.png", "epoch-0002-end.png"}
    assert "epoch-0002-begin.png" not in pictures  # it would be what epoch 1 ended with
    readme = (folder / "README.md").read_text()
    assert "vaejax sample" not in readme
    assert ("with noise, what the model makes of them" in readme) == (name == "denoising")
    assert ("vaejax denoise runs" in readme) == (name == "denoising")
    assert "vaejax reconstruct runs" in readme
    for line in lines(folder):
        assert line["loss"] == line["bce" if name == "denoising" else "mse"]
        assert "kl" not in line


def test_drawn_faces_are_denoised_by_the_quick_recipe(experiment, tmp_path: Path, capsys):
    denoising = experiment("denoising")
    denoising.main(denoising.Flags(size=16, steps=1, out=Path("run"), devices=1))
    assert "training on the drawn faces of vaejax, quick recipe" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "run" / "reconstructions" / "epoch-0001-end.png"))
    assert sheet.shape == (3 * 18 + 2, 10 * 18 + 2, 3)
    noisy, denoised, clean = sheet[2:].reshape(3, 18, -1, 3)[:, :16].astype(float) / 255
    assert 0.05 < np.std(noisy - clean) < 0.12  # of 0.1, what is cut off at black and white
    assert np.std(denoised - clean) > 0
    assert np.array_equal(clean[:, -2:], np.ones((16, 2, 3)))


# The students -------------------------------------------------------------------------------------


def test_students_without_photographs_are_told_how_they_should_lie(experiment, tmp_path: Path):
    students = experiment("students")
    with pytest.raises(UserError, match=r"no photographs ship with vaejax.*students/anna/1\.jpg"):
        students.main(students.Flags())
    assert list(tmp_path.iterdir()) == []


def test_photographs_are_cropped_and_people_are_not_held_out_in_part(experiment, tmp_path: Path):
    photograph = skimage.data.astronaut()[:300, 100:400]
    for person in range(6):
        (tmp_path / "students" / f"person {person}").mkdir(parents=True)
        for number in range(3):
            moved = np.roll(photograph, (5 * person, 7 * number), axis=(0, 1))
            path = tmp_path / "students" / f"person {person}" / f"{number}.png"
            Image.fromarray(moved).save(path)
    students = experiment("students")
    flags = {"size": 32, "latent_dim": 8, "batch_size": 4, "micro_batch": 2, "devices": 1}
    students.main(students.Flags(data=Path("students"), steps=2, **flags))
    folder = Path("runs/00000-students")
    spec = run.read_spec(folder)
    assert spec.data["persons"] == 6
    assert sum(spec.data["splits"].values()) == 18
    assert all(count % 3 == 0 for count in spec.data["splits"].values())  # entire people
    report = json.loads((Path(spec.schedule.prepared) / "dataset_report.json").read_text())
    assert report["crop"]["several_faces"] == 0
    assert (folder / "faces.png").exists()


# The sweep ----------------------------------------------------------------------------------------


def test_each_weight_is_a_run_and_a_point_and_the_same_command_resumes(
    experiment, faces: Path, tmp_path: Path, capsys
):
    sweep = experiment("rate_distortion")
    settings = {"size": 16, "width": 1, "latent_dim": 4, "batch_size": 8, "devices": 1}
    flags = sweep.Flags(data=faces, steps=4, weights=(0.01,), out=Path("sweep"), **settings)
    sweep.main(flags)
    out = tmp_path / "sweep"
    runs = sorted(path.parent.name for path in out.glob("*/config.json"))
    # pythae's 2 d / n, PyTorch-VAE's 0.00025 d; the report's is among ours
    assert runs == ["kl-0.001", "kl-0.01", "kl-0.01042", "sigma_vae"]
    points = json.loads((out / "rate_distortion.json").read_text())
    assert points["curve"].keys() == {"0.001", "0.01", "0.01042"}
    named = [name.split(" ")[0] for name in points["recommended"]]
    assert named == ["report", "PyTorch-VAE", "pythae", "sigma_vae"]
    for point in (*points["curve"].values(), *points["recommended"].values()):
        np.testing.assert_allclose(point["elbo"], -(point["rate"] + point["distortion"]), rtol=1e-6)
        np.testing.assert_allclose(point["rate"], 4 * point["kl"], rtol=1e-5)
    assert (out / "rate_distortion.png").exists()
    before = (out / "rate_distortion.json").read_bytes()
    (out / "rate_distortion.json").unlink()
    capsys.readouterr()
    sweep.main(flags)
    told = capsys.readouterr()
    assert told.out.count("is finished") == 4
    assert "held-out images" not in told.err  # the runs were measured before
    assert (out / "rate_distortion.json").read_bytes() == before


def test_a_weight_that_cannot_be_is_refused(experiment, tmp_path: Path):
    sweep = experiment("rate_distortion")
    with pytest.raises(UserError, match="--weights"):
        sweep.main(sweep.Flags(weights=(0.1, -1.0)))
    assert list(tmp_path.iterdir()) == []
