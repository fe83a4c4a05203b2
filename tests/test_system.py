"""Memory is limited by the machine and by every container; sizes and durations are readable."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

import vaejax
from vaejax import system
from vaejax.system import (
    format_bytes,
    format_duration,
    memory_free,
    memory_limit,
    process_memory,
    processor_id,
    versions,
)


def write_group(folder: Path, *, version: int, limit: str, used: int, files: int) -> None:
    """Write the files of a control group as the kernel shows it; sizes in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == 1:
        limit_name, use_name, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
    else:
        limit_name, use_name, prefix = "memory.max", "memory.current", ""
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / use_name).write_text(f"{used}\n")
    stat = f"anon 7\n{prefix}inactive_file {files}\n{prefix}active_file 5\n"
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_that_of_the_tightest_control_group_around_the_process(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "memory" if version == 1 else tmp_path
    write_group(root / "jobs" / "mine", version=version, limit="max", used=900, files=100)
    write_group(root / "jobs", version=version, limit="3000", used=1000, files=200)
    write_group(root, version=version, limit="9000", used=8900, files=300)
    controllers = "4:memory" if version == 1 else "0:"
    (tmp_path / "cgroup").write_text(f"9:cpu:/x\n{controllers}:/jobs/mine\n")
    monkeypatch.setattr(system, "_ROOT", tmp_path)
    monkeypatch.setattr(system, "_OWN", tmp_path / "cgroup")
    assert memory_limit() == 3000
    # the kernel frees the cache of files before it kills a process
    assert memory_free() == 9000 - (8900 - 300 - 5)


def test_the_path_of_a_group_may_be_that_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_group(tmp_path, version=2, limit="3000", used=1000, files=200)
    (tmp_path / "cgroup").write_text("0::/docker/0123/jobs\n")
    monkeypatch.setattr(system, "_ROOT", tmp_path)
    monkeypatch.setattr(system, "_OWN", tmp_path / "cgroup")
    assert memory_limit() == 3000


def test_without_a_group_memory_is_that_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(system, "_OWN", tmp_path / "none")
    assert memory_limit() == psutil.virtual_memory().total
    assert 0 < memory_free() < memory_limit()


def test_allocated_memory_is_no_longer_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(system, "_OWN", tmp_path / "none")
    free, used = memory_free(), process_memory()
    allocated = bytearray(os.urandom(1 << 20) * 300)
    assert free - memory_free() > 100 << 20
    assert process_memory() - used > 250 << 20
    del allocated


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells mapped pages apart")
def test_pages_of_a_mapped_file_are_not_held(tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(200 << 20))
    used, resident = process_memory(), psutil.Process().memory_info().rss
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")
    assert mapped.sum() == 0
    assert psutil.Process().memory_info().rss - resident > 150 << 20
    assert process_memory() - used < 50 << 20
    del mapped


def test_sizes_and_durations_are_readable():
    assert [format_bytes(n) for n in (0, 12_345, 213 << 20, 1_000 << 20, 3 << 29)] == [
        "0 KiB",
        "12 KiB",
        "213 MiB",
        "1,000 MiB",
        "1.5 GiB",
    ]
    assert [format_duration(s) for s in (0.0, 12.4, 59.6, 200.0, 3600.0, 7500.0)] == [
        "0 s",
        "12 s",
        "1 min 00 s",
        "3 min 20 s",
        "1 h 00 min",
        "2 h 05 min",
    ]


def test_the_processor_id_depends_on_the_features_and_not_on_the_clock(
    monkeypatch: pytest.MonkeyPatch,
):
    def read(flags: str, clock: str) -> str:
        text = f"model name\t: A\nflags\t\t: {flags}\ncpu MHz\t\t: {clock}\n"
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        return processor_id.__wrapped__()

    assert read("avx2", "2000.1") == read("avx2", "1800.7")
    assert read("avx2", "2000.1") != read("avx2 avx512f", "2000.1")


def test_versions_name_the_program_and_its_libraries():
    assert versions()["vaejax"] == vaejax.__version__
    assert versions()["jax"] == jax.__version__
