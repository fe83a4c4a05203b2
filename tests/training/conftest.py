"""One whole run for all who compare with it."""

from pathlib import Path

import pytest
from test_fit import train

from vaejax.data.prepare import prepare


@pytest.fixture(scope="session")
def data(faces: Path) -> Path:
    return prepare(faces, size=16, say=lambda _: None)


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, with checkpoints after 7, 14 and 18 updates."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(data, out, checkpoint_steps=7)
    return out
