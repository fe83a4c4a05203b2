"""vaejax for `faces.py`: the speed of a recipe, and the faces of a run that its command trained.

draw_vaejax.py speed PREPARED BEGAN FLAG ...     prints one line of JSON
draw_vaejax.py draw DATA OUT RUN PRIOR           writes samples, reconstructions and facts
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.contenders import plain_vae
from experiments import anime
from vaejax import flow, generate, priors
from vaejax.data.batches import Images
from vaejax.models import autoencoder
from vaejax.priors import FlowPrior, StandardNormal
from vaejax.training import budget, run
from vaejax.training import devices as dev
from vaejax.training import prior as run_prior
from vaejax.training.config import Recipe, resolve

BATCH, SAMPLES, REPEATS = 100, 1000, 5


def speed(prepared: Path, began: float, flags: list[str]) -> dict[str, Any]:
    """Measure what a command with these flags takes; `began` is when its process was started."""
    plain = "--plain" in flags
    config = tyro.cli(anime.Flags, args=[flag for flag in flags if flag != "--plain"])
    recipe = (
        plain_vae.recipe(config)
        if plain
        else resolve(config, anime.REPORT, anime.QUICK, anime.FACES)
    )
    training, held_out = Images(prepared, "train"), Images(prepared, "validation")
    measured = budget.measure_speed(
        recipe, training, held_out, elapsed=time.monotonic() - began, devices=dev.choose(1)
    )
    return {**measured._asdict(), "sample": sample_seconds(recipe)}


def sample_seconds(recipe: Recipe) -> float:
    """Measure what a face takes to draw, of a network that has learned nothing."""
    key, model = jax.random.key(0), recipe.model
    params, stats = autoencoder.init(model, key)
    prior: Any = StandardNormal(model)
    if recipe.prior == "flow":
        latents = priors.latent_dimensions(model)
        network = flow.FlowMLP(latents, recipe.prior_width, recipe.prior_depth)
        prior = FlowPrior(network, *flow.init(network, key), model, steps=priors.SAMPLER_STEPS)
    seconds = []
    for _ in range(1 + REPEATS):  # the first one compiles
        began = time.monotonic()
        np.asarray(generate.decode(params, stats, prior.sample(range(BATCH)), model=model))
        seconds.append(time.monotonic() - began)
    return float(np.median(seconds[1:])) / BATCH


def draw(data: Path, out: Path, folder: Path, name: str) -> None:
    """Write samples and reconstructions of a run, and facts about it."""
    loaded = run.load(folder)
    model, weights = loaded.model, loaded.weights
    arrays = weights.params, weights.batch_stats
    prior = run_prior.load(loaded, name or run_prior.default_name(loaded))  # pyright: ignore
    decode = partial(generate.decode, *arrays, model=model)
    samples = [
        np.asarray(decode(prior.sample(range(first, first + BATCH))))
        for first in range(0, SAMPLES, BATCH)
    ]
    np.save(out / "samples.npy", np.concatenate(samples))
    for split in ("test", "half"):
        images = np.load(data / f"{split}.npy")
        parts = [
            np.asarray(generate.reconstruct(*arrays, images[i : i + BATCH], model=model))
            for i in range(0, len(images), BATCH)
        ]
        np.save(out / f"{split}.npy", np.concatenate(parts))
    trained = [weights.params, *([prior.params] if isinstance(prior, FlowPrior) else [])]
    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "seen": weights.step * loaded.spec.batch_size,
        "versions": {"jax": jax.__version__},
    }
    (out / "facts.json").write_text(json.dumps(facts))


def main() -> None:
    command = sys.argv[1]
    dev.configure(keep=False)  # as on a machine where nothing was compiled yet
    if command == "speed":
        print(json.dumps(speed(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])))
    else:
        draw(*map(Path, sys.argv[2:5]), sys.argv[5])


if __name__ == "__main__":
    main()
