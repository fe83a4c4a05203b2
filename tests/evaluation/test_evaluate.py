"""A run's metrics are those of its model on held-out images, or are left out with a reason."""

import ast
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.scipy.special import logsumexp

from vaejax import generate, nearest
from vaejax.data import assignment
from vaejax.data.batches import Images
from vaejax.data.splits import Facts, image_ids
from vaejax.distributions import Normal
from vaejax.errors import CheckpointError, UserError
from vaejax.evaluation import evaluate, likelihood, memorization, passes, tables
from vaejax.evaluation.evaluate import EvaluationConfig, image_results, load_run
from vaejax.evaluation.likelihood import BatchEvaluation, Latents
from vaejax.evaluation.passes import ImageScores, TrainedModel
from vaejax.metrics import Estimate, shown_in
from vaejax.models import autoencoder
from vaejax.models.convolutional import Convolutional
from vaejax.models.vae import VAE
from vaejax.priors import StandardNormal
from vaejax.training import checkpoint, run
from vaejax.training.step import image_keys

SETS = ("samples", "reconstructions", "train")


def value(evaluation: dict, name: str) -> float:
    return evaluation["metrics"][name]["value"]


def noise_keys(seed: int, images: int):
    """The keys of the held-out images' z, in an evaluation with this seed."""
    key = jax.random.split(jax.random.key(seed), 3)[1]
    return jax.vmap(lambda k: jax.random.split(k)[1])(image_keys(key, jnp.arange(images)))


# Exact values -------------------------------------------------------------------------------------


def test_the_metrics_of_images_have_the_values_of_their_definitions(trained_run):
    """Two images of 16 x 16 x 3 values and two latents, worked out by hand: σ is 0.1, thus 25.5
    levels, and the report's weight of 0.01 is a β of 0.01 · 768 / (2 · 0.01 · 2) = 192."""
    model = VAE(size=16, latent_dim=2, width=1)
    tiny = trained_run._replace(
        trained=TrainedModel(model, {}, {}), loss={"kind": "mse_kl", "kl_weight": 0.01}
    )
    kl = np.array([[1.0, 3.0], [2.0, 6.0]])
    means = np.array([[1.0, 0.0], [-1.0, 0.01]])  # with variances 1 and 0.000025
    latents = Latents(means, np.zeros((2, 2)), np.zeros((2, 2)), kl)
    scores = ImageScores(
        mse=np.array([0.02, 0.04]),
        psnr=np.array([20.0, 24.0]),
        ssim=None,
        distortion=np.array([3000.0, 3200.0]),
        latents=latents,
    )
    results = image_results(scores, 2 * math.log(0.1), tiny)
    bits = 16 * 16 * 3 * math.log(2)
    exact = {
        "mse": (0.03, 0.01),  # the standard error of two values is half their difference
        "psnr": (22, 2),
        "distortion": (3100, 100),
        "kl": (3, 1),
        "report_loss": (0.06, 0.02),
        "rate": (6, 2),
        "elbo": (-3106, 102),
        "bits_per_dim": (3106 / bits, 102 / bits),
        "likelihood_sigma": (25.5, None),
        "effective_beta": (192, None),
        "active_units": (1, None),
    }
    for name, (mean, error) in exact.items():
        assert results[name] == (pytest.approx(mean), error and pytest.approx(error)), name
    assert "11 pixels" in results["ssim"]


@pytest.mark.parametrize(
    ("loss", "beta"),
    [
        # mse + w kl is w n / (2 σ² d), here w · 12 / (2 · 0.25 · 3) = 8 w
        ({"kind": "mse_kl", "kl_weight": 0.5}, Estimate(4.0)),
        ({"kind": "mse_kl", "kl_weight": 0.125}, Estimate(1.0)),
        ({"kind": "mse_kl", "kl_weight": 0.0}, Estimate(0.0)),
        ({"kind": "sigma_vae", "beta": 1.0}, Estimate(1.0)),
        ({"kind": "sigma_vae", "beta": 2.0}, Estimate(2.0)),
        ({"kind": "other"}, "the loss other has no known weight of the rate"),
    ],
)
def test_effective_beta_is_exact(loss, beta):
    assert evaluate._effective_beta(loss, 0.25, values=12, latents=3) == beta


class InMemory(Images):
    """The images of a split that lies in memory."""

    def __init__(self, images: np.ndarray):
        self._images, self.shape = images, images.shape[1:]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        images = self._images[indices]
        if out is None:
            return images
        out[:] = images
        return out


def test_the_likelihood_is_fitted_to_the_images_and_not_to_the_padding(monkeypatch):
    """Of 8 · 16 values a quarter are 255, as in the closed form of test_likelihood. The last image,
    which fills the second batch of five, has more of them."""
    images = np.full((8, 4, 4, 1), 254, np.uint8)
    images[:6, 0] = 255
    images[7, 2:] = 255

    def constant(trained, batch, indices, key):
        output = jnp.full(batch.shape, 254 / 255)
        mse = jnp.mean((batch / 255.0 - output) ** 2, axis=(1, 2, 3))
        return BatchEvaluation(output, jnp.asarray(batch), mse, mse, None, None)

    monkeypatch.setattr(passes, "evaluate_batch", constant)
    monkeypatch.setattr(passes, "batch_size", lambda model: 5)
    trained = TrainedModel(Convolutional(size=16, width=2), {}, {})
    log_variance = passes.fit_log_variance(trained, InMemory(images), jax.random.key(0))
    np.testing.assert_allclose(255 * np.exp(log_variance / 2), 0.43465, rtol=0.001)


# A run --------------------------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_model_on_the_held_out_images(evaluation, trained_run):
    """Each is computed once more, for all images at once."""
    result, (model, params, batch_stats) = evaluation.json, trained_run.trained
    n = len(trained_run.held_out)
    images = trained_run.held_out.read(np.arange(n))
    reconstructions = generate.reconstruct(params, batch_stats, images, model=model)
    errors = (np.asarray(reconstructions, float) - images) ** 2
    psnr = 10 * np.log10(255**2 / errors.mean(axis=(1, 2, 3)))
    assert result["images"] == n
    np.testing.assert_allclose(value(result, "psnr"), psnr.mean(), rtol=1e-4)

    x = jnp.asarray(images / np.float32(255))
    posterior = autoencoder.encode(model, params, batch_stats, x)
    z = autoencoder.sample(posterior, noise_keys(0, n))
    output = autoencoder.decode(model, params, batch_stats, z)
    mse = np.mean((x - output) ** 2)
    rates = posterior.kl().mean(axis=0)
    np.testing.assert_allclose(value(result, "mse"), mse, rtol=1e-4)
    np.testing.assert_allclose(result["rate_per_dimension"], rates, rtol=1e-3)
    np.testing.assert_allclose(value(result, "rate"), rates.sum(), rtol=1e-3)
    np.testing.assert_allclose(value(result, "kl"), rates.mean(), rtol=1e-3)
    loss = mse + 0.01 * rates.mean()
    np.testing.assert_allclose(value(result, "report_loss"), loss, rtol=1e-4)

    elbo = -(value(result, "distortion") + value(result, "rate"))
    np.testing.assert_allclose(value(result, "elbo"), elbo, rtol=1e-6)
    bits = -elbo / (16 * 16 * 3 * math.log(2))
    np.testing.assert_allclose(value(result, "bits_per_dim"), bits, rtol=1e-6)
    variance = (value(result, "likelihood_sigma") / 255) ** 2
    beta = 0.01 * 16 * 16 * 3 / (2 * variance * 4)
    np.testing.assert_allclose(value(result, "effective_beta"), beta, rtol=1e-6)

    prior = Normal(jnp.zeros_like(z), jnp.zeros_like(z))
    rate_at_z = jnp.mean(posterior.log_prob(z) - prior.log_prob(z))
    parts = value(result, "mutual_information") + value(result, "aggregate_posterior_kl")
    np.testing.assert_allclose(parts, rate_at_z, rtol=1e-3)


def test_the_importance_weighted_bound_is_that_of_its_weights(evaluation, trained_run):
    """Three images and nine samples of each, as the configuration of the test has them."""
    model, params, batch_stats = trained_run.trained
    key = jax.random.fold_in(jax.random.split(jax.random.key(0), 3)[2], 0)
    log_variance = 2 * math.log(value(evaluation.json, "likelihood_sigma") / 255)
    weights = likelihood.image_log_weights(
        params,
        batch_stats,
        jnp.asarray(trained_run.held_out.read(np.arange(3))),
        image_keys(key, jnp.arange(3)),
        jnp.float32(log_variance),
        model=model,
        samples=9,
    )
    bound = jnp.mean(logsumexp(weights, axis=1) - math.log(9))
    np.testing.assert_allclose(value(evaluation.json, "iwae_bound"), bound, rtol=1e-5)
    np.testing.assert_allclose(value(evaluation.json, "iwae_elbo"), weights.mean(), rtol=1e-5)


def test_every_metric_has_a_value_or_a_reason(evaluation):
    result = evaluation.json
    names = {name.split("/")[0] for name in (*result["metrics"], *result["left_out"])}
    assert names == shown_in("evaluation").keys() - {"distortion_bits"}  # of other models
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    n = result["images"]
    few = f"with {n} held-out faces, less than 100, their nearest hundredth is less than one face"
    kinds = ("pixels", "features", "person")
    assert result["left_out"] == {
        f"memorized_{kind}/{of}": few for kind in kinds for of in ("samples", "reconstructions")
    } | {"learned_prior_elbo": "the run has no learned prior"}
    assert result["compared_faces"] == n
    sets = {f"{name}/{of}" for name in ("frechet", "kernel", "recall") for of in SETS}
    assert sets <= result["metrics"].keys()


def test_the_seed_decides_the_noise_and_nothing_else(
    evaluation, trained_run, quarters, quick: EvaluationConfig
):
    again = evaluate.evaluate(trained_run, quick, quarters)
    assert again.json["metrics"] == evaluation.json["metrics"]
    other = evaluate.evaluate(trained_run, quick._replace(seed=1), quarters).json
    assert value(other, "psnr") == value(evaluation.json, "psnr")  # of the mode
    model, params, batch_stats = trained_run.trained
    n = len(trained_run.held_out)
    x = jnp.asarray(trained_run.held_out.read(np.arange(n)) / np.float32(255))
    posterior = autoencoder.encode(model, params, batch_stats, x)
    for seed, result in ((0, evaluation.json), (1, other)):
        z = autoencoder.sample(posterior, noise_keys(seed, n))
        output = autoencoder.decode(model, params, batch_stats, z)
        np.testing.assert_allclose(value(result, "mse"), np.mean((x - output) ** 2), rtol=1e-5)


def test_the_batch_size_does_not_matter(
    evaluation, trained_run, quarters, quick, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(passes, "batch_size", lambda model: 5)
    small = evaluate.evaluate(trained_run, quick, quarters).json
    for name, estimate in evaluation.json["metrics"].items():
        if not name.startswith("iwae"):  # whose samples are drawn in parts
            np.testing.assert_allclose(
                value(small, name), estimate["value"], rtol=1e-4, atol=1e-5, err_msg=name
            )


def test_the_likelihood_is_fitted_to_the_validation_images(evaluation, trained_run):
    key = jax.random.split(jax.random.key(0), 3)[0]
    validation = Images(trained_run.prepared, "validation")
    best = 2 * math.log(value(evaluation.json, "likelihood_sigma") / 255)
    totals = [
        passes.evaluate_images(trained_run.trained, validation, key, best + offset)
        .distortion.astype(float)
        .sum()
        for offset in (-0.02, 0.0, 0.02)
    ]
    assert totals[1] < min(totals[0], totals[2])


def test_samples_are_those_of_the_sample_command(trained_run):
    model, params, batch_stats = trained_run.trained
    batches = list(passes.sample_batches(trained_run.trained, StandardNormal(model), 130))
    assert [len(batch) for batch in batches] == [128, 2]
    z = StandardNormal(model).sample([0, 1, 129])
    faces = generate.decode(params, batch_stats, z, model=model)
    drawn = np.concatenate(batches)[[0, 1, 129]].astype(int)
    np.testing.assert_allclose(drawn, np.asarray(faces).astype(int), atol=1)


def test_a_run_that_repeats_its_training_faces_is_detected(
    trained_run, quarters, quick, monkeypatch
):
    """A decoder that knows one training face by heart."""
    memorized = Images(trained_run.prepared, "train").read(np.array([3]))

    def repeat(params, batch_stats, z, *, model):
        return np.repeat(memorized, len(z), axis=0)

    monkeypatch.setattr(generate, "decode", repeat)
    for module in (memorization, nearest):
        monkeypatch.setattr(module, "MIN_HELD_OUT", 20)
    result = evaluate.evaluate(trained_run, quick, quarters).json
    assert value(result, "memorized_pixels/samples") == 1
    assert value(result, "memorized_features/samples") == 1
    assert value(result, "nearest_pixels/samples") == 0
    assert value(result, "nearest_features/samples") == pytest.approx(0, abs=1e-5)
    assert value(result, "persons/samples") == pytest.approx(1)


def test_pictures_have_the_faces_that_they_are_said_to_have(evaluation, trained_run):
    pictures, n = evaluation.pictures, len(trained_run.held_out)
    model, params, batch_stats = trained_run.trained
    images = trained_run.held_out.read(np.arange(n))
    reconstructions = generate.reconstruct(params, batch_stats, images, model=model)
    errors = ((np.asarray(reconstructions, float) - images) ** 2).mean(axis=(1, 2, 3))
    order = np.argsort(-errors, kind="stable")
    extremes = np.concatenate([order[:10], order[-10:][::-1]])
    np.testing.assert_array_equal(pictures.worst_and_best[0], images[extremes])
    np.testing.assert_array_equal(pictures.reconstructions[0], images[:10])
    shown = np.asarray(reconstructions)[:10].astype(int)
    np.testing.assert_allclose(pictures.reconstructions[1].astype(int), shown, atol=1)

    prior = StandardNormal(model)
    samples = np.concatenate(list(passes.sample_batches(trained_run.trained, prior, 70)))
    assert pictures.samples.keys() == {"normal"}
    np.testing.assert_array_equal(pictures.samples["normal"], samples[:40])
    faces, by_features, by_pixels = pictures.nearest
    training = Images(trained_run.prepared, "train")
    training = training.read(np.arange(len(training))).astype(float)
    for face, found in zip(faces, by_pixels, strict=True):
        squares = ((training - face) ** 2).sum(axis=(1, 2, 3))
        np.testing.assert_array_equal(found, training[squares.argmin()])

    def quarters_of(faces: np.ndarray) -> np.ndarray:
        return faces.reshape(len(faces), 2, 8, 2, 8, 3).mean(axis=(2, 4)).reshape(len(faces), -1)

    for face, found in zip(faces, by_features, strict=True):
        distances = np.linalg.norm(quarters_of(training) - quarters_of(face[None]), axis=1)
        np.testing.assert_array_equal(found, training[distances.argmin()])
    rates = evaluation.json["rate_per_dimension"]
    np.testing.assert_allclose(pictures.rate_per_dimension, rates, rtol=1e-6)


# Metrics that are left out ------------------------------------------------------------------------


def test_a_deterministic_autoencoder_has_no_metrics_of_a_posterior(trained_run, quarters, quick):
    model = Convolutional(size=16, width=2)
    trained = TrainedModel(model, *jax.jit(partial(autoencoder.init, model))(jax.random.key(0)))
    deterministic = trained_run._replace(
        trained=trained, loss={"kind": "reconstruction"}, priors={}
    )
    result = evaluate.evaluate(deterministic, quick, quarters)
    metrics, left_out = result.json["metrics"], result.json["left_out"]
    assert {"mse", "psnr", "distortion", "distortion_bits"} <= metrics.keys()
    names = {name.split("/")[0] for name in (*metrics, *left_out)}
    assert names == shown_in("evaluation").keys() | {"samples"}
    assert "no prior to draw faces from" in left_out["samples"]
    assert {"kl", "elbo", "effective_beta", "iwae_elbo", "mmd", "frechet_gap"} <= left_out.keys()
    bits = value(result.json, "distortion") / (16 * 16 * 3 * math.log(2))
    np.testing.assert_allclose(value(result.json, "distortion_bits"), bits, rtol=1e-6)
    assert not any(name.endswith("/samples") for name in (*metrics, *left_out))
    assert result.pictures.samples == {}
    assert result.pictures.rate_per_dimension is None


def test_samples_of_a_mixture_stand_beside_those_of_the_standard_normal(
    trained: Path, trained_run, quarters, quick, tmp_path: Path
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    assert trained_run.priors.keys() == {"samples"}
    evaluated = load_run(folder, "test", prior="mixture")  # fits it
    result = evaluate.evaluate(evaluated, quick, quarters)
    for name in ("frechet", "recall", "nearest_pixels"):
        assert {f"{name}/samples", f"{name}/samples (mixture)"} <= result.json["metrics"].keys()
    assert "learned_prior_elbo" in result.json["metrics"]
    assert result.pictures.samples.keys() == {"normal", "mixture"}
    assert load_run(folder, "test").priors.keys() == {"samples", "samples (mixture)"}  # has it now


def test_the_elbo_of_a_learned_prior_counts_its_density(trained_run):
    """With a wider normal distribution as the learned prior, by NumPy."""
    wide = 1.5

    class Wide:
        name = "wide"

        def sample(self, seeds, *, temperature=1.0):
            raise NotImplementedError

        def log_prob(self, z):
            return jax.scipy.stats.norm.logpdf(z, scale=wide).sum(axis=1)

    validation = Images(trained_run.prepared, "validation")
    trained, key = trained_run.trained, jax.random.key(3)
    scores = passes.evaluate_images(trained, validation, key, -4.0, on_batch=lambda *_: None)
    count = 5
    estimate = evaluate.learned_prior_elbo(scores, Wide(), images=count)
    latents = scores.latents
    assert latents is not None
    z, mean, log_variance = (np.asarray(getattr(latents, n)) for n in ("z", "mean", "log_variance"))
    log_q = scipy.stats.norm.logpdf(z, mean, np.exp(log_variance / 2)).sum(axis=1)
    log_p = scipy.stats.norm.logpdf(z, 0, wide).sum(axis=1)
    expected = (log_p - log_q - scores.distortion)[:count].mean()
    np.testing.assert_allclose(estimate.value, expected, rtol=1e-5)


def test_without_features_only_their_metrics_are_left_out(evaluation, trained_run, quick):
    result = evaluate.evaluate(trained_run, quick, None, missing_features="they are missing").json
    assert result["left_out"]["features"] == "they are missing"
    needing = ("frechet", "kernel", "precision", "recall", "density", "coverage", "persons")
    needing += ("nearest_features", "nearest_person")
    all_names = evaluation.json["metrics"].keys()
    expected = {n for n in all_names if n.split("/")[0] not in needing and "_gap" not in n}
    assert result["metrics"].keys() == expected


def test_metrics_that_are_not_finite_are_left_out_and_useless_weights_are_refused(
    trained_run, quarters, quick, monkeypatch: pytest.MonkeyPatch
):
    evaluate_batch = passes.evaluate_batch

    def overflow(*arguments):
        result = evaluate_batch(*arguments)
        kl = result.latents.kl.at[0, 0].set(jnp.inf)  # of a log-variance of 200, in float32
        return result._replace(latents=result.latents._replace(kl=kl))

    with monkeypatch.context() as patch:
        patch.setattr(passes, "evaluate_batch", overflow)
        evaluation = evaluate.evaluate(trained_run, quick, quarters)
    result = evaluation.json
    for name in ("rate", "kl", "report_loss", "elbo", "bits_per_dim"):
        assert result["left_out"][name].startswith("it is not finite")
    assert result["rate_per_dimension"][0] is None
    assert None not in result["rate_per_dimension"][1:]
    assert evaluation.pictures.rate_per_dimension is None
    assert "mse" in result["metrics"]
    json.dumps(result, allow_nan=False)

    nan = jax.tree.map(lambda leaf: leaf * np.nan, trained_run.trained.params)
    broken = trained_run._replace(trained=trained_run.trained._replace(params=nan))
    with pytest.raises(UserError, match="is not finite: their mse is nan"):
        evaluate.evaluate(broken, quick, quarters)


def test_other_or_missing_images_and_runs_without_weights_are_refused(
    trained: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    spec = run.read_spec(folder)
    run.write_spec(folder, replace(spec, data={"fingerprint": "0"}))
    with pytest.raises(UserError, match="other images than"):
        load_run(folder, "test")
    # the same images with other splits
    run.write_spec(folder, replace(spec, data={**spec.data, "persons": 0}))
    with pytest.raises(UserError, match="or splits them in another way"):
        load_run(folder, "test")
    schedule = replace(spec.schedule, prepared=str(tmp_path / "missing"))
    run.write_spec(folder, replace(spec, schedule=schedule))
    with pytest.raises(UserError, match="prepares them again"):
        load_run(folder, "test")
    run.write_spec(folder, spec)
    shutil.rmtree(folder / checkpoint.FOLDER)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load_run(folder, "test")


def test_images_that_the_run_has_learned_from_are_left_out_and_counted(
    trained: Path, trained_run, evaluation, tmp_path: Path
):
    assert evaluation.json["learned_from"] == 0
    assert not [note for note in tables.notes(evaluation.json) if "learned from" in note]
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    held_out, kept = trained_run.held_out, assignment.read(folder)
    assert kept is not None
    paths = [held_out.metadata(i)["path"] for i in range(len(held_out))]
    learned = {kept_id: "train" for kept_id in ids(held_out, [0, 3, len(held_out) - 1])}
    assignment._write(folder, kept._replace(known={**kept.known, **learned}))
    found = load_run(folder, "test")
    assert found.learned_from == 3
    assert [found.held_out.metadata(i)["path"] for i in range(len(found.held_out))] == [
        path for i, path in enumerate(paths) if i not in (0, 3, len(held_out) - 1)
    ]
    notes = tables.notes({**evaluation.json, "learned_from": found.learned_from})
    assert any(note.startswith("3 more images of that split are left out") for note in notes)

    learned = {kept_id: "train" for kept_id in ids(trained_run.validation, [1])}
    assignment._write(folder, kept._replace(known={**kept.known, **learned}))
    found = load_run(folder, "test")
    assert found.learned_from == 0
    assert len(found.validation) == len(trained_run.validation) - 1

    learned = {kept_id: "train" for kept_id in kept.known}
    assignment._write(folder, kept._replace(known=learned))
    with pytest.raises(UserError, match="has learned from all"):
        load_run(folder, "test")


def ids(images: Images, indices: list[int]) -> list[bytes]:
    """Some of their files, as a run knows them."""
    facts = [Facts(images.metadata(i)["sha256"], "", "", "") for i in indices]
    return [image_ids(fact)[0] for fact in facts]


# The modules --------------------------------------------------------------------------------------


def imported_modules(path: Path) -> set[str]:
    """The modules of vaejax.evaluation that a file imports, with those that these import."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            modules |= {name.split(".")[2] for name in names if name.count(".") >= 2
                        and name.startswith("vaejax.evaluation.")}  # fmt: skip
    modules = {name for name in modules if path.with_name(f"{name}.py").exists()}
    return modules.union(*(imported_modules(path.with_name(f"{name}.py")) for name in modules))


def test_what_computes_imports_nothing_that_draws():
    folder = Path(evaluate.__file__).parent
    imported = imported_modules(folder / "evaluate.py")
    assert {"passes", "likelihood", "features", "weights"} <= imported
    assert not imported & {"tables", "compare", "rate_distortion"}
