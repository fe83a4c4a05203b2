"""How much memory there is, is what a container leaves of it."""

import os
from pathlib import Path

import psutil
import pytest

from vaejax import memory


def group(folder: Path, *, first: bool, limit: str, used: int, files: int) -> None:
    """A control group as the kernel shows it, of the first version or the second."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_") if first else (
        "memory.max", "memory.current", "",
    )  # fmt: skip
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    stat = f"anon 7\n{names[2]}inactive_file {files}\n{names[2]}active_file 5\n"
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize("first", [True, False])
def test_the_tightest_group_around_a_process_counts(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "memory" if first else tmp_path
    group(root / "jobs" / "mine", first=first, limit="max", used=900, files=100)
    group(root / "jobs", first=first, limit="3000", used=1000, files=200)
    group(root, first=first, limit="9000", used=8900, files=300)
    lines = "9:cpu:/x\n4:memory:/jobs/mine\n" if first else "9:cpu:/x\n0::/jobs/mine\n"
    (tmp_path / "cgroup").write_text(lines)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    monkeypatch.setattr(memory, "_OWN", tmp_path / "cgroup")
    assert memory.limit() == 3000
    # what is read from files is given back before anything is killed
    assert memory.room() == 9000 - (8900 - 300 - 5)


def test_without_a_group_it_is_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_OWN", tmp_path / "none")
    assert memory.limit() == psutil.virtual_memory().total
    assert 0 < memory.room() < memory.limit()
    before = memory.room()
    held = bytearray(os.urandom(1 << 20) * 300)
    assert before - memory.room() > 100 << 20
    del held
