"""A model card for Hugging Face: the README.md of an export."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from vaejax.export.exported import LATENT
from vaejax.metrics import METRICS, format_estimate

# what the card tells of an evaluation; the last ones are of the samples of the exported prior
OF_IMAGES = ("mse", "psnr", "ssim", "bits_per_dim", "elbo", "learned_prior_elbo")
OF_SAMPLES = ("frechet", "precision", "recall", "coverage", "memorized_pixels")

DRAWN_CREDIT = """\
The training images are the drawn faces of vaejax, which are derived from **ToonHead** by **Johan
Melin** (<https://www.johanmelin.com>,
<https://www.figma.com/community/file/1589627891082866389>), licensed under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), in the remix that
[DiceBear](https://www.dicebear.com) ships as its style "Toon Head". They were changed: cut to the
head, larger eyes and mouths, other colors, added glasses. This model is passed on under CC BY 4.0
too: name Johan Melin and this license. The artist has nothing to do with it and does not endorse
it."""
OTHER_CREDIT = """\
**To be written by whoever publishes this model:** where the training images come from, whom they
show or who made them, under which license they are, and the license of this model. Then replace
`license: other` at the top."""


class Facts(NamedTuple):
    """What a card tells of the training of a model."""

    source: str  # the name of the folder or zip of the training images
    drawn: bool  # whether these are the drawn faces that ship with vaejax
    recipe: str
    loss: str
    images: int  # for training
    updates: int
    batch_size: int
    evaluation: Mapping[str, Any] | None  # the content of a valid evaluation.json
    copies: Sequence[str]  # Markdown on copies of training faces


def card(metadata: Mapping[str, Any], facts: Facts, files: Mapping[str, str]) -> str:
    """Write the card of an export as Markdown with a YAML head.

    `metadata` are those of `payload`; `files` are the names of the folder's files and what they
    are.
    """
    size, title = metadata["size"], metadata["title"]
    draws = "draws new ones" if metadata["prior"] else "has no prior to draw new ones from"
    sections = [
        _head(metadata, facts),
        f"# A {title} for faces of {size}×{size} pixels",
        f"{_sentence(metadata)} It encodes and decodes faces and {draws}. It was trained with "
        f"vaejax, an autoencoder laboratory for faces in JAX.",
        "## Files",
        _table(
            ("file", "what it is"), ((f"`{name}`", _cell(what)) for name, what in files.items())
        ),
        "## Use with onnxruntime",
        _code(onnx_usage(metadata)),
        *_attributes(metadata),
        "## Use with vaejax",
        _code(vaejax_usage(metadata)),
        "## Training",
        _training(facts),
        "## Evaluation",
        _evaluation(metadata, facts),
        *(["\n".join(facts.copies)] if facts.copies else []),
        "## Limits",
        _limits(metadata, facts),
        "## License and credits",
        DRAWN_CREDIT if facts.drawn else OTHER_CREDIT,
    ]
    return "\n\n".join(sections) + "\n"


def _head(metadata: Mapping[str, Any], facts: Facts) -> str:
    tags = ["vae" if metadata["variational"] else "autoencoder", "faces"]
    tags += ["denoising"] * metadata["denoises"]
    tags += ["flow-matching"] * (_kind(metadata) == "flow")
    tags += ["jax", "flax", "onnx", "safetensors"]
    task = "unconditional-image-generation" if metadata["prior"] else "image-to-image"
    lines = [
        f"license: {'cc-by-4.0' if facts.drawn else 'other'}",
        "library_name: vaejax",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _kind(metadata: Mapping[str, Any]) -> str:
    """Return the kind of the prior, or "" without one."""
    return metadata["prior"]["kind"] if metadata["prior"] else ""


def _sentence(metadata: Mapping[str, Any]) -> str:
    shapes = " and ".join("×".join(map(str, s)) or "1" for s in metadata["latents"].values())
    parameters = metadata["parameters"]
    prior = {
        "": "no prior",
        "normal": "N(0, I) as its prior",
        "mixture": "a Gaussian mixture as its prior",
        "flow": f"a flow of {parameters['prior']:,} parameters as its prior",
    }[_kind(metadata)]
    return (
        f"A face is {shapes} latents. The model has {parameters['model']:,} parameters and {prior}."
    )


# Usage --------------------------------------------------------------------------------------------


def onnx_usage(metadata: Mapping[str, Any]) -> str:
    """Write a Python program that draws four faces with onnxruntime, or reconstructs a photo."""
    latents = {
        "": _latents_of_photo,
        "normal": _normal_latents,
        "mixture": _mixture_latents,
        "flow": _flow_latents,
    }[_kind(metadata)](metadata)
    lines = [
        "import numpy as np",
        "import onnxruntime as ort",
        "from PIL import Image",
        "",
        *latents,
        'decoder = ort.InferenceSession("decoder.onnx")',
        f'faces = decoder.run(["image"], dict(zip({_names(metadata)}, latents)))[0]',
        "for i, face in enumerate(np.uint8(255 * faces.clip(0, 1) + 0.5)):",
        '    Image.fromarray(face.squeeze()).save(f"face-{i}.png")',
    ]
    return "\n".join(lines)


def _names(metadata: Mapping[str, Any], kind: str = LATENT) -> str:
    names = (f'"{name.replace(LATENT, kind, 1)}"' for name in metadata["latents"])
    return f"[{', '.join(names)}]"


def _latents_of_photo(metadata: Mapping[str, Any]) -> list[str]:
    mean = _names(metadata, "mean" if metadata["variational"] else LATENT)
    return [
        'encoder = ort.InferenceSession("encoder.onnx")',
        *_photo(metadata),
        f'latents = encoder.run({mean}, {{"image": np.float32(image) / 255}})',
    ]


def _photo(metadata: Mapping[str, Any]) -> list[str]:
    size, channels = metadata["size"], metadata["channels"]
    mode = "L" if channels == 1 else "RGB"
    return [
        f'photo = Image.open("photo.jpg").convert("{mode}").resize(({size}, {size}))',
        f"image = np.asarray(photo).reshape(1, {size}, {size}, {channels})",
    ]


def _normal_latents(metadata: Mapping[str, Any]) -> list[str]:
    shapes = ((4, *shape) for shape in metadata["latents"].values())
    draws = (f"random.standard_normal({shape}, np.float32)" for shape in shapes)
    return ["random = np.random.default_rng(0)", f"latents = [{', '.join(draws)}]"]


def _noise(metadata: Mapping[str, Any]) -> list[str]:
    count = sum(prod(shape) for shape in metadata["latents"].values())
    return [
        'prior = ort.InferenceSession("prior.onnx")',
        "random = np.random.default_rng(0)",
        f"noise = random.standard_normal((4, {count}), np.float32)",
    ]


def _flow_latents(metadata: Mapping[str, Any]) -> list[str]:
    count = len(metadata["prior"]["attributes"])
    labels = f', "labels": np.zeros((4, {count}), np.int32)' if count else ""
    run = f'latents = prior.run({_names(metadata)}, {{"noise": noise{labels}}})'
    return [*_noise(metadata), run]


def _mixture_latents(metadata: Mapping[str, Any]) -> list[str]:
    return [
        "import json",
        *_noise(metadata),
        'described = json.loads(prior.get_modelmeta().custom_metadata_map["vaejax"])',
        'weights = np.exp(described["prior"]["log_weights"])',
        "component = random.choice(len(weights), 4, p=weights / weights.sum()).astype(np.int32)",
        f'latents = prior.run({_names(metadata)}, {{"noise": noise, "component": component}})',
    ]


def vaejax_usage(metadata: Mapping[str, Any]) -> str:
    """Write a Python program that draws four faces with vaejax, or reconstructs a photo."""
    if metadata["prior"]:
        draw = "faces = generate.decode(*weights, m.prior.sample(range(4)), model=m.model)"
        lines = [draw]
    else:
        draw = "faces = generate.reconstruct(*weights, image, model=m.model)"
        lines = [*_photo(metadata), draw]
    return "\n".join(
        [
            "from pathlib import Path",
            "",
            "import numpy as np",
            "from PIL import Image",
            "from vaejax import export, generate",
            "",
            'm = export.load(Path("."))  # the folder of this file',
            "weights = m.params, m.batch_stats",
            *lines,
            "for i, face in enumerate(np.asarray(faces)):  # uint8",
            '    Image.fromarray(face.squeeze()).save(f"face-{i}.png")',
        ]
    )


def _attributes(metadata: Mapping[str, Any]) -> list[str]:
    """Say which numbers of `labels` mean what, of a flow that knows attributes."""
    if _kind(metadata) != "flow" or not (attributes := metadata["prior"]["attributes"]):
        return []
    rows = (
        (str(i), _cell(name), ", ".join(f"{n} {_cell(v)}" for n, v in enumerate(values, 1)))
        for i, (name, values) in enumerate(attributes.items())
    )
    return [
        "`labels` has a column for each attribute: 0 for any value, or the number of one.",
        _table(("column", "attribute", "values"), rows),
    ]


# Sections -----------------------------------------------------------------------------------------


def _training(facts: Facts) -> str:
    source = "the 3,200 drawn faces that ship with vaejax" if facts.drawn else f"`{facts.source}`"
    return (
        f"On {facts.images:,} training images of {source}; others were held out. "
        f"{facts.updates:,} updates of {facts.batch_size} images by the {facts.recipe} recipe with "
        f"the loss `{facts.loss}`. `model.safetensors` has the model's settings in its metadata."
    )


def _evaluation(metadata: Mapping[str, Any], facts: Facts) -> str:
    if facts.evaluation is None:
        return "This model was not evaluated before it was exported."
    metrics, kind = facts.evaluation["metrics"], _kind(metadata)
    samples = "samples" if kind == "normal" else f"samples ({kind})"
    keys = {name: name for name in OF_IMAGES} | {f"{n}/{samples}": n for n in OF_SAMPLES}
    rows = [
        (_cell(key), format_estimate(metrics[key]), METRICS[n].unit, _cell(METRICS[n].meaning))
        for key, n in keys.items()
        if key in metrics
    ]
    step = facts.evaluation["step"]
    of = "" if step == facts.updates else f", after {step:,} updates"
    intro = f"By `vaejax evaluate` on {facts.evaluation['images']:,} held-out images{of}:"
    return f"{intro}\n\n{_table(('metric', 'value', 'unit', 'what it is'), rows)}"


def _limits(metadata: Mapping[str, Any], facts: Facts) -> str:
    what = "drawn faces of one style" if facts.drawn else "faces as they are in its training images"
    words = [
        f"It knows {what}, of {metadata['size']}×{metadata['size']} pixels: others come out as the "
        "nearest that it knows."
    ]
    if metadata["denoises"]:
        words.append("Its encoder takes a noisy picture, and its decoder gives a clean one.")
    if not metadata["prior"]:
        words.append("It reconstructs faces, and draws none of its own.")
    words.append(
        "Details are lost in reconstructions. Its faces are not to be taken for photographs of "
        "persons, and it is no tool to recognize anybody."
    )
    if metadata["half"]:
        words.append(
            "Weights are stored as float16, which changes the image of a latent by less than 0.001."
        )
    return " ".join(words)


# Markdown -----------------------------------------------------------------------------------------


def _code(program: str) -> str:
    return f"```python\n{program}\n```"


def _cell(text: str) -> str:
    """Return a text as it may stand in a table, on one line."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
