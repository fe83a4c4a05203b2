"""Who may import whom: drawn from the imports themselves."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "vaejax").rglob("*.py"))

# what a part of the house may use besides itself
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "files": {"errors"},
    "cache": {"errors", "files"},
    "system": {"__init__"},
    "kernels": {"cache", "files", "system"},
    "metrics": {"files"},
    "nearest": {"metrics"},
    "latent": set(),
    "pictures": {"files"},
    "plots": {"files", "metrics"},
    "data": {"cache", "errors", "files", "pictures"},
    "distributions": set(),
    "terminal": {"files"},
    "models": {"distributions", "errors", "kernels"},
    "losses": {"distributions", "models"},
    "flow": {"losses", "models"},
    "priors": {"errors", "files", "flow", "models"},
    "generate": {"data", "losses", "models", "priors"},
    "export": {
        "distributions", "errors", "files", "flow", "kernels", "metrics", "models", "priors",
        "system", "__init__",
    },
    "training": {
        "cache", "data", "errors", "export", "files", "flow", "generate", "kernels", "latent",
        "losses", "metrics", "models", "nearest", "pictures", "plots", "priors", "system",
        "terminal",
    },
    "recipes": {"losses", "models", "training"},
    "evaluation": {
        "cache", "data", "distributions", "errors", "files", "generate", "losses", "metrics",
        "models", "nearest", "pictures", "plots", "priors", "system", "terminal", "training",
    },
    "doctor": {
        "cache", "errors", "files", "kernels", "losses", "metrics", "models", "system",
        "terminal", "training", "__init__",
    },
    "commands": {
        "data", "doctor", "errors", "evaluation", "files", "generate", "models", "pictures",
        "terminal", "training",
    },
    "latent_commands": {
        "commands", "data", "errors", "evaluation", "generate", "latent", "models", "nearest",
        "pictures", "priors", "training",
    },
    "cli": {"commands", "errors", "files", "latent_commands", "training"},
}  # fmt: skip
# which packages stay behind which door
DOORS = {
    "flax": {"flow.py", "models"},
    "orbax": {"training/checkpoint.py"},
    "tyro": {"cli.py", "commands.py", "latent_commands.py"},
    "tensorflow_datasets": {"data"},
    "apache_beam": {"data/beam.py"},
    "cv2": {"data"},
    "imageio_ffmpeg": {"pictures.py"},
    "matplotlib": {"plots.py"},
    "onnx": {"export"},
    "safetensors": {"export"},
    "tensorboardX": {"training/logger.py"},
}


def part(path: Path) -> str:
    return path.relative_to(ROOT / "vaejax").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_imports_what_its_part_may_not(path: Path):
    known = {p.stem if p.parent.name == "vaejax" else part(p) for p in MODULES}
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "vaejax":
            other = rest.split(".")[0] if rest.split(".")[0] in known else "__init__"
            assert other == part(path) or other in ALLOWED[part(path)], f"{path} imports {name}"


@pytest.mark.parametrize("package", DOORS)
def test_a_package_stays_behind_its_door(package: str):
    for path in MODULES:
        if any(name.split(".")[0] == package for name in imports(path)):
            inside = path.relative_to(ROOT / "vaejax").as_posix()
            doors = DOORS[package]
            assert inside in doors or inside.split("/")[0] in doors, f"{path} imports {package}"


# Cycles inside a package

DEFERRED = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def module_level_imports(source: str) -> set[str]:
    """The names that a module imports when it is imported itself, as in "vaejax.files.atomic"."""
    names, nodes = set(), list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif not isinstance(node, DEFERRED):
            nodes += ast.iter_child_nodes(node)
    return names


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """By module, the modules among `sources` (text by module name) that it imports."""
    graph = {}
    for module, source in sources.items():
        names = module_level_imports(source)
        # "a.b.c" is the module a.b.c, or the name c of the module a.b
        others = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = others & sources.keys() - {module}
    return graph


def import_cycle(sources: dict[str, str]) -> list[str]:
    """The modules of some cycle of imports, or none."""
    try:
        graphlib.TopologicalSorter(import_graph(sources)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def package_sources(package: str) -> dict[str, str]:
    folder = ROOT / "vaejax" / package
    return {
        f"vaejax.{package}.{path.stem}".removesuffix(".__init__"): path.read_text(encoding="utf-8")
        for path in folder.glob("*.py")
    }


PACKAGES = sorted({path.parent.name for path in MODULES} - {"vaejax"})


@pytest.mark.parametrize("package", PACKAGES)
def test_there_is_no_import_cycle_inside_a_package(package: str):
    sources = package_sources(package)
    assert import_cycle(sources) == []


def test_the_graph_of_a_package_is_that_of_its_imports():
    graph = import_graph(package_sources("data"))
    assert {"vaejax.data.records", "vaejax.data.gather"} <= graph["vaejax.data.prepare"]
    assert "vaejax.data.prepare" not in graph["vaejax.data.gather"]


@pytest.mark.parametrize(
    "source",
    [
        "import p.b",
        "from p import b",
        "from p.b import name",
        "class C:\n    from p.b import name",
        "try:\n    import p.b\nexcept ImportError:\n    pass",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import p.b",
    ],
)
def test_a_cycle_of_imports_is_detected(source: str):
    sources = {"p": "", "p.a": source, "p.b": "import p.c", "p.c": "from p.a import x"}
    assert set(import_cycle(sources)) == {"p.a", "p.b", "p.c"}


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import p.b",
        "class C:\n    def f(self):\n        from p.b import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.b",
        "import typing\nif typing.TYPE_CHECKING:\n    import p.b",
        "import q.b",
    ],
)
def test_imports_inside_functions_and_for_type_checking_make_no_cycle(source: str):
    sources = {"p": "", "p.a": source, "p.b": "import p.c", "p.c": "from p.a import x"}
    assert import_cycle(sources) == []


# Data without a device

HEAVY = {"jax", "flax", "optax", "matplotlib", "tensorboardX"}
IMPORT_DATA = f"""
import sys, vaejax.data.prepare, vaejax.data.batches
assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)
"""


def test_data_imports_neither_jax_nor_plots():
    for path in (ROOT / "vaejax" / "data").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path
    subprocess.run([sys.executable, "-c", IMPORT_DATA], check=True, cwd=ROOT)


# what makes programs of data, and what is only called to do that
LOADERS = {
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "runpy", "shelve", "torch",
    "yaml",
}  # fmt: skip
EXECUTORS = {"eval", "exec", "__import__", "read_pickle", "allow_pickle"}


def executed(source: str) -> set[str]:
    """What in a program may run data as a program, or unpickle them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = {alias.name for alias in node.names}
            roots = {name.split(".")[0] for name in ({module} if module else names)}
            found |= roots & LOADERS | names & EXECUTORS
        elif isinstance(node, ast.Name | ast.Attribute):
            found |= {node.id if isinstance(node, ast.Name) else node.attr} & EXECUTORS
        elif isinstance(node, ast.keyword) and node.arg:
            found |= {node.arg} & EXECUTORS
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # import_module("pickle"), getattr(builtins, "eval"), {"allow_pickle": True}
            found |= {node.value.split(".")[0]} & (LOADERS | EXECUTORS)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            unknown = any(isinstance(argument, ast.Starred) for argument in node.args)
            unknown |= any(keyword.arg is None for keyword in node.keywords)
            if name == "load" and (unknown or len(node.args) > 2):
                found.add("load")  # the third of numpy.load is allow_pickle
    return found


def test_nothing_is_executed_from_data():
    for path in [*MODULES, *(ROOT / "experiments").glob("*.py")]:
        # a program that a person names on the command line is run: it is no data
        allowed = {"runpy"} if path == ROOT / "vaejax" / "doctor.py" else set()
        assert executed(path.read_text(encoding="utf-8")) <= allowed, path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import _pickle as p",
        "from pickle import loads",
        "import os, pickle",
        "def f():\n    import dill",
        "import cloudpickle",
        "import joblib",
        "import joblib.numpy_pickle",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "import torch",
        "import torch.serialization as t",
        "from torch import load",
        "import yaml",
        "from yaml import load",
        "import runpy",
        "from runpy import run_path",
        "import importlib\nimportlib.import_module('pickle')",
        "import sys\nsys.modules['torch']",
        "__import__('os')",
        "import numpy as np\nnp.load('f', allow_pickle=True)",
        "import numpy as np\nnp.load('f', None, True)",
        "import numpy as np\nnp.load('f', *settings)",
        "import numpy as np\nnp.load('f', **settings)",
        "import numpy as np\nnp.load('f', **{'allow_pickle': True})",
        "from numpy import load\nload('f', 'r', True)",
        "import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)",
        "import pandas\npandas.read_pickle('f')",
        "eval('1')",
        "exec('1')",
        "run = eval",
        "import builtins\nbuiltins.eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "from builtins import exec",
        "from builtins import eval as e",
        "import builtins\ngetattr(builtins, 'eval')('1')",
    ],
)
def test_what_would_execute_data_is_found(source: str):
    assert executed(source)


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load('f')\nnp.load('f', 'r')",
        "import json\njson.load(file)",
        "import pickletools\npickletools.genops(data)",  # takes a pickle apart, and runs nothing
        "image.load()",
        "from importlib import import_module\nimport_module(f'{folder}.{name}')",
        "import re\nre.compile('a')",
        '"""Evaluates a model, and speaks of pickle, torch and eval."""',
    ],
)
def test_what_is_harmless_is_not(source: str):
    assert executed(source) == set()


def test_experiments_are_short():
    for path in (ROOT / "experiments").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path


def test_the_threat_model_names_tests_that_there_are():
    text = (ROOT / "docs" / "threat_model.md").read_text(encoding="utf-8")
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    known = set(re.findall(r"def (test_\w+)", "\n".join(tests.values())))
    assert set(re.findall(r"\b(test_\w+)(?:`|\s*,)", text)) - {p.stem for p in tests} <= known
    for name in re.findall(r"[`/]([\w/]*test_\w+\.py)", text):
        assert any(path.match(name) for path in tests), name
