"""Priors: what they draw, their densities, how a mixture is fitted and kept."""

import os
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from vaejax import flow, generate, priors
from vaejax.distributions import Normal
from vaejax.errors import UserError
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.feed_forward import FeedForward
from vaejax.priors import (
    FlowPrior,
    GaussianMixture,
    Mixture,
    NoisePrior,
    Prior,
    StandardNormal,
    choose_mixture,
    fit_mixture,
)

FLAT = FeedForward(size=8, latent_dim=3)


class Pair(Autoencoder):
    """Two latents: `[b 2 2]` and `[b 3]`. Only their shapes matter."""

    title: ClassVar[str] = "pair"

    def setup(self) -> None:
        self.scale = self.param("scale", lambda _: jnp.ones(()))

    def encode(self, x, *, train, axis=None):
        a, b = self.scale * jnp.mean(x, axis=(1, 2, 3)), jnp.zeros((len(x), 3))
        a = jnp.zeros((len(x), 2, 2)) + a.reshape(-1, 1, 1)
        return {"a": Normal(a, a), "b": Normal(b, b)}

    def decode(self, z, *, train, axis=None):
        mean = jnp.mean(z["a"], axis=(1, 2)) + jnp.mean(z["b"], axis=1)
        return jnp.zeros((len(mean), self.size, self.size, 3)) + mean.reshape(-1, 1, 1, 1)


PAIR = Pair(size=8)
WEIGHTS = np.asarray([0.5, 0.3, 0.2])
MEANS = np.asarray([[0.0, 0.0, 0.0], [20.0, 0.0, -5.0], [0.0, 30.0, 9.0]])
FACTORS = np.asarray(
    [
        [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.0, -0.3, 0.7]],
        [[2.0, 0.0, 0.0], [0.0, 0.5, 0.0], [1.0, 0.2, 1.0]],
        [[0.3, 0.0, 0.0], [0.1, 1.5, 0.0], [0.0, 0.0, 1.0]],
    ]
)
COVARIANCES = FACTORS @ FACTORS.transpose(0, 2, 1)
MIXTURE = Mixture(*(jnp.asarray(a, jnp.float32) for a in (np.log(WEIGHTS), MEANS, FACTORS)))


def draw(n: int, seed: int = 0) -> np.ndarray:
    """Points of the mixture above, by NumPy."""
    random = np.random.default_rng(seed)
    index = random.choice(3, size=n, p=WEIGHTS)
    noise = random.normal(size=(n, 3))
    return (MEANS[index] + np.einsum("nij,nj->ni", FACTORS[index], noise)).astype(np.float32)


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b)))


def near(a, b) -> bool:
    return all(
        np.allclose(x, y, atol=1e-5) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def flow_prior(model: Autoencoder, **settings) -> FlowPrior:
    """A flow with some weights or other."""
    network = flow.FlowMLP(priors.latent_dimensions(model), 16, 2)
    random = np.random.default_rng(0)
    params, standard = jax.tree.map(
        lambda a: jnp.float32(a + 0.2 * random.normal(size=a.shape)),
        flow.init(network, jax.random.key(0)),
    )
    return FlowPrior(network, params, standard, model, **settings)


PRIORS = {
    "normal": StandardNormal(FLAT),
    "normal, two latents": StandardNormal(PAIR),
    "mixture": GaussianMixture(MIXTURE, FLAT),
    "mixture, two latents": GaussianMixture(
        Mixture(jnp.log(jnp.asarray([0.4, 0.6])), jnp.arange(14.0).reshape(2, 7) / 7,
                jnp.stack([jnp.eye(7), 2 * jnp.eye(7) + jnp.tri(7, k=-1)])),
        PAIR,
    ),
    "flow": flow_prior(FLAT, steps=3),
    "flow, two latents": flow_prior(PAIR, steps=3),
}  # fmt: skip
each_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)


@each_prior
def test_a_seed_determines_z_whatever_else_is_drawn(prior: Prior):
    assert isinstance(prior, Prior)
    together = prior.sample([3, 1, 2**32 - 1, 0, 7])
    assert equal(together, prior.sample([3, 1, 2**32 - 1, 0, 7]))
    for position, seed in [(0, 3), (2, 2**32 - 1), (4, 7)]:
        own = jax.tree.map(lambda leaf: leaf[position], together)  # noqa: B023
        for others in ([seed], [seed, seed + 1 if seed < 9 else 5], [seed, *range(40)]):
            z = jax.tree.map(lambda leaf: leaf[0], prior.sample(others))
            # the last bits of a matrix product may depend on the row
            assert equal(z, own) if prior.name != "flow" else near(z, own)
    flat = np.asarray(priors.flatten_latents(together))
    assert len(np.unique(flat)) == flat.size  # no two seeds or dimensions share their noise


@each_prior
def test_z_has_the_structure_that_the_decoder_takes(prior: Prior):
    z = prior.sample(range(2))
    shapes = jax.tree.map(lambda leaf: leaf.shape, z)
    assert shapes in ((2, 3), {"a": (2, 2, 2), "b": (2, 3)})
    assert prior.log_prob(z).shape == (2,)


@pytest.mark.parametrize("model", [FLAT, PAIR], ids=["one latent", "two latents"])
def test_the_density_of_the_standard_normal_is_scipys(model: Autoencoder):
    prior = StandardNormal(model)
    z = prior.sample(range(5))
    flat = np.concatenate([np.asarray(leaf).reshape(5, -1) for leaf in jax.tree.leaves(z)], axis=1)
    expected = stats.multivariate_normal(np.zeros(flat.shape[1])).logpdf(flat)
    np.testing.assert_allclose(prior.log_prob(z), expected, rtol=1e-5)


def test_samples_of_the_standard_normal_are_standard():
    z = priors.flatten_latents(StandardNormal(PAIR).sample(range(4000)))
    np.testing.assert_allclose(jnp.mean(z, axis=0), 0, atol=0.07)
    np.testing.assert_allclose(np.cov(z.T), np.eye(7), atol=0.1)


# The mixture --------------------------------------------------------------------------------------


def test_the_density_of_a_mixture_is_scipys():
    z = np.concatenate([draw(20), np.zeros((1, 3), np.float32), draw(3) + 40])
    logs = [
        np.log(w) + stats.multivariate_normal(mean, covariance).logpdf(z)
        for w, mean, covariance in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)
    ]
    actual = GaussianMixture(MIXTURE, FLAT).log_prob(jnp.asarray(z))
    np.testing.assert_allclose(actual, logsumexp(logs, axis=0), rtol=1e-4, atol=1e-4)


def test_samples_of_a_mixture_have_its_moments():
    z = np.asarray(GaussianMixture(MIXTURE, FLAT).sample(range(5000)))
    nearest = np.argmin(((z[:, None] - MEANS) ** 2).sum(-1), axis=1)
    np.testing.assert_allclose(np.bincount(nearest) / 5000, WEIGHTS, atol=0.03)
    for i in range(3):
        mine = z[nearest == i]
        np.testing.assert_allclose(mine.mean(0), MEANS[i], atol=0.25)
        np.testing.assert_allclose(np.cov(mine.T), COVARIANCES[i], atol=0.5)


@pytest.fixture(scope="module")
def fitted() -> Mixture:
    return fit_mixture(draw(3000), components=3)


def test_fitting_recovers_three_separate_clusters(fitted: Mixture):
    order = [int(np.argmin(((fitted.means - mean[None]) ** 2).sum(-1))) for mean in MEANS]
    assert sorted(order) == [0, 1, 2]
    np.testing.assert_allclose(np.exp(fitted.log_weights)[order], WEIGHTS, atol=0.03)
    np.testing.assert_allclose(np.asarray(fitted.means)[order], MEANS, atol=0.25)
    factors = np.asarray(fitted.choleskys)[order]
    np.testing.assert_allclose(factors @ factors.transpose(0, 2, 1), COVARIANCES, atol=0.4)
    assert np.all(np.triu(factors, k=1) == 0)


def test_a_fit_is_nearly_as_likely_as_the_truth_and_more_than_one_gaussian(fitted: Mixture):
    fresh = jnp.asarray(draw(2000, seed=1))

    def nats(mixture: Mixture) -> float:
        return float(jnp.mean(GaussianMixture(mixture, FLAT).log_prob(fresh)))

    assert abs(nats(fitted) - nats(MIXTURE)) < 0.05
    assert nats(fitted) > nats(fit_mixture(draw(3000), components=1)) + 1


def test_one_component_has_the_mean_and_nearly_the_covariance_of_the_points():
    points = draw(3000)
    one = fit_mixture(points, components=1)
    factor = np.asarray(one.choleskys[0])
    np.testing.assert_allclose(one.means[0], points.mean(0), atol=1e-3)
    np.testing.assert_allclose(factor @ factor.T, np.cov(points.T), rtol=0.02, atol=0.2)


def test_the_same_seed_gives_the_same_bits():
    points = draw(200)
    assert equal(
        fit_mixture(points, components=5, seed=3), fit_mixture(points, components=5, seed=3)
    )
    assert all(leaf.dtype == jnp.float32 for leaf in fit_mixture(points, components=10))


@pytest.mark.parametrize(("images", "components"), [(99, 1), (149, 2), (500, 10), (5000, 10)])
def test_a_component_has_fifty_images_at_least(images: int, components: int):
    random = np.random.default_rng(0).normal(size=(images, 2)).astype(np.float32)
    assert len(fit_mixture(random, components=10).log_weights) == components


@pytest.mark.parametrize("images", [2, 5, 120])
def test_with_fewer_images_than_dimensions_covariances_are_positive_definite(images: int):
    points = np.random.default_rng(0).normal(size=(images, 200)).astype(np.float32)
    points[:, 7] = 3.0  # a latent that no image uses
    mixture = fit_mixture(points, components=10)
    for factor in np.asarray(mixture.choleskys, np.float64):
        assert np.linalg.eigvalsh(factor @ factor.T).min() > 0
    prior = GaussianMixture(mixture, FeedForward(size=8, latent_dim=200))
    z = prior.sample(range(4))
    assert np.isfinite(z).all()
    assert np.isfinite(prior.log_prob(z)).all()
    np.testing.assert_allclose(z[:, 7], 3.0, atol=0.1)


def test_the_covariance_of_few_images_is_shrunk_towards_its_diagonal():
    points = np.random.default_rng(0).normal(size=(60, 50)).astype(np.float32)
    mixture = fit_mixture(points, components=10)
    eigenvalues = np.linalg.eigvalsh(mixture.choleskys[0] @ mixture.choleskys[0].T)
    assert np.linalg.eigvalsh(np.cov(points.T)).min() < 0.02
    assert 0.1 < eigenvalues.min() < eigenvalues.max() < 3  # all are 1 in truth
    many = np.random.default_rng(0).normal(size=(5000, 5)).astype(np.float32)
    factor = fit_mixture(many, components=1).choleskys[0]
    np.testing.assert_allclose(factor @ factor.T, np.cov(many.T), atol=0.01)


def test_equal_images_can_be_fitted():
    mixture = fit_mixture(np.ones((200, 4), np.float32), components=10)
    assert all(np.isfinite(leaf).all() for leaf in mixture)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        (np.zeros((2, 2049), np.float32), "2,049 latent dimensions are too many"),
        (np.zeros((1, 3), np.float32), "two images or more"),
        (np.full((5, 3), np.nan, np.float32), "finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(points: np.ndarray, words: str):
    with pytest.raises(UserError, match=words):
        fit_mixture(points, components=10)


def nats(mixture: Mixture, points: np.ndarray) -> float:
    return float(jnp.mean(GaussianMixture(mixture, FLAT).log_prob(jnp.asarray(points))))


def test_held_out_clusters_choose_more_than_one_component_and_one_normal_chooses_one():
    points, held_out = draw(2000), draw(200, seed=1)
    chosen = choose_mixture(points, held_out)
    assert 1 < len(chosen.log_weights) <= 5
    for components in (1, 2):
        worse = fit_mixture(points, components=components)
        assert nats(chosen, held_out) > nats(worse, held_out) + 0.5
    random = np.random.default_rng(0)
    factor = np.tril(random.normal(size=(3, 3))) + 2 * np.eye(3)
    normal = (random.normal(size=(1500, 3)) @ factor.T + 7).astype(np.float32)
    assert len(choose_mixture(normal[:1200], normal[1200:]).log_weights) == 1


def test_the_number_of_components_is_one_that_has_enough_images():
    assert len(choose_mixture(draw(99), draw(20, seed=1)).log_weights) == 1
    assert len(choose_mixture(draw(120), draw(20, seed=1)).log_weights) == 2
    with pytest.raises(UserError, match="finite"):
        choose_mixture(draw(500), draw(20) * np.float32(np.inf))


# The flow -----------------------------------------------------------------------------------------


def test_a_seed_has_the_same_bits_however_many_are_drawn_with_it():
    prior = flow_prior(PAIR, steps=3)
    many = prior.sample(range(150))  # in two batches
    for n in (1, 99, 100, 101):
        some = prior.sample(range(n))
        assert equal(some, jax.tree.map(lambda leaf: leaf[:n], many))  # noqa: B023
    flat = np.asarray(priors.flatten_latents(many))
    assert len(np.unique(flat)) == flat.size


def test_a_seed_is_the_same_face_wherever_it_is_drawn():
    prior = flow_prior(FLAT, steps=3)
    params, batch_stats = jax.jit(autoencoder.init, static_argnums=0)(FLAT, jax.random.key(0))
    first = np.asarray(generate.decode(params, batch_stats, prior.sample(range(120)), model=FLAT))
    back = generate.decode(params, batch_stats, prior.sample(range(119, -1, -1)), model=FLAT)
    assert np.abs(first.astype(int) - np.asarray(back)[::-1]).max() <= 1
    assert len(np.unique(first.reshape(120, -1), axis=0)) > 100


def test_a_flow_has_its_model_s_noise_its_steps_and_its_density():
    prior = flow_prior(PAIR, steps=4)
    keys = priors.seed_keys([5, 6])
    noise = jax.vmap(lambda key: jax.random.normal(key, (7,)))(keys)
    known = jnp.zeros((2, 0), jnp.int32)
    arrays = prior.params, prior.stats
    z = prior.sample([5, 6])
    assert jax.tree.map(lambda leaf: leaf.shape, z) == {"a": (2, 2, 2), "b": (2, 3)}
    flat = priors.flatten_latents(z)
    for steps, close in ((4, True), (3, False)):
        expected = flow.sample(*arrays, noise, known, flow=prior.network, steps=steps)
        assert np.allclose(flat, expected, atol=1e-5) == close
        logs = flow.log_prob(*arrays, flat, known, flow=prior.network, steps=steps)
        assert np.allclose(prior.log_prob(z), logs, atol=1e-4) == close
    many = prior.sample(range(130))
    logs = prior.log_prob(many)
    assert logs.shape == (130,)
    np.testing.assert_allclose(
        prior.log_prob(jax.tree.map(lambda leaf: leaf[110:], many)), logs[110:], rtol=1e-4
    )


@each_prior
def test_what_makes_z_of_noise_can_tell_the_noise_of_z(prior: Prior):
    assert isinstance(prior, NoisePrior) == (prior.name != "mixture")
    if isinstance(prior, NoisePrior):
        noise = prior.noise([3, 1])
        z = prior.from_noise(noise)
        assert equal(z, prior.sample([3, 1]))
        np.testing.assert_allclose(prior.to_noise(z), noise, atol=0.25)  # of three steps
        assert np.abs(priors.flatten_latents(z) - noise).max() > 0.5 or prior.name == "normal"


@each_prior
def test_a_low_temperature_draws_almost_the_same_z(prior: Prior):
    if prior.name == "mixture":
        pytest.skip("its components stay apart")
    spread = [
        np.ptp(priors.flatten_latents(prior.sample(range(20), temperature=t)), axis=0)
        for t in (1.0, 0.5, 1e-4)
    ]
    assert np.all(spread[1] < spread[0])
    assert np.all(spread[2] < 2e-3 * spread[0])


def test_a_low_temperature_draws_the_means_of_a_mixture():
    prior = PRIORS["mixture"]
    z = np.asarray(prior.sample(range(50), temperature=1e-4))
    distances = np.abs(z[:, None] - MEANS).max(-1)
    assert distances.min(axis=1).max() < 0.01
    # the component of a seed does not depend on it
    usual = np.asarray(prior.sample(range(50)))
    nearest = np.argmin(((usual[:, None] - MEANS) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(distances.argmin(axis=1), nearest)


# In the run's folder ------------------------------------------------------------------------------


def test_a_mixture_is_kept_for_its_weights_alone(tmp_path: Path):
    assert priors.load(tmp_path, digest="abc", latents=3) is None
    priors.save(MIXTURE, tmp_path, digest="abc")
    loaded = priors.load(tmp_path, digest="abc", latents=3)
    assert loaded is not None
    assert equal(loaded, MIXTURE)
    assert priors.load(tmp_path, digest="abd", latents=3) is None
    assert priors.load(tmp_path, digest="abc", latents=4) is None
    assert [path.name for path in (tmp_path / "priors").iterdir()] == ["mixture.npz"]


def test_a_damaged_mixture_is_as_none(tmp_path: Path):
    priors.save(MIXTURE, tmp_path, digest="abc")
    path = tmp_path / "priors" / "mixture.npz"
    good = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [good[:n] for n in range(0, len(good), 37)]
    for position in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[position] ^= int(random.integers(1, 256))
        damaged.append(bytes(flipped))
    for content in [*damaged, b"", b"text", good + good]:
        path.write_bytes(content)
        loaded = priors.load(tmp_path, digest="abc", latents=3)
        assert loaded is None or equal(loaded, MIXTURE)  # of the zip's own bytes, some are unused


@pytest.mark.parametrize(
    "content",
    [np.zeros(3), {"format": "vaejax mixture 2"}, {"means": np.zeros(3)}]
    + [{"log_weights": np.float32(0)}, {"means": np.full((3, 3), np.nan, np.float32)}]
    + [{"choleskys": np.zeros((3, 3, 3))}, {"means": np.asarray([{}], object)}],
)
def test_a_mixture_of_other_content_is_as_none(content, tmp_path: Path):
    path = tmp_path / "priors" / "mixture.npz"
    path.parent.mkdir()
    with path.open("wb") as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            arrays = {name: np.asarray(leaf) for name, leaf in MIXTURE._asdict().items()}
            np.savez(file, **{"format": priors.FORMAT, "digest": "abc", **arrays, **content})
    assert priors.load(tmp_path, digest="abc", latents=3) is None


def test_a_mixture_of_a_stranger_is_neither_waited_for_nor_unpacked(tmp_path: Path):
    path = tmp_path / "priors" / "mixture.npz"
    path.parent.mkdir()
    arrays = {name: np.asarray(leaf) for name, leaf in MIXTURE._asdict().items()}
    with path.open("wb") as file:
        np.savez_compressed(
            file, format=priors.FORMAT, digest="abc", bomb=np.zeros(10**7), **arrays
        )
    assert path.stat().st_size < 10**5
    assert priors.load(tmp_path, digest="abc", latents=3) is None
    path.unlink()
    os.mkfifo(path)
    assert priors.load(tmp_path, digest="abc", latents=3) is None
