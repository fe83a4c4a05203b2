"""The model card: its head is YAML, its programs run, and it says where the faces come from."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_exports import ATTRIBUTES, export_of, flow_prior, mixture_prior

from vaejax.export import ARRAYS, Exported, metadata, payload, to_safetensors
from vaejax.export.card import Facts, card
from vaejax.models.denoising import Denoising
from vaejax.models.vae import VAE
from vaejax.priors import StandardNormal

MODEL = VAE(size=16, latent_dim=3, width=1)
FACTS = Facts("faces.zip", False, "quick", "mse_kl", 2875, 5012, 16, None, ())
EVALUATION = {
    "step": 5012,
    "images": 173,
    "metrics": {
        "mse": {"value": 0.0123456, "error": 0.00034},
        "frechet/samples": {"value": 999.0, "error": None},
        "frechet/samples (flow)": {"value": 11.0, "error": None},
    },
}


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def export_with(kind: str) -> Exported:
    grey = VAE(size=16, latent_dim=3, width=1, channels=1)
    match kind:
        case "normal":
            return export_of(grey, StandardNormal(grey))
        case "flow":
            flow = flow_prior(MODEL, steps=2, attributes=ATTRIBUTES)
            return export_of(MODEL, flow, attributes=ATTRIBUTES)
        case "mixture":
            return export_of(MODEL, mixture_prior(MODEL))
        case "none, of a VAE":
            return export_of(MODEL)
    return export_of(Denoising(size=16, width=2))


@pytest.mark.parametrize("kind", ["normal", "flow", "mixture", "none", "none, of a VAE"])
def test_its_programs_draw_faces(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    exported = export_with(kind)
    files, facts = payload(exported)
    for name, content in (files | {ARRAYS: to_safetensors(exported)}).items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", card(facts, FACTS, {}), re.DOTALL)
    assert len(programs) == 2
    by_onnxruntime, by_vaejax = ({} for _ in range(2))
    for program, names in zip(programs, (by_onnxruntime, by_vaejax), strict=True):
        assert program.count("\n") <= 16
        exec(program, names)
        drawn = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("face-*.png"))]
        assert len(drawn) == (1 if "none" in kind else 4)
        size = exported.model.size
        assert all(face.shape[:2] == (size, size) for face in drawn)
        for path in tmp_path.glob("face-*.png"):
            path.unlink()
    if "none" in kind:  # both of the same photo
        pairs = np.asarray(by_vaejax["faces"], float), by_onnxruntime["faces"].clip(0, 1) * 255
        assert np.abs(np.subtract(*pairs)).max() < 0.51


def test_the_head_says_what_the_model_is():
    text = card(metadata(export_with("flow"), half=True), FACTS._replace(drawn=True), {})
    assert head(text) == {
        "license": "cc-by-4.0",
        "library_name": "vaejax",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["vae", "faces", "flow-matching", "jax", "flax", "onnx", "safetensors"],
    }
    assert "**Johan\nMelin**" in text
    assert "float16" in text
    facts = metadata(export_with("none"), half=False)
    text = card(facts, FACTS, {"decoder.onnx": "latents | images"})
    assert head(text)["license"] == "other"
    assert head(text)["pipeline_tag"] == "image-to-image"
    assert {"autoencoder", "denoising"} <= set(head(text)["tags"])
    assert "Johan" not in text
    assert "To be written by whoever publishes this model" in text
    assert "| `decoder.onnx` | latents \\| images |" in text


def test_the_last_evaluation_is_that_of_the_exported_prior():
    facts, exported = (
        metadata(export_with("flow"), half=False),
        FACTS._replace(evaluation=EVALUATION),
    )
    assert "was not evaluated" in card(facts, FACTS, {})
    text = card(facts, exported, {})
    assert "| mse | 0.01235 ± 0.00034 | in [0, 1]² |" in text
    assert "| frechet/samples (flow) | 11 |" in text
    assert "999" not in text
    assert "after 5,012 updates" not in text
    assert "after 5,012 updates" in card(facts, exported._replace(updates=6000), {})


def test_the_labels_of_attributes_are_in_a_table():
    attributes = {"a|b": ["blue", "red", "white"], "glasses": ["no", "yes"]}
    flow = flow_prior(MODEL, attributes=attributes)
    text = card(metadata(export_of(MODEL, flow, attributes=attributes), half=False), FACTS, {})
    assert "| 0 | a\\|b | 1 blue, 2 red, 3 white |" in text
    assert "| 1 | glasses | 1 no, 2 yes |" in text
