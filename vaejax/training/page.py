"""The README.md of a run, written by the program: what it is, its figures, its pictures."""

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from vaejax.files import whole
from vaejax.models import autoencoder
from vaejax.models.autoencoder import Autoencoder
from vaejax.training import run

FIGURES = {
    "loss": "what was minimised",
    "mse": "mean squared error, over pixels and channels in [0, 1]",
    "bce": "binary cross-entropy of each value in [0, 1], nats: the recipe's error",
    "kl": "KL(q(z\\|x) ‖ N(0, I)), nats per latent dimension",
    # the bar of a conditional density would end a Markdown table's cell
    "distortion": "−log p(x\\|z) over the 256 levels, nats per image",
    "rate": "KL(q(z\\|x) ‖ N(0, I)), nats per image",
    "elbo": "−(distortion + rate), nats per image: higher is better",
    "bits_per_dim": "(distortion + rate) / (number of values · log 2)",
    "effective_beta": "the weight of the rate against the distortion: 1 is the ELBO",
}


def epoch_line(epoch: int, epochs: int, figures: Mapping[str, float]) -> str:
    shown = (name for name in ("loss", "mse", "kl", "bits_per_dim") if name in figures)
    words = "  ".join(f"{name} {figures[name]:.5g}" for name in shown)
    return f"epoch {epoch}/{epochs} held out: {words}"


def what_next(folder: Path, model: Autoencoder) -> str:
    new = folder / "faces.png"
    there = f"New faces are in {new}, the" if new.exists() else "The"
    return (
        f"{there} film of the learning is in {folder / 'learning.mp4'}, all else in "
        f"{folder / 'README.md'}.\nMore:  " + "\n       ".join(commands(model, folder))
    )


def commands(model: Autoencoder, folder: Path | str) -> list[str]:
    """What can be done with such a run."""
    known = (
        ("sample", "--seeds 0-24", model.has_prior),
        ("denoise", "IMAGE...", model.denoises),
        ("reconstruct", "IMAGE...", True),
    )
    return [f"vaejax {verb} {quote(str(folder))} {rest}" for verb, rest, can in known if can]


def write(folder: Path, config: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write README.md from what `config.json` and `run.json` say and what else is in the folder."""
    first, last = run.ends(folder)
    model, plan = autoencoder.build(config["model"]), config["schedule"]
    lines = [
        f"# {folder.name}: {state['status']}",
        "",
        f"A {model.title} for faces of {model.size}×{model.size} pixels with codes of "
        f"{'×'.join(map(str, model.code))}, by the {plan['recipe']} recipe, on "
        f"{plan['images']:,} training images: {plan['updates']:,} updates of "
        f"{config['batch_size']} images. Seed {config['seed']}, on {state['devices']}.",
        "",
        "| figure | first batch | last batch | held out | what it is |",
        "|---|---|---|---|---|",
    ]
    columns = (first.get("train"), last.get("train"), last.get("validation"))
    for name, meaning in FIGURES.items():
        values = [f"{c[name]:.5g}" if c and name in c else "" for c in columns]
        if any(values):
            lines.append(f"| {name} | {' | '.join(values)} | {meaning} |")
    lines += ["", _steps(columns), "", *_pictures(folder, model), "", "## Going on", "", "```"]
    lines += [
        f"{state['command']}     # goes on, if it is not finished",
        *commands(model, folder),
        "```",
        "",
        "`config.json` is what identifies this run, `run.json` where it was made, `metrics.jsonl` "
        "and `tensorboard/` hold every figure.",
        "",
    ]
    with whole(folder / "README.md") as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")


def _steps(columns: tuple[dict | None, ...]) -> str:
    names = ("first batch", "last batch", "held out")
    steps = [f"{n}: step {c['step']:,}" for n, c in zip(names, columns, strict=True) if c]
    return "; ".join(steps) + "." if steps else "No update was made yet."


def _pictures(folder: Path, model: Autoencoder) -> list[str]:
    """What there is to be seen, newest first."""
    held_out = "Held-out faces above their reconstructions"
    if model.denoises:
        held_out = "Held-out faces with noise, what the model makes of them, and without noise"
    shown = [
        ("New faces", folder / "faces.png"),
        ("Samples", _newest(folder / "samples")),
        (held_out, _newest(folder / "reconstructions")),
        ("Learning", folder / "learning.gif"),
        ("Curves", folder / "curves.png"),
    ]
    return [
        f"![{title}]({path.relative_to(folder).as_posix()})\n\n*{title}*\n"
        for title, path in shown
        if path and path.exists()
    ]


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("epoch-*.png"), default=None)
