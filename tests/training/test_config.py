"""Recipes, what flags set in them, and the JSON that identifies a run."""

import importlib.util
import json
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaejax import cli, losses
from vaejax.errors import UserError
from vaejax.models.autoencoder import Autoencoder, from_json, hyperparameters
from vaejax.models.denoising import Denoising
from vaejax.models.vae import VAE
from vaejax.training.config import (
    RUN_FORMAT,
    Config,
    OtherVersion,
    Recipe,
    RunFlags,
    RunSpec,
    Schedule,
    differences,
    resolve,
    run_spec,
)
from vaejax.training.optimizer import adam, skip_nonfinite
from vaejax.training.step import Gradient, TrainState, update

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
REPORT = Recipe("report", VAE(), partial(losses.mse_kl, kl_weight=0.01), epochs=150)
QUICK = Recipe(
    "quick",
    VAE(latent_dim=8, width=4, norm="batch"),
    partial(losses.mse_kl, kl_weight=0.002),
    epochs=3,
)
SIGMA = replace(QUICK, loss=partial(losses.sigma_vae))
DENOISING = replace(QUICK, model=Denoising(), loss=partial(losses.reconstruction, error="mse"))


@dataclass(frozen=True)
class Flags(Config):
    objective: str = "of the experiment itself"
    kl_weight: float | None = None
    beta: float | None = None
    b1: float | None = None
    latent_dim: int | None = None
    norm: str | None = None
    width: int | None = None
    noise: float | None = None


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", EXPERIMENTS / f"{name}.py")
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


MODULES = {path.stem: module(path.stem) for path in sorted(EXPERIMENTS.glob("*.py"))}
RECIPES = {
    f"{name}, {recipe.name}": recipe
    for name, loaded in MODULES.items()
    for recipe in vars(loaded).values()
    if isinstance(recipe, Recipe)
}


# Which recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        (Flags(data=Path("faces")), REPORT),
        (Flags(), QUICK),
        (Flags(data=Path("faces"), recipe="quick"), QUICK),
        (Flags(recipe="report"), REPORT),
    ],
)
def test_own_data_have_the_reports_recipe_and_drawn_faces_the_quick_one(flags, recipe):
    chosen = resolve(flags, REPORT, QUICK)
    assert (chosen.name, chosen.model) == (recipe.name, recipe.model)
    assert losses.settings(chosen.loss) == losses.settings(recipe.loss)


def test_a_recipe_that_an_experiment_does_not_have_is_refused():
    assert resolve(Flags(), REPORT).name == "report"
    assert resolve(Flags(data=Path("faces")), QUICK).name == "quick"  # where there is but one
    with pytest.raises(UserError, match="--recipe quick: this experiment has the recipe report"):
        resolve(Flags(recipe="quick"), REPORT)


def test_every_flag_has_a_description(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        cli.parse(Config, args=["--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    options = {part.split()[0].strip(","): part for part in re.split(r"\n\W*--", plain)[1:]}
    for field in fields(Config):
        # after the flag and its values there are words, and then the default in brackets
        option = options[field.name.replace("_", "-")]
        assert re.search(r"\s[A-Za-z]?[a-z']{2,}\s.*\(default", option, re.DOTALL), option


# What flags set -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [("epochs", 7), ("steps", 5), ("batch_size", 9), ("micro_batch", 3), ("learning_rate", 0.5)]
    + [("warmup_steps", 0), ("ema_decay", 0.0), ("flip", True), ("prior", "mixture")],
)
def test_a_flag_replaces_a_setting_of_the_recipe(flag: str, value: object):
    recipe = resolve(Flags(**{flag: value}), REPORT, replace(QUICK, warmup_steps=3))
    assert getattr(recipe, flag) == value


@pytest.mark.parametrize(
    ("flag", "value"),
    [("latent_dim", 3), ("norm", "affine"), ("size", 32), ("compute", "bfloat16")],
)
def test_a_flag_replaces_a_setting_of_the_model(flag: str, value: object):
    recipe = resolve(Flags(**{flag: value}), REPORT, QUICK)
    assert getattr(recipe.model, flag) == value
    assert recipe.model == QUICK.model.clone(**{flag: value})
    assert losses.settings(recipe.loss) == {"kl_weight": 0.002}


def test_a_flag_replaces_a_setting_of_the_loss():
    recipe = resolve(Flags(kl_weight=0.0), REPORT, QUICK)
    assert recipe.loss.func is losses.mse_kl
    assert losses.settings(recipe.loss) == {"kl_weight": 0.0}
    assert losses.settings(resolve(Flags(beta=2.0), SIGMA).loss) == {"beta": 2.0}
    assert recipe.model == QUICK.model


def test_a_flag_replaces_a_setting_of_the_optimizer():
    recipe = resolve(Flags(clip_norm=2.0, b1=0.7), REPORT, QUICK)
    assert recipe.optimizer.func is adam
    assert recipe.optimizer.keywords == {"b1": 0.7, "clip_norm": 2.0}
    assert resolve(Flags(), QUICK).optimizer.keywords == {"b1": 0.5}


def test_without_flags_a_recipe_stays_as_it_is():
    recipe = resolve(Flags(), REPORT, QUICK)
    for field in fields(Recipe):
        if field.name not in ("loss", "optimizer"):
            assert getattr(recipe, field.name) == getattr(QUICK, field.name)
    assert losses.settings(recipe.loss) == losses.settings(QUICK.loss)


@pytest.mark.parametrize(
    ("recipe", "flag", "value"),
    [(SIGMA, "kl_weight", 0.01), (QUICK, "beta", 1.0), (QUICK, "noise", 0.1)]
    + [(DENOISING, "latent_dim", 3), (DENOISING, "kl_weight", 0.0)]
    + [(replace(QUICK, optimizer=partial(optax.sgd)), "clip_norm", 1.0)],
)
def test_a_flag_that_sets_nothing_in_the_recipe_is_refused(recipe, flag: str, value: object):
    words = f"--{flag.replace('_', '-')} {value}: it sets nothing in the quick recipe"
    with pytest.raises(UserError, match=words):
        resolve(Flags(**{flag: value}), recipe)


@pytest.mark.parametrize("name", MODULES)
def test_every_flag_of_an_experiment_sets_something_in_one_of_its_recipes(name: str):
    """Or it says where and how a run takes place, or the experiment itself reads it."""
    kind = MODULES[name].Flags
    recipes = [recipe for key, recipe in RECIPES.items() if key.startswith(f"{name}, ")]
    assert recipes
    settable = {"epochs", "steps", "batch_size", "micro_batch", "learning_rate", "warmup_steps"}
    settable |= {"ema_decay", "flip", "prior", "prior_steps", "prior_width", "prior_depth"}
    settable |= {"minutes", "labels", "conditional"}
    for recipe in recipes:
        settable |= set(hyperparameters(type(recipe.model)))
        settable |= losses.settings(recipe.loss).keys()
        settable |= {"b1", "b2", "eps", "clip_norm"}  # of `adam`
        assert recipe.optimizer.func is adam
    run_flags = {field.name for field in fields(RunFlags)}
    own = {"loss": "anime", "weights": "rate_distortion"}
    text = (EXPERIMENTS / f"{name}.py").read_text()
    for field in fields(kind):
        if field.name in own:
            assert (own[field.name], f"config.{field.name}" in text) == (name, True)
        else:
            assert field.name in settable | run_flags, f"--{field.name} of {name}"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("epochs", 0), ("steps", 0), ("batch_size", -1), ("latent_dim", 0), ("log_steps", 0)]
    + [("width", 0), ("noise", -0.1), ("beta", -1.0), ("warmup_steps", -1), ("micro_batch", 0)]
    + [("checkpoint_steps", 0), ("keep", 0), ("seed", -1), ("seed", 2**32 - 1)]
    + [("kl_weight", -0.1), ("kl_weight", float("nan")), ("clip_norm", 0.0), ("ema_decay", 1.0)]
    + [("epochs", 99999999999999999), ("latent_dim", 3 * 10**9), ("threads", 0)]
    + [("learning_rate", 0.0), ("learning_rate", float("inf")), ("checkpoint_minutes", -1.0)],
)
def test_a_value_out_of_range_is_refused_with_its_flag(flag: str, value: object):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {value}"):
        resolve(Flags(**{flag: value}), REPORT, QUICK)


def test_a_size_that_the_layers_do_not_admit_is_refused():
    with pytest.raises(UserError, match="take a multiple of 16, the nearest is 48 or 64"):
        resolve(Flags(size=60), REPORT, QUICK)


# The optimizers of recipes ------------------------------------------------------------------------


def test_the_cosine_starts_at_the_learning_rate_and_ends_at_zero():
    gradient = {"w": jnp.full(4, 1e3)}
    decaying = replace(QUICK, learning_rate=0.1, cosine_decay=True)
    optimizer = decaying.trainer(updates=10).optimizer
    state, sizes = optimizer.init(gradient), []
    for _ in range(11):
        updates, state = optimizer.update(gradient, state)
        sizes.append(float(jnp.abs(updates["w"]).max()))
    np.testing.assert_allclose(sizes[0], 0.1, rtol=1e-3)
    np.testing.assert_allclose(sizes[-1], 0, atol=1e-6)


def test_a_trainer_has_what_the_recipe_says():
    recipe = replace(QUICK, batch_size=12, micro_batch=4, ema_decay=0.9, flip=True)
    trainer = recipe.trainer(updates=10)
    assert (trainer.model, trainer.loss) == (QUICK.model, QUICK.loss)
    assert (trainer.ema_decay, trainer.flip, trainer.micro_batches) == (0.9, True, 3)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_recipes_optimizer_applies_a_non_finite_update(recipe: Recipe):
    assert len(RECIPES) == 12
    trainer = replace(recipe, ema_decay=0.9, warmup_steps=2).trainer(updates=9)
    params = {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([0.5])}
    gradients = {"w": jnp.asarray([0.1, 0.2]), "b": jnp.asarray([-3.0])}
    zero, opt_state = jnp.zeros((), jnp.int32), skip_nonfinite(trainer.optimizer).init(params)
    state = TrainState(zero, zero, params, {"mean": jnp.zeros(2)}, opt_state, params)
    apply = jax.jit(partial(update, trainer=trainer))
    finite = Gradient(gradients, {"mean": jnp.ones(2)}, {"loss": jnp.float32(1)})
    for _ in range(2):
        state, _ = apply(state, finite)
    assert jnp.all(state.params["w"] != params["w"])
    other = finite._replace(batch_stats={"mean": jnp.zeros(2)})
    for bad in (
        other._replace(gradients={**gradients, "b": jnp.asarray([jnp.nan])}),
        other._replace(metrics={"loss": jnp.float32(jnp.nan)}),
    ):
        after, _ = apply(state, bad)
        assert (int(after.step), int(after.skipped)) == (3, 1)
        same = jax.tree.map(
            lambda a, b: bool(jnp.all(a == b)), after._replace(step=zero, skipped=zero), state
        )
        assert all(jax.tree.leaves(same._replace(step=True, skipped=True)))


# What identifies a run ----------------------------------------------------------------------------


SCHEDULE = Schedule(
    recipe="quick",
    source="/faces",
    prepared="/prepared",
    images=100,
    updates=50,
    updates_per_epoch=10,
    log_steps=10,
    checkpoint_steps=None,
    checkpoint_minutes=3.0,
    keep=3,
    prior="normal",
)


class Tupled(Autoencoder):
    """A model with a field that JSON has no type for."""

    widths: tuple[int, ...] = (4, 8)


def spec_of(recipe: Recipe, **flags: Any) -> RunSpec:
    facts = {"fingerprint": "abc", "persons": 0, "splits": {"train": 100}}
    return run_spec("tiny", Flags(**flags), recipe, data=facts, schedule=SCHEDULE)


@pytest.mark.parametrize(
    "recipe",
    [QUICK, SIGMA, DENOISING, replace(QUICK, model=Tupled(), ema_decay=0.9, cosine_decay=True)],
)
def test_a_run_spec_survives_json(recipe: Recipe):
    spec = spec_of(recipe, seed=7)
    text = json.dumps(spec.to_json(), allow_nan=False)
    again = RunSpec.from_json(json.loads(text))
    assert again == spec
    assert is_dataclass(again.schedule)
    assert from_json(again.model) == recipe.model
    assert differences(again, spec) == []
    assert json.loads(text)["format"] == RUN_FORMAT


def test_a_run_spec_says_what_is_trained():
    spec = spec_of(replace(QUICK, cosine_decay=True, warmup_steps=5, flip=True), seed=7)
    assert spec.loss == {"kind": "mse_kl", "kl_weight": 0.002}
    assert spec.optimizer == {
        "kind": "adam", "b1": 0.5, "b2": 0.999, "eps": 1e-8, "clip_norm": None,
        "learning_rate": 1e-4, "warmup_steps": 5, "decay_steps": 50,
    }  # fmt: skip
    assert (spec.seed, spec.flip, spec.batch_size) == (7, True, 128)
    assert spec_of(QUICK).optimizer["decay_steps"] is None  # its length changes no update


def test_micro_batches_identify_a_run_only_where_images_meet():
    affine = VAE(norm="affine")
    for recipe, expected in [
        (replace(QUICK, model=affine, micro_batch=16), None),
        (replace(QUICK, model=VAE(norm="batch"), micro_batch=16), 16),
        (replace(SIGMA, model=affine, micro_batch=16), 16),
    ]:
        assert spec_of(recipe).micro_batch == expected


DAMAGED = [
    ("experiment", 3), ("model", None), ("model", {"size": 64}), ("loss", {}), ("loss", []),
    ("optimizer", "adam"), ("optimizer", {}), ("data", None), ("batch_size", 0),
    ("batch_size", 2.5), ("batch_size", True), ("micro_batch", "4"), ("micro_batch", 0),
    ("micro_batch", 2.5), ("ema_decay", -1.0), ("ema_decay", float("nan")), ("flip", 1),
    ("loss.kl_weight", "x"), ("loss.beta", True), ("optimizer.learning_rate", -1.0),
    ("flip", None), ("seed", -1), ("seed", None), ("schedule", None), ("schedule", []),
]  # fmt: skip
DAMAGED_SCHEDULE = [
    ("recipe", None), ("source", 1), ("prepared", None), ("images", 0), ("updates", "50"),
    ("updates_per_epoch", 0), ("log_steps", 0), ("checkpoint_steps", 0), ("checkpoint_steps", 1.5),
    ("checkpoint_minutes", 0), ("checkpoint_minutes", None), ("checkpoint_minutes", float("inf")),
    ("keep", 0), ("prior", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), DAMAGED, ids=str)
def test_a_damaged_run_spec_is_refused_with_its_field(field: str, value: object):
    damaged = spec_of(QUICK).to_json()
    if setting := field.partition(".")[2]:
        part = field.partition(".")[0]
        damaged[part] = {**damaged[part], setting: value}
    else:
        damaged[field] = value
    with pytest.raises(ValueError, match=f'"{field}"'):
        RunSpec.from_json(damaged)
    if setting:
        return
    del damaged[field]
    if field not in ("micro_batch", "ema_decay"):  # for which null is a value
        with pytest.raises(ValueError, match=f'"{field}"'):
            RunSpec.from_json(damaged)


@pytest.mark.parametrize(("field", "value"), DAMAGED_SCHEDULE, ids=str)
def test_a_damaged_schedule_is_refused_with_its_field(field: str, value: object):
    good = spec_of(QUICK).to_json()
    damaged = {**good, "schedule": {**good["schedule"], field: value}}
    with pytest.raises(ValueError, match=f'"{field}"'):
        RunSpec.from_json(damaged)


@pytest.mark.parametrize("value", [None, [], "text", 3, {}, {"format": 3}])
def test_what_is_no_run_spec_at_all_is_refused(value: object):
    with pytest.raises(ValueError, match=r"it is not an object|it has no") as error:
        RunSpec.from_json(value)
    assert not isinstance(error.value, OtherVersion)


def test_another_format_is_told_from_damage():
    good = spec_of(QUICK).to_json()
    with pytest.raises(OtherVersion, match=r"another version of vaejax \(vaejax run 99\)"):
        RunSpec.from_json({**good, "format": "vaejax run 99"})
    del good["format"]
    with pytest.raises(OtherVersion, match="no format"):
        RunSpec.from_json(good)


@pytest.mark.parametrize(
    ("recipe", "flags", "words"),
    [
        (replace(QUICK, batch_size=64), {}, ["batch_size 128 → 64"]),
        (QUICK, {"seed": 3}, ["seed 0 → 3"]),
        (SIGMA, {}, ["loss.beta None → 1.0", "loss.kind mse_kl → sigma_vae"]),
        (replace(QUICK, model=QUICK.model.clone(latent_dim=9)), {}, ["model.latent_dim 8 → 9"]),
        (replace(QUICK, ema_decay=0.5), {}, ["ema_decay None → 0.5"]),
        (replace(QUICK, optimizer=partial(adam)), {}, ["optimizer.b1 0.5 → 0.9"]),
        (replace(QUICK, name="report", steps=3, epochs=99), {}, []),
    ],
)
def test_differences_name_their_fields(recipe: Recipe, flags: dict, words: list[str]):
    changed = differences(spec_of(QUICK), spec_of(recipe, **flags))
    assert [line for line in changed if "kl_weight" not in line] == words


def test_without_the_data_neither_images_nor_the_length_they_give_differ():
    spec = spec_of(replace(QUICK, cosine_decay=True))
    other = replace(
        spec, data={"fingerprint": "xyz"}, optimizer={**spec.optimizer, "decay_steps": 60}
    )
    assert "data.fingerprint abc → xyz" in differences(spec, other)
    assert "optimizer.decay_steps 50 → 60" in differences(spec, other)
    assert differences(spec, other, without_data=True) == []
    assert differences(spec, replace(other, seed=1), without_data=True) == ["seed 0 → 1"]
