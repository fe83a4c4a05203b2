"""The commands of `vaejax` that move through the latents of a run, or look around a face."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vaejax.commands import (
    load,
    parse_seeds,
    read_images,
    refuse_no_picture,
    require_counts,
)
from vaejax.errors import UserError

if TYPE_CHECKING:
    from vaejax.latent import Directions
    from vaejax.nearest import Nearest
    from vaejax.priors import Prior

# JAX and the rest are imported by the commands that need them: --help and a mistake answer at once.

PriorFlag = Literal["normal", "mixture", "flow"] | None

FRAMES, FILM_FRAMES = 8, 30  # in a row of a strip; of a film, from a face to the next one
MAX_FACES, MAX_CELLS = 10_000, 64  # of a strip; of a grid
FILM_SIDE = 256  # pixels to which faces are enlarged
FILM_WIDTHS = {".mp4": 1024, ".gif": 512}  # pixels of a film, as far as enlarged faces admit
STEPS = (-3, -2, -1, 0, 1, 2, 3)  # standard deviations: the columns of a traversal
HELD_OUT = 1000  # faces whose distances say how near a new face lies


@dataclass(frozen=True)
class Interpolate:
    """Draw the faces between faces: a strip, or a film that goes through them and around."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    between: tyro.conf.Positional[tuple[str, ...]] = ()  # seeds of the faces, as in 3 17
    seeds: str = ""  # the same as numbers and ranges, as in 0-7
    images: tuple[Path, ...] = ()  # photographs in place of seeds
    frames: int | None = None  # in a row of a strip (none: 8), or of a film (none: 30 a face)
    grid: str = "1x1"  # columns and rows of a film: several walks at once share the seeds
    prior: PriorFlag = None  # distribution of z (none: what the run's recipe says)
    out: Path = Path("strip.png")  # a strip as .png, a film as .mp4 or .gif


@dataclass(frozen=True)
class Traverse:
    """Draw what the principal components of the latents change in a face."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    seed: int | None = None  # of the face (none: the mean of the training faces)
    image: Path | None = None  # a photograph in place of a seed
    directions: int = 8  # how many components, the largest ones
    prior: PriorFlag = None  # distribution of z (none: what the run's recipe says)
    out: Path = Path("sheet.png")  # the picture


@dataclass(frozen=True)
class ComputeDirections:
    """Find the directions of attributes in the latents, and which attributes the latents have."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    labels: Path | None = None  # CSV of attributes (none: those that the run was trained with)


@dataclass(frozen=True)
class Edit:
    """Change attributes of faces."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # files of any common format and any size
    seeds: Annotated[str, tyro.conf.arg(aliases=["--seed"])] = ""  # faces in place of files: 3, 0-9
    # NAME=VALUE, or NAME=NUMBER of standard deviations of an attribute with two values, such as
    # glasses=+2; may be repeated
    changes: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set", metavar="NAME=VALUE")
    ] = ()
    prior: PriorFlag = None  # distribution of z (none: what the run's recipe says)
    out: Path = Path("edited.png")  # the picture


@dataclass(frozen=True)
class ShowNearest:
    """Show the training faces that are nearest to a face, in pixels and in features."""

    run: tyro.conf.Positional[str]  # a run's folder, its number, or "latest"
    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # files of any common format and any size
    seeds: str = ""  # new faces in place of files (none: 0-9)
    prior: PriorFlag = None  # distribution of z (none: what the run's recipe says)
    out: Path = Path("nearest.png")  # the picture


# Interpolate --------------------------------------------------------------------------------------


def interpolate(command: Interpolate) -> None:
    """Write a strip, or a film, of the faces between faces."""
    seeds = _seeds_to_walk(command)
    columns, rows = _parse_grid(command.grid)
    is_film = command.out.suffix.lower() in FILM_WIDTHS
    _refuse_no_walk(command, stops=len(seeds) or len(command.images), cells=columns * rows)
    import numpy as np

    from vaejax import pictures
    from vaejax.latent import along

    loaded = load(command.run)
    stops, to_vectors, words = _space(loaded, command, seeds)
    if not is_film:
        frames, pairs = command.frames or FRAMES, len(stops) - 1
        positions = (np.arange(pairs)[:, None] + np.linspace(0, 1, frames)).reshape(-1)
        faces = _decode(loaded, to_vectors(along(stops, positions)))
        pictures.save_png(command.out, pictures.grid(faces, columns=frames))
        print(f"{frames} faces from a face to the next one, {words}: {command.out}")
        return
    walks = stops.reshape(columns * rows, -1, stops.shape[1])
    frames = command.frames or FILM_FRAMES * walks.shape[1]
    side = min(FILM_SIDE, FILM_WIDTHS[command.out.suffix.lower()] // columns)
    factor = max(1, side // loaded.model.size)
    film = _film(loaded, walks, to_vectors, frames=frames, columns=columns, factor=factor)
    pictures.loop(command.out, film)
    print(f"{frames} frames through {walks.shape[1]} faces, {words}: {command.out}")


def _film(
    loaded: Any,
    walks: Any,
    to_vectors: Callable[[Any], Any],
    *,
    frames: int,
    columns: int,
    factor: int,
) -> Iterator[Any]:
    """Yield the frames of walks `[cells k d]` side by side, which end where they began."""
    import numpy as np

    from vaejax import generate, pictures
    from vaejax.latent import along

    cells, count = walks.shape[:2]
    block = max(1, generate.BATCH // cells)  # frames that are drawn at a time
    for first in range(0, frames, block):
        positions = np.arange(first, min(first + block, frames)) * count / frames
        points = np.stack([along(walk, positions) for walk in walks], axis=1)
        vectors = to_vectors(points.reshape(-1, points.shape[2]))
        faces = _decode(loaded, vectors, batch_size=block * cells)
        for frame in faces.reshape(-1, cells, *faces.shape[1:]):
            enlarged = pictures.enlarge(frame, factor)
            yield pictures.grid(enlarged, columns=columns, gap=pictures.GAP if cells > 1 else 0)


def _seeds_to_walk(command: Interpolate) -> list[int]:
    """Return the seeds of a walk; none for one through images. UserError unless it is one."""
    given = [bool(command.between), bool(command.seeds), bool(command.images)]
    if sum(given) != 1:
        raise UserError(
            "name the faces to walk between in one way: seeds after the run (3 17), --seeds 0-7, "
            "or --images a.jpg b.jpg"
        )
    return parse_seeds(",".join(command.between) or command.seeds) if not given[2] else []


def _refuse_no_walk(command: Interpolate, *, stops: int, cells: int) -> None:
    """Raise UserError for a walk that cannot be drawn as it is described."""
    require_counts(command, "frames")
    refuse_no_picture(command.out, kinds=(".png", *FILM_WIDTHS))
    is_film = command.out.suffix.lower() in FILM_WIDTHS
    if cells > 1 and not is_film:
        raise UserError(f"--grid {command.grid} is of films: --out {command.out} is a strip")
    each, rest = divmod(stops, cells)
    if each < 2 or rest:
        raise UserError(
            f"{stops} faces for {cells} walk{'s' * (cells > 1)}: "
            f"each needs two or more, and all as many"
        )
    frames = command.frames
    if not is_film and (frames == 1 or (frames or FRAMES) * (stops - 1) > MAX_FACES):
        raise UserError(f"a strip has 2 frames or more in a row, and at most {MAX_FACES:,} faces")
    if is_film and frames is not None and frames < each:
        raise UserError(f"--frames {frames}: less than the {each} faces of the walk")


def _parse_grid(text: str) -> tuple[int, int]:
    """ "4x2" -> (4, 2): columns and rows."""
    match = re.fullmatch(r"(\d{1,2})x(\d{1,2})", text)
    columns, rows = map(int, match.groups()) if match else (0, 0)
    if not 0 < columns * rows <= MAX_CELLS:
        raise UserError(f"--grid {text}: columns and rows as in 4x2, at most {MAX_CELLS} in all")
    return columns, rows


def _space(
    loaded: Any, command: Interpolate, seeds: Sequence[int]
) -> tuple[Any, Callable[[Any], Any], str]:
    """Return the faces as points of the space to walk in, how points become latents, and words.

    It is the noise of the prior; of a prior that makes z of no noise, and without a prior, z from
    the mean of the training faces.
    """
    import jax.numpy as jnp
    import numpy as np

    from vaejax.priors import NoisePrior, flatten_latents
    from vaejax.training import directions

    prior = _prior(loaded, command.prior, optional=not seeds)
    encoded = None if seeds else _encode_files(loaded, command.images)
    if not isinstance(prior, NoisePrior):
        mean = directions.components(loaded).mean
        z = _latents(loaded, prior, seeds) if encoded is None else encoded
        return z - mean, lambda away: away + mean, "in z, around the mean of the training faces"
    noise = prior.noise(seeds) if encoded is None else prior.to_noise(_unravel(loaded, encoded))

    def to_vectors(points: Any) -> Any:
        return np.asarray(flatten_latents(prior.from_noise(jnp.asarray(points))))

    return np.asarray(noise), to_vectors, f"in the noise of the {prior.name} prior"


# Traverse -----------------------------------------------------------------------------------------


def traverse(command: Traverse) -> None:
    """Write a sheet of what the principal components change."""
    require_counts(command, "directions")
    refuse_no_picture(command.out)
    if command.seed is not None and command.image is not None:
        raise UserError("--seed and --image: of which face? Name one of them")
    seeds = [] if command.seed is None else parse_seeds(str(command.seed))
    import numpy as np

    from vaejax import pictures
    from vaejax.training import directions

    loaded = load(command.run)
    components = directions.components(loaded)
    start = components.mean[None]
    if command.image is not None:
        start = _encode_files(loaded, [command.image])
    elif seeds:
        start = _latents(loaded, _prior(loaded, command.prior), seeds)
    count = min(command.directions, len(components.stds))
    moves = components.stds[:count, None] * components.vectors[:count]
    steps = np.asarray(STEPS, np.float32)[None, :, None]
    faces = _decode(loaded, (start + steps * moves[:, None]).reshape(-1, moves.shape[1]))
    shares = 100 * components.stds**2 / components.total
    sheet = pictures.labelled_rows(
        list(faces.reshape(count, len(STEPS), *faces.shape[1:])),
        [f"{i + 1}: {shares[i]:.2g} %" for i in range(count)],
        headings=[f"{step:+} std" if step else "0" for step in STEPS],
    )
    pictures.save_png(command.out, sheet)
    print(
        f"{count} principal components, with their share of the variance, from -3 to +3 standard "
        f"deviations: {command.out}"
    )


# Attributes ---------------------------------------------------------------------------------------


def compute_directions(command: ComputeDirections) -> None:
    """Fit the directions of attributes, and print which of them the latents have."""
    import numpy as np

    from vaejax.latent import MIN_AUC
    from vaejax.training import directions

    loaded = load(command.run)
    path = command.labels or directions.default_labels(loaded)
    if path is None:
        raise UserError(
            f"{command.run} was trained without labels: --labels FILE.csv names the attributes of "
            "its images"
        )
    found = directions.fit(loaded, path)
    encoded = found.encoded()
    width = max(map(len, _names(found)))
    print(f"{'direction':{width}}  AUC on held-out faces")
    for name, auc, good in zip(_names(found), found.auc, encoded, strict=True):
        if good:
            print(f"{name:{width}}  {auc:.3f}")
    left_out = [
        f"{name} ({'too few faces' if np.isnan(auc) else f'{auc:.2f}'})"
        for name, auc, good in zip(_names(found), found.auc, encoded, strict=True)
        if not good
    ]
    if left_out:
        print(f"Left out, with an AUC below {MIN_AUC}: {', '.join(left_out)}")
    print(f"`vaejax edit {command.run} --seed 3 --set NAME=VALUE` changes a face")


def _names(found: "Directions") -> list[str]:
    return [f"{a}={v}" for a, v in zip(found.attributes, found.values, strict=True)]


def edit(command: Edit) -> None:
    """Write a picture of faces above what changes make of them."""
    if bool(command.images) == bool(command.seeds):
        raise UserError("name the faces to edit in one way: files after the run, or --seed 3")
    if not command.changes:
        raise UserError("nothing to change: name it with --set glasses=+2 or --set hair=blue")
    seeds = parse_seeds(command.seeds) if command.seeds else []
    refuse_no_picture(command.out)
    import numpy as np

    from vaejax import pictures
    from vaejax.training import directions

    loaded = load(command.run)
    images = read_images(command.images, size=loaded.model.size) if command.images else None
    found = directions.load(loaded)
    moves = [_parse_change(change, found) for change in command.changes]
    if images is None:
        z = _latents(loaded, _prior(loaded, command.prior), seeds)
    else:
        z = _encode(loaded, images)
    edited = np.asarray(z + sum(move(z) for move in moves), np.float32)
    batch = min(len(z), 100)
    rows = [_decode(loaded, v, batch_size=batch) for v in (z, edited)]
    labels = ["face", "edited"]
    if images is not None:
        rows, labels = [images, *rows], ["image", "decoded", "edited"]
    pictures.save_png(command.out, pictures.labelled_rows(rows, labels))
    print(f"{len(z)} faces above them with {', '.join(command.changes)}: {command.out}")


def _parse_change(text: str, found: "Directions") -> Callable[[Any], Any]:
    """ "glasses=+2" or "hair_colour=blue" -> how latents have to change.

    Raises UserError, with what there is, for an unknown attribute or value and for those that the
    latents do not have.
    """
    from vaejax.latent import MIN_AUC

    name, _, value = (part.strip() for part in text.partition("="))
    rows, encoded = found.rows(name), found.encoded()
    names = _names(found)
    if not rows:
        known = "; ".join(
            f"{attribute}={'|'.join(found.values[i] for i in found.rows(attribute) if encoded[i])}"
            for attribute in dict.fromkeys(found.attributes)
            if encoded[found.rows(attribute)].any()
        )
        raise UserError(f"--set {text}: there is {known or 'no attribute in these latents'}")
    row = next((i for i in rows if found.values[i] == value), None)
    number = None
    if row is None and re.fullmatch(r"[+-]?\d+(\.\d*)?|[+-]?\.\d+", value):
        if len(rows) != 2:
            some = ", ".join(found.values[i] for i in rows)
            raise UserError(f"--set {text}: {name} is no matter of more or less, but one of {some}")
        row, number = rows[1], float(value)
    if row is None:
        some = ", ".join(found.values[i] for i in rows)
        number_too = " or a number of standard deviations" if len(rows) == 2 else ""
        raise UserError(f"--set {text}: {name} is {some}{number_too}")
    if not encoded[row]:
        raise UserError(
            f"--set {text}: the latents of this run do not have {names[row]} (AUC on held-out "
            f"faces {found.auc[row]:.2f}, at least {MIN_AUC})"
        )
    if number is not None:
        return lambda z: number * found.step(row)
    return lambda z: found.replace(z, row)


# Nearest ------------------------------------------------------------------------------------------


def show_nearest(command: ShowNearest) -> None:
    """Write a picture of faces above the nearest training faces; print their distances."""
    if command.images and command.seeds:
        raise UserError("name the faces in one way: files after the run, or --seeds 0-9")
    seeds = parse_seeds(command.seeds or "0-9") if not command.images else []
    refuse_no_picture(command.out)
    import numpy as np

    from vaejax import pictures
    from vaejax.data.batches import Images

    loaded = load(command.run)
    if command.images:
        faces = read_images(command.images, size=loaded.model.size)
        names = [path.name for path in command.images]
    else:
        z = _latents(loaded, _prior(loaded, command.prior), seeds)
        faces = _decode(loaded, z, batch_size=min(len(z), 100))
        names = [f"seed {seed}" for seed in seeds]
    prepared = Path(loaded.spec.schedule.prepared)
    training, held_out = (Images(prepared, split) for split in ("train", "validation"))
    known = held_out.read(np.arange(min(HELD_OUT, len(held_out))))
    found = _nearest(loaded, {"faces": faces, "held_out": known}, training)
    rows = [faces, *(training.read(sets["faces"].indices) for sets in found.values())]
    labels = ["faces", *(f"nearest in {kind}" for kind in found)]
    pictures.save_png(command.out, pictures.labelled_rows(rows, labels))
    for line in _nearest_table(names, found, training):
        print(line)
    print(
        f"{len(faces)} faces above the nearest of {len(training):,} training faces: {command.out}"
    )


def _nearest(loaded: Any, sets: dict[str, Any], training: Any) -> dict[str, dict[str, "Nearest"]]:
    """Find the nearest training face of each face of each set: in pixels, and in features where
    their network can be had."""
    import sys

    from vaejax.evaluation import features, passes
    from vaejax.evaluation.memorization import nearest_by_features

    model = loaded.model
    found = {"pixels": passes.nearest_training_images(sets, training, model)}
    try:
        network = features.vgg16(model.size)
    except UserError as error:
        print(f"warning: pixels only: {error}", file=sys.stderr)
        return found
    candidates = passes.training_features(Path(loaded.spec.schedule.prepared), network, model)
    batch = passes.batch_size(model)
    found["features"] = {
        name: nearest_by_features(network.of(faces, batch_size=batch), candidates)
        for name, faces in sets.items()
    }
    return found


def _nearest_table(
    names: Sequence[str], found: dict[str, dict[str, "Nearest"]], training: Any
) -> Iterator[str]:
    """Yield a line for each face: its distances, the share of held-out faces that lie nearer to
    a training face, and the files."""
    import numpy as np

    width = max(map(len, names))
    heads = "".join(f"  {f'distance in {kind}':>20}  nearer held-out" for kind in found)
    yield f"{'':{width}}{heads}  training files"
    for i, name in enumerate(names):
        line, files = f"{name:{width}}", []
        for sets in found.values():
            distance = sets["faces"].distances[i]
            nearer = np.mean(sets["held_out"].distances < distance)
            line += f"  {distance:20.4f}  {100 * nearer:13.0f} %"
            files.append(training.metadata(int(sets["faces"].indices[i]))["path"])
        yield f"{line}  {', '.join(files)}"


# Latents ------------------------------------------------------------------------------------------


def _prior(loaded: Any, name: PriorFlag, *, optional: bool = False) -> "Prior | None":
    """Return the prior of a run that a flag names, or its own.

    Raises UserError for a model without one, or returns None where it is `optional`.
    """
    from vaejax.models import autoencoder
    from vaejax.training import prior

    chosen = name or prior.default_name(loaded)
    if optional and chosen == "normal" and not autoencoder.is_variational(loaded.model):
        return None
    return prior.load(loaded, chosen)


def _latents(loaded: Any, prior: Any, seeds: Sequence[int]) -> Any:
    """Return the latents of seeds as vectors, `[n d]`."""
    import numpy as np

    from vaejax import generate
    from vaejax.priors import flatten_latents

    parts = (seeds[i : i + generate.BATCH] for i in range(0, len(seeds), generate.BATCH))
    return np.concatenate([np.asarray(flatten_latents(prior.sample(part))) for part in parts])


def _encode_files(loaded: Any, paths: Sequence[Path]) -> Any:
    return _encode(loaded, read_images(paths, size=loaded.model.size))


def _encode(loaded: Any, images: Any) -> Any:
    """Return the most probable latents of images as vectors, `[n d]`."""
    import numpy as np

    from vaejax import generate

    params, batch_stats = loaded.weights.params, loaded.weights.batch_stats
    parts = (images[i : i + 10] for i in range(0, len(images), 10))
    encoded = [generate.encode(params, batch_stats, p, model=loaded.model) for p in parts]
    return np.concatenate([np.asarray(part) for part in encoded])


def _unravel(loaded: Any, vectors: Any) -> Any:
    import jax

    from vaejax.priors import unraveler

    return jax.vmap(unraveler(loaded.model))(vectors)


def _decode(loaded: Any, vectors: Any, *, batch_size: int | None = None) -> Any:
    """Decode latents that are vectors to faces, uint8 `[n h w c]`."""
    from vaejax import generate

    return generate.decode_vectors(
        loaded.weights.params,
        loaded.weights.batch_stats,
        vectors,
        model=loaded.model,
        batch_size=batch_size or min(len(vectors), generate.BATCH),
    )
