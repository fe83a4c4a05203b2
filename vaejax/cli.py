"""The command line: `vaejax prepare | sample | reconstruct`, and what every experiment shares."""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vaejax.errors import UserError, VaejaxError

if TYPE_CHECKING:
    from vaejax.training.config import Config

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
class Reconstruct:
    """Show images above what a trained run makes of them."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    images: tyro.conf.Positional[tuple[Path, ...]]  # files of any common format and any size
    out: Path = Path("reconstructions.png")  # the picture


def prepare(command: Prepare) -> None:
    from vaejax.data.faces import Crop
    from vaejax.data.prepare import prepare

    flags = {"cascade": command.cascade, "margin": command.margin}
    given = {name: value for name, value in flags.items() if value is not None}
    if given and not command.crop_faces:
        raise UserError(f"--{' and --'.join(given)} without --crop-faces would change nothing")
    folder = prepare(
        command.source,
        size=command.size,
        out=command.out,
        allow_refused=command.allow_refused,
        crop=Crop(**given) if command.crop_faces else None,
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

    model, params, statistics = load(command.run)
    faces = []
    for some in (seeds[i : i + 100] for i in range(0, len(seeds), 100)):
        z = generate.latents(some, latent_dim=model.latent_dim)
        faces.append(np.asarray(generate.decode(params, statistics, z, model=model)))
    columns = max(1, round(len(seeds) ** 0.5))
    pictures.save(command.out, pictures.grid(np.concatenate(faces), columns=columns))
    print(f"{len(seeds)} new faces: {command.out}")


def reconstruct(command: Reconstruct) -> None:
    if not command.images:
        raise UserError("no image to reconstruct: name one or more after the run")
    refuse_no_picture(command.out)
    import numpy as np

    from vaejax import generate, pictures
    from vaejax.data.decode import Refused, decode, resize

    model, params, statistics = load(command.run)
    images = []
    for path in command.images:
        try:
            images.append(resize(decode(path.read_bytes()), model.size))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except Refused as refused:
            raise UserError(f"{path} is no usable image: {refused.reason}") from None
    rows = []
    for some in (images[i : i + 10] for i in range(0, len(images), 10)):
        originals = np.stack(some)
        again = generate.reconstruct(params, statistics, originals, model=model)
        rows.append(pictures.strips([originals, np.asarray(again)]))
    width = max(row.shape[1] for row in rows)
    picture = [
        np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows
    ]
    pictures.save(command.out, np.concatenate(picture))
    print(f"{len(images)} images above their reconstructions: {command.out}")


def load(name: str):
    """The model, parameters and statistics of a run, as a person names it."""
    from vaejax.models.vae import VAE
    from vaejax.training import checkpoint, parallel, run

    folder = run.find(name)
    parallel.configure()
    try:
        model = VAE(**run.read(folder)["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} does not describe a VAE: {error}") from None
    return model, *checkpoint.weights(folder, model)


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


def refuse_no_picture(path: Path) -> None:
    """UserError unless a PNG can be written there."""
    from vaejax.training.run import refuse_unwritable

    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: the picture is a PNG, its name must end in .png")
    if os.path.isdir(path):
        raise UserError(f"--out {path} is a folder: name a file in it, such as faces.png")
    refuse_unwritable(path.parent)


@contextmanager
def for_people() -> Iterator[None]:
    """Errors that a person can mend become one line and an exit code."""
    try:
        yield
    except VaejaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def experiment(
    main: Callable[["Config"], None], config: type["Config"], description: str | None
) -> None:
    """Run an experiment's `main` on the flags of the command line."""
    from vaejax.training import parallel

    with for_people():
        flags = parse(config, description=description)
        parallel.configure(cache=not flags.dry_run)
        main(flags)


def parse(flags: Any, **settings: Any) -> Any:
    """The command line as a dataclass; a wrong one is a UserError, in a line, not in a box."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return tyro.cli(flags, **settings)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        # tyro draws a box: a title, a rule, what is wrong, a rule, where to read on
        plain = re.sub(r"[╭╮╰╯│]", " ", errors.getvalue())
        parts = [" ".join(part.split()) for part in re.split(r"[-─]{8,}", plain)]
        wrong = next(part for part in parts[1:] if part) if len(parts) > 1 else parts[0]
        wrong = wrong.split(" Got errors:")[0]  # every type that was tried
        raise UserError(f"{wrong} (--help lists what there is)") from None


def main() -> None:
    """The `vaejax` command."""
    commands = (
        Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
    )
    act = {Prepare: prepare, Sample: sample, Reconstruct: reconstruct}
    with for_people():
        command = parse(commands, prog="vaejax", description="An autoencoder laboratory for faces.")
        act[type(command)](command)
