"""Models with other latents than one vector, defined outside the package, live like the others."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_fit import digest

from vaejax import generate, losses
from vaejax.distributions import Normal
from vaejax.evaluation.evaluate import EvaluationConfig, evaluate, load_run
from vaejax.models.autoencoder import Autoencoder, latent_spec
from vaejax.priors import StandardNormal
from vaejax.training import prior, run
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit


class LatentImage(Autoencoder):
    """z is a small image, [b 4 4 2]."""

    def setup(self):
        self.down, self.up = (
            nn.Conv(4, (4, 4), strides=4),
            nn.ConvTranspose(3, (4, 4), strides=(4, 4)),
        )

    def encode(self, x, *, train, axis=None):
        h = self.down(x)
        return Normal(h[..., :2], 0.1 * h[..., 2:])

    def decode(self, z, *, train, axis=None):
        return nn.sigmoid(self.up(z))


class StyleAndLayout(Autoencoder):
    """z is a vector of five numbers and an image, [b 4 4 1]."""

    def setup(self):
        self.vector, self.image = nn.Dense(10), nn.Conv(2, (4, 4), strides=4)
        self.output, self.up = nn.Dense(3), nn.ConvTranspose(3, (4, 4), strides=(4, 4))

    def encode(self, x, *, train, axis=None):
        h, m = self.vector(x.reshape(len(x), -1)), self.image(x)
        return {"style": Normal(h[:, :5], h[:, 5:]), "layout": Normal(m[..., :1], m[..., 1:])}

    def decode(self, z, *, train, axis=None):
        colour = self.output(z["style"])[:, None, None]
        return nn.sigmoid(self.up(z["layout"]) + colour)


MODELS = {"spatial": LatentImage(size=16), "two": StyleAndLayout(size=16)}


@dataclass(frozen=True)
class Flags(Config):
    pass


def train(model: Autoencoder, data: Path, out: Path, steps: int) -> Path:
    recipe = Recipe("quick", model, partial(losses.sigma_vae), epochs=3, batch_size=8)
    recipe = replace(recipe, learning_rate=1e-3, ema_decay=0.9, flip=True)
    config = Flags(data=data, recipe="quick", out=out, log_steps=1, devices=1, steps=steps)
    folder = fit("tiny", config, resolve(config, recipe))
    assert folder is not None
    return folder


@pytest.fixture(scope="module", params=list(MODELS))
def trained(request, data: Path, tmp_path_factory) -> tuple[Autoencoder, Path]:
    model = MODELS[request.param]
    return model, train(model, data, tmp_path_factory.mktemp("latents") / "run", 3)


def test_it_resumes_bit_for_bit(trained, data: Path, tmp_path: Path):
    model, folder = trained
    train(model, data, tmp_path / "run", 1)
    train(model, data, tmp_path / "run", 3)
    assert digest(tmp_path / "run") == digest(folder)
    assert (tmp_path / "run/faces.png").read_bytes() == (folder / "faces.png").read_bytes()


def test_it_is_sampled_with_its_moving_average_from_both_priors(trained):
    model, folder = trained
    loaded = run.load(folder)
    assert loaded.model == model
    latents = sum(leaf.size for leaf in jax.tree.leaves(latent_spec(model)))
    assert latents == (32 if isinstance(model, LatentImage) else 21)
    normal, mixture = (prior.load(loaded, name) for name in ("normal", "mixture"))
    assert isinstance(normal, StandardNormal)
    for chosen in (normal, mixture):
        z = chosen.sample([3, 4, 5])
        alone = chosen.sample([4])
        assert all(
            np.allclose(a[1:2], b, atol=1e-6)
            for a, b in zip(jax.tree.leaves(z), jax.tree.leaves(alone), strict=True)
        )
        assert np.isfinite(chosen.log_prob(z)).all()
        weights = loaded.weights
        faces = generate.decode(weights.params, weights.batch_stats, z, model=model)
        assert faces.shape == (3, 16, 16, 3)
    assert (folder / "priors" / "mixture.npz").exists()


def test_it_is_evaluated(trained):
    model, folder = trained
    config = EvaluationConfig(samples=50, bound_images=2, bound_samples=3)
    result = evaluate(load_run(folder, "test"), config, None, missing_features="none").json
    metrics = result["metrics"]
    latents = sum(leaf.size for leaf in jax.tree.leaves(latent_spec(model)))
    assert len(result["rate_per_dimension"]) == latents
    assert metrics["rate"]["value"] == pytest.approx(sum(result["rate_per_dimension"]))
    assert metrics["kl"]["value"] == pytest.approx(metrics["rate"]["value"] / latents)
    assert metrics["iwae_bound"]["value"] >= metrics["iwae_elbo"]["value"]
