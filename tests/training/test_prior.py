"""A run that ends with a flow as its prior: whatever stops it, it ends as it would have ended."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from test_faults import said
from test_fit import PROGRAM, after_steps, digest, leave, lines
from test_latents import LatentImage

from vaejax import commands, generate, losses
from vaejax.data.batches import Images
from vaejax.data.labels import NO_LABELS
from vaejax.data.prepare import prepare
from vaejax.errors import CheckpointError, DivergedError, Interrupted, UserError
from vaejax.evaluation.evaluate import load_run
from vaejax.priors import FlowPrior
from vaejax.training import checkpoint, flow_prior, prior, publish, run
from vaejax.training import devices as dev
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit
from vaejax.training.guards import SignalGuard

pytestmark = pytest.mark.slow
UPDATES, PRIOR_UPDATES = 12, 60
RECIPE = Recipe(
    "quick",
    LatentImage(size=16),
    partial(losses.mse_kl, kl_weight=0.01),
    epochs=1,
    steps=UPDATES,
    batch_size=8,
    learning_rate=1e-3,
    prior="flow",
    prior_steps=PRIOR_UPDATES,
    prior_width=16,
    prior_depth=1,
)


@dataclass(frozen=True)
class Flags(Config):
    pass


def train(data: Path, out: Path, **flags: object) -> Path | None:
    usual = {"data": data, "out": out, "log_steps": 2, "checkpoint_steps": 3, "devices": 1}
    config = Flags(**usual | flags)
    return fit("tiny", config, resolve(config, RECIPE))


def start(data: Path, out: Path) -> subprocess.Popen:
    program = PROGRAM.format(tests=str(Path(__file__).parent), data=str(data), out=str(out))
    return subprocess.Popen(
        [sys.executable, "-c", program.replace("from test_fit", "from test_prior")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def flow_of(folder: Path) -> Path:
    return folder / "priors" / "flow"


def outcome(folder: Path) -> tuple:
    """All that must not depend on what happened on the way."""
    faces = (folder / "faces.png").read_bytes()
    states = digest(folder), digest(flow_of(folder))
    return *states, said(folder), said(flow_of(folder)), faces, run.status(folder)


@pytest.fixture(scope="session")
def many(shared: Callable[..., Path], draw: Callable[..., np.ndarray]) -> Path:
    """A prepared set with more than a hundred training images, which a flow wants."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for i, image in enumerate(draw(125, 16)):
            Image.fromarray(image).save(folder / f"{i:03}.png")

    return prepare(shared("many-faces", make), size=16, say=lambda _: None)


@pytest.fixture(scope="session")
def complete(many: Path, shared: Callable[..., Path]) -> Path:
    """A run with its flow, which nothing interrupted."""
    return shared("run-with-flow", lambda folder: train(many, folder))


@pytest.fixture
def copy(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "run"))


def test_a_run_ends_with_its_prior_and_faces_from_it(complete: Path, many: Path):
    assert run.status(complete) == "finished"
    assert "New faces, drawn from the flow prior" in (complete / "README.md").read_text()
    found = lines(flow_of(complete))
    assert [x["step"] for x in found if x["split"] == "train"] == list(range(0, PRIOR_UPDATES, 2))
    validated = [x for x in found if x["split"] == "validation"]
    assert [x["step"] for x in validated] == list(range(6, PRIOR_UPDATES + 1, 6))
    assert all(np.isfinite(x["loss"]) and x["loss"] > 0 for x in found)
    loaded = run.load(complete)
    assert prior.default_name(loaded) == "flow"
    flow = prior.load(loaded, "flow", steps=40)
    seeds = range(25, 125)
    weights, z = loaded.weights, flow.sample(seeds)
    decode = partial(generate.decode, weights.params, weights.batch_stats, model=loaded.model)
    faces = np.asarray(decode(z))
    assert faces.std(axis=0).mean() > 2  # levels, between faces
    picture = np.asarray(Image.open(complete / "faces.png"))
    for i, face in enumerate(faces):
        top, left = 2 + 18 * (i // 10), 2 + 18 * (i % 10)
        drawn = picture[top : top + 16, left : left + 16].astype(int)
        assert np.abs(drawn - face).max() <= 1


def test_what_a_flow_learns_from_are_the_posterior_means_of_the_training_images(
    complete: Path, many: Path
):
    loaded = run.load(complete)
    codes, held_out = flow_prior._codes(loaded, NO_LABELS)
    assert len(codes.z) == len(Images(many, "train"))
    assert len(held_out.z) == len(Images(many, "validation"))
    saved = checkpoint.newest(flow_of(complete), expected=True)
    assert saved is not None
    assert saved.step == PRIOR_UPDATES
    without = {"labels": "", "attributes": {}}
    assert saved.spec["data"] == {"weights": loaded.weights.digest} | without
    stats = prior.load(loaded, "flow").stats
    np.testing.assert_allclose(stats["mean"], codes.z.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["std"], codes.z.std(0), rtol=1e-4)
    mirrored = loaded._replace(spec=replace(loaded.spec, flip=True))
    doubled, _ = flow_prior._codes(mirrored, NO_LABELS)
    assert len(doubled.z) == 2 * len(codes.z)
    np.testing.assert_array_equal(doubled.z[: len(codes.z)], codes.z)
    assert np.abs(doubled.z[len(codes.z) :] - codes.z).max() > 1e-3


def test_the_same_command_again_says_that_it_is_finished(complete: Path, many: Path, capsys):
    before = outcome(complete), (complete / "faces.png").stat().st_mtime_ns
    train(many, complete)
    assert "is finished" in capsys.readouterr().out
    assert before == (outcome(complete), (complete / "faces.png").stat().st_mtime_ns)


def test_an_evaluation_has_samples_of_the_flow_last(complete: Path):
    assert list(load_run(complete, "test").priors) == ["samples", "samples (flow)"]


# Interruptions ------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_and_killed_in_its_flow_ends_as_if_it_had_not_been(
    complete: Path, many: Path, tmp_path: Path, capsys
):
    out, reached = tmp_path / "run", 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = start(many, out)
        after_steps(process, flow_of(out), len(lines(flow_of(out))) + 4 if reached else 4)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        killed = number == signal.SIGKILL
        assert process.returncode == (-number if killed else 128 + number), errors
        assert "Traceback" not in errors
        assert run.status(out) == ("running" if killed else "stopped")
        assert checkpoint.steps(out)[-1] == UPDATES
        before, reached = reached, checkpoint.steps(flow_of(out))[-1]
        assert before < reached < PRIOR_UPDATES
        assert not (out / "faces.png").exists()
    # until the end there are faces from N(0, I), with a remark
    assert prior.default_name(run.load(out)) == "normal"
    remark = capsys.readouterr().err
    assert "not trained to its end" in remark
    assert "drawn from N(0, I)" in remark
    train(many, out)
    assert outcome(out) == outcome(complete)


def test_a_run_that_was_killed_between_its_flow_and_its_end_comes_to_its_end(
    complete: Path, copy: Path, many: Path
):
    (copy / "faces.png").unlink()
    leave(copy, "running")
    train(many, copy)
    assert outcome(copy) == outcome(complete)


def test_means_that_are_not_finite_stop_the_run_with_advice(
    copy: Path, many: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> np.ndarray:
        return np.full((110, 32), np.nan, np.float32)

    shutil.rmtree(flow_of(copy))
    monkeypatch.setattr(flow_prior, "posterior_means", broken)
    with pytest.raises(DivergedError, match="posterior means may be out of range"):
        train(many, copy)
    assert run.status(copy) == "stopped"
    assert checkpoint.steps(flow_of(copy)) == []


# Other flows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"prior_steps": 10}, {"prior_width": 8}])
def test_another_flow_is_fitted_anew(setting: dict, complete: Path, copy: Path, many: Path):
    train(many, copy, **setting)
    assert digest(copy) == digest(complete)
    assert digest(flow_of(copy)) != digest(flow_of(complete))
    saved = checkpoint.newest(flow_of(copy), expected=True)
    assert saved is not None
    assert saved.step == setting.get("prior_steps", PRIOR_UPDATES)
    steps = [x["step"] for x in lines(flow_of(copy)) if x["split"] == "train"]
    assert steps == list(range(0, saved.step, 2))
    assert (copy / "faces.png").read_bytes() != (complete / "faces.png").read_bytes()
    schedule = run.read_spec(copy).schedule
    assert {name: getattr(schedule, name) for name in setting} == setting


def test_a_flow_of_other_weights_is_refused_until_it_is_fitted_anew(
    copy: Path, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    with monkeypatch.context() as interrupted:

        def stop(*_: object) -> None:
            raise Interrupted("stopped by SIGTERM", exit_code=143)

        interrupted.setattr(prior, "fit", stop)
        with pytest.raises(Interrupted):
            train(many, copy, steps=UPDATES + 2)
    assert run.status(copy) == "stopped"
    picture = tmp_path / "faces.png"
    sample = commands.Sample(str(copy), seeds="0-3", out=picture)
    with pytest.raises(UserError, match=rf"other weights.*`vaejax fit-prior {copy}`"):
        commands.sample(replace(sample, prior="flow"))
    capsys.readouterr()
    commands.sample(sample)
    text = capsys.readouterr()
    assert "4 new faces from the normal prior" in text.out
    assert "warning: " in text.err
    assert "fit-prior" in text.err
    normal = picture.read_bytes()

    commands.fit_prior(commands.FitPrior(str(copy), steps=4))
    assert "has a flow prior" in capsys.readouterr().out
    commands.sample(sample)
    text = capsys.readouterr()
    assert "4 new faces from the flow prior" in text.out
    assert "warning" not in text.err
    assert picture.read_bytes() != normal
    # at a low temperature they are nearly the same face
    commands.sample(replace(sample, temperature=1e-4))
    pixels = np.asarray(Image.open(picture)).astype(int)
    one, other = pixels[2:18, 2:18], pixels[2:18, 20:36]
    assert np.abs(one - other).max() <= 1
    with pytest.raises(UserError, match="--temperature 0"):
        commands.sample(replace(sample, temperature=0.0))
    with pytest.raises(UserError, match="--sampler-steps 0"):
        commands.sample(replace(sample, sampler_steps=0))
    with pytest.raises(UserError, match="--width 0"):
        commands.fit_prior(commands.FitPrior(str(copy), width=0))


def damage(folder: Path, steps: list[int]) -> None:
    for step in steps:
        path = max(checkpoint.path(folder, step).rglob("*"), key=lambda p: p.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_damaged_flow_is_trained_anew_from_what_is_undamaged(
    kept: int, complete: Path, copy: Path, many: Path, capsys
):
    steps = checkpoint.steps(flow_of(copy))
    damage(flow_of(copy), steps[kept:])
    words = "can be used.*`vaejax fit-prior" if kept == 0 else "not trained to its end"
    with pytest.raises((CheckpointError, UserError), match=words):
        prior.load(run.load(copy), "flow")
    assert list(load_run(copy, "test").priors) == ["samples"]
    capsys.readouterr()
    train(many, copy)
    text = capsys.readouterr().err
    assert ("the flow is trained anew" in text) == (kept == 0)
    assert ("resuming from update" in text) == (kept == 1)
    assert outcome(copy) == outcome(complete)


def test_too_few_images_for_a_flow_have_a_mixture_and_a_warning(data: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    train(data, out, steps=2)
    text = capsys.readouterr().err
    assert "training images are too few for a flow as the prior (at least 100)" in text
    assert "it will be a Gaussian mixture" in text
    assert run.read_spec(out).schedule.prior == "mixture"
    assert (out / "priors" / "mixture.npz").exists()
    assert not flow_of(out).exists()
    assert prior.default_name(run.load(out)) == "mixture"
    train(data, out, steps=2)
    assert "is finished" in capsys.readouterr().out


# Devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "how"), [(2, "jit"), (4, "jit"), (4, "pmap")])
def test_several_devices_train_the_same_flow(count: int, how: str, complete: Path, copy: Path):
    loaded = run.load(complete)
    expected = prior.load(loaded, "flow")
    shutil.rmtree(flow_of(copy))
    resources = flow_prior.Resources(dev.choose(count, how), SignalGuard())
    fitted = prior.fit(loaded._replace(folder=copy), resources)
    assert fitted is not None
    for tree in ("params", "stats"):
        ours, theirs = (jax.tree.map(np.asarray, getattr(p, tree)) for p in (fitted, expected))
        apart = optax.tree.norm(jax.tree.map(np.subtract, ours, theirs))
        assert apart < 1e-4 * optax.tree.norm(theirs)
    for x, y in zip(lines(flow_of(copy)), lines(flow_of(complete)), strict=True):
        assert x["step"] == y["step"]
        np.testing.assert_allclose(x["loss"], y["loss"], rtol=1e-4)


def test_a_finished_run_takes_another_prior(copy: Path, many: Path):
    before = digest(copy), (copy / "faces.png").read_bytes()
    train(many, copy, prior="normal")
    assert prior.default_name(run.load(copy)) == "normal"
    assert "New faces, drawn from N(0, I)" in (copy / "README.md").read_text()
    assert digest(copy) == before[0]
    assert (copy / "faces.png").read_bytes() != before[1]
    train(many, copy)  # whose flow is still there
    assert (digest(copy), (copy / "faces.png").read_bytes()) == before


# Labels -------------------------------------------------------------------------------------------


def write_labels(path: Path, *, of: str = "even") -> Path:
    """Every second face is one or the other; some have no row."""
    rows = (f"{i:03}.png,{of if i % 2 else 'odd'},same" for i in range(120))
    path.write_text("\n".join(["file,number,kind", *rows, ""]))
    return path


def test_a_flow_draws_faces_with_the_attributes_that_it_is_asked_for(
    copy: Path, many: Path, tmp_path: Path
):
    commands.fit_prior(commands.FitPrior(str(copy), labels=write_labels(tmp_path / "labels.csv")))
    loaded = run.load(copy)
    codes, _ = flow_prior._codes(loaded, flow_prior._labels(loaded))
    images = Images(many, "train")
    for i in range(len(images)):
        number = int(images.metadata(i)["path"][:3])
        expected = [0, 0] if number >= 120 else [1 if number % 2 else 2, 1]
        assert codes.labels[i].tolist() == expected  # in alphabetical order
    drawn = {
        condition: np.asarray(prior.load(loaded, "flow", condition=condition).sample(range(3)))
        for condition in ("", "number=even", "number=odd", "kind=same,number=odd")
    }
    exported = publish.exported(loaded)
    assert exported.attributes == {"kind": ["same"], "number": ["even", "odd"]}
    assert isinstance(exported.prior, FlowPrior)
    assert np.array_equal(exported.prior.sample(range(3)), drawn[""])
    several = list(drawn.values())
    for i, z in enumerate(several):
        assert all(np.abs(z - other).max() > 1e-4 for other in several[:i])
    with pytest.raises(UserError, match=r"number is even, odd"):
        prior.load(loaded, "flow", condition="number=blue")
    with pytest.raises(UserError, match="only a flow draws faces with some attributes"):
        prior.load(loaded, "normal", condition="number=odd")


def test_other_labels_are_another_flow(copy: Path, tmp_path: Path):
    labels = write_labels(tmp_path / "labels.csv")
    commands.fit_prior(commands.FitPrior(str(copy), labels=labels))
    before = digest(flow_of(copy))
    commands.fit_prior(commands.FitPrior(str(copy)))  # with the same labels: it is there
    assert digest(flow_of(copy)) == before
    write_labels(labels, of="even again")
    commands.fit_prior(commands.FitPrior(str(copy)))
    with pytest.raises(UserError, match="number is even again, odd"):
        prior.load(run.load(copy), "flow", condition="number=even")


def test_labels_that_no_prior_can_use_are_refused_before_training(many: Path, tmp_path: Path):
    labels = write_labels(tmp_path / "labels.csv")
    with pytest.raises(UserError, match="only a flow as the prior uses them"):
        train(many, tmp_path / "run", labels=labels, prior="normal")
    labels.write_text("file,hair\nelsewhere/1.png,blue\n")
    with pytest.raises(UserError, match=r"no row for any of \d+ training images.*elsewhere/1.png"):
        train(many, tmp_path / "run", labels=labels)
    with pytest.raises(UserError, match="cannot be read"):
        train(many, tmp_path / "run", labels=tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"--conditional: --labels FILE.csv has to say"):
        train(many, tmp_path / "run", conditional=True)
    assert not (tmp_path / "run").exists()
