"""pythae's VAE, beta-VAE or RAE, as its benchmark's files configure it, for benchmarks/quality.py.

It reads train.npy, validation.npy and test.npy (uint8, [n h w c]) in a folder, and leaves its
samples and reconstructions there.
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
FITTED = 5000  # training images that the mixture is fitted on: their codes take a while on a CPU


class Enough(Exception):
    """The budget is spent."""


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
    same = {"input_dim": (3, SIZE, SIZE), "latent_dim": 64}
    trainer = {"output_dir": str(options.out / "pythae"), "seed": seed, "num_epochs": 100_000}
    trainer |= {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH}
    if name == "rae":
        config = RAE_L2_Config(**same, embedding_weight=1e-4, reg_weight=1e-7)
        kind, encoder = RAE_L2, Encoder_Conv_AE_CELEBA(config)
        rates = {"encoder_learning_rate": 1e-3, "decoder_learning_rate": 1e-3}
        training = CoupledOptimizerTrainerConfig(**trainer, **rates)
    else:
        beta = {"beta": 2.0} if name == "beta-vae" else {}
        config = (BetaVAEConfig if beta else VAEConfig)(**same, **beta, reconstruction_loss="mse")
        kind, encoder = BetaVAE if beta else VAE, Encoder_Conv_VAE_CELEBA(config)
        training = BaseTrainerConfig(**trainer, learning_rate=1e-4)
    model = kind(config, encoder=encoder, decoder=Decoder_Conv_AE_CELEBA(config))

    class Budget(TrainingCallback):
        began, updates = 0.0, 0

        def on_train_begin(self, training_config, **kwargs):
            self.began = time.monotonic()

        def seen(self) -> int:
            """Images, of which the last batch of an epoch has fewer."""
            images = len(data["train"])
            epochs, rest = divmod(self.updates, -(-images // BATCH))
            return epochs * images + rest * BATCH

        def on_train_step_end(self, training_config, **kwargs):
            self.updates += 1
            spent = time.monotonic() - self.began
            full = self.seen() >= options.images
            if spent > 60 * options.minutes if options.minutes else full:
                raise Enough

    callback = Budget()
    with suppress(Enough):
        TrainingPipeline(model=model, training_config=training)(
            train_data=data["train"], eval_data=data["validation"], callbacks=[callback]
        )
    seconds = time.monotonic() - callback.began
    model.eval()
    device = next(model.parameters()).device

    def images(x) -> np.ndarray:
        levels = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()

    with torch.no_grad():
        again = [
            images(
                model.decoder(model.encoder(torch.tensor(x).to(device)).embedding).reconstruction
            )
            for x in np.array_split(data["test"], -(-len(data["test"]) // 100))
        ]
        arrays = {"reconstructions": np.concatenate(again)}
        torch.manual_seed(seed)
        normal = NormalSampler(model=model)
        arrays["normal"] = images(normal.sample(options.samples, batch_size=100))
        mixture = GaussianMixtureSampler(
            model=model, sampler_config=GaussianMixtureSamplerConfig(n_components=10)
        )
        mixture.fit(torch.tensor(data["train"][:FITTED]))
        arrays["mixture"] = images(mixture.sample(options.samples, batch_size=100))
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": callback.updates,
        "seen": callback.seen(),
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {"pythae": version("pythae"), "torch": torch.__version__},
    }
    for what, array in arrays.items():
        np.save(options.out / f"{name}-{seed}-{what}.npy", array)
    (options.out / f"{name}-{seed}.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
