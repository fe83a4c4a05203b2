"""What the bits of a run depend on besides its spec: the machine, the libraries and the source.

It is recorded with every checkpoint. A run that goes on in another environment says so, or is
refused.
"""

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import jax

from vaejax import kernels
from vaejax.errors import UserError
from vaejax.files import printable
from vaejax.system import processor, versions
from vaejax.training.config import Recipe
from vaejax.training.devices import DETERMINISTIC, Devices, broadcast, on_cpu, threads

PACKAGE = Path(__file__).parents[1]
SOURCES = (".py", ".cc", ".h")
# of JAX, what changes the numbers of a program; `devices.configure` sets some of them
SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_jit",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
)


def present(devices: Devices, recipe: Recipe | None = None) -> dict[str, str]:
    """Describe what the next updates are computed with, each part by its name.

    `recipe` adds the files outside of vaejax that define it. On a CPU the kernels are built, if
    they are not there yet.
    """
    flags = (flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag != DETERMINISTIC)
    return {
        **versions(),
        "source of vaejax": _package_digest(),
        **({"source of the experiment": _experiment(recipe)} if recipe else {}),
        "devices": str(devices),
        "processor": processor(),
        "threads": threads() if on_cpu() else "none",
        "kernels": _kernels(),
        "XLA_FLAGS": " ".join(sorted(f for f in flags if not f.startswith("--xla_dump"))) or "none",
        **{name: str(getattr(jax.config, name)) for name in SETTINGS},
    }


def differences(saved: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """List what differs, as "threads 8 → 2"; what only one of them tells does not count."""
    pairs = ((name, saved[name], present[name]) for name in saved if name in present)
    return [
        f"{printable(name)[:60]} {printable(old)[:200]} → {new}"
        for name, old, new in pairs
        if old != new
    ]


def compare(saved: Mapping[str, str], present: Mapping[str, str], *, strict: bool) -> None:
    """Say in one warning what differs between the environment of a checkpoint and this one.

    Raises UserError instead if `strict`. All processes have to call it together: the first one's
    environments count.
    """
    broadcast(lambda: _compare(saved, present, strict=strict))


def _compare(saved: Mapping[str, str], present: Mapping[str, str], *, strict: bool) -> None:
    different = differences(saved, present)
    if not different:
        return
    text = f"this run was saved in another environment ({'; '.join(different)})"
    if strict:
        raise UserError(
            f"{text}, and --strict asks for the same one. Without --strict the run goes on, and "
            "its end may differ from that of a run that nothing interrupted"
        )
    print(
        f"warning: {text}: the end may differ, by rounding or more, from that of a run that "
        "nothing interrupted",
        file=sys.stderr,
    )


@cache
def _package_digest() -> str:
    paths = sorted(path for path in PACKAGE.rglob("*") if path.suffix in SOURCES)
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(PACKAGE)}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def _experiment(recipe: Recipe) -> str:
    """Name the program and the files outside of vaejax that define a recipe, with their digests."""
    functions: tuple[Callable, ...] = (recipe.loss.func, recipe.optimizer.func)
    files = {getattr(sys.modules["__main__"], "__file__", None)}
    files |= {_file(thing) for thing in (type(recipe.model), *functions)}
    if recipe.frozen:
        files.add(_file(recipe.frozen))
    paths = {Path(file).absolute() for file in files if file and os.path.isfile(file)}
    ours = (path for path in sorted(paths) if not path.is_relative_to(PACKAGE))
    return ", ".join(f"{printable(p.name)} {_digest(p)}" for p in ours) or "none"


def _file(thing: object) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(thing))  # pyright: ignore[reportArgumentType]
    except TypeError:  # built in, or an object that is called
        return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _kernels() -> str:
    if not on_cpu():
        return "none"
    if jax.device_count() > 1:
        return "none (several devices)"
    if reason := kernels.unavailable_reason():
        return f"none ({reason})"
    return _digest(kernels.build())
