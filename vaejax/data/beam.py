"""Preparing on Apache Beam: the same prepared set, by as many workers as a runner has.

Two passes. In the first a worker looks at some hundred files at a time, and leaves their pixels and
what there is to say of them beside the set that is to be. When all hashes are known so are the
splits and the order, and the second pass writes them: a TFDS builder, run by
`download_and_prepare`. No pixels go through the runner, and nobody holds more of them than a shard.
The source and the set must lie where every worker sees them, under the same paths.

The builder is a `ShardBasedBuilder`. TFDS runs a `GeneratorBasedBuilder` on Beam too, but sends all
records through the runner's shuffle, which Beam's direct runner keeps in memory: 1.9 GB for 22,000
images of 64 x 64, against 0.25. Two faults of TFDS 4.9.10 are kept out. It writes the splits before
anew with each further one: here a builder has one split. It sorts the lengths of more than ten
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
from vaejax.data.faces import NO_FACE, Finder
from vaejax.data.gather import Gathered, Pixels, _examine, _Examined, _NoFace, collected
from vaejax.data.sheet import Seen
from vaejax.data.sources import Entry, Listing, reader
from vaejax.errors import UserError

FILES = 256  # that a worker looks at before it hands in what it found
SHARD_BYTES, SHARD_RECORDS = 64 << 20, 10_000  # at most, in a file of records


@dataclass(frozen=True)
class Beam:
    """The workers of a runner: its name, and what one would write on Beam's command line."""

    runner: str
    options: tuple[str, ...] = ()

    @contextlib.contextmanager
    def gathered(
        self, files: Listing, raw: Path, source: Path, *, size: int, finder: Finder | None
    ) -> Iterator[Gathered]:
        """What the files hold; the pixels lie in `raw` until the end of the block."""
        raw.mkdir()
        parts = []
        for start in range(0, len(files.entries), FILES):
            parts.append(raw / f"{start // FILES:06}")
            _write(parts[-1], [astuple(entry) for entry in files.entries[start : start + FILES]])
        with self._running(), beam.Pipeline(self._start(), self._settings()) as pipeline:
            names = pipeline | beam.Create([str(part) for part in parts]) | beam.Reshuffle()
            _ = names | beam.ParDo(_Look(source.resolve(), size, finder))
        found = collected(files.entries, _results(files.entries, parts), _Stored(raw, size))
        found.sheet.draw(lambda there: _drawn(there, files.read, size, finder))
        yield found
        shutil.rmtree(raw)

    def write(
        self,
        folder: Path,
        found: Gathered,
        chosen: Iterable[tuple[int, records.Texts]],
        *,
        size: int,
        split: str,
    ) -> tfds.core.SplitInfo:
        """Write one split: images by number, and what is known of them."""
        stored: _Stored = found.pixels
        most = max(1, min(SHARD_RECORDS, SHARD_BYTES // (3 * size * size)))
        chosen, plans, lengths = iter(chosen), [], []
        while some := [(stored.places[i], texts) for i, texts in itertools.islice(chosen, most)]:
            plans.append(stored.folder / f"{split}-{len(plans):06}")
            _write(plans[-1], some)
            lengths.append(len(some))
        faces = Faces(stored.folder, size=size, split=split, plans=plans)
        how = tfds.download.DownloadConfig(beam_runner=self._start(), beam_options=self._settings())
        with self._running():
            faces.download_and_prepare(download_config=how)
        for file in Path(faces.data_dir).glob("*.array_record-*"):
            file.rename(folder / file.name)
        shutil.rmtree(faces.data_dir)  # or the next split would be taken for prepared
        return records.split_info(folder, split=split, lengths=lengths)

    def check(self) -> None:
        """UserError if there is no such runner, or it cannot do with these options."""
        name, errors = f"--beam {self.runner}", io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                self._settings().get_all_options(retain_unknown_options=True)
        except SystemExit:  # argparse's
            wrong = errors.getvalue().rpartition("error: ")[2].strip()
            raise UserError(f"--beam-options: {wrong}.") from None
        try:
            runner = self._start()
        except Exception as error:  # whatever the import of that name makes of it
            raise UserError(f"{name}: {error}") from None
        if not isinstance(runner, PipelineRunner):
            raise UserError(f"{name} is no runner of Apache Beam.")
        if wrong := PipelineOptionsValidator(self._settings(), runner).validate():
            raise UserError(f"{name} wants more --beam-options: {' '.join(wrong)}")

    def _start(self) -> PipelineRunner:
        # Beam's DirectRunner first fetches a program from GitHub, and does without if it cannot.
        if self.runner.lower() in ("direct", "directrunner"):
            return FnApiRunner()
        return create_runner(self.runner)

    def _settings(self) -> PipelineOptions:
        return PipelineOptions(list(self.options))

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """What goes wrong in a pipeline is one line; Beam has logged the rest where it happened."""
        try:
            # Workers in this process set filters of warnings, and TFDS speaks of downloads.
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:  # of any kind, or its traceback as a text: so are the runners
            lines = str(error).strip().splitlines() or [type(error).__name__]
            message = lines[-1].partition(" [while running")[0]
            message = message.removeprefix("vaejax.errors.UserError: ").rstrip(".")
            raise UserError(f"--beam {self.runner}: {message}; nothing was kept.") from error


def on(runner: str, options: str) -> Beam:
    """The workers of this runner; UserError if they cannot be had."""
    try:
        workers = Beam(runner, tuple(shlex.split(options)))
    except ValueError as error:
        raise UserError(f"--beam-options {options}: {error}.") from None
    workers.check()
    return workers


# The first pass: the files are looked at

_Place = tuple[str, int]  # a file of pixels, and which image of it


class _Stored:
    """Images of one size in the files of a folder, by number."""

    def __init__(self, folder: Path, size: int):
        self.folder, self._size = folder, size
        self.places: list[_Place] = []

    def append(self, place: _Place) -> None:
        self.places.append(place)

    def __getitem__(self, number: int) -> UInt8[np.ndarray, "size size 3"]:
        return _pixels(*self.places[number], self._size)


class _Look(beam.DoFn):
    """Decode the files that a part of the listing names."""

    def __init__(self, source: Path, size: int, finder: Finder | None):
        self._source, self._size, self._finder = source, size, finder

    def setup(self) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # as `gather` does
        self._open = contextlib.ExitStack()
        self._bytes_of = self._open.enter_context(reader(self._source))

    def process(self, element: str) -> None:
        facts = []
        with _replaced(f"{element}.pixels") as path, path.open("wb") as file:
            pixels = Pixels(file, self._size)
            for fields in _read(Path(element)):
                result = _examine(Entry(*fields), self._bytes_of, self._size, self._finder)
                if isinstance(result, Refused):
                    facts.append(result.reason)
                else:
                    faces = None if result.seen is None else result.seen.faces
                    facts.append([result.sha256, result.dimensions, faces])
                    pixels.append(result.pixels)
        with _replaced(f"{element}.facts") as path:
            _write(path, facts)

    def teardown(self) -> None:
        self._open.close()


@dataclass(frozen=True)
class _There(Seen):
    """A picture that a worker saw: its thumbnail is drawn here, if the sheet shows it."""

    entry: Entry


def _results(entries: Iterable[Entry], parts: Iterable[Path]) -> Iterator[_Examined | Refused]:
    """What came of the files, in the order of the listing; their pixels stay where they are."""
    none = np.zeros((1, 1, 3), np.uint8)
    entry_of = iter(entries)
    for part in parts:
        count = itertools.count()
        for fact, entry in zip(_read(Path(f"{part}.facts")), entry_of, strict=False):
            if isinstance(fact, str):
                yield _NoFace(_There(none, 0, entry)) if fact == NO_FACE else Refused(fact)
            else:
                sha256, (width, height), faces = fact
                seen = None if faces is None else _There(none, faces, entry)
                place = (f"{part}.pixels", next(count))
                yield _Examined(sha256, (width, height), place, seen)


def _drawn(there: Any, read: Callable[[Entry], bytes], size: int, finder: Finder | None) -> Seen:
    result = _examine(there.entry, read, size, finder)
    if not isinstance(result, _NoFace | _Examined) or result.seen is None:
        raise UserError(f"{there.entry.path} changed while it was prepared; nothing was kept.")
    return result.seen


def _pixels(path: str, number: int, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    with open(path, "rb") as file:
        return Pixels(file, size)[number]


# The second pass: the records are written


class Faces(tfds.core.ShardBasedBuilder):
    """One split of a prepared set, a shard a plan."""

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
        """Nobody has published it, and to look would leave an empty folder in /tmp."""


class _Writer(ExampleWriter):
    """Writes files as they are without Beam: TFDS's own are packed."""

    def write(self, path: Any, examples: Iterable[Any]) -> None:
        with _replaced(path) as partial:
            records.save(partial, (example for _, example in examples))


def _examples(plan: Path, size: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, ((path, place), texts) in enumerate(_read(plan)):
        yield number, {"image": _pixels(path, place, size), **texts}


# Files that all workers see


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, under its name when it is whole: a runner gives the same work to another
    worker when one dies or takes long."""
    partial = Path(f"{os.fspath(path)}.{secrets.token_hex(4)}")
    yield partial
    os.replace(partial, path)
