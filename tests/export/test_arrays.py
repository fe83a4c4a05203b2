"""A model and its prior come back from safetensors bit for bit; what does not fit is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from safetensors import safe_open
from small_exports import ATTRIBUTES, export_of, flow_prior, mixture_prior

from vaejax.errors import UserError
from vaejax.export import ARRAYS, Exported, load, to_safetensors
from vaejax.models.feed_forward import FeedForward
from vaejax.models.residual import ResidualVAE
from vaejax.models.vae import VAE
from vaejax.priors import StandardNormal

MODEL = VAE(size=16, latent_dim=3, width=1, norm="batch")


def written(folder: Path, exported: Exported, **settings) -> Path:
    (folder / ARRAYS).write_bytes(to_safetensors(exported, **settings))
    return folder


def test_names_are_paths_and_numbers_are_the_same_bits(tmp_path: Path):
    exported = export_of(MODEL)
    folder = written(tmp_path, exported)
    arrays = safetensors.load_file(folder / ARRAYS)
    kernel = exported.params["decoder"]["conv_1"]["layer"]["kernel"]
    assert arrays["params.decoder.conv_1.layer.kernel"].tobytes() == np.asarray(kernel).tobytes()
    assert "batch_stats.encoder.dense.norm.mean" in arrays
    with safe_open(folder / ARRAYS, "np") as file:
        facts = json.loads(file.metadata()["vaejax"])
    assert facts["model"]["kind"] == "VAE"
    assert facts["model"]["norm"] == "batch"


def export_with(kind: str) -> Exported:
    match kind:
        case "normal":
            return export_of(MODEL, StandardNormal(MODEL))
        case "flow":
            flow = flow_prior(MODEL, steps=3, attributes=ATTRIBUTES)
            return export_of(MODEL, flow, attributes=ATTRIBUTES)
        case "mixture":
            return export_of(MODEL, mixture_prior(MODEL))
    return export_of(MODEL)


@pytest.mark.parametrize("kind", ["none", "normal", "flow", "mixture"])
def test_what_is_loaded_is_what_was_exported(kind: str, tmp_path: Path):
    exported = export_with(kind)
    loaded = load(written(tmp_path, exported))
    assert loaded.model == exported.model
    assert loaded.attributes == exported.attributes
    for actual, expected in zip(loaded[1:3], exported[1:3], strict=True):
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        assert all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
    if exported.prior is None:
        assert loaded.prior is None
    else:
        assert loaded.prior is not None
        assert np.array_equal(loaded.prior.sample([0, 7]), exported.prior.sample([0, 7]))


def test_half_rounds_large_arrays_alone(tmp_path: Path):
    exported = export_of(FeedForward(size=16, latent_dim=4))
    folder = written(tmp_path, exported, half=True)
    stored = safetensors.load_file(folder / ARRAYS)
    assert {n: a.dtype for n, a in stored.items() if a.size >= 1024} == {
        f"params.{part}.layer.kernel": np.float16 for part in ("decoder.output", "encoder.dense")
    }
    loaded = load(folder)
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(exported.params), strict=True):
        assert a.dtype == np.float32
        assert np.array_equal(a, np.asarray(b, np.float16) if b.size >= 1024 else b)


def changed(exported: Exported, change) -> bytes:
    """The file, with its arrays and its description changed."""
    content = to_safetensors(exported)
    arrays = safetensors.load(content)
    length = int.from_bytes(content[:8], "little")
    facts = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["vaejax"])
    change(arrays, facts)
    return safetensors.save(arrays, {"vaejax": json.dumps(facts)})


KERNEL = "params.encoder.dense.layer.kernel"
DAMAGE = {
    "array": (lambda a, _: a.pop(KERNEL), f"{KERNEL} is missing"),
    "one more": (lambda a, _: a.update(extra=a[KERNEL]), "extra is not of this model"),
    "shape": (
        lambda a, _: a.update({KERNEL: a[KERNEL][1:]}),
        "is float32 15×32, not float32 16×32",
    ),
    "type": (lambda a, _: a.update({KERNEL: a[KERNEL].astype(int)}), "is int64 16×32, not float32"),
    "width": (
        lambda _, f: f["model"].update(width=2),
        r"norm.mean is float32 8, not float32 16; .* and \d+ more$",
    ),
    "model": (lambda _, f: f["model"].update(kind="Unknown"), "there is no model 'Unknown'"),
    "format": (lambda _, f: f.update(format="vaejax export 0"), "another version of vaejax"),
    "no format": (lambda _, f: f.pop("format"), "is no export of vaejax, or damaged: 'format'"),
    "prior": (lambda _, f: f.update(prior={"kind": "odd"}), "it describes an unknown prior"),
    "steps": (lambda _, f: f["prior"].update(steps=0), "it describes an unknown prior"),
    "depth": (lambda _, f: f["prior"]["network"].update(depth="1"), "is no export of vaejax"),
    "network": (lambda _, f: f["prior"].update(network=3), "is no export of vaejax"),
    "attributes": (lambda _, f: f["prior"].update(attributes={}), "are not those of its network"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused_by_its_name(damage: str, tmp_path: Path):
    change, words = DAMAGE[damage]
    (tmp_path / ARRAYS).write_bytes(changed(export_with("flow"), change))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_what_is_no_export_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=f"there is no {tmp_path / ARRAYS}: `vaejax export RUN"):
        load(tmp_path)
    content = to_safetensors(export_of(ResidualVAE(size=32, width=8, latent_dim=2)))
    for wrong in (b"", b"hello, world", content[: len(content) // 2], safetensors.save({})):
        (tmp_path / ARRAYS).write_bytes(wrong)
        with pytest.raises(UserError, match="is no export of vaejax, or damaged"):
            load(tmp_path)
