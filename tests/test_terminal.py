import os
import pty
import re
import sys
import termios
from pathlib import Path

import pytest

from vaejax import terminal
from vaejax.training.progress import Progress


def test_parts_are_left_out_whole_and_from_the_end():
    parts = ["epoch 3/28", "step 1,234/5,678", "2 min left", "loss 0.01"]
    whole = "  ".join(parts)
    for columns in range(10, len(whole) + 3):
        line = terminal.join(parts, columns)
        shown = line.split("  ")
        assert len(line) <= columns
        assert shown == parts[: len(shown)]
        # the next one would not have fitted
        assert shown == parts or len("  ".join(parts[: len(shown) + 1])) > columns
    assert terminal.join(parts, None) == whole
    assert terminal.join(parts, 3) == "epoch 3/28"


def test_paragraphs_are_wrapped_between_words_and_commands_are_not():
    command = "       vaejax sample runs/00000-anime --seeds 0-24 --out a/very/long/name.png"
    text = f"one two three four five\n{command}"
    assert terminal.wrap(text, 12) == f"one two\n  three four\n  five\n{command}"
    assert terminal.wrap(text, None) == text


def test_columns_are_aligned_and_the_last_are_left_out_where_they_do_not_fit():
    rows = [["", "a", "unit"], ["metric", "1.5", ""], ["m", "10", "dB"]]
    whole = ["            a  unit", "  metric  1.5", "  m        10  dB"]
    assert terminal.table(rows, left=(0, -1)) == whole
    assert terminal.table(rows, left=(0, -1), columns=19) == whole
    narrow = ["            a", "  metric  1.5", "  m        10"]
    assert terminal.table(rows, left=(0, -1), columns=18) == narrow
    assert terminal.table(rows, left=(0, -1), columns=5) == narrow


def test_the_width_is_that_of_the_terminal(capsys: pytest.CaptureFixture):
    first, second = pty.openpty()
    with os.fdopen(first), os.fdopen(second, "w") as stream:
        termios.tcsetwinsize(stream.fileno(), (24, 57))
        assert terminal.width(stream) == 57
        termios.tcsetwinsize(stream.fileno(), (0, 0))  # not known
        assert terminal.width(stream) == 80
    with capsys.disabled(), open(os.devnull, "w") as nowhere:
        assert terminal.width(nowhere) is None


def test_the_progress_line_fits_and_shows_the_time_left(monkeypatch: pytest.MonkeyPatch):
    first, second = pty.openpty()
    metrics = {"loss": -2.53125, "mse": 0.00123, "kl": 1.5, "images_per_second": 4321.0}
    with os.fdopen(first, "rb", buffering=0) as screen, os.fdopen(second, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        for columns in (40, 80, 200):
            termios.tcsetwinsize(stream.fileno(), (24, columns))
            progress = Progress(updates=63_300, epochs=300, batch_size=128)
            progress.show(31_650, 150, metrics, device_memory=None)
            line = screen.read(1000).decode().removeprefix("\r")
            assert len(line) == columns - 1
            assert line.startswith("epoch 150/300  step 31,650/63,300")
            assert ("left" in line, "mse 0.00123" in line) == (columns > 40, columns > 40)
            assert ("RAM" in line) == (columns == 200)


def test_what_is_printed_is_copied_to_the_log_without_lines_that_were_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    log = tmp_path / "log.txt"
    for text in ("first\nse", "again\n"):
        with terminal.copied_to(log):
            print(text, end="")
            print("\r1 %\r2 %", end="", file=sys.stderr)
            print("\r\x1b[Kwarning: ä", file=sys.stderr)
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    lines = [re.sub(stamp, "", line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert lines == ["first", "warning: ä", "again", "warning: ä"]
    assert capsys.readouterr().out == "first\nseagain\n"


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path):
    with terminal.copied_to(tmp_path / "no" / "log.txt"):
        print("goes on")
    with pytest.raises(OSError, match="of the run"), terminal.copied_to(tmp_path / "log.txt"):
        raise OSError("of the run")
    assert not isinstance(sys.stdout, terminal._Copied)
