"""The weight of the KL, swept: what each weight buys in distortion, and pays in rate.

    python experiments/rate_distortion.py                    drawn faces: half an hour on a CPU
    python experiments/rate_distortion.py --data faces.zip   your own folder or zip

One model is trained once for each weight, and by the weights that others recommend: the report's
(mse + 0.01 kl, both means), PyTorch-VAE's (mean squared error + 0.00025 KL, summed) and pythae's
(half the squared error + KL, both summed), all brought to the report's form; and by sigma-VAE's
loss, which has no weight. All are held against the same held-out images. The same command goes on
where it was stopped.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vaejax import cli, objectives
from vaejax.errors import UserError
from vaejax.evaluation import sweep
from vaejax.models.layers import Norm
from vaejax.models.vae import VAE
from vaejax.training.config import Config, Recipe, settle
from vaejax.training.fit import fit


@dataclass(frozen=True)
class Flags(Config):
    weights: tuple[float, ...] = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # of the kl, to sweep
    latent_dim: int | None = None  # numbers that describe a face
    norm: Norm | None = None  # "frozen": what the report really trained; "batch": real batch norm
    width: int | None = None  # channels of the first convolution


# the quick recipe of experiments/anime.py, for as many updates as a CPU makes in minutes
SWEEP = Recipe(
    "quick",
    VAE(latent_dim=64, width=12, norm="batch", output_norm=False, log_variance_bound=6.0),
    partial(objectives.report, kl_weight=0.01),
    epochs=1000,
    steps=1500,
    batch_size=16,
    learning_rate=2e-3,
    b1=0.9,
    cosine_decay=True,
)


def main(config: Flags) -> None:
    if not config.weights or not all(0 <= w < float("inf") for w in config.weights):
        raise UserError("--weights: one or more numbers of at least 0")
    root = config.out or Path("runs/rate-distortion")
    recipe = settle(replace(config, recipe="quick"), SWEEP)
    model = recipe.model
    latents, values = model.code[0], model.size**2 * model.channels
    known = {"report": 0.01, "PyTorch-VAE": 0.00025 * latents, "pythae": 2 * latents / values}
    weights = {f"{weight:.4g}" for weight in (*config.weights, *known.values())}
    runs: dict[str, Path] = {}
    for name in (*sorted(weights, key=float), "calibrated"):
        loss = partial(objectives.report, kl_weight=float(name)) if name != "calibrated" else None
        chosen = replace(recipe, loss=loss or partial(objectives.calibrated))
        out = root / (name if loss is None else f"kl-{name}")
        folder = fit("rate-distortion", replace(config, out=out), chosen)
        if folder is not None:
            runs[name] = folder
    if config.dry_run:
        return
    found = {name: sweep.measure(folder, seed=config.seed) for name, folder in runs.items()}
    curve = {name: one for name, one in found.items() if name != "calibrated"}
    named = {f"{who} ({weight:.3g})": found[f"{weight:.4g}"] for who, weight in known.items()}
    named["calibrated"] = found["calibrated"]
    title = f"{latents} latents, {model.size} px, {recipe.steps:,} updates, seed {config.seed}"
    print("\n".join(sweep.write(root, curve, named, title=title)))
    print(f"The curve: {root / 'rate_distortion.png'}")


if __name__ == "__main__":
    cli.experiment(main, Flags, __doc__)
