"""A run that has learned a little, to be judged; and features that need no weights."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vaejax.evaluation.features import Features

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # for its small run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    """A run of tiny images of some persons."""
    from PIL import Image
    from test_fit import train

    source = tmp_path_factory.mktemp("persons")
    for i, image in enumerate(draw(1200, 16)):
        path = source / f"{i % 300:03}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    out = tmp_path_factory.mktemp("trained") / "run"
    train(source, out, steps=40)
    return out


@pytest.fixture(scope="session")
def plain() -> Features:
    """The means over quarters of an image: twelve numbers."""

    @jax.jit
    def extract(images):
        b, h, w, c = images.shape
        quarters = images.reshape(b, 2, h // 2, 2, w // 2, c).astype(np.float32)
        return quarters.mean(axis=(2, 4)).reshape(b, -1)

    return Features("quarters", 12, "nobody", extract)
