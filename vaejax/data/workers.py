"""Who does the work of preparing: the cores of this machine, or the workers of Apache Beam."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vaejax.data import records
from vaejax.data.faces import Finder
from vaejax.data.gather import Gathered, gather
from vaejax.data.sources import Listing
from vaejax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

    from vaejax.data.beam import Beam


@dataclass(frozen=True)
class Threads:
    """So many threads of this process (none: one a core); it says how far they are."""

    count: int | None
    say: Callable[[str], None]

    @contextlib.contextmanager
    def gathered(
        self, files: Listing, raw: Path, source: Path, *, size: int, finder: Finder | None
    ) -> Iterator[Gathered]:
        """What the files hold; the pixels lie in `raw` until the end of the block."""
        with raw.open("w+b") as file:
            yield gather(files, file, size=size, finder=finder, threads=self.count, say=self.say)
        raw.unlink()

    def write(
        self,
        folder: Path,
        found: Gathered,
        chosen: Iterable[tuple[int, records.Texts]],
        *,
        size: int,
        split: str,
    ) -> "tfds.core.SplitInfo":
        """Write one split: images by number, and what is known of them."""
        some = (records.Record(image=found.pixels[i], **texts) for i, texts in chosen)
        return records.write(folder, size=size, split=split, records=some)


def workers(
    beam: str | None, beam_options: str, *, threads: int | None, say: Callable[[str], None]
) -> "Threads | Beam":
    """Those of a runner of Beam, if one is named; UserError if they cannot be had."""
    if beam is not None:
        return _beam().on(beam, beam_options)
    if beam_options:
        raise UserError(f"--beam-options {beam_options}: name a runner, as in --beam DirectRunner.")
    return Threads(threads, say)


def _beam() -> ModuleType:
    logging.disable(logging.WARNING)  # Beam remarks that Google's packages are not there
    try:
        from vaejax.data import beam
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "apache_beam":
            raise
        raise UserError("--beam needs Apache Beam: pip install -r requirements-beam.txt") from None
    finally:
        logging.disable(logging.NOTSET)
    return beam
