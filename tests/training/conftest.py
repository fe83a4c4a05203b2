"""One complete run for all tests that compare with it."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_fit import train

from vaejax.data.prepare import prepare


@pytest.fixture(scope="session")
def data(faces: Path) -> Path:
    return prepare(faces, size=16, say=lambda _: None)


@pytest.fixture(scope="session")
def patience() -> float:
    """The seconds that a test waits for a process of a tiny run: as this machine is now, twenty
    times what it takes to import what a run needs."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import vaejax.training.fit"], check=True)
    return max(60, 20 * (time.monotonic() - began))


@pytest.fixture(scope="session")
def complete_run(data: Path, shared: Callable[..., Path]) -> Path:
    """A run that nothing interrupted, with checkpoints after 7, 14 and 18 updates."""
    return shared("complete-run", lambda folder: train(data, folder, checkpoint_steps=7))
