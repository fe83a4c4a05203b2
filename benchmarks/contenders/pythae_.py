"""pythae's VAE, beta-VAE or RAE, with the settings of its own benchmark, for `quality.py`.

It reads train.npy, validation.npy and test.npy (uint8, `[n h w c]`) from a folder, and writes its
samples and reconstructions to it.
"""

import argparse
import json
import resource
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pythae.models import RAE_L2, VAE, BetaVAE, BetaVAEConfig, RAE_L2_Config, VAEConfig
from pythae.models.nn.benchmarks.celeba import (
    Decoder_Conv_AE_CELEBA,
    Encoder_Conv_AE_CELEBA,
    Encoder_Conv_VAE_CELEBA,
)
from pythae.pipelines import TrainingPipeline
from pythae.samplers import GaussianMixtureSampler, GaussianMixtureSamplerConfig, NormalSampler
from pythae.trainers import BaseTrainerConfig, CoupledOptimizerTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback

SIZE = 64
BATCH = 100
FITTED = 5000  # training images that the mixture is fitted on: to encode all takes long on a CPU


class BudgetSpent(Exception):
    """Ends pythae's training pipeline."""


class Budget(TrainingCallback):
    """Counts the updates, and ends the training after some minutes or some images."""

    def __init__(self, train_images: int, *, images: int, minutes: float | None):
        self.started, self.updates = 0.0, 0
        self._train_images, self._images, self._minutes = train_images, images, minutes

    def on_train_begin(self, training_config, **kwargs):
        self.started = time.monotonic()

    def seen(self) -> int:
        """Return the number of images seen; the last batch of an epoch has fewer."""
        epochs, rest = divmod(self.updates, -(-self._train_images // BATCH))
        return epochs * self._train_images + rest * BATCH

    def on_train_step_end(self, training_config, **kwargs):
        self.updates += 1
        if self._minutes:
            spent = time.monotonic() - self.started > 60 * self._minutes
        else:
            spent = self.seen() >= self._images
        if spent:
            raise BudgetSpent


def build(name: str, *, folder: Path, seed: int):
    """Return a model and the config of its training."""
    shared = {"input_dim": (3, SIZE, SIZE), "latent_dim": 64}
    trainer = {"output_dir": str(folder / "pythae"), "seed": seed, "num_epochs": 100_000}
    trainer |= {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    if name == "rae":
        config = RAE_L2_Config(**shared, embedding_weight=1e-4, reg_weight=1e-7)
        kind, encoder = RAE_L2, Encoder_Conv_AE_CELEBA(config)
        rates = {"encoder_learning_rate": 1e-3, "decoder_learning_rate": 1e-3}
        training = CoupledOptimizerTrainerConfig(**trainer, **rates)
    else:
        beta = {"beta": 2.0} if name == "beta-vae" else {}
        config = (BetaVAEConfig if beta else VAEConfig)(**shared, **beta, reconstruction_loss="mse")
        kind, encoder = BetaVAE if beta else VAE, Encoder_Conv_VAE_CELEBA(config)
        training = BaseTrainerConfig(**trainer, learning_rate=1e-4)
    return kind(config, encoder=encoder, decoder=Decoder_Conv_AE_CELEBA(config)), training


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Round images `[n c h w]` in [0, 1] to levels `[n h w c]`."""
    levels = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def make_images(
    model, data: dict[str, np.ndarray], *, samples: int, seed: int
) -> dict[str, np.ndarray]:
    """Return the reconstructions of the test images, and the samples of both samplers."""
    device = next(model.parameters()).device
    reconstructions = []
    for x in np.array_split(data["test"], -(-len(data["test"]) // 100)):
        embedding = model.encoder(torch.tensor(x).to(device)).embedding
        reconstructions.append(to_uint8(model.decoder(embedding).reconstruction))
    torch.manual_seed(seed)
    normal = NormalSampler(model=model)
    normal_samples = to_uint8(normal.sample(samples, batch_size=100))
    mixture = GaussianMixtureSampler(
        model=model, sampler_config=GaussianMixtureSamplerConfig(n_components=10)
    )
    mixture.fit(torch.tensor(data["train"][:FITTED]))
    return {
        "reconstructions": np.concatenate(reconstructions),
        "normal": normal_samples,
        "mixture": to_uint8(mixture.sample(samples, batch_size=100)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["vae", "beta-vae", "rae"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--minutes", type=float)
    options = parser.parse_args()
    name, seed = options.name, options.seed
    torch.manual_seed(seed)
    data = {
        split: np.load(options.out / f"{split}.npy").transpose(0, 3, 1, 2).astype(np.float32) / 255
        for split in ("train", "validation", "test")
    }
    model, training = build(name, folder=options.out, seed=seed)
    budget = Budget(len(data["train"]), images=options.images, minutes=options.minutes)
    with suppress(BudgetSpent):
        TrainingPipeline(model=model, training_config=training)(
            train_data=data["train"], eval_data=data["validation"], callbacks=[budget]
        )
    seconds = time.monotonic() - budget.started
    model.eval()
    for images, array in make_images(model, data, samples=options.samples, seed=seed).items():
        np.save(options.out / f"{name}-{seed}-{images}.npy", array)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": budget.updates,
        "seen": budget.seen(),
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {"pythae": version("pythae"), "torch": torch.__version__},
    }
    (options.out / f"{name}-{seed}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
