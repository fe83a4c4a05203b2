"""The report's feed-forward autoencoder: dense to a bottleneck, dense back.

    python experiments/feed_forward.py                    drawn faces, the quick recipe
    python experiments/feed_forward.py --data faces.zip   the recipe on your own folder or zip
    python experiments/feed_forward.py --help             every flag

The notebook learned digits with it: 32 numbers, mse, Adam at 1e-3, batches of 128. How many epochs
it had is not known: the 50 are ours.
"""

from dataclasses import dataclass, replace
from functools import partial

from vaejax import cli, losses
from vaejax.models.feed_forward import FeedForward
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit
from vaejax.training.optimizer import adam


@dataclass(frozen=True)
class Flags(Config):
    latent_dim: int | None = None  # numbers that describe a face


LOSS = partial(losses.reconstruction, error="mse")
REPORT = Recipe(
    "report", FeedForward(), LOSS, epochs=50, learning_rate=1e-3, optimizer=partial(adam, b1=0.9)
)
# On bright pictures most units of the bottleneck are 0 for every face, from the first updates on:
# of these 256 some 30 stay alive.
QUICK = replace(
    REPORT,
    name="quick",
    model=FeedForward(latent_dim=256),
    epochs=20,
    batch_size=32,
    learning_rate=2e-3,
    cosine_decay=True,
)


def main(config: Flags) -> None:
    fit("feed-forward", config, resolve(config, REPORT, QUICK))


if __name__ == "__main__":
    cli.experiment(main, Flags, __doc__)
