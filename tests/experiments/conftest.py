"""Experiments as modules, whose `main` the tests call in this process."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="session")
def experiment() -> Callable[[str], ModuleType]:
    """experiment(name) -> the module of `experiments/name.py`."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            f"experiment_{name}", EXPERIMENTS / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where the command line looks for the comments of flags
        spec.loader.exec_module(module)
        return module

    return load
