"""Flow matching against normal distributions, for which everything is known in closed form."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from vaejax import flow
from vaejax.flow import Codes, FlowMLP
from vaejax.losses import Context
from vaejax.training.optimizer import adam
from vaejax.training.step import Trainer, init, train_step

NO_LABELS = jnp.zeros((1, 0), jnp.int32)


class Normals(nn.Module):
    """The best velocity for latents that are N(m, q diag(s^2) q^T) when they are standardized.

    It is E[z_1 - z_0 | z_t], which is linear in z_t; it leads from a noise n to m + q s q^T n.
    """

    latents: int
    labels: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, z, t, labels):
        d, zeros = self.latents, nn.initializers.zeros
        m, s = self.param("m", zeros, (d,)), self.param("s", zeros, (d,))
        q = self.param("q", zeros, (d, d))
        t, m, s = t[:, None], m[None], s[None]
        slope = (t * s**2 - (1 - t)) / ((1 - t) ** 2 + (t * s) ** 2)
        return m + ((z - t * m) @ q * slope) @ q.T


class Constant(nn.Module):
    """A velocity that is the same everywhere."""

    latents: int
    labels: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, z, t, labels):
        c = self.param("c", nn.initializers.zeros, (self.latents,))
        return jnp.broadcast_to(c[None], z.shape)


def normals(d: int, *, rotated: bool):
    """m, s and q of a normal distribution, and what standardizes it, in float64."""
    random = np.random.default_rng(d)
    q = np.linalg.qr(random.normal(size=(d, d)))[0] if rotated else np.eye(d)
    params = {"m": random.normal(size=d), "s": random.uniform(0.3, 2.0, d), "q": q}
    return params, {"mean": 5 * random.normal(size=d), "std": random.uniform(0.5, 3.0, d)}


def labels(n: int) -> jax.Array:
    return jnp.zeros((n, 0), jnp.int32)


# Training -----------------------------------------------------------------------------------------


def test_the_loss_of_a_constant_velocity_is_known():
    """E |c - (z - n)|^2 = |c - z|^2 + d, for noise n ~ N(0, I): whatever the time is."""
    z = jnp.asarray([[0.5, -2.0, 3.0], [1.0, 1.0, 1.0]])
    c = jnp.asarray([1.0, 0.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 2 * 8000)
    losses = flow.flow_matching(
        Constant(3), {"c": c}, jnp.tile(z, (8000, 1)), labels(2 * 8000), keys
    )
    expected = np.mean((np.asarray(c) - np.asarray(z)) ** 2, axis=1) + 1
    np.testing.assert_allclose(losses.reshape(8000, 2).mean(0), expected, rtol=0.03)


def test_the_loss_of_the_best_velocity_is_that_of_its_variance():
    """Var(z_1 - z_0 | z_t) = s^2 / ((1 - t)^2 + (t s)^2), whose mean over times is pi s / 2."""
    params, _ = normals(4, rotated=True)
    n = 20_000
    noise = np.random.default_rng(0).normal(size=(n, 4))
    z = params["m"] + (noise * params["s"]) @ params["q"].T
    keys = jax.random.split(jax.random.key(0), n)
    arrays = jax.tree.map(jnp.float32, params)
    loss = jax.jit(partial(flow.flow_matching, Normals(4)))(arrays, jnp.float32(z), labels(n), keys)
    best = np.pi / 2 * params["s"].mean()
    np.testing.assert_allclose(jnp.mean(loss), best, rtol=0.02)
    worse = {**arrays, "m": arrays["m"] + 0.5}
    assert jnp.mean(flow.flow_matching(Normals(4), worse, jnp.float32(z), labels(n), keys)) > best


def test_a_key_determines_the_noise_and_the_time_of_its_own_face_alone():
    network = FlowMLP(3, 8, 1)
    params, _ = flow.init(network, jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (4, 3))
    keys = jax.random.split(jax.random.key(2), 4)
    four = flow.flow_matching(network, params, z, labels(4), keys)
    two = flow.flow_matching(network, params, z[2:], labels(2), keys[2:])
    np.testing.assert_allclose(two, four[2:], rtol=1e-5)
    same = flow.flow_matching(network, params, z[:1].repeat(4, axis=0), labels(4), keys)
    assert len(np.unique(same)) == 4


def test_the_gradient_of_the_loss_agrees_with_finite_differences():
    with jax.enable_x64(True):
        network = FlowMLP(3, 8, 2, labels=(2,))
        params, _ = flow.init(network, jax.random.key(0))
        random = np.random.default_rng(0)
        params = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), params)
        z = jnp.asarray(random.normal(size=(4, 3)))
        known = jnp.asarray([[0], [1], [2], [1]], jnp.int32)
        keys = jax.random.split(jax.random.key(0), 4)

        def loss(params):
            return jnp.mean(flow.flow_matching(network, params, z, known, keys))

        check_grads(jax.jit(loss), (params,), order=1, modes=["rev"], rtol=1e-6)


def test_what_standardizes_latents_gives_them_mean_0_and_deviation_1():
    z = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32) * [1e-3, 1, 50] + 1e3
    z[:, 1] = 7.0  # a latent that no face uses
    codes = Codes(jnp.float32(z), labels(500))
    found = flow.standardization(np.float32(z))
    seen = []

    def loss(_, params, z, labels, keys):
        seen.append(z)
        return jnp.zeros(len(z))

    keys = jax.random.split(jax.random.key(0), 500)
    context = Context(FlowMLP(3), {}, found, keys, frozen=codes)
    flow.batch_loss(jnp.arange(500), context, loss=partial(loss))
    np.testing.assert_allclose(seen[0].mean(0), 0, atol=0.1)  # 1e-3 is little for a float of 1e3
    np.testing.assert_allclose(seen[0].std(0)[::2], 1, atol=0.05)
    assert jnp.all(seen[0][:, 1] == 0)


# Attributes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_attributes_are_hidden_in_training_all_of_them_or_some(train: bool):
    n = 10_000
    codes = Codes(jnp.zeros((n, 2)), jnp.stack([jnp.full(n, 3), 1 + jnp.arange(n) % 2], axis=1))
    found = flow.standardization(np.zeros((2, 2), np.float32))
    seen = []

    def loss(_, params, z, labels, keys):
        seen.append((labels, keys))
        return jnp.zeros(len(z))

    keys = jax.random.split(jax.random.key(0), n)
    context = Context(FlowMLP(2), {}, found, keys, frozen=codes, train=train)
    order = jnp.arange(n)[::-1]
    _, (metrics, kept) = flow.batch_loss(order, context, loss=partial(loss))
    assert metrics["loss"] == 0
    assert kept is found
    (given, used), everything = seen[0], codes.labels[order]
    hidden = np.asarray(given == 0)
    assert np.all(hidden | np.asarray(given == everything))
    # none, one or both of two are as likely, but for the fifth that hides all of them anyway
    shares = np.bincount(hidden.sum(axis=1), minlength=3) / n
    expected = np.array([0.8, 0.8, 0.8 + 3 * 0.2]) / 3 if train else [1, 0, 0]
    np.testing.assert_allclose(shares, expected, atol=0.015)
    np.testing.assert_allclose(hidden[:, 0].mean(), hidden[:, 1].mean(), atol=0.02)
    # whether they are hidden says nothing about the noise, whose keys are other ones
    assert jnp.all(jax.random.key_data(used) == jax.random.key_data(keys)) == (not train)


def test_attributes_that_are_hidden_have_no_influence():
    network = FlowMLP(3, 8, 1, labels=(2, 3))
    params, _ = flow.init(network, jax.random.key(0))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.float32(a + 0.3 * random.normal(size=a.shape)), params)
    z, t = jnp.ones((6, 3)), jnp.full(6, 0.5)
    known = jnp.asarray([[0, 0], [1, 0], [2, 0], [0, 1], [0, 2], [1, 3]], jnp.int32)

    def velocity(params):
        return np.asarray(network.apply({"params": params}, z, t, known))

    before = velocity(params)
    distances = np.abs(before[:, None] - before[None]).max(-1)
    assert (distances + np.eye(6)).min() > 1e-2  # every value has its own
    for name, uses in (("label_0", known[:, 0] > 0), ("label_1", known[:, 1] > 0)):
        other = {**params, name: jax.tree.map(lambda a: a + 1.0 * a, params[name])}
        changed = np.abs(velocity(other) - before).max(1) > 1e-3
        np.testing.assert_array_equal(changed, uses)


# Sampling and density -----------------------------------------------------------------------------

STEPS = 20, 40, 80


@pytest.mark.parametrize(
    ("d", "rotated"), [(3, True), (20, False), (130, False)], ids=["rotated", "20", "estimated"]
)
def test_the_best_velocity_leads_to_the_normal_distribution_with_its_density(d: int, rotated: bool):
    """By Heun's method of second order: with twice the steps a quarter of the error is left.

    The divergence of 130 dimensions is estimated; for a diagonal Jacobian probes of ±1 are exact.
    """
    with jax.enable_x64(True):
        params, standard = normals(d, rotated=rotated)
        m, s, q = (params[name] for name in "msq")
        noise = np.random.default_rng(0).normal(size=(5, d))
        spread = (q * s) @ q.T
        z = (m + noise @ spread) * standard["std"] + standard["mean"]
        factor = standard["std"][:, None] * spread
        truth = stats.multivariate_normal(m * standard["std"] + standard["mean"], factor @ factor.T)
        known = {"flow": Normals(d)}
        drawn, noises, densities = [], [], []
        for steps in STEPS:
            moved = flow.sample(
                params, standard, jnp.asarray(noise), labels(5), steps=steps, **known
            )
            known_z = jnp.asarray(z)
            back = flow.to_noise(params, standard, known_z, labels(5), steps=steps, **known)
            logs = flow.log_prob(params, standard, known_z, labels(5), steps=steps, **known)
            noises.append(np.abs(back - noise).max())
            drawn.append(np.abs(moved - z).max())
            densities.append(np.abs(logs - truth.logpdf(z)).max())
    for errors in (drawn, noises, densities):
        assert errors[-1] < 0.01 * d
        ratios = np.divide(errors[:-1], errors[1:])
        assert np.all((ratios > 3) & (ratios < 5.5)), ratios


def test_a_density_is_estimated_without_bias_where_it_cannot_be_exact():
    """A rotated Jacobian: the estimate's error is that of 16 probes, and has no preferred sign."""
    params, standard = normals(130, rotated=True)
    z = (params["m"] + np.zeros((1, 130))) * standard["std"] + standard["mean"]
    arrays = jax.tree.map(jnp.float32, (params, standard))
    logs = flow.log_prob(*arrays, jnp.float32(z), labels(1), flow=Normals(130), steps=40)
    log_det = np.sum(np.log(params["s"])) + np.sum(np.log(standard["std"]))
    truth = -log_det - 65 * np.log(2 * np.pi)
    # of log s, the off-diagonal elements times two, over 16 probes
    logs_of_s = (params["q"] * np.log(params["s"])) @ params["q"].T
    deviation = np.sqrt(2 * np.sum((logs_of_s - np.diag(np.diag(logs_of_s))) ** 2) / 16)
    assert abs(logs[0] - truth) < 4 * deviation
    assert deviation < 4


@pytest.fixture(scope="module")
def clusters() -> tuple[FlowMLP, dict, dict, list[float]]:
    """A network that was trained on two clusters, with the number of each as an attribute."""
    random = np.random.default_rng(0)
    which = random.integers(0, 2, 1000)
    z = random.normal(size=(1000, 2)) * 0.3 + np.asarray([[-3.0, 1.0], [3.0, 1.0]])[which]
    codes = Codes(jnp.float32(z), jnp.asarray(1 + which[:, None], jnp.int32))
    network = FlowMLP(2, 48, 2, labels=(2,))
    optimizer = adam(3e-3, b1=0.9, b2=0.99, clip_norm=1.0)
    trainer = Trainer(
        network,
        partial(flow.flow_matching),
        optimizer,
        ema_decay=0.99,
        init=flow.init,
        batch_loss=flow.batch_loss,
    )
    state = init(jax.random.key(0), trainer=trainer)
    state = state._replace(batch_stats=flow.standardization(np.float32(z)))

    @jax.jit
    def updates(state, batches):
        step = partial(train_step, trainer=trainer)
        return jax.lax.scan(lambda s, b: step(s, codes, b, jax.random.key(1)), state, batches)

    batches = jnp.asarray(random.integers(0, 1000, (600, 128)))
    state, metrics = updates(state, batches)
    return network, state.ema, state.batch_stats, np.asarray(metrics["loss"]).tolist()


def drawn(clusters, known: int, n: int = 400) -> np.ndarray:
    network, params, standard, _ = clusters
    noise = jax.random.normal(jax.random.key(5), (n, 2))
    return np.asarray(
        flow.sample(
            params, standard, noise, jnp.full((n, 1), known, jnp.int32), flow=network, steps=30
        )
    )


def test_a_network_learns_two_clusters_which_no_normal_distribution_does(clusters):
    losses = clusters[3]
    # the best of all normal distributions has a loss of pi / 2: its deviations are 1
    assert losses[0] > np.pi / 2
    assert np.mean(losses[-100:]) < 0.85 * np.pi / 2
    z = drawn(clusters, 0)
    left, right = z[z[:, 0] < -1.5], z[z[:, 0] > 1.5]
    assert 0.35 < len(left) / len(z) < 0.65
    assert len(left) + len(right) > 0.9 * len(z)
    for some, x in ((left, -3.0), (right, 3.0)):
        np.testing.assert_allclose(np.median(some, axis=0), [x, 1.0], atol=0.25)


def test_a_face_has_the_attribute_that_is_asked_for(clusters):
    assert np.mean(drawn(clusters, 1)[:, 0] < 0) > 0.97
    assert np.mean(drawn(clusters, 2)[:, 0] > 0) > 0.97


def test_the_density_of_a_network_sums_to_one_and_knows_its_samples(clusters):
    network, params, standard, _ = clusters
    x, y = np.meshgrid(np.linspace(-6, 6, 90), np.linspace(-1.5, 3.5, 50))
    grid = jnp.float32(np.stack([x.ravel(), y.ravel()], axis=1))
    known = jnp.zeros((len(grid), 1), jnp.int32)
    logs = flow.log_prob(params, standard, grid, known, flow=network, steps=20)
    cell = (12 / 89) * (5 / 49)
    np.testing.assert_allclose(np.sum(np.exp(logs)) * cell, 1, atol=0.02)
    at = flow.log_prob(
        params, standard, jnp.asarray([[-3.0, 1.0], [0.0, 1.0], [3.0, 1.0]]),
        known[:3], flow=network, steps=20,
    )  # fmt: skip
    assert min(at[0], at[2]) > at[1] + 3


# JSON ---------------------------------------------------------------------------------------------


def test_a_network_survives_json():
    network = FlowMLP(7, 16, 3, labels=(4, 2))
    text = json.dumps(flow.to_json(network))
    assert flow.from_json(json.loads(text), latents=7) == network


@pytest.mark.parametrize(
    "change",
    [{"kind": "VAE"}, {"kind": None}, {"width": 0}, {"width": "16"}, {"width": 1e3}]
    + [{"depth": True}, {"depth": 2**17}, {"labels": None}, {"labels": [0]}, {"labels": ["a"]}]
    + [{"labels": {"1": 1}}],
)
def test_a_description_of_something_else_is_refused(change: dict):
    good = flow.to_json(FlowMLP(7, 16, 3))
    with pytest.raises(ValueError, match="describes"):
        flow.from_json({**good, **change}, latents=7)
