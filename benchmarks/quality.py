"""Compare faces of vaejax and pythae: the same images, the same budget, the same metrics.

    python benchmarks/quality.py --data faces.zip --images 100000 --seeds 0 1 --out quality

The contenders are vaejax with its recipes report, quick and faces, each with its own prior, and
pythae's VAE, beta-VAE and RAE with their normal and their mixture sampler, each as its authors
recommend for faces of 64 pixels. All are trained on the same training images, and vaejax evaluates
them on the same test images. A budget is a number of images seen by the autoencoder (--images) or
of minutes (--minutes). The minutes are of the entire command for quick and faces, whose prior is
fitted within them, and of training alone, without compiling and preparing, for all others. Results
are kept in --out: the same command resumes.

pythae needs PyTorch: `pip install pythae torch`, or name a Python that has both by --peer.
"""

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaejax.files import read_json, write_json, write_text

if TYPE_CHECKING:  # imported where they are needed, since JAX takes seconds to import
    from vaejax.evaluation.features import Features
    from vaejax.evaluation.set_metrics import Results

ROOT = Path(__file__).parents[1]
SIZE = 64
VAEJAX = ("report", "quick", "faces")
PYTHAE = ("vae", "beta-vae", "rae")
SAMPLERS = ("normal", "mixture")  # of pythae; a run of vaejax has its own prior, saved as "normal"
BATCH = {"report": 128, "quick": 16, "faces": 16}
METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")
CHUNK = 100  # images that are decoded or evaluated at a time
SHOWN = 10  # samples of each contender in the picture
ENDLESS = 10**7  # updates, more than any machine makes in the time
DIFFERENCES = """
- vaejax, report: the report's recipe, `experiments/anime.py --recipe report`: 27 M parameters, 512
  latents, Adam 1e-4 with b1 0.5, batches of 128, affine norm, mse + 0.01 kl (both means).
- vaejax, quick and faces: docs/training.md has the recipes: a residual VAE with a vector, or with a
  grid of vectors as z, batches of 16, and a flow as the prior.
- pythae {pythae}: its benchmark's convolutional networks for CelebA, 64 latents, batches of 100,
  Adam; the VAE and the beta-VAE (beta 2) at 1e-4, squared error / 2 + KL summed; the RAE (L2) with
  embedding 1e-4 and decoder's weight decay 1e-7 (configs/celeba/rae_l2_config.json of its examples)
  at 1e-3 (configs/celeba/reproducibility/rae_l2, the same examples). Its training pipeline as it
  is, with the validation images; its last weights are evaluated, not its best, since the budget
  ends it in between. The mixture sampler has 10 components, fitted on 5,000 training images.
- All reconstructions are of the posterior's mean. All samples are rounded to 256 levels.
- The report trained for 150 epochs, pythae's files ask for about 50: this budget is far shorter.
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder or zip of faces (none: the drawn faces)")
    parser.add_argument("--images", type=int, default=100_000, help="images seen by each")
    parser.add_argument("--minutes", type=float, help="minutes of training, instead of --images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--only", nargs="+", choices=[*VAEJAX, *PYTHAE], default=[*VAEJAX, *PYTHAE])
    parser.add_argument("--peer", default=sys.executable, help="a Python that has pythae")
    parser.add_argument("--inception", type=Path, help="weights of Inception, instead of VGG16's")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prepared = prepare_images(options)
    for name in options.only:
        for seed in options.seeds:
            if read_facts(options, name, seed) is not None:
                continue
            print(f"{name}, seed {seed} …", flush=True)
            if name in VAEJAX:
                train_with_vaejax(options, name, seed, prepared)
            else:
                train_with_pythae(options, name, seed)
    lines = evaluate(options)
    write_text(options.out / "quality.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def prepare_images(options: argparse.Namespace) -> Path:
    """Prepare and split the images by vaejax, and write an array of each split for the others."""
    from vaejax.data import assignment
    from vaejax.data.batches import Images
    from vaejax.data.prepare import prepare
    from vaejax.data.records import read_dataset_report
    from vaejax.data.sources import drawn_faces

    prepared = prepare(options.data or drawn_faces(), size=SIZE)
    identity = assignment.identity(read_dataset_report(prepared))
    identity_file = options.out / "data.json"
    kept = read_json(identity_file) if identity_file.exists() else {}
    if any(identity[field] != value for field, value in kept.items()):
        sys.exit(f"{options.out} has results of other images: name another --out")
    write_json(identity_file, identity)
    for split in ("train", "validation", "test"):
        path = options.out / f"{split}.npy"
        if not path.exists():
            images = Images(prepared, split)
            unfinished = path.with_suffix(".partial")
            shape = (len(images), *images.shape)
            array = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)
            for i in range(0, len(images), 256):
                array[i : i + 256] = images.read(np.arange(i, min(i + 256, len(images))))
            array.flush()
            os.replace(unfinished, path)
    return prepared


# Results ------------------------------------------------------------------------------------------


def budget(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a contender's results depend on, besides its name and its seed."""
    limit = {"minutes": options.minutes} if options.minutes else {"images": options.images}
    return {**limit, "samples": options.samples}


def read_facts(options: argparse.Namespace, name: str, seed: int) -> dict[str, Any] | None:
    """Return the facts of a contender's training; None unless it was made with this budget."""
    path = options.out / f"{name}-{seed}.json"
    facts = read_json(path) if path.exists() else {}
    return facts if facts.get("budget") == budget(options) else None


def write_facts(options: argparse.Namespace, name: str, seed: int, facts: dict[str, Any]) -> None:
    """Write the facts of a contender's training, after its images."""
    write_json(options.out / f"{name}-{seed}.json", {"budget": budget(options), **facts})


def images_path(options: argparse.Namespace, name: str, seed: int, images: str) -> Path:
    """Return the file of a contender's "reconstructions", or of the samples of a sampler."""
    return options.out / f"{name}-{seed}-{images}.npy"


# vaejax -------------------------------------------------------------------------------------------


def train_with_vaejax(options: argparse.Namespace, name: str, seed: int, prepared: Path) -> None:
    """Train by the command that a user would type, and write samples and reconstructions."""
    import jax

    from vaejax import generate
    from vaejax.system import versions
    from vaejax.training import prior as run_prior
    from vaejax.training import run

    folder = options.out / f"run-{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of another budget, or of an interrupted benchmark
    seconds = run_vaejax(options, name, seed, prepared, folder)
    loaded = run.load(folder)
    model, weights = loaded.model, loaded.weights
    arrays = weights.params, weights.batch_stats
    test = np.load(options.out / "test.npy", mmap_mode="r")
    reconstructions = [
        np.asarray(generate.reconstruct(*arrays, test[i : i + CHUNK], model=model))
        for i in range(0, len(test), CHUNK)
    ]
    prior = run_prior.load(loaded, run_prior.default_name(loaded))
    samples = [
        np.asarray(generate.decode(*arrays, prior.sample(range(i, i + CHUNK)), model=model))
        for i in range(0, options.samples, CHUNK)
    ]
    np.save(images_path(options, name, seed, "normal"), np.concatenate(samples)[: options.samples])
    np.save(images_path(options, name, seed, "reconstructions"), np.concatenate(reconstructions))
    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights.params)),
        "updates": weights.step,
        "seen": weights.step * BATCH[name],
        "seconds": seconds,
        "versions": versions(),
    }
    write_facts(options, name, seed, facts)


def run_vaejax(
    options: argparse.Namespace, name: str, seed: int, prepared: Path, folder: Path
) -> float:
    """Train until the budget is spent, and return the seconds from the first line of metrics on."""
    program = str(ROOT / "experiments" / "anime.py")
    command = [sys.executable, program, "--data", str(prepared), "--recipe", name]
    command += ["--out", str(folder), "--seed", str(seed)]
    stops_itself = name != "report"
    if options.minutes and stops_itself:  # the learning rate has to fall to 0 at the end
        command += ["--minutes", str(options.minutes)]
    else:
        steps = ENDLESS if options.minutes else options.images // BATCH[name]
        command += ["--steps", str(steps), "--epochs", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    started, metrics = None, folder / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        if started is None and metrics.exists() and metrics.stat().st_size:
            started = time.monotonic()
        limited = options.minutes and not stops_itself
        if limited and started and time.monotonic() - started > 60 * options.minutes:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.monotonic() - (started or time.monotonic())


# pythae -------------------------------------------------------------------------------------------


def train_with_pythae(options: argparse.Namespace, name: str, seed: int) -> None:
    """Train in the peer's Python, which need not have vaejax."""
    program = Path(__file__).parent / "contenders" / "pythae_.py"
    flags = [name, str(options.out), "--seed", str(seed), "--samples", str(options.samples)]
    flags += ["--minutes", str(options.minutes)] if options.minutes else []
    flags += ["--images", str(options.images)]
    process = subprocess.run([options.peer, str(program), *flags], check=False)
    if process.returncode:
        sys.exit(f"{name} ended with {process.returncode}: is pythae installed in {options.peer}?")
    write_facts(options, name, seed, read_json(options.out / f"{name}-{seed}.json"))


# Evaluation ---------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> list[str]:
    """Compare the faces of all contenders with the test images: a table in Markdown.

    Every contender has as many samples as there are test images, or several groups of so many.
    """
    from vaejax import pictures
    from vaejax.evaluation import features
    from vaejax.evaluation.set_metrics import compare_sets

    network = features.inception(options.inception) if options.inception else features.vgg16(SIZE)
    test = np.load(options.out / "test.npy")
    held_out = extract(network, options.out / "test.npy")
    train = extract(network, options.out / "train.npy", options.samples)
    floor = compare_sets({"train": train}, held_out)
    lines = [
        f"| contender | seed | images seen | minutes | parameters | mse | PSNR | reconstructions: "
        f"{METRICS[0]} | samples: {' | '.join(METRICS)} |",
        "|---" * (8 + len(METRICS)) + "|",
        f"| *training images* | | | | | | | | {format_metrics(floor, 'train')} |",
    ]
    rows, names = [test[:SHOWN]], []
    for name in options.only:
        for seed in options.seeds:
            start = format_training(options, name, seed, test)
            again = extract(network, images_path(options, name, seed, "reconstructions"))
            for sampler in SAMPLERS if name in PYTHAE else SAMPLERS[:1]:
                samples = images_path(options, name, seed, sampler)
                sets = {"samples": extract(network, samples), "reconstructions": again}
                results = compare_sets(sets, held_out)
                title = f"vaejax, {name}" if name in VAEJAX else f"pythae {name}, {sampler}"
                lines.append(
                    f"| {title} | {seed} | {start} | "
                    f"{format_metric(results, 'frechet/reconstructions')} | "
                    f"{format_metrics(results, 'samples')} |"
                )
                if seed == options.seeds[0]:
                    rows.append(np.load(samples, mmap_mode="r")[:SHOWN])
                    names.append(title)
    pictures.save_png(options.out / "samples.png", pictures.stack_rows(rows))
    all_facts = [read_facts(options, name, options.seeds[0]) or {} for name in options.only]
    versions = [facts["versions"] for facts in all_facts if "versions" in facts]
    pythae = next((by_name["pythae"] for by_name in versions if "pythae" in by_name), "")
    return [
        *lines,
        *("", f"{len(test):,} test images of {SIZE} pixels, features: {network.name}."),
        *("", DIFFERENCES.format(pythae=pythae)),
        *("", f"samples.png: test images, then {', '.join(names)}."),
    ]


def extract(network: "Features", path: Path, most: int | None = None) -> np.ndarray:
    """Compute features `[n d]` of the first `most` images of a file, and keep them beside it."""
    key = hashlib.sha256(f"{network.name} {network.weights} {most}".encode()).hexdigest()[:12]
    kept = path.with_name(f"{path.stem}.{key}.features.npy")
    if kept.exists() and kept.stat().st_mtime > path.stat().st_mtime:
        return np.load(kept)
    features = network.of(np.load(path, mmap_mode="r")[:most], batch_size=CHUNK)
    np.save(kept, features)
    return features


def format_training(options: argparse.Namespace, name: str, seed: int, test: np.ndarray) -> str:
    """Return the cells of a contender's training and of its reconstructions' errors."""
    facts = read_facts(options, name, seed)
    assert facts is not None
    again = np.load(images_path(options, name, seed, "reconstructions"))
    errors = np.mean((again.astype(float) - test) ** 2, axis=(1, 2, 3)) / 255**2
    psnr = float(np.mean(-10 * np.log10(np.maximum(errors, 1e-9))))
    return (
        f"{facts['seen']:,} | {facts['seconds'] / 60:.1f} | {facts['parameters'] / 1e6:.1f} M | "
        f"{errors.mean():.5f} | {psnr:.2f}"
    )


def format_metrics(results: "Results", set_name: str) -> str:
    """Return the cells of all metrics of a set of faces."""
    return " | ".join(format_metric(results, f"{metric}/{set_name}") for metric in METRICS)


def format_metric(results: "Results", metric: str) -> str:
    """Return the cell of a metric; a dash where it was left out."""
    estimate = results.get(metric)
    if estimate is None or isinstance(estimate, str):  # the reason why
        return "–"
    spread = f" ± {estimate.error:.2g}" if estimate.error else ""
    return f"{estimate.value:.4g}{spread}"


if __name__ == "__main__":
    main()
