"""A run that was trained for a while, its evaluation, and features that need no weights."""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vaejax.evaluation import tables
from vaejax.evaluation.evaluate import Evaluation, EvaluationConfig, TrainedRun, evaluate, load_run
from vaejax.evaluation.features import Features

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # for its small run


@pytest.fixture(scope="session")
def trained(shared, draw) -> Path:
    """The folder of a run on tiny images of some persons."""
    from PIL import Image
    from test_fit import train

    def make(folder: Path) -> None:
        for i, image in enumerate(draw(1800, 16)):
            path = folder / "persons" / f"{i % 450:03}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        train(folder / "persons", folder / "run", steps=40)

    return shared("trained-on-persons", make) / "run"


@pytest.fixture(scope="session")
def quarters() -> Features:
    """The means over quarters of an image: twelve numbers."""

    @jax.jit
    def extract(images):
        b, h, w, c = images.shape
        quarters = images.reshape(b, 2, h // 2, 2, w // 2, c).astype(np.float32)
        return quarters.mean(axis=(2, 4)).reshape(b, -1)

    return Features("quarters", 12, "no file", extract)


@pytest.fixture(scope="session")
def quick() -> EvaluationConfig:
    return EvaluationConfig(samples=70, bound_images=3, bound_samples=9)


@pytest.fixture(scope="session")
def trained_run(trained: Path) -> TrainedRun:
    return load_run(trained, "test")


@pytest.fixture(scope="session")
def evaluation(trained_run: TrainedRun, quick: EvaluationConfig, quarters: Features) -> Evaluation:
    return evaluate(trained_run, quick, quarters)


@pytest.fixture(scope="session")
def written(
    trained: Path, evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of the run with its evaluation."""
    folder = tmp_path_factory.mktemp("written") / "run"
    shutil.copytree(trained, folder)
    tables.write(folder, evaluation)
    return folder
