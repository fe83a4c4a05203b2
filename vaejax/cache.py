"""What is kept from one command to the next in the user's cache folder, safe to delete."""

import hashlib
import os
import platform
import tempfile
from functools import cache
from pathlib import Path


def folder() -> Path:
    """Where compiled programs, kernels and prepared images are kept."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "vaejax"
    try:
        return Path.home() / ".cache" / "vaejax"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"vaejax-{os.getuid()}"


@cache
def processor() -> str:
    """A name for this kind of processor, by all that it can do: what was compiled for another may
    not run here, though both read the same home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    facts = {line for line in lines if line.partition(":")[0].strip() in kinds}
    words = "\n".join([platform.machine(), platform.processor(), *sorted(facts)])
    return hashlib.sha256(words.encode()).hexdigest()[:12]
