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
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(data, out)
    return out
