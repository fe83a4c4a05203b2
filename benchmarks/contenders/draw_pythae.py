"""pythae's VAE with the residual networks of its own benchmark, and a sampler of its own."""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from pythae.models import VAE, VAEConfig
from pythae.models.nn.benchmarks.celeba import Decoder_ResNet_AE_CELEBA, Encoder_ResNet_VAE_CELEBA
from pythae.pipelines import TrainingPipeline
from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig
from pythae.trainers import BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

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

LATENTS, BATCH, RATE = 64, 64, 1e-3
COMPONENTS = 10
FITTED = 5000  # images that the mixture is fitted to: to encode all takes long on a CPU
ENDLESS = 100_000  # epochs


class Spent(Exception):
    """Ends pythae's training pipeline."""


class Budget(TrainingCallback):
    """Notes when each update ended, and ends the training after some of them."""

    def __init__(self, updates: int):
        self.updates, self.times = updates, [time.monotonic()]

    def on_train_step_end(self, training_config, **kwargs):
        self.times.append(time.monotonic())
        if len(self.times) > self.updates:
            raise Spent


def trained(images: torch.Tensor, out: Path, updates: int) -> tuple[VAE, Budget]:
    """Train by pythae's pipeline, as its documentation shows; the last weights count."""
    config = VAEConfig(input_dim=tuple(images.shape[1:]), latent_dim=LATENTS)
    networks = {
        "encoder": Encoder_ResNet_VAE_CELEBA(config),
        "decoder": Decoder_ResNet_AE_CELEBA(config),
    }
    model, budget = VAE(config, **networks), Budget(updates)
    training = BaseTrainerConfig(
        output_dir=str(out / "pythae"),
        num_epochs=ENDLESS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        seed=torch.initial_seed() % 2**31,
    )
    try:
        pipeline = TrainingPipeline(model=model, training_config=training)
        pipeline(train_data=images, callbacks=[budget])
    except Spent:
        pass
    return model.eval(), budget


def fitted(model: VAE, images: torch.Tensor) -> GaussianMixtureSampler:
    sampler = GaussianMixtureSampler(model, GaussianMixtureSamplerConfig(n_components=COMPONENTS))
    sampler.fit(images[:FITTED])
    return sampler


def speed(images: torch.Tensor, began: float) -> dict[str, float]:
    """Measure the pipeline's updates and the fit of the sampler."""
    with tempfile.TemporaryDirectory() as folder:
        model, budget = trained(images, Path(folder), WARM + TIMED)
    ready = budget.times[0] - began
    fitting = time.monotonic()
    sampler = fitted(model, images)
    fitting = time.monotonic() - fitting
    return {
        "fixed": ready + fitting,
        "update": median_interval(budget.times),
        "prior_update": 0.0,
        "sample": seconds(lambda: sampler.sample(100, batch_size=100)) / 100,
    }


def train(images: torch.Tensor, out: Path, updates: int, prior_updates: int) -> Drawn:
    model, _ = trained(images, out, updates)
    sampler = fitted(model, images)

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        return model.decoder(model.encoder(x).embedding).reconstruction

    epochs, rest = divmod(updates, -(-len(images) // BATCH))  # an epoch's last batch has fewer
    seen = epochs * len(images) + rest * BATCH
    return Drawn(sampler.sample(SAMPLES, batch_size=100), reconstruct, count(model), seen)


if __name__ == "__main__":
    main(Contender(("pythae",), speed, train))
