"""A DCGAN (Radford et al., 2016) of torchgan: its networks, its losses and their train_ops.

torchgan's own Trainer calls functions that torchvision no longer has, so that the loop is here. The
rates, Adam's b1, the batches' size and the loss are the paper's (sections 3 and 4).
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from torchgan.losses import MinimaxDiscriminatorLoss, MinimaxGeneratorLoss
from torchgan.models import DCGANDiscriminator, DCGANGenerator

from benchmarks.contenders.torch_faces import (
    SAMPLES,
    TIMED,
    WARM,
    Contender,
    Drawn,
    count,
    main,
    median_interval,
    seconds,
)

LATENTS, CHANNELS, BATCH, RATE = 100, 64, 128, 2e-4
DEVICE = torch.device("cpu")


def trained(images: torch.Tensor, updates: int) -> tuple[DCGANGenerator, int, list[float]]:
    """Train both networks, and return the generator, all parameters, and when updates ended."""
    size = images.shape[-1]
    generator = DCGANGenerator(LATENTS, out_size=size, step_channels=CHANNELS)
    discriminator = DCGANDiscriminator(in_size=size, step_channels=CHANNELS)
    adam = {"lr": RATE, "betas": (0.5, 0.999)}
    of_generator = torch.optim.Adam(generator.parameters(), **adam)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), **adam)
    generating, discriminating = MinimaxGeneratorLoss(), MinimaxDiscriminatorLoss()
    times = [time.monotonic()]
    while len(times) <= updates:
        for chosen in torch.randperm(len(images)).split(BATCH)[: updates + 1 - len(times)]:
            real = images[chosen] * 2 - 1
            discriminating.train_ops(generator, discriminator, of_discriminator, real, DEVICE)
            generating.train_ops(generator, discriminator, of_generator, DEVICE, len(real))
            times.append(time.monotonic())
    return generator.eval(), count(generator, discriminator), times


@torch.no_grad()
def draw(generator: DCGANGenerator, number: int) -> torch.Tensor:
    """Return samples in [0, 1]."""
    return generator(torch.randn(number, LATENTS)) / 2 + 0.5


def speed(images: torch.Tensor, began: float) -> dict[str, float]:
    """Measure updates and samples."""
    generator, _, times = trained(images, WARM + TIMED)
    return {
        "fixed": times[0] - began,
        "update": median_interval(times),
        "prior_update": 0.0,
        "sample": seconds(lambda: draw(generator, 100)) / 100,
    }


def train(images: torch.Tensor, out: Path, updates: int, prior_updates: int) -> Drawn:
    generator, parameters, _ = trained(images, updates)
    samples = torch.cat([draw(generator, 100) for _ in range(SAMPLES // 100)])
    epochs, rest = divmod(updates, -(-len(images) // BATCH))
    return Drawn(samples, None, parameters, epochs * len(images) + rest * BATCH)


if __name__ == "__main__":
    main(Contender(("torchgan",), speed, train))
