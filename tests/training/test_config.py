"""A recipe fills in what no flag says, a flag wins, and values that cannot be are refused."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from vaejax.errors import UserError
from vaejax.training.config import Config, Recipe, build_adam, build_vae, settle

REPORT = Recipe("report", epochs=150)
QUICK = Recipe("quick", epochs=3, latent_dim=8, norm="batch", width=4)


def test_own_data_take_the_reports_recipe_and_drawn_faces_the_quick_one():
    assert settle(Config(data=Path("faces")), REPORT, QUICK) == REPORT
    assert settle(Config(), REPORT, QUICK) == QUICK
    assert settle(Config(data=Path("faces"), recipe="quick"), REPORT, QUICK) == QUICK
    assert settle(Config(recipe="report"), REPORT, QUICK) == REPORT


def test_the_reports_recipe_is_the_reports():
    assert (REPORT.batch_size, REPORT.learning_rate, REPORT.b1) == (128, 1e-4, 0.5)
    assert (REPORT.kl_weight, REPORT.latent_dim, REPORT.norm) == (0.01, 512, "frozen")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("epochs", 7), ("steps", 5), ("batch_size", 9), ("learning_rate", 0.5), ("kl_weight", 0.0)]
    + [("latent_dim", 3), ("norm", "batch")],
)
def test_a_flag_wins_over_the_recipe(flag: str, value: object):
    assert getattr(settle(Config(**{flag: value}), REPORT, QUICK), flag) == value


@pytest.mark.parametrize(
    ("flag", "value"),
    [("epochs", 0), ("steps", 0), ("batch_size", -1), ("latent_dim", 0), ("log_steps", 0)]
    + [("checkpoint_steps", 0), ("keep", 0), ("seed", -1), ("seed", 2**32), ("kl_weight", -0.1)]
    + [("kl_weight", float("nan")), ("learning_rate", 0.0), ("learning_rate", float("inf"))]
    + [("checkpoint_minutes", -1.0)],
)
def test_a_value_that_cannot_be_is_refused_by_its_flag(flag: str, value: object):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {value}"):
        settle(Config(**{flag: value}), REPORT, QUICK)


def test_the_model_is_built_as_the_recipe_has_it():
    model = build_vae(QUICK, size=32)
    assert (model.size, model.latent_dim, model.norm, model.width) == (32, 8, "batch", 4)


def test_the_cosine_begins_at_the_learning_rate_and_ends_at_zero():
    gradient = {"w": jnp.full(4, 1e3)}
    decaying = Recipe("r", epochs=1, learning_rate=0.1, cosine_decay=True)
    adam = build_adam(decaying, updates=10)
    state, sizes = adam.init(gradient), []
    for _ in range(11):
        update, state = adam.update(gradient, state)
        sizes.append(float(jnp.abs(update["w"]).max()))
    np.testing.assert_allclose(sizes[0], 0.1, rtol=1e-3)
    np.testing.assert_allclose(sizes[-1], 0, atol=1e-6)
