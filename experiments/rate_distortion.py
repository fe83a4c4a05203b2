"""The weight of the KL, swept: what each weight buys in distortion, and pays in rate.

    python experiments/rate_distortion.py                    drawn faces: half an hour on two cores
    python experiments/rate_distortion.py --data faces.zip   your own folder or zip
    python experiments/rate_distortion.py --help             every flag

One model is trained once for each weight, and by the weights that others recommend: the report's
(mse + 0.01 kl, both means), PyTorch-VAE's (mean squared error + 0.00025 KL, summed) and pythae's
(half the squared error + KL, both summed), all brought to the report's form; and by sigma-VAE's
loss, which has no weight. All are held against the same held-out images. Each is a run in a folder
of its own; the same command goes on where it was stopped, and draws what is there in the end.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from vaejax import cli, losses
from vaejax.errors import UserError
from vaejax.evaluation.rate_distortion import measure, sweep, write
from vaejax.models.layers import Norm
from vaejax.models.vae import VAE
from vaejax.training import devices
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit
from vaejax.training.optimizer import adam


@dataclass(frozen=True)
class Flags(Config):
    weights: tuple[float, ...] = (0.0001, 0.0003, 0.001, 0.003, 0.03, 0.3)  # of the kl, to sweep
    recipe: Literal["quick"] | None = None  # there is but one
    latent_dim: int | None = None  # numbers that describe a face
    norm: Norm | None = None  # "affine": what the report really trained; "batch": batch norm
    width: int | None = None  # channels of the first convolution


# A VAE of the report's kind and latents that is trained in a minute: a seventh of the report's
# multiplications, a learning rate that needs real batch norm (though not on the output, whose scale
# would have to shrink first), a bounded log-variance, and small batches for more updates.
SWEEP = Recipe(
    "quick",
    VAE(latent_dim=512, width=12, norm="batch", output_norm=False, log_variance_bound=6.0),
    partial(losses.mse_kl, kl_weight=0.01),
    epochs=1000,
    steps=1000,
    batch_size=16,
    learning_rate=2e-3,
    optimizer=partial(adam, b1=0.9),
    cosine_decay=True,
)


def main(config: Flags) -> None:
    if not devices.is_single_process():
        raise UserError("a sweep is the work of one process: start it without a launcher")
    root = config.out or Path("runs/rate-distortion")
    recipe = resolve(config, SWEEP)
    model = recipe.model
    latents, values = model.latent_dim, model.size**2 * model.channels
    weights = {"report": 0.01, "PyTorch-VAE": 0.00025 * latents, "pythae": 2 * latents / values}
    runs = sweep([*config.weights, *weights.values()])
    points = {}
    for number, (name, loss) in enumerate(runs.items(), 1):
        print(f"\nrun {number} of {len(runs)}: {name}", flush=True)
        out = replace(config, out=root / name)
        folder = fit("rate-distortion", out, replace(recipe, loss=loss))
        if folder is None:  # a dry run: the others are of the same kind
            return
        points[name] = measure(folder, seed=config.seed)
    recommended = {f"{who} ({w:.4g})": points[f"kl-{w:.4g}"] for who, w in weights.items()}
    title = f"{latents} latents, {model.size} px, batches of {recipe.batch_size}"
    print("\n".join(write(root, points, recommended, title=f"{title}, seed {config.seed}")))
    print(f"The curve: {root / 'rate_distortion.png'}")


if __name__ == "__main__":
    cli.experiment(main, Flags, __doc__)
