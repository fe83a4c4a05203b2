"""The report's denoising autoencoder: noisy faces in, clean ones out.

    python experiments/denoising.py                    drawn faces, the quick recipe
    python experiments/denoising.py --data faces.zip   the recipe on your own folder or zip
    python experiments/denoising.py --help             every flag

The notebook learned digits with it: noise of 0.1, cross-entropy, Adam at 1e-3, batches of 128. How
many epochs it had is not known: the 50 are ours.
"""

from dataclasses import dataclass, replace
from functools import partial

from vaejax import cli, losses
from vaejax.models.denoising import Denoising
from vaejax.models.layers import Norm
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit
from vaejax.training.optimizer import adam


@dataclass(frozen=True)
class Flags(Config):
    noise: float | None = None  # standard deviation of what is added, where 1 is black to white
    width: int | None = None  # channels of every layer but the last
    norm: Norm | None = None  # "batch": batch norm; "affine": its scale and shift alone


LOSS = partial(losses.reconstruction, error="bce")
REPORT = Recipe(
    "report", Denoising(), LOSS, epochs=50, learning_rate=1e-3, optimizer=partial(adam, b1=0.9)
)
QUICK = replace(
    REPORT,
    name="quick",
    epochs=5,
    batch_size=16,
    learning_rate=6e-3,
    cosine_decay=True,
)


def main(config: Flags) -> None:
    fit("denoising", config, resolve(config, REPORT, QUICK))


if __name__ == "__main__":
    cli.experiment(main, Flags, __doc__)
