"""How much memory there is: the machine's, or what a container leaves of it."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

# of Linux' control groups, second version and first: where they are, limit, use, and what of that
# the kernel gives back before it kills
_GROUPS = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)
_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def limit() -> int:
    """Bytes that this process may use at the very most."""
    return min([psutil.virtual_memory().total, *(bound for bound, _ in _bounds())])


def room() -> int:
    """Bytes that are still to be had before the machine, or a container around us, is full."""
    return min([psutil.virtual_memory().available, *(bound - used for bound, used in _bounds())])


def _bounds() -> Iterator[tuple[int, int]]:
    """The limit and the use, in bytes, of every control group that this process is in."""
    with suppress(OSError):
        for line in _OWN.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            for name, most, current, given_back in _GROUPS:
                if name not in controllers.split(","):
                    continue
                # in a container the path may be that of the host, of which only the end is here
                for path in (place, *map(str, Path(place).parents)):
                    folder = _ROOT / name / path.lstrip("/")
                    with suppress(OSError, ValueError, KeyError):  # none here, or without a limit
                        bound = int((folder / most).read_text())
                        parts = dict(
                            line.split()
                            for line in (folder / "memory.stat").read_text().splitlines()
                        )
                        used = int((folder / current).read_text())
                        yield bound, used - sum(int(parts[part]) for part in given_back)
