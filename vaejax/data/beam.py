"""Preparation on Apache Beam: the same prepared set, by as many workers as a runner has.

There are two passes. In the first, a worker examines some hundred files at a time, and stores their
pixels and facts beside the future set. When all hashes are known, so are the splits and the order,
and the second pass writes the records: a TFDS builder, run by `download_and_prepare`. No pixels
pass through the runner, and no process holds more of them than a shard. The source and the set must
lie where every worker sees them, under the same paths.

The builder is a `ShardBasedBuilder`. TFDS runs a `GeneratorBasedBuilder` on Beam too, but sends all
records through the runner's shuffle, which Beam's direct runner keeps in memory: 1.9 GB for 22,000
images of 64 x 64, against 0.25. Two faults of TFDS 4.9.10 are avoided. It writes the earlier splits
again with each further one: here a builder has one split. It sorts the lengths of more than ten
shards as texts (0, 1, 10, 2): here they are counted when the shards are planned.
"""

import contextlib
import io
import itertools
import json
import os
import secrets
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner, create_runner
from jaxtyping import UInt8
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.writer import ExampleWriter

from vaejax.data import records
from vaejax.data.decode import Refused
from vaejax.data.faces import NO_FACE, Detector, Thumbnail
from vaejax.data.gather import Examined, Gathered, NoFace, Pixels, collect, examine
from vaejax.data.sources import Entry, Listing, open_reader
from vaejax.errors import UserError
from vaejax.files import read_json

FILES_PER_PART = 256  # that a worker examines before it stores the results
MAX_SHARD_BYTES, MAX_SHARD_RECORDS = 64 << 20, 10_000  # in a file of records


@dataclass(frozen=True)
class Beam:
    """The workers of a runner: its name, and what one would write on Beam's command line."""

    runner: str
    options: tuple[str, ...] = ()

    @contextlib.contextmanager
    def gather(
        self,
        files: Listing,
        scratch: Path,
        *,
        size: int,
        detector: Detector | None,
        say: Callable[[str], None],  # not called: runners log their progress themselves
    ) -> Iterator[Gathered]:
        """Examine all files; the pixels lie in `scratch` until the end of the block."""
        scratch.mkdir()
        parts = []
        for start in range(0, len(files.entries), FILES_PER_PART):
            parts.append(scratch / f"{start // FILES_PER_PART:06}")
            entries = files.entries[start : start + FILES_PER_PART]
            _write_json(parts[-1], [astuple(entry) for entry in entries])
        with self._errors(), beam.Pipeline(self._runner(), self._options()) as pipeline:
            names = pipeline | beam.Create([str(part) for part in parts]) | beam.Reshuffle()
            _ = names | beam.ParDo(_ExamineParts(files.source.resolve(), size, detector))
        results = _read_results(files.entries, parts)
        gathered = collect(files.entries, results, _StoredPixels(scratch, size))
        gathered.sheet.redraw(lambda stand_in: _draw(stand_in, files.read, size, detector))
        yield gathered
        shutil.rmtree(scratch)

    def write_split(
        self,
        folder: Path,
        gathered: Gathered,
        selected: Iterable[tuple[int, records.Metadata]],
        *,
        size: int,
        split: str,
    ) -> tfds.core.SplitInfo:
        """Write the records of one split: the selected images by index, and their metadata."""
        stored: _StoredPixels = gathered.pixels
        shard_size = max(1, min(MAX_SHARD_RECORDS, MAX_SHARD_BYTES // (3 * size * size)))
        located = ((stored.locations[i], metadata) for i, metadata in selected)
        plans, lengths = [], []
        while plan := list(itertools.islice(located, shard_size)):
            plans.append(stored.folder / f"{split}-{len(plans):06}")
            _write_json(plans[-1], plan)
            lengths.append(len(plan))
        faces = Faces(stored.folder, size=size, split=split, plans=plans)
        config = tfds.download.DownloadConfig(
            beam_runner=self._runner(), beam_options=self._options()
        )
        with self._errors():
            faces.download_and_prepare(download_config=config)
        for file in Path(faces.data_dir).glob("*.array_record-*"):
            file.rename(folder / file.name)
        shutil.rmtree(faces.data_dir)  # or TFDS would take the next split for prepared
        return records.finish_split(folder, split=split, lengths=lengths)

    def check(self) -> None:
        """Raise UserError if there is no such runner, or it does not accept these options."""
        name, errors = f"--beam {self.runner}", io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                self._options().get_all_options(retain_unknown_options=True)
        except SystemExit:  # argparse's
            problem = errors.getvalue().rpartition("error: ")[2].strip()
            raise UserError(f"--beam-options: {problem}.") from None
        try:
            runner = self._runner()
        except Exception as error:  # whatever importing that name raises
            raise UserError(f"{name}: {error}") from None
        if not isinstance(runner, PipelineRunner):
            raise UserError(f"{name} is no runner of Apache Beam.")
        if problems := PipelineOptionsValidator(self._options(), runner).validate():
            raise UserError(f"{name} wants more --beam-options: {' '.join(problems)}")

    def _runner(self) -> PipelineRunner:
        # Beam's DirectRunner first downloads a program from GitHub, and works without it too.
        if self.runner.lower() in ("direct", "directrunner"):
            return FnApiRunner()
        return create_runner(self.runner)

    def _options(self) -> PipelineOptions:
        return PipelineOptions(list(self.options))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of a pipeline into UserErrors of one line; Beam has logged the rest."""
        try:
            # Workers in this process set warning filters, and TFDS prints about downloads.
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:  # of any class, or a traceback as text: runners differ
            lines = str(error).strip().splitlines() or [type(error).__name__]
            message = lines[-1].partition(" [while running")[0]
            message = message.removeprefix("vaejax.errors.UserError: ").rstrip(".")
            raise UserError(f"--beam {self.runner}: {message}; nothing was kept.") from error


def runner_from_flags(runner: str, options: str) -> Beam:
    """Return the workers of a runner. Raises UserError if there is no such runner or option."""
    try:
        workers = Beam(runner, tuple(shlex.split(options)))
    except ValueError as error:
        raise UserError(f"--beam-options {options}: {error}.") from None
    workers.check()
    return workers


# The first pass: examine the files ----------------------------------------------------------------

_Location = tuple[str, int]  # a file of pixels, and the index of an image in it


class _StoredPixels:
    """Images of one size in the files of a folder, by index."""

    def __init__(self, folder: Path, size: int):
        self.folder, self._size = folder, size
        self.locations: list[_Location] = []

    def append(self, location: _Location) -> None:
        self.locations.append(location)

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "size size 3"]:
        return _read_pixels(*self.locations[index], self._size)


class _ExamineParts(beam.DoFn):
    """Examine the files that a part of the listing names."""

    def __init__(self, source: Path, size: int, detector: Detector | None):
        self._source, self._size, self._detector = source, size, detector

    def setup(self) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # as Threads does
        self._open = contextlib.ExitStack()
        self._read = self._open.enter_context(open_reader(self._source))

    def process(self, element: str) -> None:
        facts = []
        with _unshared(f"{element}.pixels") as path, path.open("wb") as file:
            pixels = Pixels(file, self._size)
            for fields in read_json(Path(element)):
                result = examine(Entry(*fields), self._read, self._size, self._detector)
                if isinstance(result, Refused):
                    facts.append(result.reason)
                else:
                    faces = None if result.thumbnail is None else result.thumbnail.faces
                    hashes = [result.sha256, result.pixel_hash, result.look.hex()]
                    facts.append([*hashes, result.dimensions, faces])
                    pixels.append(result.pixels)
        with _unshared(f"{element}.facts") as path:
            _write_json(path, facts)

    def teardown(self) -> None:
        self._open.close()


@dataclass(frozen=True)
class _StandIn(Thumbnail):
    """A thumbnail that a worker has not stored: it is drawn here, if the sheet shows it."""

    entry: Entry


def _read_results(entries: Iterable[Entry], parts: Iterable[Path]) -> Iterator[Examined | Refused]:
    """Read the workers' results in the order of the listing; the pixels stay where they are."""
    blank = np.zeros((1, 1, 3), np.uint8)
    remaining = iter(entries)
    for part in parts:
        indices = itertools.count()
        for fact, entry in zip(read_json(Path(f"{part}.facts")), remaining, strict=False):
            if isinstance(fact, str):
                yield NoFace(_StandIn(blank, 0, entry)) if fact == NO_FACE else Refused(fact)
            else:
                sha256, pixel_hash, look, (width, height), faces = fact
                hashes = sha256, pixel_hash, bytes.fromhex(look)
                thumbnail = None if faces is None else _StandIn(blank, faces, entry)
                location = (f"{part}.pixels", next(indices))
                yield Examined(*hashes, (width, height), location, thumbnail)


def _draw(
    stand_in: Any, read: Callable[[Entry], bytes], size: int, detector: Detector | None
) -> Thumbnail:
    result = examine(stand_in.entry, read, size, detector)
    if not isinstance(result, NoFace | Examined) or result.thumbnail is None:
        raise UserError(f"{stand_in.entry.path} changed while it was prepared; nothing was kept.")
    return result.thumbnail


def _read_pixels(path: str, index: int, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    with open(path, "rb") as file:
        return Pixels(file, size)[index]


# The second pass: write the records ---------------------------------------------------------------


class Faces(tfds.core.ShardBasedBuilder):
    """One split of a prepared set, of which each plan is a shard."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, data_dir: Path, *, size: int, split: str, plans: Sequence[Path]):
        self._size, self._split, self._plans = size, split, plans
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(builder=self, features=records.features(self._size))

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        return {self._split: [partial(_examples, plan, self._size) for plan in self._plans]}

    def _example_writer(self) -> ExampleWriter:
        return _Writer(FileFormat.ARRAY_RECORD)


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Do nothing: the set is not published, and the lookup leaves an empty folder in /tmp."""


class _Writer(ExampleWriter):
    """Writes the files that `records.write_records` writes: those of TFDS are compressed."""

    def write(self, path: Any, examples: Iterable[Any]) -> None:
        with _unshared(path) as partial:
            serialized = (example for _, example in examples)
            records.write_records(partial, ((s, records.image_of(s)) for s in serialized))
            os.replace(f"{partial}.pixels", f"{os.fspath(path)}.pixels")


def _examples(plan: Path, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for key, ((path, index), metadata) in enumerate(read_json(plan)):
        yield key, {"image": _read_pixels(path, index, size), **metadata}


# Files that all workers see -----------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    # in ASCII, unlike files.write_json: paths that are not UTF-8 have no other form
    path.write_text(json.dumps(value), encoding="ascii")


@contextlib.contextmanager
def _unshared(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path that no other worker writes to, and rename it to `path` at the end.

    A runner gives the same work to another worker when one dies or is slow.
    """
    partial = Path(f"{os.fspath(path)}.{secrets.token_hex(4)}")
    yield partial
    os.replace(partial, path)
