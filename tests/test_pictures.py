"""Pictures show what they are given, and are there whole or not at all."""

import subprocess
import sys
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from vaejax import pictures


def colours(n: int, size: int = 4) -> np.ndarray:
    return np.stack([np.full((size, size, 3), 10 * i, np.uint8) for i in range(n)])


def test_a_grid_has_its_images_in_reading_order():
    sheet = pictures.grid(colours(5), columns=3, gap=1)
    assert sheet.shape == (2 * 5 + 1, 3 * 5 + 1, 3)
    found = [sheet[1 + 5 * (i // 3), 1 + 5 * (i % 3), 0] for i in range(6)]
    assert found == [0, 10, 20, 30, 40, 255]


def test_strips_have_image_i_of_every_row_in_column_i():
    sheet = pictures.strips([colours(3), colours(3) + 5])
    assert list(sheet[2, 2::6, 0][:3]) == [0, 10, 20]
    assert list(sheet[8, 2::6, 0][:3]) == [5, 15, 25]


def test_strips_of_many_images_go_on_below():
    sheet = pictures.strips([colours(5), colours(5) + 5], columns=3)
    assert [sheet[y, 2, 0] for y in (2, 8, 16, 22)] == [0, 5, 30, 35]
    assert [sheet[16, x, 0] for x in (2, 8, 14)] == [30, 40, 255]


def test_a_saved_picture_comes_back_bit_for_bit(tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    pictures.save(tmp_path / "new" / "a.png", picture)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert np.array_equal(np.asarray(image), picture)


def test_what_fails_in_between_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(TypeError, match="type"):
        pictures.save(path, np.zeros((2, 2, 7), np.uint8))  # seven channels are no picture
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def make_film(folder: Path, n: int, **settings: int) -> tuple[Path, Path]:
    for i in range(n):
        pictures.save(
            folder / f"{i:03}.png", np.full((32, 48, 3), 255 * i // max(1, n - 1), np.uint8)
        )
    mp4, gif = folder / "film.mp4", folder / "film.gif"
    pictures.film(sorted(folder.glob("*.png")), mp4=mp4, gif=gif, **settings)
    return mp4, gif


def test_a_film_shows_every_picture_from_first_to_last(tmp_path: Path):
    mp4, gif = make_film(tmp_path, 6)
    with Image.open(gif) as image:
        assert image.n_frames == 6
        greys = []
        for i in range(6):
            image.seek(i)
            greys.append(np.asarray(image.convert("RGB")).mean())
    np.testing.assert_allclose(greys, [0, 51, 102, 153, 204, 255], atol=3)
    video, frames = cv2.VideoCapture(str(mp4)), []
    while (frame := video.read())[0]:
        frames.append(frame[1].mean())
    assert len(frames) >= 6
    np.testing.assert_allclose([frames[0], frames[-1]], [0, 255], atol=6)
    assert frames == sorted(frames)


def test_a_long_film_keeps_its_first_and_last_picture(tmp_path: Path):
    _, gif = make_film(tmp_path, 20, most=5)
    with Image.open(gif) as image:
        assert image.n_frames == 5
        assert np.asarray(image.convert("RGB")).mean() < 3
        image.seek(4)
        assert np.asarray(image.convert("RGB")).mean() > 252


def test_a_film_of_one_picture_is_a_film(tmp_path: Path):
    mp4, gif = make_film(tmp_path, 1)
    assert mp4.stat().st_size > 0
    assert gif.stat().st_size > 0


def test_pictures_that_are_broken_or_of_another_size_are_left_out_and_told(tmp_path: Path, capsys):
    make_film(tmp_path, 6)
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "003.png").write_bytes(b"")
    pictures.save(tmp_path / "004.png", np.zeros((8, 8, 3), np.uint8))
    frames = sorted(tmp_path.glob("*.png"))
    pictures.film(frames, mp4=tmp_path / "film.mp4", gif=tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == 3
    told = capsys.readouterr().err
    assert "3 of 6 pictures" in told
    assert all(name in told for name in ("002.png", "003.png", "004.png"))


def test_a_film_that_could_not_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mp4, gif = make_film(tmp_path, 3)
    before = mp4.read_bytes(), gif.read_bytes()
    with monkeypatch.context() as ends_at_once:
        ends_at_once.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "false")
        with pytest.raises(OSError, match="it ended with 1"):
            make_film(tmp_path, 4)
    assert (mp4.read_bytes(), gif.read_bytes()) == before
    frames = sorted(tmp_path.glob("*.png"))
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        pictures.film(frames, mp4=tmp_path / "000.png" / "film.mp4", gif=gif)
    assert not list(tmp_path.glob(".partial-*"))


FULL = """
import resource, sys
from pathlib import Path
from vaejax import pictures
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    pictures.film(sorted(folder.glob("*.png")), mp4=folder / "film.mp4", gif=folder / "film.gif")
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_is_full_leaves_the_old_film(tmp_path: Path):
    mp4, _ = make_film(tmp_path, 3)
    before = mp4.read_bytes()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8)
        pictures.save(tmp_path / f"{i:03}.png", noise)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "File too large" in done.stdout, done.stderr
    assert mp4.read_bytes() == before
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.parametrize(
    ("figures", "panels"),
    [
        ('"loss": 0.2, "mse": 0.1, "kl": 0.01, "bits_per_dim": 5.0', (2, 2)),
        ('"loss": 0.2, "mse": 0.1, "bce": 0.2', (2, 1)),
        ('"loss": 0.1, "mse": 0.1', (1, 1)),  # the same twice is shown once
        ('"loss": -1.5, "mse": 0.1', (2, 1)),  # which has no logarithm
    ],
)
def test_curves_are_drawn_from_a_metrics_file(tmp_path: Path, figures: str, panels: tuple):
    metrics = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {i}, "epoch": 1, "split": "train", {figures}}}' for i in range(5)]
    lines.append(f'{{"step": 5, "epoch": 1, "split": "validation", {figures}}}')
    metrics.write_text("\n".join(lines) + "\n")
    pictures.curves(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (600 * panels[0], 360 * panels[1])
        assert len(np.unique(np.asarray(image).reshape(-1, 4), axis=0)) > 20
