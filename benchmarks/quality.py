"""Who makes better faces of the same images, with the same budget, before the same judge?

    python benchmarks/quality.py --data faces.zip --images 100000 --seeds 0 1 --out quality

Contenders are vaejax with the report's recipe and with its quick one, and pythae's VAE, beta-VAE
and RAE with their normal and their mixture sampler, each as its authors recommend for faces of 64
pixels. All learn from the same training images, and are judged by vaejax on the same test images. A
budget is so many images seen (--images), or so many minutes of learning (--minutes), without
compiling or preparing. What is done is kept in --out: the same command goes on.

pythae needs PyTorch: `pip install pythae torch` here, or name a Python that has them by --peer.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIZE = 64
VAEJAX = ("report", "quick")
PYTHAE = ("vae", "beta-vae", "rae")
SAMPLERS = ("normal", "mixture")
BATCH = {"report": 128, "quick": 16}
DIFFERENCES = """
- vaejax, report: the report's recipe, `experiments/anime.py --recipe report`: 27 M parameters, 512
  latents, Adam 1e-4 with b1 0.5, batches of 128, norm that is frozen, mse + 0.01 kl (both means).
- vaejax, quick: its quick recipe: 64 latents, real batch norm, Adam 2e-3 that falls to 0 at the end
  of the budget, batches of 16, mse + 0.002 kl.
- pythae {pythae}: its benchmark's convolutional networks for CelebA, 64 latents, batches of 100,
  Adam; the VAE and the beta-VAE (beta 2) at 1e-4, squared error / 2 + KL summed; the RAE (L2) with
  embedding 1e-4 and decoder's weight decay 1e-7 (configs/celeba/rae_l2_config.json of its examples)
  at 1e-3 (configs/celeba/reproducibility/rae_l2, the same examples). Its training
  pipeline as it is, with the validation images; its last weights are taken, not its best, since the
  budget ends it in between. The mixture sampler has 10 components, fitted on 5,000 training
  images.
- All reconstructions are of the posterior's mean. All samples are rounded to 256 levels.
- The report trained for 150 epochs, pythae's files ask for about 50: this budget is far shorter.
""".strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder or zip of faces (none: the drawn faces)")
    parser.add_argument("--images", type=int, default=100_000, help="images seen by each")
    parser.add_argument("--minutes", type=float, help="minutes of learning, in place of --images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--only", nargs="+", choices=[*VAEJAX, *PYTHAE], default=[*VAEJAX, *PYTHAE])
    parser.add_argument("--peer", default=sys.executable, help="a Python that has pythae")
    parser.add_argument("--inception", type=Path, help="judge by these weights, not by VGG16's")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    prepared = prepare(options)
    for name in options.only:
        for seed in options.seeds:
            if known(options, name, seed) is None:
                print(f"{name}, seed {seed} …", flush=True)
                (learn_with_vaejax if name in VAEJAX else learn_with_pythae)(
                    options, name, seed, prepared
                )
    print("\n".join(table(options, prepared)))


def prepare(options: argparse.Namespace) -> Path:
    """The images as vaejax prepares and splits them, and as arrays for the others."""
    from vaejax.data.batches import Images
    from vaejax.data.demo import drawn_faces
    from vaejax.data.prepare import prepare
    from vaejax.data.records import read_report

    prepared = prepare(options.data or drawn_faces(), size=SIZE)
    report = read_report(prepared)
    images = {field: report[field] for field in ("fingerprint", "persons", "splits")}
    whose = options.out / "data.json"
    if whose.exists() and json.loads(whose.read_text()) != images:
        sys.exit(f"{options.out} is of other images than those: name another --out")
    whose.write_text(json.dumps(images))
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


def budget(options: argparse.Namespace) -> dict:
    asked = {"minutes": options.minutes} if options.minutes else {"images": options.images}
    return {**asked, "samples": options.samples}


def known(options: argparse.Namespace, name: str, seed: int) -> dict | None:
    """What a contender has left, if it is of this budget."""
    path = options.out / f"{name}-{seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("budget") == budget(options) else None


def keep(options: argparse.Namespace, name: str, seed: int, arrays: dict, facts: dict) -> None:
    for what, array in arrays.items():
        np.save(options.out / f"{name}-{seed}-{what}.npy", array)
    facts = {"budget": budget(options), **facts}
    (options.out / f"{name}-{seed}.json").write_text(json.dumps(facts, indent=1))


# vaejax -------------------------------------------------------------------------------------------


def learn_with_vaejax(options: argparse.Namespace, name: str, seed: int, prepared: Path) -> None:
    """The command that a user would type; by the clock, it is asked to stop when the time is up."""
    folder = options.out / f"run-{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of another budget, or cut off within this one
    steps = options.images // BATCH[name] if not options.minutes else guess(options, name)
    command = [sys.executable, "experiments/anime.py", "--data", str(prepared), "--recipe", name]
    command += ["--steps", str(steps), "--epochs", "100000", "--seed", str(seed)]
    command += ["--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    began, metrics = None, folder / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        if began is None and metrics.exists() and metrics.stat().st_size:
            began = time.monotonic()
        if options.minutes and began and time.monotonic() - began > 60 * options.minutes:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.monotonic() - (began or time.monotonic())
    from vaejax import generate
    from vaejax.models import autoencoder
    from vaejax.training import checkpoint, run

    model = autoencoder.build(run.read(folder)["model"])
    weights = checkpoint.weights(folder, model)
    params, statistics = weights.params, weights.statistics
    test = np.load(options.out / "test.npy", mmap_mode="r")
    again = [
        np.asarray(generate.reconstruct(params, statistics, test[i : i + 100], model=model))
        for i in range(0, len(test), 100)
    ]
    drawn = []
    for i in range(0, options.samples, 100):
        z = generate.latents(range(i, i + 100), latent_dim=model.code[0])
        drawn.append(np.asarray(generate.decode(params, statistics, z, model=model)))
    arrays = {
        "normal": np.concatenate(drawn)[: options.samples],
        "reconstructions": np.concatenate(again),
    }
    facts = {
        "parameters": sum(np.size(leaf) for leaf in _leaves(params)),
        "updates": weights.step,
        "seen": weights.step * BATCH[name],
        "seconds": seconds,
        "versions": run.versions(),
    }
    keep(options, name, seed, arrays, facts)


def _leaves(tree) -> list:
    import jax

    return jax.tree.leaves(tree)


def guess(options: argparse.Namespace, name: str) -> int:
    """Updates that no machine makes in the time; but the quick recipe's learning rate must fall to
    0 at the end, so that of that one the rate is measured first."""
    if name == "report":
        return 10**7
    probe = options.out / "run-probe"
    shutil.rmtree(probe, ignore_errors=True)
    command = [sys.executable, "experiments/anime.py", "--recipe", name, "--steps", "200"]
    command += ["--data", str(prepare(options)), "--out", str(probe)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (probe / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line][5:]
    return int(60 * options.minutes * float(np.median(rates)) / BATCH[name])


# pythae -------------------------------------------------------------------------------------------


def learn_with_pythae(options: argparse.Namespace, name: str, seed: int, _: Path) -> None:
    """In the peer's Python, where vaejax need not be."""
    program = Path(__file__).parent / "contenders" / "pythae_.py"
    asked = [name, str(options.out), "--seed", str(seed), "--samples", str(options.samples)]
    asked += ["--minutes", str(options.minutes)] if options.minutes else []
    asked += ["--images", str(options.images)]
    done = subprocess.run([options.peer, str(program), *asked], check=False)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}: is pythae installed in {options.peer}?")
    path = options.out / f"{name}-{seed}.json"
    keep(options, name, seed, {}, json.loads(path.read_text()))


# The judge ----------------------------------------------------------------------------------------


def table(options: argparse.Namespace, prepared: Path) -> list[str]:
    """One judge for all: of each as many samples as are held out, in groups."""
    import jax.numpy as jnp

    from vaejax import pictures
    from vaejax.evaluation import faces, features

    found = features.inception(options.inception) if options.inception else features.vgg16(SIZE)

    def extract(path: Path, most: int | None = None) -> np.ndarray:
        by = hashlib.sha256(f"{found.name} {found.weights} {most}".encode()).hexdigest()[:12]
        kept = path.with_name(f"{path.stem}.{by}.features.npy")
        images = np.load(path, mmap_mode="r")[:most]
        if kept.exists() and kept.stat().st_mtime > path.stat().st_mtime:
            return np.load(kept)
        parts = []
        for i in range(0, len(images), 100):
            some = images[i : i + 100]
            padded = np.concatenate([some, np.repeat(some[-1:], 100 - len(some), axis=0)])
            parts.append(np.asarray(found.extract(jnp.asarray(padded)))[: len(some)])
        np.save(kept, np.concatenate(parts))
        return np.concatenate(parts)

    test = np.load(options.out / "test.npy")
    held_out = extract(options.out / "test.npy")
    figures = ("frechet", "kernel", "precision", "recall", "density", "coverage")
    lines = [
        f"| contender | seed | images seen | minutes | parameters | mse | PSNR | reconstructions: "
        f"{figures[0]} | samples: {' | '.join(figures)} |",
        "|---" * (9 + len(figures) - 1) + "|",
    ]
    floor = faces.compare({"train": extract(options.out / "train.npy", options.samples)}, held_out)
    cells = [_cell(floor.figures.get(f"{figure}/train")) for figure in figures]
    lines.append(f"| *training images* | | | | | | | | {' | '.join(cells)} |")
    shown, names = [], []
    for name in options.only:
        for seed in options.seeds:
            facts = known(options, name, seed)
            assert facts is not None
            stem = f"{name}-{seed}"
            again = np.load(options.out / f"{stem}-reconstructions.npy")
            errors = np.mean((again.astype(float) - test) ** 2, axis=(1, 2, 3)) / 255**2
            psnr = float(np.mean(-10 * np.log10(np.maximum(errors, 1e-9))))
            for sampler in SAMPLERS if name in PYTHAE else SAMPLERS[:1]:
                path = options.out / f"{stem}-{sampler}.npy"
                sets = {
                    "samples": extract(path),
                    "reconstructions": extract(options.out / f"{stem}-reconstructions.npy"),
                }
                judged = faces.compare(sets, held_out).figures
                cells = [_cell(judged.get(f"{figure}/samples")) for figure in figures]
                who = f"vaejax, {name}" if name in VAEJAX else f"pythae {name}, {sampler}"
                lines.append(
                    f"| {who} | {seed} | {facts['seen']:,} | {facts['seconds'] / 60:.1f} | "
                    f"{facts['parameters'] / 1e6:.1f} M | {errors.mean():.5f} | {psnr:.2f} | "
                    f"{_cell(judged.get('frechet/reconstructions'))} | {' | '.join(cells)} |"
                )
                if seed == options.seeds[0]:
                    shown.append(np.load(path, mmap_mode="r")[:10])
                    names.append(who)
    pictures.save(options.out / "samples.png", pictures.strips([test[:10], *shown]))
    versions = [known(options, name, options.seeds[0]) or {} for name in options.only]
    peer_version = next((v["versions"]["pythae"] for v in versions if "torch" in v["versions"]), "")
    lines += ["", f"{len(test):,} test images of {SIZE} pixels, features: {found.name}."]
    lines += ["", DIFFERENCES.format(pythae=peer_version), ""]
    lines += [f"samples.png: test images, then {', '.join(names)}."]
    (options.out / "quality.md").write_text("\n".join(lines) + "\n")
    return lines


def _cell(estimate) -> str:
    if estimate is None:
        return "–"
    spread = f" ± {estimate.error:.2g}" if estimate.error else ""
    return f"{estimate.value:.4g}{spread}"


if __name__ == "__main__":
    main()
