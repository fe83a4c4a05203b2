"""A run shows itself learning, and whatever stops it, it ends where it would have ended."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from vaejax import losses
from vaejax.data.prepare import prepare
from vaejax.errors import CheckpointError, DivergedError, UserError
from vaejax.models.vae import VAE
from vaejax.training import checkpoint, devices, run
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit

MODEL = VAE(size=16, latent_dim=4, width=1, norm="batch")
RECIPE = Recipe(
    "quick",
    MODEL,
    partial(losses.mse_kl, kl_weight=0.01),
    epochs=3,
    batch_size=8,
    learning_rate=1e-3,
)


@dataclass(frozen=True)
class Flags(Config):
    latent_dim: int | None = None
    norm: str | None = None


# the same run as a program, to be killed; with as many devices, by which XLA divides its threads
PROGRAM = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, {tests!r})
from test_fit import train
from vaejax.cli import errors_as_messages, unbreakable_output
with errors_as_messages(), unbreakable_output():
    train(Path({data!r}), Path({out!r}), checkpoint_steps=3)
"""


def train(data: Path, out: Path | None, **flags: object) -> Path | None:
    usual = {"data": data, "recipe": "quick", "out": out, "log_steps": 2, "devices": 1}
    config = Flags(**usual | flags)
    return fit("tiny", config, resolve(config, RECIPE))


def leave(folder: Path, status: str) -> None:
    """As a run that has said this of itself."""
    run.write_status(folder, run.read_status(folder), status=status)


def digest(folder: Path) -> str:
    """Over everything that the newest checkpoint holds, as Orbax reads it, bit for bit."""
    newest = checkpoint.path(folder, checkpoint.steps(folder)[-1])
    names = ocp.CheckpointManagerOptions(step_format_fixed_length=7)
    with ocp.CheckpointManager(folder / "checkpoints", options=names) as checkpoints:
        arguments = {"state": ocp.args.StandardRestore(), "data": ocp.args.JsonRestore()}
        restored = checkpoints.restore(int(newest.name), args=ocp.args.Composite(**arguments))
    total = hashlib.sha256(json.dumps(restored["data"]).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored["state"]):
        total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pictures(folder: Path) -> dict[str, bytes]:
    found = sorted([*folder.glob("samples/*.png"), *folder.glob("reconstructions/*.png")])
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_run_leaves_the_folder_that_it_promises(complete_run: Path):
    names = {path.name for path in complete_run.iterdir()}
    assert names >= {"README.md", "config.json", "run.json", "metrics.jsonl", "curves.png"}
    assert names >= {"learning.mp4", "learning.gif", "faces.png", "tensorboard", "checkpoints"}
    samples = ["epoch-0001-begin.png", *(f"epoch-{e:04}-end.png" for e in (1, 2, 3))]
    assert sorted(path.name for path in (complete_run / "samples").iterdir()) == samples
    assert len(list((complete_run / "reconstructions").iterdir())) == 3
    assert run.status(complete_run) == "finished"
    assert not [path for path in complete_run.rglob("*partial*")]


def test_metrics_have_every_step_and_every_epoch_once(complete_run: Path):
    updates = run.read_spec(complete_run).schedule.updates
    found = lines(complete_run)
    assert [x["step"] for x in found if x["split"] == "train"] == list(range(0, updates, 2))
    validation = [x for x in found if x["split"] == "validation"]
    assert [x["epoch"] for x in validation] == [1, 2, 3]
    assert [x["step"] for x in validation] == [updates // 3, 2 * updates // 3, updates]
    keys = {"loss", "mse", "kl", "rate", "distortion", "elbo", "bits_per_dim"}
    for line in found:
        assert line.keys() >= keys | {"effective_beta", "images_per_second"}
        assert all(np.isfinite(line[key]) for key in keys)


def test_the_same_command_again_says_that_it_is_finished(complete_run: Path, data: Path, capsys):
    before = digest(complete_run), (complete_run / "metrics.jsonl").read_bytes()
    train(data, complete_run)
    assert "is finished" in capsys.readouterr().out
    assert before == (digest(complete_run), (complete_run / "metrics.jsonl").read_bytes())


def test_a_run_in_two_parts_ends_bit_for_bit_like_one(
    complete_run: Path, data: Path, tmp_path: Path, capsys
):
    train(data, tmp_path / "run", steps=7)  # in the middle of an epoch
    assert run.read_status(tmp_path / "run")["status"] == "finished"
    capsys.readouterr()
    train(data, tmp_path / "run")
    assert "run: 7 of " in capsys.readouterr().out
    assert digest(tmp_path / "run") == digest(complete_run)
    assert (tmp_path / "run" / "faces.png").read_bytes() == (
        complete_run / "faces.png"
    ).read_bytes()


def test_images_kept_on_the_device_make_the_same_run_and_it_goes_on_without(
    complete_run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gathered = []
    gather = devices.ResidentImages.__call__
    monkeypatch.setattr(
        devices.ResidentImages, "__call__", lambda self, i: gathered.append(i) or gather(self, i)
    )
    with monkeypatch.context() as resident:
        resident.setattr(devices, "fit_on_device", lambda images, devices: True)
        train(data, tmp_path / "run", steps=7)
    assert len(gathered) == 7
    train(data, tmp_path / "run")
    assert len(gathered) == 7
    assert digest(tmp_path / "run") == digest(complete_run)


def start(data: Path, out: Path) -> subprocess.Popen:
    program = PROGRAM.format(tests=str(Path(__file__).parent), data=str(data), out=str(out))
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def after_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    """Wait until so many lines are written, or the process ends."""
    while process.poll() is None:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= steps:
            return
        time.sleep(0.005)


def test_a_run_that_was_killed_between_its_last_checkpoint_and_its_end_comes_to_its_end(
    complete_run: Path, data: Path, tmp_path: Path
):
    out = tmp_path / "run"
    shutil.copytree(complete_run, out)
    for name in ("faces.png", "learning.mp4", "learning.gif"):
        (out / name).unlink()
    leave(out, "running")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "spl')  # cut off by a kill or a full disk
    train(data, out)
    assert run.status(out) == "finished"
    assert (out / "faces.png").read_bytes() == (complete_run / "faces.png").read_bytes()
    assert (out / "learning.mp4").stat().st_size > 0
    assert len(lines(out)) == len(lines(complete_run))


def test_fewer_updates_than_were_made_are_refused_and_change_nothing(
    complete_run: Path, data: Path, tmp_path: Path
):
    out = tmp_path / "run"
    shutil.copytree(complete_run, out)
    leave(out, "stopped")
    before = {path: path.read_bytes() for path in out.glob("*.json*")}
    with pytest.raises(UserError, match="more than the 2 requested"):
        train(data, out, steps=2)
    assert before == {path: path.read_bytes() for path in out.glob("*.json*")}


def test_the_same_images_arranged_by_person_are_another_run(
    complete_run: Path, faces: Path, tmp_path: Path
):
    for path in faces.iterdir():
        folder = tmp_path / "people" / path.stem[-1]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    people = prepare(tmp_path / "people", size=16, say=lambda _: None)
    with pytest.raises(UserError, match=r"data.persons 0 → 10"):
        train(people, complete_run)


def test_a_run_among_the_images_it_is_trained_on_is_refused(faces: Path):
    with pytest.raises(UserError, match="among the images"):
        train(faces, faces / "run")
    assert not (faces / "run").exists()


def test_another_command_in_the_same_folder_is_refused_with_what_differs(
    complete_run: Path, data: Path
):
    before = (complete_run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"model.latent_dim 4 → 5.*seed 0 → 1"):
        train(data, complete_run, latent_dim=5, seed=1)
    assert (complete_run / "config.json").read_bytes() == before


def test_fresh_starts_anew_and_keeps_the_old_folder(data: Path, tmp_path: Path):
    train(data, tmp_path / "run", steps=1)
    train(data, tmp_path / "run", steps=1, seed=1, fresh=True)
    assert run.read_spec(tmp_path / "run").seed == 1
    assert run.read_spec(tmp_path / "run.1").seed == 0


def test_micro_batches_are_part_of_a_run_whose_loss_is_of_the_entire_batch(
    data: Path, tmp_path: Path
):
    recipe = replace(RECIPE, model=MODEL.clone(norm="affine"), steps=1)

    def start(out: str, **changes: object) -> None:
        config = Config(data=data, out=tmp_path / out, devices=1)
        fit("tiny", config, replace(recipe, **changes))

    start("means", micro_batch=4)
    start("means")  # the same up to rounding
    sigma_vae = partial(losses.sigma_vae)
    start("sigma_vae", loss=sigma_vae, micro_batch=4)
    with pytest.raises(UserError, match="micro_batch 4 → None"):
        start("sigma_vae", loss=sigma_vae)


def test_a_run_without_a_name_gets_the_next_number_and_is_found_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train(data, None, steps=1) == Path("runs/00000-tiny")
    assert train(data, None, steps=1, seed=1) == Path("runs/00001-tiny")
    assert train(data, None, steps=1) == Path("runs/00000-tiny")
    assert train(data, None, steps=1, fresh=True) == Path("runs/00002-tiny")
    assert run.find("latest") == Path("runs/00002-tiny")
    assert run.find("1") == Path("runs/00001-tiny")


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(data: Path, tmp_path: Path):
    with pytest.raises(DivergedError, match=r"learning-rate"):
        train(data, tmp_path / "other", learning_rate=1e30)
    assert run.status(tmp_path / "other") == "diverged"
    with pytest.raises(CheckpointError, match="diverged before its first checkpoint"):
        run.load(tmp_path / "other")


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert train(faces, tmp_path / "run", dry_run=True) is None
    text = capsys.readouterr().out
    for word in ("60 files", "updates", "memory", "disk", "time", "Conv 1, stride 1 + BN"):
        assert word in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(name: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        train(tmp_path / "no data", tmp_path / name)
    assert (tmp_path / "file").read_text() == ""


def test_a_folder_of_something_else_is_left_alone(data: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match="neither empty nor a run's folder"):
            train(data, tmp_path, fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
