"""A small DDPM (Ho et al., 2020) of diffusers, drawn from by DDIM (Song et al., 2021).

The loop is that of diffusers' examples/unconditional_image_generation/train_unconditional.py: AdamW
(0.95, 0.999), a cosine schedule, gradients clipped at 1, a moving average with its inv_gamma and
power. The network is narrower, without attention, and the rate is higher, for so few updates.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

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

CHANNELS, BATCH, RATE, WARMUP = (32, 64, 96, 128), 16, 1e-3, 100
NOISE_LEVELS, STEPS = 1000, 50  # of training, and of the sampler
DRAWN = 20  # samples at a time


def trained(images: torch.Tensor, updates: int) -> tuple[UNet2DModel, list[float]]:
    """Train the network, and return its moving average, and when updates ended."""
    levels = len(CHANNELS)
    model = UNet2DModel(
        sample_size=images.shape[-1],
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
    )
    noising = DDPMScheduler(NOISE_LEVELS)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6
    )
    rates = get_scheduler("cosine", optimizer, WARMUP, updates)
    average = EMAModel(model.parameters(), use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    times = [time.monotonic()]
    while len(times) <= updates:
        for chosen in torch.randperm(len(images)).split(BATCH)[: updates + 1 - len(times)]:
            clean = images[chosen] * 2 - 1
            noise, t = torch.randn_like(clean), torch.randint(0, NOISE_LEVELS, (len(clean),))
            error = model(noising.add_noise(clean, noise, t), t).sample - noise
            (error**2).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            average.step(model.parameters())
            times.append(time.monotonic())
    average.copy_to(model.parameters())
    return model.eval(), times


def draw(model: UNet2DModel, number: int) -> torch.Tensor:
    """Return samples in [0, 1]."""
    pipeline = DDIMPipeline(model, DDIMScheduler(NOISE_LEVELS))
    pipeline.set_progress_bar_config(disable=True)
    faces = pipeline(batch_size=number, num_inference_steps=STEPS, output_type="np").images
    return torch.from_numpy(faces).permute(0, 3, 1, 2)


def speed(images: torch.Tensor, began: float) -> dict[str, float]:
    """Measure updates and samples."""
    model, times = trained(images, WARM + TIMED)
    return {
        "fixed": times[0] - began,
        "update": median_interval(times),
        "prior_update": 0.0,
        "sample": seconds(lambda: draw(model, DRAWN), 1) / DRAWN,
    }


def train(images: torch.Tensor, out: Path, updates: int, prior_updates: int) -> Drawn:
    model, _ = trained(images, updates)
    samples = torch.cat([draw(model, DRAWN) for _ in range(SAMPLES // DRAWN)])
    epochs, rest = divmod(updates, -(-len(images) // BATCH))
    return Drawn(samples, None, count(model), epochs * len(images) + rest * BATCH)


if __name__ == "__main__":
    main(Contender(("diffusers",), speed, train))
