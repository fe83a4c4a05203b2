"""A recipe fills in what no flag says, a flag wins, and values that cannot be are refused."""

import re
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from vaejax import cli, objectives
from vaejax.errors import UserError
from vaejax.models.vae import VAE
from vaejax.training.config import Config, Recipe, build_adam, describe_loss, settle

REPORT = Recipe("report", VAE(), partial(objectives.report, kl_weight=0.01), epochs=150)
QUICK = Recipe(
    "quick",
    VAE(latent_dim=8, width=4, norm="batch"),
    partial(objectives.report, kl_weight=0.002),
    epochs=3,
)


@dataclass(frozen=True)
class Flags(Config):
    kl_weight: float | None = None
    latent_dim: int | None = None
    norm: str | None = None
    width: int | None = None
    noise: float | None = None


def test_own_data_take_the_reports_recipe_and_drawn_faces_the_quick_one():
    for config, recipe in [
        (Flags(data=Path("faces")), REPORT),
        (Flags(), QUICK),
        (Flags(data=Path("faces"), recipe="quick"), QUICK),
        (Flags(recipe="report"), REPORT),
    ]:
        settled = settle(config, REPORT, QUICK)
        assert (settled.name, settled.model) == (recipe.name, recipe.model)
        assert describe_loss(settled) == describe_loss(recipe)


def test_every_flag_says_what_it_is_for(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        cli.parse(Config, args=["--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    told = {part.split()[0].strip(","): part for part in re.split(r"\n\W*--", plain)[1:]}
    for field in fields(Config):
        # after the flag and its values there are words, and then the default in brackets
        option = told[field.name.replace("_", "-")]
        assert re.search(r"\s[A-Za-z]?[a-z']{2,}\s.*\(default", option, re.DOTALL), option


def test_a_recipe_that_an_experiment_does_not_have_is_refused():
    assert settle(Flags(), REPORT).name == "report"
    with pytest.raises(UserError, match="--recipe quick: this experiment has the recipe report"):
        settle(Flags(recipe="quick"), REPORT)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("epochs", 7), ("steps", 5), ("batch_size", 9), ("learning_rate", 0.5)],
)
def test_a_flag_wins_over_the_recipe(flag: str, value: object):
    assert getattr(settle(Flags(**{flag: value}), REPORT, QUICK), flag) == value


@pytest.mark.parametrize(("flag", "value"), [("latent_dim", 3), ("norm", "frozen"), ("size", 32)])
def test_a_flag_wins_over_the_recipes_model(flag: str, value: object):
    recipe = settle(Flags(**{flag: value}), REPORT, QUICK)
    assert getattr(recipe.model, flag) == value
    assert recipe.model.width == 4


def test_a_flag_wins_over_the_recipes_loss():
    recipe = settle(Flags(kl_weight=0.0), REPORT, QUICK)
    assert describe_loss(recipe) == {"kind": "report", "kl_weight": 0.0}
    assert recipe.loss.func is objectives.report


@pytest.mark.parametrize(
    ("flag", "value"),
    [("epochs", 0), ("steps", 0), ("batch_size", -1), ("latent_dim", 0), ("log_steps", 0)]
    + [("width", 0), ("noise", -0.1)]
    + [("checkpoint_steps", 0), ("keep", 0), ("seed", -1), ("seed", 2**32), ("kl_weight", -0.1)]
    + [("kl_weight", float("nan")), ("learning_rate", 0.0), ("learning_rate", float("inf"))]
    + [("checkpoint_minutes", -1.0)],
)
def test_a_value_that_cannot_be_is_refused_by_its_flag(flag: str, value: object):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {value}"):
        settle(Flags(**{flag: value}), REPORT, QUICK)


def test_a_size_that_the_layers_do_not_admit_is_refused():
    with pytest.raises(UserError, match="take a multiple of 16, the nearest is 48 or 64"):
        settle(Flags(size=60), REPORT, QUICK)


def test_the_cosine_begins_at_the_learning_rate_and_ends_at_zero():
    gradient = {"w": jnp.full(4, 1e3)}
    decaying = Recipe("r", VAE(), QUICK.loss, epochs=1, learning_rate=0.1, cosine_decay=True)
    adam = build_adam(decaying, updates=10)
    state, sizes = adam.init(gradient), []
    for _ in range(11):
        update, state = adam.update(gradient, state)
        sizes.append(float(jnp.abs(update["w"]).max()))
    np.testing.assert_allclose(sizes[0], 0.1, rtol=1e-3)
    np.testing.assert_allclose(sizes[-1], 0, atol=1e-6)
