"""The quick recipe without adaptive group norm, a command as `experiments/anime.py` is one."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments import anime
from vaejax import cli
from vaejax.models.residual import AdaptiveNorm, ResidualVAE
from vaejax.training.config import Recipe, resolve
from vaejax.training.fit import fit


class PlainVAE(ResidualVAE):
    """A residual VAE whose decoder sees z at its smallest grid alone: its norms have no style."""

    title: ClassVar[str] = "residual VAE without adaptive norm"

    def decode(self, z: Any, *, train: bool, axis: str | None = None) -> Any:
        """Return the mean of p(x|z)."""
        with nn.intercept_methods(_without_style):
            return super().decode(z, train=train, axis=axis)


def _without_style(
    method: Callable[..., Any], arguments: Any, keywords: Any, context: nn.module.InterceptorContext
) -> Any:
    if isinstance(context.module, AdaptiveNorm) and context.method_name == "__call__":
        return method(arguments[0], None)
    return method(*arguments, **keywords)


def recipe(config: anime.Flags) -> Recipe:
    """Return the quick recipe with the plain model and the flags that were set."""
    return resolve(config, replace(anime.QUICK, model=PlainVAE()))


def main(config: anime.Flags) -> None:
    fit("anime", config, recipe(config))


if __name__ == "__main__":
    cli.experiment(main, anime.Flags, __doc__)
