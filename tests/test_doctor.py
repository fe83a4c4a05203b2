"""What is there is told as it is: layers, runs and how they stand, this machine."""

import json
import os
from functools import partial
from pathlib import Path

import pytest

from vaejax import doctor, losses
from vaejax.errors import UserError
from vaejax.models.autoencoder import to_json
from vaejax.models.vae import VAE
from vaejax.training import run
from vaejax.training.config import Recipe, RunSpec, Schedule

SMALL = VAE(size=16, latent_dim=4, width=1)
STATE = {
    "status": "running",
    "started": "2026-01-02T03:00:00",
    "changed": "2026-01-02T03:04:05",
    "command": "python tiny.py",
    "devices": "1 × cpu",
}


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two epochs of five updates that has made seven of them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "00003-tiny"
    folder.mkdir(parents=True)
    schedule = Schedule(
        recipe="quick",
        source="",
        prepared="",
        images=40,
        updates=10,
        updates_per_epoch=5,
        log_steps=1,
        checkpoint_steps=None,
        checkpoint_minutes=3.0,
        keep=3,
        prior="normal",
    )
    spec = RunSpec(
        experiment="tiny",
        model=to_json(SMALL),
        loss={"kind": "mse_kl"},
        optimizer={"kind": "adam"},
        batch_size=8,
        micro_batch=None,
        ema_decay=None,
        minutes=None,
        flip=False,
        seed=0,
        data={},
        schedule=schedule,
    )
    run.write_spec(folder, spec)
    (folder / "run.json").write_text(json.dumps(STATE))
    lines = [
        {"step": 0, "epoch": 1, "split": "train", "mse": 0.5},
        {
            "step": 5,
            "epoch": 1,
            "split": "validation",
            "mse": 0.25,
            "kl": 0.125,
            "bits_per_dim": 7.5,
        },
        {"step": 6, "epoch": 2, "split": "train", "mse": 0.2},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 7, "sp')
    return folder


def test_a_run_is_told_with_its_progress_and_its_held_out_metrics(begun: Path):
    head, row = doctor.runs().splitlines()
    assert head.split()[:4] == ["run", "state", "epoch", "held"]
    assert "00003-tiny" in row
    assert " 2/2 " in row
    assert row.endswith(" 7/10")
    assert "mse 0.25  kl 0.125  bits_per_dim 7.5" in row
    assert "2026-01-02 03:04" in row


def test_a_run_that_says_running_is_so_only_while_a_process_holds_it(begun: Path):
    assert " stopped " in doctor.runs()  # it was killed
    with run.locked(begun):
        assert " running " in doctor.runs()
    assert " stopped " in doctor.runs()


@pytest.mark.parametrize("status", ["finished", "diverged", "stopped"])
def test_a_run_that_ended_is_told_as_it_ended(status: str, begun: Path):
    (begun / "run.json").write_text(json.dumps({**STATE, "status": status}))
    assert f" {status} " in doctor.runs()


def test_a_broken_run_does_not_hide_the_others(begun: Path):
    other = begun.with_name("00004-tiny")
    other.mkdir()
    (other / "config.json").write_text("{")
    table = doctor.runs()
    assert "unreadable" in table.splitlines()[2]
    assert "00003-tiny" in table


def test_a_stranger_s_run_says_nothing_to_the_terminal(begun: Path):
    state = {**STATE, "status": "finished\x1b[2J\nfaked", "changed": "\x1b]0;title\x07 now"}
    (begun / "run.json").write_text(json.dumps(state))
    named = begun.with_name("00004-\x1b[31m\n")
    named.mkdir()
    (named / "config.json").write_text('{"format": "\\u001b[2J"}')
    table = doctor.runs()
    assert len(table.splitlines()) == 3
    assert not any(ord(c) < 32 for line in table.splitlines() for c in line)
    assert "\\x1b[2J\\x0afaked" in table


@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl", "run.lock"])
def test_a_pipe_in_a_run_does_not_block(name: str, begun: Path):
    (begun / name).unlink(missing_ok=True)
    os.mkfifo(begun / name)
    assert ("unreadable" if name != "run.lock" else "stopped") in doctor.runs()


def test_no_run_is_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.runs() == f"there is no run in {tmp_path / 'runs'} yet"
    assert os.listdir(tmp_path) == []


def test_the_summary_of_a_run_is_its_models_table(begun: Path):
    text = doctor.summary("3")
    assert "variational autoencoder" in text
    assert "Conv 1, stride 1 + BN" in text
    assert doctor.summary(str(begun)).splitlines()[1:] == text.splitlines()[1:]


def test_the_summary_of_an_experiment_has_a_table_for_each_of_its_models():
    text = doctor.summary("anime")
    assert "anime, report recipe" in text
    assert "27,085,711 parameters" in text
    assert "anime, quick recipe" in text
    assert "anime, faces recipe" in text
    assert text.count("parameters:") == 3


def test_what_is_neither_an_experiment_nor_a_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("x = 1")
    for name, words in [("no", "no run 'no'"), ("no.py", "no experiment"), ("other.py", "recipe")]:
        with pytest.raises(UserError, match=words):
            doctor.summary(name)


def test_the_doctor_computes_and_says_how_long_a_run_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    loss = partial(losses.mse_kl, kl_weight=0.01)
    small = Recipe("report", SMALL, loss, epochs=1, batch_size=6)
    monkeypatch.setattr(doctor, "_report", lambda pixels, epochs: small)
    text = "\n".join(doctor.doctor())
    for words in (
        "vaejax",
        "jax 0.",
        "devices  4 × cpu",
        "free for runs",
        "compiled in",
        "images/s",
    ):
        assert words in text
    assert "batch of 8" in text  # the nearest to 6 that four devices share
    assert f"{30_750 * 9 // 10 // 8 * 150:,} updates" in text
    assert os.listdir(tmp_path) == []


def test_the_doctor_says_so_when_the_metrics_are_not_finite(monkeypatch: pytest.MonkeyPatch):
    def broken(x, out, context):
        return 0 * out.output.sum() / 0, {}

    recipe = Recipe("report", SMALL, partial(broken), epochs=1, batch_size=8)
    monkeypatch.setattr(doctor, "_report", lambda pixels, epochs: recipe)
    with pytest.raises(UserError, match="computes wrongly"):
        list(doctor.doctor())
