"""Faults that are real: signals, a file system that takes no more, a terminal that goes away."""

import errno
import fcntl
import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_fit import PROGRAM, RECIPE, Flags, after_steps, digest, leave, lines, start, train

from vaejax import losses
from vaejax.data.batches import Images, stream
from vaejax.errors import DivergedError, MemoryLowError, StorageError, UserError
from vaejax.training import checkpoint, finish, run
from vaejax.training.config import resolve
from vaejax.training.fit import fit
from vaejax.training.logger import MetricsWriter
from vaejax.training.visualize import Visualizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")]


def said(folder: Path) -> list[tuple]:
    """Every line but for its speed."""
    return [tuple(v for k, v in line.items() if k != "images_per_second") for line in lines(folder)]


# Signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_is_met_after_the_step_with_its_own_exit_code(
    number: signal.Signals, complete_run: Path, data: Path, tmp_path: Path, patience: float
):
    out = tmp_path / "run"
    process = start(data, out)
    after_steps(process, out, 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=patience)
    assert process.returncode == 128 + number
    assert f"{number.name}: finishing the step and saving" in errors
    assert "Traceback" not in errors
    assert run.status(out) == "stopped"
    assert 0 < checkpoint.steps(out)[-1] < 18
    train(data, out)
    assert digest(out) == digest(complete_run)
    assert said(out) == said(complete_run)


def test_a_second_request_ends_at_once(data: Path, tmp_path: Path, patience: float):
    out = tmp_path / "run"
    process = start(data, out)
    after_steps(process, out, 2)
    process.send_signal(signal.SIGSTOP)  # so that both are there before any step ends
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=patience)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert run.status(out) == "running"  # nothing more was written


def command(data: Path, out: Path) -> list[str]:
    """The tiny run as a person starts it, with the streams that the command line has."""
    program = PROGRAM.format(tests=str(Path(__file__).parent), data=str(data), out=str(out))
    return [sys.executable, "-c", program]


def at_a_terminal() -> None:
    """What a shell does for its child."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_that_is_gone_does_not_end_a_run(
    complete_run: Path, data: Path, tmp_path: Path, patience: float
):
    out = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(data, out),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=at_a_terminal,
    )
    os.close(theirs)
    while process.poll() is None and (not (out / "metrics.jsonl").exists()):
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 4096)
    os.close(ours)  # a hang-up, and an error for all that is written from now on
    assert process.wait(timeout=patience) == 0
    assert digest(out) == digest(complete_run)


# The disk -----------------------------------------------------------------------------------------


def full(process: subprocess.Popen, *, yes: bool) -> None:
    """No file of the process can grow, or every one can."""
    _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    limit = 0 if yes else resource.RLIM_INFINITY
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, most))


def begun(data: Path, out: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        command(data, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    after_steps(process, out, 3)
    return process


def test_a_disk_that_is_full_from_the_start_is_one_line(
    data: Path, tmp_path: Path, patience: float
):
    program = command(data, tmp_path / "run")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    done = subprocess.run(
        [*program[:2], limit + program[2]],
        capture_output=True,
        text=True,
        timeout=patience,
        # what JAX has written of a program into a cache on a full disk is no program
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_not_missed(
    closed: str, complete_run: Path, data: Path, tmp_path: Path, patience: float
):
    out = tmp_path / "run"
    python, flag, program = command(data, out)
    done = subprocess.run(
        ["sh", "-c", f'"$0" "$@" {closed}', python, flag, program],
        capture_output=True,
        timeout=patience,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert digest(out) == digest(complete_run)
    assert said(out) == said(complete_run)


def test_a_full_disk_is_told_once_and_what_was_kept_back_is_written_when_there_is_room(
    complete_run: Path, data: Path, tmp_path: Path, patience: float
):
    out = tmp_path / "run"
    process = begun(data, out)
    full(process, yes=True)
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if "warning: a checkpoint cannot be written: File too large" in line:
            break
    full(process, yes=False)
    rest, errors = process.communicate(timeout=patience)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    text = "".join(told) + rest
    assert text.count("a checkpoint cannot be written") == 1
    assert text.count("a checkpoint can be written again") == 1
    assert run.status(out) == "finished"
    assert digest(out) == digest(complete_run)
    assert said(out) == said(complete_run)


def test_a_disk_that_stays_full_costs_an_exit_code_and_nothing_that_was_saved(
    complete_run: Path, data: Path, tmp_path: Path, patience: float
):
    out = tmp_path / "run"
    process = begun(data, out)
    process.send_signal(signal.SIGSTOP)
    full(process, yes=True)
    there = checkpoint.steps(out)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=patience)
    assert process.returncode == 5
    assert "error: not everything could be written" in errors
    assert "Make room" in errors
    assert "Traceback" not in errors
    left = checkpoint.steps(out)
    assert set(there) - {3} <= set(left) < {*range(0, 19, 3)}
    assert checkpoint.newest(out, expected=True) is not None
    assert not list(out.rglob(".partial-*"))
    train(data, out)
    assert run.status(out) == "finished"
    assert digest(out) == digest(complete_run)
    assert said(out) == said(complete_run)
    assert (out / "learning.gif").exists()


def test_no_checkpoint_knows_of_metrics_that_are_not_on_the_disk(
    complete_run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    sync, calls = MetricsWriter.sync, []

    def refused(self: MetricsWriter) -> None:
        calls.append(len(checkpoint.steps(tmp_path / "run")))
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        sync(self)

    monkeypatch.setattr(MetricsWriter, "sync", refused)
    train(data, tmp_path / "run", checkpoint_steps=5)
    assert calls == [0, 0, 0, 1]  # after 5, 10, 15 and 18 updates
    assert checkpoint.steps(tmp_path / "run") == [15, 18]
    assert capsys.readouterr().out.count("a checkpoint cannot be written: Input/output error") == 1
    assert digest(tmp_path / "run") == digest(complete_run)


def test_a_folder_that_takes_nothing_is_refused_with_the_code_of_the_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "Logger", full_disk)
    with pytest.raises(StorageError, match="No space left") as caught:
        train(data, tmp_path / "run", steps=1)
    assert caught.value.exit_code == 5


# Memory -------------------------------------------------------------------------------------------


def test_a_run_that_holds_too_much_saves_itself_and_goes_on_later(
    complete_run: Path, data: Path, tmp_path: Path
):
    out = tmp_path / "run"
    with pytest.raises(
        MemoryLowError, match=r"more than --max-ram 0.01.*--micro-batch 4"
    ) as caught:
        train(data, out, max_ram=0.01)
    assert caught.value.exit_code == 75
    assert run.status(out) == "stopped"
    assert checkpoint.steps(out) == [1]
    train(data, out)
    assert digest(out) == digest(complete_run)


def test_programs_that_are_compiled_after_the_first_epoch_are_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    train(data, tmp_path / "run")
    assert "compiled after the first epoch" not in capsys.readouterr().err
    end = Visualizer.draw_epoch_end

    def another_shape(self, state, epoch: int) -> dict[str, np.ndarray]:
        jax.jit(grows)(jnp.zeros(epoch))
        return end(self, state, epoch)

    def grows(x):
        return x + 1

    monkeypatch.setattr(Visualizer, "draw_epoch_end", another_shape)
    train(data, tmp_path / "other")
    text = capsys.readouterr().err
    assert text.count("programs were compiled after the first epoch") == 2
    assert "grows" in text


# Numbers that are none ----------------------------------------------------------------------------


def broken_at(x, out, context, *, kl_weight, bad):
    """The report's loss; infinite for every batch whose pixels sum up to one of those."""
    loss, metrics = losses.mse_kl(x, out, context, kl_weight=kl_weight)
    total = jnp.sum(jnp.round(255 * x).astype(jnp.int32))
    scale = jnp.where(context.train & jnp.isin(total, jnp.asarray(bad)), jnp.inf, 1.0)
    return loss * scale, metrics


def breaking(data: Path, updates: list[int]) -> Callable[..., Path | None]:
    """`train`, with a loss that is infinite in these updates."""
    images = stream(Images(data, "train"), batch_size=8, seed=0)
    sums = [int(next(images).sum()) for _ in range(18)]
    loss = partial(broken_at, kl_weight=0.01, bad=[sums[n] for n in updates])
    recipe = replace(RECIPE, loss=loss)

    def run_it(out: Path, **flags: object) -> Path | None:
        config = Flags(data=data, recipe="quick", out=out, log_steps=2, devices=1, **flags)
        return fit("tiny", config, resolve(config, recipe))

    return run_it


def test_an_update_that_is_not_finite_is_left_out_and_the_run_goes_on(
    data: Path, tmp_path: Path, capsys
):
    out = tmp_path / "run"
    run_it = breaking(data, [4, 5, 11])
    run_it(out)
    text = capsys.readouterr().err
    assert "update 4 was not applied: the loss is inf (1 in a row" in text
    assert "update 5 was not applied: the loss is inf (2 in a row" in text
    assert text.count("was not applied") == 3
    found = [line for line in lines(out) if line["split"] == "train"]
    assert [line["step"] for line in found if line["skipped"]] == [4]
    assert "loss" not in next(line for line in found if line["step"] == 4)
    assert all(np.isfinite(v) for line in lines(out) for v in line.values() if v != line["split"])
    assert run.status(out) == "finished"
    # interrupted between two of them, it ends the same
    other = tmp_path / "other"
    run_it(other, steps=5)
    run_it(other)
    assert digest(other) == digest(out)


def test_three_in_a_row_end_the_run_with_the_images_they_were_computed_from(
    data: Path, faces: Path, tmp_path: Path
):
    out = tmp_path / "run"
    with pytest.raises(DivergedError) as caught:
        breaking(data, [8, 9, 10])(out, checkpoint_steps=3)
    text = str(caught.value)
    assert caught.value.exit_code == 4
    for words in ("epoch 2 at step 10", "the loss is inf", "of step 7: loss 1.", "0000006"):
        assert words in text
    assert run.status(out) == "diverged"
    # that after 9 updates was due in between
    assert checkpoint.steps(out) == [3, 6]
    found = json.loads((out / "diverged.json").read_text())
    assert found["last_good_checkpoint"] == str(checkpoint.path(out, 6))
    assert [update["step"] for update in found["updates"]] == [8, 9, 10]
    images = stream(Images(data, "train"), batch_size=8, seed=0)
    drawn = [next(images) for _ in range(11)][8:]
    for update, batch in zip(found["updates"], drawn, strict=True):
        for name, image in zip(update["images"], batch, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(faces / name)), image)
    with pytest.raises(DivergedError):  # the same again, from the last good one
        breaking(data, [8, 9, 10])(out, checkpoint_steps=3)
    assert checkpoint.steps(out) == [3, 6]


def test_a_run_that_diverges_ends_two_updates_later(data: Path, tmp_path: Path):
    with pytest.raises(DivergedError, match="at step 10"):
        breaking(data, [8, 9, 10])(tmp_path / "run")
    assert max(line["step"] for line in lines(tmp_path / "run")) == 10  # and not 12, nor its end


def test_held_out_metrics_that_are_not_finite_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(finish, "validate", lambda *_, **__: {"mse": float("nan")})
    with pytest.raises(DivergedError, match="held-out images' mse is nan"):
        train(data, tmp_path / "run")


# Other images -------------------------------------------------------------------------------------


@pytest.fixture
def folder(faces: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(faces, tmp_path / "faces"))


def change(folder: Path) -> None:
    """Two more images, three fewer, and one that is another one."""
    for i, name in enumerate(("new.png", "newer.png", "000.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    for i in (3, 4, 5):
        (folder / f"{i:03}.png").unlink()


@pytest.mark.parametrize("named", [True, False])
def test_images_that_changed_are_refused_with_their_number_unless_they_are_accepted(
    named: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run" if named else None
    first = train(folder, out, steps=3)
    assert first is not None
    leave(first, "stopped")  # more is to come
    change(folder)
    before = (first / "config.json").read_bytes()
    with pytest.raises(UserError, match="2 added, 3 removed, 1 changed") as caught:
        train(folder, out, steps=5)
    assert "--accept-changed-data" in str(caught.value)
    assert (first / "config.json").read_bytes() == before
    capsys.readouterr()
    assert train(folder, out, steps=5, accept_changed_data=True) == first
    assert "3 of 5 updates are done" in capsys.readouterr().out
    assert run.status(first) == "finished"
    assert train(folder, out, steps=5) == first  # they are its own from now on


def test_a_run_that_is_finished_leaves_changed_images_to_a_new_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert train(folder, None, steps=1) == Path("runs/00000-tiny")
    change(folder)
    assert train(folder, None, steps=1) == Path("runs/00001-tiny")


def test_images_whose_older_set_is_gone_are_refused_all_the_same(folder: Path, tmp_path: Path):
    out = tmp_path / "run"
    train(folder, out, steps=1)
    shutil.rmtree(run.read_spec(out).schedule.prepared)
    change(folder)
    with pytest.raises(UserError, match="how is unknown, because the set prepared before is gone"):
        train(folder, out, steps=2)


# Two of them --------------------------------------------------------------------------------------


def test_two_processes_do_not_train_in_one_folder(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    first = start(data, out)
    after_steps(first, out, 1)
    first.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"already being trained by process {first.pid} on .* UTC"):
        train(data, out)
    assert time.monotonic() - began < 30
    first.kill()
    first.communicate()
    train(data, out)  # nothing stale is left
    assert run.status(out) == "finished"


def test_a_run_that_is_extended_in_the_middle_of_an_epoch_has_every_epoch_once(
    complete_run: Path, data: Path, tmp_path: Path
):
    out = tmp_path / "run"
    train(data, out, steps=8)
    assert [x["step"] for x in lines(out) if x["split"] == "validation"] == [6, 8]
    train(data, out)
    assert said(out) == said(complete_run)


def test_killed_at_random_and_in_a_save_it_ends_as_if_it_had_not_been(tmp_path: Path):
    """The benchmark, in short: as people start it, with our kernels where there are any.

    It ends by itself if a start takes many times as long as the run that it measures first.
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "kill.py"), "2", "--random-cores", "--json"]
        + [str(tmp_path / "k")],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "k").read_text())
    assert found["differences"] == []
    assert len(found["kills"]) == 2
    assert sum(kill["in_a_save"] for kill in found["kills"]) >= 1
    assert [kill["of_flow"] for kill in found["kills"]] == [False, True]
    assert all(kill["reached"] - kill["kept"] <= 7 for kill in found["kills"])
