"""What onnxruntime computes is what JAX computes, for every model and prior."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from small_exports import ATTRIBUTES, export_of, flow_prior, images, mixture_prior, run_onnx

from vaejax import kernels
from vaejax.distributions import Normal
from vaejax.errors import UserError
from vaejax.export import payload
from vaejax.models import autoencoder, convolution
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.convolutional import Convolutional
from vaejax.models.denoising import Denoising
from vaejax.models.feed_forward import FeedForward
from vaejax.models.residual import ResidualVAE, SpatialVAE
from vaejax.models.vae import VAE
from vaejax.priors import StandardNormal, seed_keys

VAE_16, SPATIAL = VAE(size=16, latent_dim=3, width=1), SpatialVAE(size=32, width=8)
MODELS = [
    VAE_16,
    # the decoder of large images
    VAE(size=256, latent_dim=2, width=1, channels=1, norm="batch", log_variance_bound=2.0),
    ResidualVAE(size=32, latent_dim=4, width=8),
    SPATIAL,
    FeedForward(size=16, latent_dim=4),
    Convolutional(size=16, width=2),
    Denoising(size=16, width=2),
    Denoising(size=16, width=2, norm="affine"),
]


def name_of(model: Autoencoder) -> str:
    return f"{type(model).__name__}-{model.size}-{getattr(model, 'norm', '')}"


TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-3


def difference(actual: np.ndarray, expected) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    return float(np.abs(actual - np.asarray(expected)).max())


def by_jax(exported, image):
    """The encoder's outputs, and the image of its z."""
    model, params, batch_stats = exported[:3]
    posterior = autoencoder.encode(model, params, batch_stats, image)
    z = autoencoder.mode(posterior)
    names = ("mean", "log_variance") if isinstance(posterior, Normal) else ("latent",)
    codes = dict(zip(names, jax.tree.leaves(posterior), strict=True))
    return codes, z, autoencoder.decode(model, params, batch_stats, z)


@pytest.mark.parametrize("model", MODELS, ids=name_of)
def test_encoder_and_decoder_compute_what_jax_computes(model: Autoencoder):
    exported, x = export_of(model), images(model, 7)
    codes, z, output = jax.jit(partial(by_jax, exported))(x)
    for half, tolerance in ((False, TOLERANCE), (True, HALF_TOLERANCE)):
        files = payload(exported, half=half).files
        assert files.keys() == {"encoder.onnx", "decoder.onnx"}
        for count in (1, 7):
            encoded = run_onnx(files["encoder.onnx"], image=x[:count])
            assert encoded.keys() == codes.keys()
            for name, code in codes.items():
                scale = max(1, np.abs(code).max())
                assert difference(encoded[name], code[:count]) < tolerance * scale, name
            decoded = run_onnx(files["decoder.onnx"], latent=z[:count])
            assert difference(decoded["image"], output[:count]) < tolerance


@pytest.mark.skipif(bool(kernels.unavailable_reason()), reason=kernels.unavailable_reason())
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_model_that_runs_on_the_kernels_is_exported_without_them(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(convolution, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(convolution, "winograd_is_faster", lambda *_: True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    exported, x = export_of(VAE_16), images(VAE_16, 3)
    assert "ffi_call" in str(jax.make_jaxpr(partial(by_jax, exported))(x))
    codes, z, output = jax.jit(partial(by_jax, exported))(x)
    files = payload(exported).files
    assert difference(run_onnx(files["encoder.onnx"], image=x)["mean"], codes["mean"]) < TOLERANCE
    assert difference(run_onnx(files["decoder.onnx"], latent=z)["image"], output) < TOLERANCE
    with kernels.plain_operations():
        plain = str(jax.make_jaxpr(partial(by_jax, exported))(x[:2]))
    assert "ffi_call" not in plain


def noise_of(seeds, d: int) -> np.ndarray:
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, (d,)))(seed_keys(seeds)))


def test_a_flow_makes_of_noise_the_latents_that_it_makes_in_jax():
    model = SPATIAL
    prior = flow_prior(model, steps=5)
    content = payload(export_of(model, prior)).files["prior.onnx"]
    for seeds in (range(1), range(7)):
        expected = prior.sample(seeds)
        actual = run_onnx(content, noise=noise_of(seeds, prior.network.latents))["latent"]
        assert difference(actual, expected) < TOLERANCE * np.abs(expected).max()


def test_the_attributes_of_a_flow_are_its_labels():
    model, settings = VAE_16, {"steps": 3, "attributes": ATTRIBUTES}
    exported = export_of(model, flow_prior(model, **settings), attributes=ATTRIBUTES)
    files, metadata = payload(exported)
    assert metadata["prior"]["attributes"] == ATTRIBUTES
    drawn = []
    for condition in ([0, 0], [3, 1], [1, 2]):
        expected = flow_prior(model, condition=condition, **settings).sample(range(2))
        labels = np.asarray([condition] * 2, np.int32)
        found = run_onnx(files["prior.onnx"], noise=noise_of(range(2), 3), labels=labels)["latent"]
        assert difference(found, expected) < TOLERANCE * np.abs(expected).max()
        drawn.append(found)
    assert np.abs(drawn[0] - drawn[1]).min() > 1e-3


def test_a_component_and_noise_are_a_latent_of_a_mixture():
    model = VAE_16
    prior = mixture_prior(model)
    files, metadata = payload(export_of(model, prior))
    weights, means, factors = (np.asarray(a, np.float64) for a in prior.mixture)
    assert metadata["prior"] == {"kind": "mixture", "log_weights": weights.tolist()}
    noise, component = noise_of(range(4), 3), np.asarray([2, 0, 1, 2], np.int32)
    z = run_onnx(files["prior.onnx"], noise=noise, component=component)["latent"]
    pairs = zip(component, noise, strict=True)
    assert difference(z, np.stack([means[k] + factors[k] @ e for k, e in pairs])) < TOLERANCE


def test_what_a_program_needs_to_know_is_in_each_file():
    model = SPATIAL
    files, metadata = payload(export_of(model, StandardNormal(model)), half=True)
    assert metadata["latents"] == {"latent": [4, 4, 4]}
    assert metadata["prior"] == {"kind": "normal"}
    assert (metadata["variational"], metadata["denoises"], metadata["half"]) == (True, False, True)
    assert metadata["parameters"]["prior"] == 0
    assert "prior.onnx" not in files
    for content in files.values():
        model_ = onnx.load_from_string(content)
        assert json.loads(model_.metadata_props[0].value) == metadata
        assert model_.opset_import[0].version == 17
        assert model_.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_large_weights_are_float16_unless_it_has_not_their_numbers():
    model = FeedForward(size=16, latent_dim=4)
    exported = export_of(model)

    def stored(exported) -> dict[str, int]:
        graph = onnx.load_from_string(payload(exported, half=True).files["encoder.onnx"]).graph
        return {tensor.name: tensor.data_type for tensor in graph.initializer}

    kernel = "params.encoder.dense.layer.kernel"
    assert stored(exported)[f"{kernel}.float16"] == onnx.TensorProto.FLOAT16
    exported.params["encoder"]["dense"]["layer"]["kernel"] *= 1e6
    assert stored(exported)[kernel] == onnx.TensorProto.FLOAT


class Two(Autoencoder):
    """A model with two latents, one of them without a posterior, and operations of its own."""

    def setup(self):
        self.dense = nn.Dense(4)
        self.back = nn.Dense(self.size**2 * self.channels)

    def encode(self, x, *, train, axis=None):
        h = self.dense(x.reshape(len(x), -1))
        return {"style": Normal(h[:, :2], -h[:, :2]), "place": jnp.argmax(h, axis=1)[:, None] / 4}

    def decode(self, z, *, train, axis=None):
        shape = (-1, self.size, self.size, self.channels)
        return self.back(jnp.concatenate([z["style"], z["place"]], axis=1)).reshape(shape)


def test_several_latents_have_names():
    model = Two(size=4)
    exported, x = export_of(model), images(model, 3)
    files, metadata = payload(exported)
    assert metadata["latents"] == {"latent.place": [1], "latent.style": [2]}
    codes = run_onnx(files["encoder.onnx"], image=x)
    posterior = autoencoder.encode(*exported[:3], x)
    assert codes.keys() == {"latent.place", "mean.style", "log_variance.style"}
    assert difference(codes["log_variance.style"], posterior["style"].log_variance) < TOLERANCE
    z = {"latent.place": codes["latent.place"], "latent.style": codes["mean.style"]}
    expected = autoencoder.decode(*exported[:3], autoencoder.mode(posterior))
    assert difference(run_onnx(files["decoder.onnx"], **z)["image"], expected) < TOLERANCE


class Sorting(FeedForward):
    """A model with operations that have no form in ONNX here."""

    def decode(self, z, *, train, axis=None):
        return super().decode(jnp.sort(z) + jnp.cumsum(z, axis=1), train=train, axis=axis)


def test_operations_without_a_form_in_onnx_are_named():
    with pytest.raises(UserError, match=r"the decoder cannot be written as ONNX.* cumsum, sort$"):
        payload(export_of(Sorting(size=4, latent_dim=2)))


class Normalizing(FeedForward):
    """A model whose output depends on the other images of its batch."""

    def decode(self, z, *, train, axis=None):
        return super().decode(z - jnp.mean(z, axis=0, keepdims=True), train=train, axis=axis)


def test_a_model_whose_images_depend_on_each_other_is_refused():
    with pytest.raises(UserError, match="reduce_sum over the batch"):
        payload(export_of(Normalizing(size=4, latent_dim=2)))
    with pytest.raises(UserError, match="of the kind 'odd'"):
        payload(export_of(FeedForward(size=4, latent_dim=2), Odd()))


class Odd:
    """A prior that nobody can read."""

    name = "odd"

    def sample(self, seeds, *, temperature=1.0):
        raise NotImplementedError

    def log_prob(self, z):
        raise NotImplementedError


def test_a_model_that_computes_in_bfloat16_is_exported_in_float32():
    exact, rounded = (FeedForward(size=16, compute=c) for c in ("float32", "bfloat16"))
    exported, x = export_of(rounded), images(rounded, 2)
    code = run_onnx(payload(exported).files["encoder.onnx"], image=x)["latent"]
    assert difference(code, autoencoder.encode(exact, *exported[1:3], x)) < TOLERANCE
