"""Measure which paths between faces, and which directions of attributes, draw good faces.

    python benchmarks/latents.py RUN          # a run with a flow; --labels FILE.csv for directions

Paths: the Fréchet distance of the middles of random pairs of seeds from training faces. Directions:
training faces are moved towards values that they do not have, and a judge that knows nothing of the
latents (a linear probe of VGG16's features) says how often the value is there afterwards, and how
often another attribute has changed.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vaejax import generate
from vaejax.data.batches import Images
from vaejax.data.labels import read_labels
from vaejax.evaluation import features, passes
from vaejax.evaluation.set_metrics import frechet_distance, moments, precision_recall
from vaejax.latent import Directions, ridge, slerp
from vaejax.priors import NoisePrior, flatten_latents
from vaejax.training import devices, directions, prior, run

BATCH = 100
FACES = 25  # that are moved towards each value
SURE = 0.8  # share of held-out faces whose value the judge must tell, to be a judge of it
AMOUNTS = (2, 4)  # standard deviations


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--only-directions", action="store_true")
    flags = parser.parse_args()
    devices.configure()
    loaded = run.load(run.find(flags.run))
    network = features.vgg16(loaded.model.size)
    if not flags.only_directions:
        print_paths(loaded, network, flags.pairs)
    labels = flags.labels or directions.default_labels(loaded)
    if labels:
        print_directions(loaded, network, labels)


def decode(loaded: run.LoadedRun, z: np.ndarray) -> np.ndarray:
    """Decode latents that are vectors."""
    weights = loaded.weights
    return generate.decode_vectors(
        weights.params,
        weights.batch_stats,
        np.asarray(z, np.float32),
        model=loaded.model,
        batch_size=min(BATCH, len(z)),
    )


# Paths --------------------------------------------------------------------------------------------


def middles(loaded: run.LoadedRun, pairs: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield z of the first seed of each pair, and of the middles of the pairs by each path."""
    known = prior.load(loaded, prior.default_name(loaded))
    assert isinstance(known, NoisePrior), "a flow or N(0, I)"

    def to_z(noise: np.ndarray) -> np.ndarray:
        return np.asarray(flatten_latents(known.from_noise(jnp.asarray(noise))))

    noise = np.asarray(known.noise(range(2 * pairs)))
    z, half = to_z(noise), np.full(pairs, 0.5)
    center = directions.components(loaded).mean
    yield "no path: the seeds themselves", z[::2]
    yield "noise, spherical", to_z(slerp(noise[::2], noise[1::2], half))
    yield "noise, straight", to_z((noise[::2] + noise[1::2]) / 2)
    yield "z, straight", (z[::2] + z[1::2]) / 2
    yield "z, spherical about 0", slerp(z[::2], z[1::2], half)
    yield "z, spherical about the mean", center + slerp(z[::2] - center, z[1::2] - center, half)


def print_paths(loaded: run.LoadedRun, network: features.Features, pairs: int) -> None:
    """Print the metrics of the middles by each path."""
    training = Images(Path(loaded.spec.schedule.prepared), "train")
    real = network.of(training.read(np.arange(min(pairs, len(training)))), batch_size=BATCH)
    print("| path | Fréchet | precision | recall | coverage |\n|---|---|---|---|---|", flush=True)
    for name, z in middles(loaded, pairs):
        drawn = network.of(decode(loaded, z), batch_size=BATCH)
        distance = frechet_distance(moments(real), moments(drawn))
        shares = precision_recall(real, drawn)
        values = f"{shares.precision:.2f} | {shares.recall:.2f} | {shares.coverage:.2f}"
        print(f"| {name} | {distance:.1f} | {values} |", flush=True)


# Directions ---------------------------------------------------------------------------------------


class Judge:
    """Reads the values of attributes from faces, by linear probes of a network's features."""

    def __init__(self, network: features.Features, found: Directions):
        self._network, self._rows = network, {a: found.rows(a) for a in found.attributes}
        self.attributes: list[str] = []

    def fit(self, seen: list[np.ndarray], numbers: list[np.ndarray]) -> None:
        """Fit the probes to features of training images; keep the attributes that they tell in
        held-out ones."""
        one_hot = np.concatenate(
            [np.eye(len(rows))[numbers[0][:, i] - 1] for i, rows in enumerate(self._rows.values())],
            axis=1,
        )
        self._weights, self._offsets = ridge(seen[0], one_hot)
        read = self._read(seen[1])
        self.attributes = [
            name
            for i, (name, rows) in enumerate(self._rows.items())
            if np.mean(read[name] == np.asarray(rows)[numbers[1][:, i] - 1]) > SURE
        ]

    def _read(self, seen: np.ndarray) -> dict[str, np.ndarray]:
        scores = seen @ self._weights + self._offsets
        return {a: np.asarray(r)[scores[:, r].argmax(axis=1)] for a, r in self._rows.items()}

    def read(self, faces: np.ndarray) -> dict[str, np.ndarray]:
        """Return the row of each attribute's value in each face."""
        read = self._read(self._network.of(faces, batch_size=FACES))
        return {name: read[name] for name in self.attributes}


def print_directions(loaded: run.LoadedRun, network: features.Features, path: Path) -> None:
    """Print how often an edit succeeds and what else it changes, by each kind of direction."""
    labels, found = read_labels(path), directions.fit(loaded, path)
    images = [
        Images(Path(loaded.spec.schedule.prepared), split) for split in ("train", "validation")
    ]
    numbers = [labels.of(i.metadata(n)["path"] for n in range(len(i))) for i in images]
    judge = Judge(network, found)
    prepared = Path(loaded.spec.schedule.prepared)
    held_out = images[1].read(np.arange(len(images[1])))
    seen = [
        passes.training_features(prepared, network, loaded.model),
        network.of(held_out, batch_size=FACES),
    ]
    judge.fit(seen, numbers)
    weights = loaded.weights
    z = generate.posterior_means(
        weights.params, weights.batch_stats, images[0], model=loaded.model, most=len(numbers[0])
    )
    results: dict[str, list[tuple[float, float]]] = {}
    for column, attribute in enumerate(labels.attributes):
        for value, row in enumerate(found.rows(attribute), 1):
            others = np.flatnonzero(numbers[0][:, column] != value)[:FACES]
            if attribute in judge.attributes and found.encoded()[row]:
                before = judge.read(decode(loaded, z[others]))
                for name, moved in edits(found, z, row):
                    after = judge.read(decode(loaded, moved(z[others])))
                    score = judged(before, after, attribute, row)
                    results.setdefault(name, []).append(score)
    print(f"\nJudged: {', '.join(judge.attributes)}; {len(next(iter(results.values())))} values\n")
    print("| direction | the value is there | another attribute has changed |\n|---|---|---|")
    for name, scores in results.items():
        success, others = np.mean(scores, axis=0)
        print(f"| {name} | {100 * success:.0f} % | {100 * others:.0f} % |")


Move = Callable[[np.ndarray], np.ndarray]


def edits(found: Directions, z: np.ndarray, row: int) -> Iterator[tuple[str, Move]]:
    """Yield the ways to give faces a value."""
    normal = found.weights[row] / np.linalg.norm(found.weights[row])
    for kind, step in (("the probe's normal", np.std(z @ normal) * normal),
                       ("effect of the value", found.step(row))):  # fmt: skip
        for amount in AMOUNTS:
            move = amount * step
            yield f"{kind}, {amount} standard deviations", lambda some, move=move: some + move
    yield (
        "from the present value's effect to the value's",
        lambda some: some + found.replace(some, row),
    )


def judged(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], attribute: str, row: int
) -> tuple[float, float]:
    """Return the share of faces that have the value, and of other attributes that changed."""
    changed = [np.mean(before[a] != after[a]) for a in before if a != attribute]
    return float(np.mean(after[attribute] == row)), float(np.mean(changed))


if __name__ == "__main__":
    main()
