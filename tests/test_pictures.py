"""Pictures and films show their images, and a failure leaves the old file as it was."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from vaejax import pictures


def greys(n: int, size: int = 4) -> np.ndarray:
    """Return images of one color each: 0, 10, 20, …"""
    return np.stack([np.full((size, size, 3), 10 * i, np.uint8) for i in range(n)])


def test_a_grid_has_its_images_in_reading_order():
    picture = pictures.grid(greys(5), columns=3, gap=1)
    assert picture.shape == (2 * 5 + 1, 3 * 5 + 1, 3)
    cells = [picture[1 + 5 * (i // 3), 1 + 5 * (i % 3), 0] for i in range(6)]
    assert cells == [0, 10, 20, 30, 40, 255]


def test_stacked_rows_have_image_i_of_every_row_in_column_i():
    picture = pictures.stack_rows([greys(3), greys(3) + 5])
    assert list(picture[2, 2::6, 0][:3]) == [0, 10, 20]
    assert list(picture[8, 2::6, 0][:3]) == [5, 15, 25]


def test_long_rows_are_continued_below():
    picture = pictures.stack_rows([greys(5), greys(5) + 5], columns=3)
    assert [picture[y, 2, 0] for y in (2, 8, 16, 22)] == [0, 5, 30, 35]
    assert [picture[16, x, 0] for x in (2, 8, 14)] == [30, 40, 255]


@pytest.mark.parametrize("times", [2, 3])
def test_shrunk_images_are_means_of_pixels_and_small_ones_stay(times: int):
    size = 8 * times
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    means = images.reshape(3, 8, times, 8, times, 3).mean(axis=(2, 4))
    # rows are rounded to levels before columns are
    np.testing.assert_allclose(pictures.shrink(images, 8), means, atol=1)
    assert pictures.shrink(images, 7).shape == (3, 7, 7, 3)
    assert pictures.shrink(images, size) is images
    assert pictures.shrink(images, 2 * size) is images


def test_a_saved_picture_is_read_back_bit_for_bit(tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    pictures.save_png(tmp_path / "new" / "a.png", picture)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert np.array_equal(np.asarray(image), picture)


def test_a_picture_that_cannot_be_encoded_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(TypeError, match="type"):
        pictures.save_png(path, np.zeros((2, 2, 7), np.uint8))  # PNG has no seven channels
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def make_film(folder: Path, n: int, **options: int) -> tuple[Path, Path]:
    """Make a film of n frames from black to white; return its MP4 and its GIF."""
    for i in range(n):
        pictures.save_png(
            folder / f"{i:03}.png", np.full((32, 48, 3), 255 * i // max(1, n - 1), np.uint8)
        )
    mp4, gif = folder / "film.mp4", folder / "film.gif"
    pictures.film(sorted(folder.glob("*.png")), mp4=mp4, gif=gif, **options)
    return mp4, gif


def test_a_film_shows_every_picture_from_first_to_last(tmp_path: Path):
    mp4, gif = make_film(tmp_path, 6)
    with Image.open(gif) as image:
        assert image.n_frames == 6
        means = []
        for i in range(6):
            image.seek(i)
            means.append(np.asarray(image.convert("RGB")).mean())
    np.testing.assert_allclose(means, [0, 51, 102, 153, 204, 255], atol=3)
    video, frames = cv2.VideoCapture(str(mp4)), []
    while (frame := video.read())[0]:
        frames.append(frame[1].mean())
    assert len(frames) >= 6
    np.testing.assert_allclose([frames[0], frames[-1]], [0, 255], atol=6)
    assert frames == sorted(frames)


def test_a_film_shows_the_caption_of_each_frame_below_it(tmp_path: Path):
    frames = [tmp_path / f"{i}.png" for i in range(3)]
    for path in frames:
        pictures.save_png(path, np.zeros((60, 100, 3), np.uint8))
    captions, height = ["epoch 1", "epoch 2", "epoch 3"], pictures.CAPTION_HEIGHT
    mp4, gif = tmp_path / "film.mp4", tmp_path / "film.gif"
    pictures.film(frames, mp4=mp4, gif=gif, captions=captions)
    with Image.open(gif) as image:
        shown = []
        for i in range(3):
            image.seek(i)
            shown.append(np.asarray(image.convert("L")))
    assert all(frame.shape == (60 + height, 100) for frame in shown)
    assert all((frame[:60] < 8).all() for frame in shown)
    below = [frame[60:] for frame in shown]
    assert all(20 < (frame < 128).sum() < 500 for frame in below)  # dark letters on white
    assert (below[0] != below[1]).any()
    assert (below[1] != below[2]).any()
    assert cv2.VideoCapture(str(mp4)).read()[1].shape == (60 + height, 100, 3)


def test_a_long_film_keeps_its_first_and_last_picture(tmp_path: Path):
    _, gif = make_film(tmp_path, 20, max_frames=5)
    with Image.open(gif) as image:
        assert image.n_frames == 5
        assert np.asarray(image.convert("RGB")).mean() < 3
        image.seek(4)
        assert np.asarray(image.convert("RGB")).mean() > 252


def test_a_film_may_have_one_picture(tmp_path: Path):
    mp4, gif = make_film(tmp_path, 1)
    assert mp4.stat().st_size > 0
    assert gif.stat().st_size > 0


def test_damaged_pictures_and_those_of_another_size_are_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    make_film(tmp_path, 6)
    complete = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(complete[: len(complete) // 2])
    (tmp_path / "003.png").write_bytes(b"")
    pictures.save_png(tmp_path / "004.png", np.zeros((8, 8, 3), np.uint8))
    frames = sorted(tmp_path.glob("*.png"))
    pictures.film(frames, mp4=tmp_path / "film.mp4", gif=tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == 3
    warning = capsys.readouterr().err
    assert "3 of 6 pictures" in warning
    assert all(name in warning for name in ("002.png", "003.png", "004.png"))


def test_a_film_shows_neither_what_a_link_leads_to_nor_a_bomb_and_waits_for_no_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "film").mkdir()
    make_film(tmp_path / "film", 7)
    capsys.readouterr()
    pictures.save_png(tmp_path / "mine.png", greys(1, 64)[0])
    frames = sorted((tmp_path / "film").glob("*.png"))
    for frame in frames[2:5]:
        frame.unlink()
    frames[2].symlink_to(tmp_path / "mine.png")
    os.mkfifo(frames[3])
    Image.new("1", (10_000, 10_000)).save(frames[4], "PNG")  # of 15 KB
    frames.append(tmp_path / "film" / "\x1b[2J.png")
    frames[-1].touch()
    pictures.film(frames, mp4=tmp_path / "film.mp4", gif=tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as image:
        assert image.n_frames == 4
    warning = capsys.readouterr().err
    assert "4 of 8 pictures" in warning
    assert "\x1b" not in warning


def test_an_mp4_has_even_sides_padded_with_white_and_plays_everywhere(tmp_path: Path):
    for i in range(3):
        pictures.save_png(tmp_path / f"{i}.png", np.zeros((31, 47, 3), np.uint8))
    mp4 = tmp_path / "film.mp4"
    pictures.film(sorted(tmp_path.glob("*.png")), mp4=mp4, gif=tmp_path / "film.gif")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(mp4)]
    description = subprocess.run(command, capture_output=True, text=True).stderr
    assert re.search(r"Video: h264 .*yuv420p.* 48x32", description), description
    _, frame = cv2.VideoCapture(str(mp4)).read()
    assert frame.shape == (32, 48, 3)
    assert frame[:28, :44].max() < 30
    assert frame[-1].min() > 200
    assert frame[:, -1].min() > 200


def test_the_same_pictures_make_the_same_bytes(tmp_path: Path):
    films = [tuple(path.read_bytes() for path in make_film(tmp_path, 6)) for _ in range(2)]
    assert films[0] == films[1]


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from vaejax import pictures
interrupts = []
signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
read = pictures._read
def interrupted(*arguments):
    for i, frame in enumerate(read(*arguments)):
        if i == 2:
            os.killpg(0, signal.SIGINT)  # what a terminal does at Ctrl-C
        yield frame
pictures._read = interrupted
folder = Path(sys.argv[1])
pictures.film(sorted(folder.glob("*.png")), mp4=folder / "film.mp4", gif=folder / "film.gif")
print(len(interrupts))
"""


def test_ctrl_c_does_not_end_ffmpeg(tmp_path: Path):
    mp4, _ = make_film(tmp_path, 6)
    before = mp4.read_bytes()
    mp4.unlink()
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        capture_output=True, text=True, timeout=60, start_new_session=True,
    )  # fmt: skip
    assert process.stdout == "2\n", process.stderr  # during the MP4, and during the GIF
    assert mp4.read_bytes() == before


def test_a_film_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mp4, gif = make_film(tmp_path, 3)
    before = mp4.read_bytes(), gif.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: "false")  # ends at once
        with pytest.raises(OSError, match="ffmpeg: exit status 1"):
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


def test_a_full_disk_leaves_the_old_film(tmp_path: Path):
    mp4, _ = make_film(tmp_path, 3)
    before = mp4.read_bytes()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (32, 48, 3), np.uint8)
        pictures.save_png(tmp_path / f"{i:03}.png", noise)
    process = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "File too large" in process.stdout, process.stderr
    assert mp4.read_bytes() == before
    assert not list(tmp_path.glob(".partial-*"))
