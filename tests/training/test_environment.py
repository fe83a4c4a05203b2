"""A run that goes on in another environment says so, in one warning that names what differs."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest
from test_fit import RECIPE, digest, train

from vaejax import kernels
from vaejax.errors import UserError
from vaejax.training import checkpoint, devices, environment, run


@pytest.fixture
def interrupted(complete_run: Path, tmp_path: Path) -> Path:
    """A run of 18 updates whose newest checkpoint is of update 14."""
    folder = Path(shutil.copytree(complete_run, tmp_path / "run"))
    shutil.rmtree(checkpoint.path(folder, 18))
    run.write_status(folder, run.read_status(folder), status="stopped")
    return folder


def rewrite(folder: Path, **facts: object) -> dict[str, str]:
    """Put other facts into the newest manifest; return the environment that was there.

    A fact that is None is left out.
    """
    path = checkpoint.path(folder, checkpoint.steps(folder)[-1]) / checkpoint.MANIFEST
    content = json.loads(path.read_text())
    path.unlink()
    changed = {**content, **facts}
    kept = {n: v for n, v in changed.items() if v is not None and n not in ("sha256", "files")}
    checkpoint.write_manifest(path.parent, kept)
    return content["environment"]


def saved_as(folder: Path, **facts: str) -> dict[str, str]:
    """Let the newest checkpoint have been written in another environment; return the true one."""
    saved = checkpoint.read_manifest(checkpoint.path(folder, 14))["environment"]
    return rewrite(folder, environment={**saved, **facts})


def test_the_same_environment_is_no_warning(interrupted: Path, data: Path, capsys):
    train(data, interrupted, strict=True)
    assert "environment" not in capsys.readouterr().err


def test_another_environment_is_one_warning_that_names_every_difference(
    interrupted: Path, complete_run: Path, data: Path, capsys
):
    now = saved_as(interrupted, flax="99.0", threads="3", kernels="none (no compiler)")
    train(data, interrupted)
    (warning,) = (w for w in capsys.readouterr().err.splitlines() if "environment" in w)
    assert warning.startswith("warning: ")
    assert f"flax 99.0 → {now['flax']}; threads 3 → {now['threads']}; kernels none (no" in warning
    assert "jax " not in warning
    # the new checkpoint has the new environment
    content = checkpoint.read_manifest(checkpoint.path(interrupted, 18))
    assert content["environment"] == now == run.read_status(interrupted)["environment"]
    assert digest(interrupted) == digest(complete_run)


def test_strict_refuses_it_and_nothing_is_changed(interrupted: Path, data: Path):
    saved_as(interrupted, threads="3")
    before = {path: path.read_bytes() for path in interrupted.rglob("*.json*")}
    with pytest.raises(UserError, match=r"threads 3 → .*--strict"):
        train(data, interrupted, strict=True)
    assert before == {path: path.read_bytes() for path in interrupted.rglob("*.json*")}


def test_a_checkpoint_that_recorded_the_versions_alone_is_compared_by_them(
    interrupted: Path, data: Path, capsys
):
    rewrite(interrupted, environment=None, versions={"jax": "0.1", "python": "3.11"})
    train(data, interrupted)
    (warning,) = (w for w in capsys.readouterr().err.splitlines() if "environment" in w)
    assert f"(jax 0.1 → {jax.__version__}" in warning
    assert "threads" not in warning


# What an environment is ---------------------------------------------------------------------------


def changes(monkeypatch: pytest.MonkeyPatch, change) -> set[str]:
    """The names of what a change of the environment changes."""
    before = environment.present(devices.choose(1), RECIPE)
    change()
    environment._package_digest.cache_clear()
    after = environment.present(devices.choose(1), RECIPE)
    environment._package_digest.cache_clear()
    monkeypatch.undo()
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_each_change_is_seen_under_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def set_(name: str, value: str):
        return lambda: monkeypatch.setenv(name, value)

    flags = os.environ["XLA_FLAGS"]
    fast = set_("XLA_FLAGS", f"{flags} --xla_cpu_enable_fast_math=true")
    assert changes(monkeypatch, fast) == {"XLA_FLAGS"}
    harmless = f"{flags} --xla_dump_to=/tmp/x {devices.DETERMINISTIC}"
    assert changes(monkeypatch, set_("XLA_FLAGS", harmless)) == set()
    assert changes(monkeypatch, set_("PJRT_NPROC", "64")) == {"threads"}
    assert environment._kernels() == "none (several devices)"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert environment._kernels() == environment._digest(kernels.build())
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "off")
    assert environment._kernels() == "none (off)"


def test_an_edited_source_is_another_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for suffix in environment.SOURCES:
        copy = Path(shutil.copytree(environment.PACKAGE, tmp_path / suffix))
        path = next(path for path in sorted(copy.rglob("*")) if path.suffix == suffix)
        point_there = lambda: monkeypatch.setattr(environment, "PACKAGE", copy)  # noqa: E731, B023
        assert changes(monkeypatch, point_there) <= {"source of the experiment"}  # the same source
        path.write_text(path.read_text() + "\n")
        assert "source of vaejax" in changes(monkeypatch, point_there)


def test_a_file_that_defines_the_loss_is_part_of_the_experiment(tmp_path: Path):
    source = "def my_loss(batch, context, *, weight=1.0):\n    return 0\n"
    path, space = tmp_path / "mine.py", {"__name__": "mine"}
    path.write_text(source)
    exec(compile(source, path, "exec"), space)
    recipe = replace(RECIPE, loss=partial(space["my_loss"]))
    before = environment.present(devices.choose(1), recipe)["source of the experiment"]
    assert f"mine.py {environment._digest(path)}" in before
    path.write_text(source + "#\n")
    assert environment.present(devices.choose(1), recipe)["source of the experiment"] != before


# Cores, and settings of JAX -----------------------------------------------------------------------

# sums and products over many numbers, which XLA divides among threads, and random numbers
BITS = """
import hashlib, os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
from vaejax.training import devices
devices.configure(keep=False)
import jax, numpy as np
from vaejax.training import environment
a, b = (np.sin(np.arange(4096.0 * n) ** 2).astype("f").reshape(4096, n) for n in (24, 96))
results = jax.jit(lambda a, b: (a.T @ b, a.sum(0), (b * b).sum()))(a, b)
noise = jax.random.normal(jax.random.key(0), (3,))
for x in (*results, noise):
    print(x.dtype, hashlib.sha256(np.asarray(x).tobytes()).hexdigest())
print(environment.present(devices.choose()))
"""


def bits(cores: int, **settings: str) -> str:
    names = {*devices.THREADS, "XLA_FLAGS"}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", BITS, str(cores)],
        env={**inherited, "JAX_PLATFORMS": "cpu", **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="has one core alone")
def test_neither_the_number_of_cores_nor_settings_of_jax_change_a_bit():
    settings = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "7",
    }
    assert bits(1, **settings) == bits(2)
