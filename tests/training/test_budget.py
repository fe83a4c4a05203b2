"""From minutes to updates: what is measured decides once, and the run's folder remembers."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from test_fit import digest
from test_latents import LatentImage

from vaejax import losses
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.models.vae import VAE
from vaejax.training import budget, checkpoint, fit, flow_prior, plan, run
from vaejax.training import devices as dev
from vaejax.training.config import Config, Recipe, resolve

UPDATE, FLOW, VALIDATING, ENCODING, COMPILING = 0.05, 0.02, 0.01, 0.002, 6.0
RECIPE = Recipe(
    "faces",
    LatentImage(size=16),
    partial(losses.mse_kl, kl_weight=0.01),
    minutes=10.0,
    batch_size=8,
    learning_rate=1e-3,
    prior="flow",
)


@dataclass(frozen=True)
class Flags(Config):
    pass


class Faces(Images):
    """As many images as one says."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch):
    """A machine of known speed."""
    measured = plan.Measured(COMPILING, UPDATE, 0, 0, True)
    monkeypatch.setattr(plan, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(flow_prior, "measure", lambda *_, **__: FLOW)
    seconds = VALIDATING, ENCODING
    monkeypatch.setattr(budget, "_seconds_an_image", lambda *_, **__: seconds)


def steps(recipe: Recipe, *, images: int = 8000, elapsed: float = 0.0) -> tuple[int, int]:
    held_out, devices = Faces(images // 20), dev.choose(1)
    chosen = budget.steps_from_minutes(
        recipe, Faces(images), held_out, elapsed=elapsed, devices=devices
    )
    assert chosen == replace(recipe, steps=chosen.steps, prior_steps=chosen.prior_steps)
    return chosen.steps or 0, chosen.prior_steps


@pytest.mark.parametrize("minutes", [5.0, 10.0, 60.0])
@pytest.mark.parametrize("elapsed", [0.0, 100.0])
def test_all_that_a_command_does_fits_into_its_minutes(speed, minutes: float, elapsed: float):
    recipe, images = replace(RECIPE, minutes=minutes), 8000
    updates, prior_updates = steps(recipe, images=images, elapsed=elapsed)
    epochs = updates / (images // 8)
    training = updates * UPDATE + epochs * 2 * (images // 20) * VALIDATING
    total = elapsed + COMPILING + training + prior_updates * FLOW
    total += (images + images // 20) * ENCODING
    assert 0.85 * 60 * minutes < total + budget.END_SECONDS < 60 * minutes


def test_without_a_prior_to_fit_all_time_is_the_autoencoders(speed):
    updates, prior_updates = steps(replace(RECIPE, prior="normal"))
    assert prior_updates == RECIPE.prior_steps
    assert updates > 1.3 * steps(RECIPE)[0]


def test_mirrored_faces_take_time_to_encode(speed):
    assert steps(replace(RECIPE, flip=True))[0] < steps(RECIPE)[0]


def test_too_few_minutes_are_refused_with_a_number_that_is_enough(speed):
    short = replace(RECIPE, minutes=0.5)
    with pytest.raises(
        UserError, match=r"--minutes 0.5 is too little .* Take --minutes (\d+)"
    ) as e:
        steps(short)
    enough = float(str(e.value).split()[-3])
    assert min(steps(replace(RECIPE, minutes=enough))) >= budget.MIN_UPDATES


# Flags --------------------------------------------------------------------------------------------


def test_a_run_has_one_length():
    with pytest.raises(UserError, match="--minutes 3 and --steps: both"):
        resolve(Flags(minutes=3.0, steps=5), RECIPE)
    with pytest.raises(UserError, match="--minutes 3 and --epochs: both"):
        resolve(Flags(minutes=3.0, epochs=5), RECIPE)
    assert resolve(Flags(minutes=3.0), RECIPE).minutes == 3
    fixed = resolve(Flags(steps=5), RECIPE)
    assert (fixed.minutes, fixed.steps, fixed.epochs) == (None, 5, None)
    other = resolve(Flags(minutes=3.0), replace(RECIPE, minutes=None, epochs=4, steps=9))
    assert (other.minutes, other.steps, other.epochs) == (3, None, None)
    assert plan.make_plan(fixed, images=80) == (10, 5)
    assert plan.make_plan(resolve(Flags(epochs=2), RECIPE), images=80) == (10, 20)


def test_more_updates_than_an_int32_counts_are_refused():
    endless = resolve(Flags(epochs=2**31 - 1), RECIPE)
    with pytest.raises(UserError, match="updates are more than a run can count"):
        plan.make_plan(endless, images=80)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": VAE(size=16, latent_dim=3 * 10**8)}, "the model has .*--latent-dim"),
        ({"prior": "flow", "prior_width": 300_000_000}, "the flow has .*--prior-width"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_before_they_are_allocated(change: dict, words: str):
    devices = dev.choose(1)
    plan.refuse_too_large(RECIPE, devices=devices)
    with pytest.raises(UserError, match=words):
        plan.refuse_too_large(replace(RECIPE, **change), devices=devices)
    with pytest.raises(UserError, match="--minutes 0"):
        resolve(Flags(minutes=0.0), RECIPE)


# Runs ---------------------------------------------------------------------------------------------


def train(data: Path, out: Path, minutes: float = 7.0) -> Path | None:
    recipe = replace(RECIPE, minutes=minutes, prior="normal")
    return fit.fit("tiny", Flags(data=data, out=out, devices=1, checkpoint_steps=2), recipe)


def measured_once(monkeypatch: pytest.MonkeyPatch, updates: int | None) -> None:
    """The machine allows so many updates; None: nobody may ask it again."""

    def answer(recipe: Recipe, images: Images, held_out: Images, **_: object) -> Recipe:
        assert updates is not None, "the speed was measured again"
        return replace(recipe, steps=updates, prior_steps=77)

    monkeypatch.setattr(fit, "steps_from_minutes", answer)


def test_the_numbers_are_stored_and_used_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    measured_once(monkeypatch, 5)
    folder = tmp_path / "run"
    train(data, folder)
    spec = run.read_spec(folder)
    assert (spec.minutes, spec.schedule.updates, spec.schedule.prior_steps) == (7.0, 5, 77)
    assert checkpoint.steps(folder)[-1] == 5
    before = digest(folder)

    measured_once(monkeypatch, None)
    (folder / "config.json").write_text("{")  # a checkpoint knows it, too
    train(data, folder)
    assert "is finished" in capsys.readouterr().out
    assert digest(folder) == before
    assert run.read_spec(folder).schedule == spec.schedule

    with pytest.raises(UserError, match=r"minutes 7\.0 → 9\.0"):
        train(data, folder, minutes=9.0)
