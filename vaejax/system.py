"""What the machine offers: memory, processor, versions; and how sizes and durations are written."""

import hashlib
import platform
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil

import vaejax

# Linux' control groups, version 2 and version 1: controller, files of the limit and of the use, and
# the entries of memory.stat that the kernel reclaims before it kills
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


def memory_limit() -> int:
    """Return the bytes of RAM that the machine, or a container around us, allows this process."""
    return min([psutil.virtual_memory().total, *(bound for bound, _ in _bounds())])


def memory_free() -> int:
    """Return the bytes of RAM that are free in the machine, or in the container if that is less."""
    return min([psutil.virtual_memory().available, *(bound - used for bound, used in _bounds())])


def _bounds() -> Iterator[tuple[int, int]]:
    """Yield the limit and the use, in bytes, of every control group that this process is in."""
    with suppress(OSError):
        for line in _OWN.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            for name, most, current, reclaimable in _GROUPS:
                if name not in controllers.split(","):
                    continue
                # in a container the path may be the host's, of which only the end exists here
                for path in (place, *map(str, Path(place).parents)):
                    folder = _ROOT / name / path.lstrip("/")
                    with suppress(OSError, ValueError, KeyError):  # none here, or without a limit
                        bound = int((folder / most).read_text())
                        parts = dict(
                            line.split()
                            for line in (folder / "memory.stat").read_text().splitlines()
                        )
                        used = int((folder / current).read_text())
                        yield bound, used - sum(int(parts[part]) for part in reclaimable)


def process_memory() -> int:
    """Return the bytes of RAM that this process holds.

    Pages of mapped files are not among them: the kernel drops those when it needs the memory. Of a
    prepared data set a process maps what it has read.
    """
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)  # which only Linux tells


def format_bytes(n: int) -> str:
    """Format a number of bytes: "1.5 GiB", "213 MiB" or "12 KiB"."""
    if n >= 2**30:
        return f"{n / 2**30:.1f} GiB"
    return f"{n / 2**20:,.0f} MiB" if n >= 2**20 else f"{n / 2**10:,.0f} KiB"


def format_duration(seconds: float) -> str:
    """Format a duration: "2 h 05 min", "3 min 20 s" or "12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


@cache
def processor_id() -> str:
    """Return a hash of the processor's model and features.

    Programs that were compiled for another processor may not run here, though both machines read
    the same home directory.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    facts = {line for line in lines if line.partition(":")[0].strip() in kinds}
    words = "\n".join([platform.machine(), platform.processor(), *sorted(facts)])
    return hashlib.sha256(words.encode()).hexdigest()[:12]


@cache
def source_commit() -> str:
    """Return the git commit of vaejax' source, with "-dirty" if files differ; "" outside of git."""
    command = ["git", "-C", str(Path(vaejax.__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # in a user's own repository a folder of installed packages is ignored: it has no commit of ours
    tracked = subprocess.run(
        [*command[:3], "ls-files", "--error-unmatch", "__init__.py"], capture_output=True
    )
    return found.stdout.strip() if found.returncode == tracked.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Return the versions of vaejax, Python and the libraries that compute, read and write."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    ours = {"vaejax": vaejax.__version__, "python": platform.python_version()}
    return ours | {name: version(name) for name in packages}
