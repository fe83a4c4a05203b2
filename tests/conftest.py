"""Small faces, and no trace on the machine: whatever is cached lies in a temporary folder."""

import fcntl
import os

# LLVM's passes would take a third of the time of all tests, and are not what is tested. Processes
# that the tests start inherit the flag; those that must run as people run them drop it.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
# as `devices.configure` sets them: whether or not a test calls it, all compute the same bits
os.environ |= dict.fromkeys(("PJRT_NPROC", "NPROC"), "8")

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_num_cpu_devices", 4)  # which the tests of many devices take apart
jax.config.update("jax_numpy_rank_promotion", "raise")  # broadcasting is said, not guessed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest one first, so that no process waits for it at the end."""
    items.sort(key=lambda item: not item.name.startswith("test_killed_at_random"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # what one of them has compiled serves the others
        folder = folder.parent
    folder = folder / "cache"
    os.environ["XDG_CACHE_HOME"] = str(folder)  # for what the tests start as a process, too
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "vaejax" / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", str(folder / "vaejax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def draw() -> Callable[..., np.ndarray]:
    """draw(n, size) -> uint8 `[n size size 3]`: discs with two eyes, here and there, coloured."""

    def discs(n: int, size: int, *, seed: int = 0) -> np.ndarray:
        random = np.random.default_rng(seed)
        y, x = np.mgrid[:size, :size] / size
        images = np.empty((n, size, size, 3), np.uint8)
        for image in images:
            top, left = random.uniform(0.4, 0.6, 2)
            background, skin, eyes = random.integers(0, 256, (3, 3))
            image[:] = background
            image[(y - top) ** 2 + (x - left) ** 2 < 0.1] = skin
            for side in (-0.12, 0.12):
                image[(y - top + 0.05) ** 2 + (x - left - side) ** 2 < 0.005] = eyes
        return images

    return discs


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """shared(name, make) -> a folder that `make(folder)` fills once for all processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    (root / "shared").mkdir(exist_ok=True)

    def build(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / "shared" / name
        with (root / "shared" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def faces(shared: Callable[..., Path], draw: Callable[..., np.ndarray]) -> Path:
    """A folder of 60 PNGs of 16 x 16 pixels."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for i, image in enumerate(draw(60, 16)):
            Image.fromarray(image).save(folder / f"{i:03}.png")

    return shared("faces", make)
