"""Who may import whom: drawn from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "vaejax").rglob("*.py"))

# what a part of the house may use besides itself
ALLOWED = {
    "errors": set(),
    "cache": set(),
    "native": {"cache"},
    "files": set(),
    "memory": set(),
    "pictures": {"files", "log"},
    "log": {"files"},
    "data": {"cache", "errors", "files", "pictures"},
    "distributions": set(),
    "models": {"errors", "distributions", "native"},
    "objectives": {"distributions", "models"},
    "generate": {"distributions", "models", "objectives"},
    "training": {
        "cache", "data", "errors", "files", "generate", "log", "memory", "models", "native",
        "objectives", "pictures", "__init__",
    },
    "machine": {
        "cache", "errors", "log", "memory", "models", "native", "objectives", "training",
        "__init__",
    },
    "commands": {"data", "errors", "generate", "machine", "models", "pictures", "training"},
    "cli": {"commands", "errors", "training"},
    "__init__": set(),
}  # fmt: skip
# which packages stay behind which door
DOORS = {
    "flax": {"models"},
    "orbax": {"training/checkpoint.py"},
    "tyro": {"cli.py", "commands.py"},
    "tensorflow_datasets": {"data"},
    "apache_beam": {"data/beam.py"},
    "cv2": {"data"},
    "imageio": {"pictures.py"},
    "matplotlib": {"pictures.py"},
    "tensorboardX": {"log.py"},
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


def test_the_data_never_touch_jax_or_a_device():
    for path in (ROOT / "vaejax" / "data").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"jax", "flax", "optax"}, path


def test_nothing_is_executed_from_data():
    for path in [*MODULES, *(ROOT / "experiments").glob("*.py")]:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"pickle", "dill", "joblib", "torch", "yaml", "shelve"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
            if isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle", path


def test_experiments_are_short():
    for path in (ROOT / "experiments").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path
