"""A person's mistake is one line and exit code 2, and nothing is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax import cli, commands, export, interrupt, losses, pictures
from vaejax.data.prepare import prepare
from vaejax.errors import UserError
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.denoising import Denoising
from vaejax.models.feed_forward import FeedForward
from vaejax.models.vae import VAE
from vaejax.training import checkpoint, prior, publish, run
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit

ROOT = Path(__file__).parents[1]


def vaejax(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["vaejax", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "prepare, sample, fit-prior, denoise, reconstruct"),
        (["smple"], "smple"),
        (["sample"], "run's folder"),
        (["sample", "latest"], "there is no run"),
        (["sample", "7"], "no run '7'"),
        (["sample", "latest", "--seeds", "0-x"], "neither a number nor a range"),
        (["sample", "latest", "--seeds", "5-1"], "an empty range"),
        (["sample", "latest", "--seeds", "5-"], "neither a number nor a range"),
        (["sample", "latest", "--out", "faces.jpg"], "must end in .png"),
        (["sample", "latest", "--seeds", "0-99999999999999"], "at most 10,000"),
        (["reconstruct", "latest"], "no image"),
        (["denoise", "latest"], "no image"),
        (["denoise", "latest", "a.png"], "there is no run"),
        (["denoise", "latest", "a.png", "--out", "a.jpg"], "must end in .png"),
        (["denoise", "latest", "a.png", "--seed", "-1"], "--seed -1: must be from 0"),
        (["export", "latest", "--out", "new"], "there is no run"),
        (["export", "latest", "--out", "."], "there is no run"),
        (["export", "latest"], "--out"),
        (["prepare", "nowhere"], "nowhere"),
        (["prepare", ".", "--size", "x"], "--size"),
        (["prepare", "."], "no images"),
        (["prepare", ".", "--margin", "0.5"], "--margin without --crop-faces"),
        (["prepare", ".", "--cascade", "a.xml"], "--cascade without --crop-faces"),
        (["prepare", ".", "--debug-sheet", "a.png"], "add --crop-faces"),
        (["prepare", ".", "--crop-faces", "--cascade", "a.xml"], "a.xml does not exist"),
        (["prepare", ".", "--crop-faces", "--debug-sheet", "a.jpg"], "must end in .png"),
        (["prepare", ".", "--crop-faces", "--margin", "3"], "--margin 3.0: from 0 to 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


def test_seeds_are_numbers_and_ranges():
    assert commands.parse_seeds("0,7,10-12") == [0, 7, 10, 11, 12]
    with pytest.raises(UserError):
        commands.parse_seeds("")


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--norm", "best"], ["--data", "nowhere"]])
def test_an_experiment_refuses_a_mistake_in_one_line(flags: list[str], tmp_path: Path):
    command = [sys.executable, str(ROOT / "experiments" / "anime.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from vaejax import cli, interrupt
os.kill(os.getpid(), signal.SIGINT)
from vaejax import losses
"""


def test_ctrl_c_while_a_program_is_imported_is_one_line(tmp_path: Path):
    program = tmp_path / "experiment.py"
    program.write_text(INTERRUPTED)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_whoever_imports_the_command_line_otherwise_keeps_a_ctrl_c_as_it_is():
    assert signal.getsignal(signal.SIGINT) is not interrupt._stop


def test_prepare_leaves_its_report_where_it_was_told(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "set"
    arguments = ["prepare", str(faces), "--size", "32", "--out", str(out)]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 0
    assert {"dataset_report.json", "contact_sheet.png"} <= {path.name for path in out.iterdir()}


def test_prepare_crops_to_faces_and_shows_where_there_are_none(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    sheet = tmp_path / "sheet.png"
    arguments = ["prepare", str(faces), "--crop-faces", "--debug-sheet", str(sheet)]
    assert vaejax(*arguments, "--margin", "0.5", monkeypatch=monkeypatch) == 2
    assert "(0 of 60 files): 60 no face found" in capsys.readouterr().err  # discs are none
    with Image.open(sheet) as image:
        assert image.width > 1000


def train(faces: Path, out: Path, model: Autoencoder, loss: partial) -> Path:
    """Two updates: enough to look at."""
    data = prepare(faces, size=model.size, say=lambda _: None)
    config = Config(data=data, out=out, recipe="quick", steps=2)
    fit("tiny", config, resolve(config, Recipe("quick", model, loss, epochs=1, batch_size=8)))
    return out


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = VAE(size=16, latent_dim=4, width=1, norm="batch")
    out = tmp_path_factory.mktemp("trained") / "run"
    return train(faces, out, model, partial(losses.mse_kl, kl_weight=0.01))


@pytest.fixture(scope="module")
def plain(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deterministic run."""
    out = tmp_path_factory.mktemp("plain") / "run"
    model = FeedForward(size=16, latent_dim=4)
    return train(faces, out, model, partial(losses.reconstruction, error="mse"))


@pytest.fixture(scope="module")
def denoising(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("denoising") / "run"
    model = Denoising(size=16, width=2, noise=0.2)
    return train(faces, out, model, partial(losses.reconstruction, error="bce"))


def test_sample_draws_the_same_face_for_a_seed_whoever_stands_beside_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, seeds in (("four", "0-3"), ("one", "2")):
        arguments = ["sample", str(trained), "--seeds", seeds, "--out", f"{tmp_path}/{name}.png"]
        assert vaejax(*arguments, monkeypatch=monkeypatch) == 0
    four, one = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("four", "one"))
    assert four.shape == (38, 38, 3)
    assert np.array_equal(one[2:18, 2:18], four[20:36, 2:18])  # the third of two rows


def test_the_runs_grid_is_what_sample_draws(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "faces.png"
    assert vaejax("sample", str(trained), "--out", str(out), monkeypatch=monkeypatch) == 0
    grid = Image.open(trained / "samples" / "epoch-0001-end.png")
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(grid))


def test_reconstruct_shows_images_of_any_size_above_what_becomes_of_them(
    trained: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.jpg")
    out = tmp_path / "out.png"
    images = [str(faces / "000.png"), str(tmp_path / "grey.jpg")]
    arguments = ["reconstruct", str(trained), *images, "--out", str(out)]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 0
    picture = np.asarray(Image.open(out))
    assert np.array_equal(picture[2:18, 2:18], np.asarray(Image.open(images[0])))
    assert abs(int(picture[10, 28, 0]) - 128) <= 2


def test_reconstruct_refuses_what_is_no_image_by_its_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    (tmp_path / "page.jpg").write_text("<html>")
    arguments = ["reconstruct", str(trained), str(tmp_path / "page.jpg")]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    assert "page.jpg is no usable image" in capsys.readouterr().err


def test_a_run_without_a_prior_says_what_it_can_do_instead(
    plain: Path, denoising: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    out = f"--out={tmp_path}/new.png"
    assert vaejax("sample", str(plain), out, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert f"{plain} is a feed-forward autoencoder, which has no prior" in error
    assert "`--prior mixture` fits one" in error
    assert f"with `vaejax reconstruct {plain} IMAGE...` or" in error
    assert vaejax("sample", str(denoising), out, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert f"`vaejax denoise {denoising} IMAGE...` or `vaejax reconstruct {denoising} IM" in error
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_a_new_folder_with_everything(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    out = tmp_path / "deep" / "export"
    assert vaejax("export", str(trained), "--out", str(out), monkeypatch=monkeypatch) == 0
    names = {"decoder.onnx", "encoder.onnx", "model.safetensors", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    said = capsys.readouterr().out
    assert all(f"{out}/{name}" in said for name in names)
    assert "the latents of new faces are standard normal" in said
    loaded, exported = run.load(trained), export.load(out)
    assert checkpoint.weights_digest(*exported[1:3]) == loaded.weights.digest
    assert exported.model == loaded.model
    assert exported.prior is not None
    assert np.array_equal(exported.prior.sample([5]), prior.load(loaded, "normal").sample([5]))


def test_an_export_leaves_what_is_there_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    (tmp_path / "mine").write_text("my notes")
    for out, words in ((tmp_path, "is not empty"), (tmp_path / "mine" / "new", "mine is a file")):
        assert vaejax("export", str(trained), "--out", str(out), monkeypatch=monkeypatch) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="is not empty"):  # it was filled while the export was made
        publish.write(tmp_path, {"README.md": b""})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_without_a_prior_is_exported_without_one(
    plain: Path, denoising: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    for folder in (plain, denoising):
        out = tmp_path / folder.parent.name
        assert vaejax("export", str(folder), "--out", str(out), monkeypatch=monkeypatch) == 0
        said = capsys.readouterr()
        assert f"{folder} has no prior, and draws no new faces" in said.out
        assert said.err == ""
        assert export.load(out).prior is None
        assert not (out / "prior.onnx").exists()
    # a prior that was to be fitted when the run was stopped
    loaded = run.load(plain)
    spec = replace(loaded.spec, schedule=replace(loaded.spec.schedule, prior="flow"))
    assert publish.exported(loaded._replace(spec=spec)).prior is None
    assert "has no flow as its prior yet" in capsys.readouterr().err


def test_only_a_denoising_run_takes_noise_away(
    plain: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    arguments = ["denoise", str(plain), str(faces / "000.png"), f"--out={tmp_path}/out.png"]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert f"{plain} is a feed-forward autoencoder, which was not trained" in error
    assert f"`vaejax reconstruct {plain} IMAGE...`" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def tiles(sheet: np.ndarray) -> np.ndarray:
    """The images of 16 x 16 in a picture, by row and column."""
    rows, columns = (side // 18 for side in sheet.shape[:2])
    found = [
        sheet[2 + 18 * i :, 2 + 18 * j :][:16, :16] for i in range(rows) for j in range(columns)
    ]
    return np.stack(found).reshape(rows, columns, 16, 16, 3)


def test_denoise_takes_a_file_as_noisy_already_and_shows_it_as_it_is(
    denoising: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = [str(faces / f"{i:03}.png") for i in range(12)]
    for verb in ("denoise", "reconstruct"):
        arguments = [verb, str(denoising), *images, f"--out={tmp_path}/{verb}.png"]
        assert vaejax(*arguments, monkeypatch=monkeypatch) == 0
    sheet, same = (
        np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("denoise", "reconstruct")
    )
    assert np.array_equal(sheet, same)
    ten, two = (tiles(line) for line in np.split(sheet, 2))
    files = [np.asarray(Image.open(path)) for path in images]
    assert np.array_equal(ten[0], files[:10])
    assert np.array_equal(two[0, :2], files[10:])
    assert not np.array_equal(two[1, :2], files[10:])


def test_denoise_can_add_the_runs_own_noise_first_by_a_seed(
    denoising: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = [str(faces / f"{i:03}.png") for i in range(3)]

    def run(seed: int) -> np.ndarray:
        arguments = ["denoise", str(denoising), *images, "--add-noise", f"--seed={seed}"]
        assert vaejax(*arguments, f"--out={tmp_path}/out.png", monkeypatch=monkeypatch) == 0
        return tiles(np.asarray(Image.open(tmp_path / "out.png"), float))

    noisy, denoised, clean = run(0)
    assert np.array_equal(clean, [np.asarray(Image.open(path)) for path in images])
    grey = (clean > 90) & (clean < 165)  # where little is cut off
    assert 0.14 < np.std((noisy - clean)[grey]) / 255 < 0.22
    assert np.mean(noisy == denoised) < 0.1
    again, other = run(0), run(1)
    assert np.array_equal(again[0], noisy)
    assert np.array_equal(again[1], denoised)
    assert np.mean(other[0] == noisy) < 0.3


def test_what_nobody_reads_any_more_or_no_terminal_can_show_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    reading, writing = os.pipe()
    before = signal.getsignal(signal.SIGHUP)
    with open(writing, "w", encoding="latin-1", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with cli.unbreakable_output():
            print("faces … ×")
            assert os.read(reading, 99) == b"faces ? \xd7\n"
            os.close(reading)
            for _ in range(3):
                print("nobody is there", flush=True)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert sys.stdout is stream
        print("and still not", flush=True)  # nor for those who write there afterwards
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_picture_that_the_disk_does_not_take_is_one_line(tmp_path: Path, capsys):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(SystemExit) as stop, cli.errors_as_messages():
        pictures.save_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    assert stop.value.code == 5
    assert capsys.readouterr().err.endswith("a.png: Is a directory\n")


# What must not be overwritten, and what must not be waited for


@pytest.fixture
def mine(faces: Path, tmp_path: Path) -> Path:
    """A picture, under four names."""
    picture = tmp_path / "me.png"
    picture.write_bytes((faces / "000.png").read_bytes())
    (tmp_path / "link.png").symlink_to(picture)
    os.link(picture, tmp_path / "hard.png")
    (tmp_path / "folder").symlink_to(tmp_path)
    return picture


@pytest.mark.parametrize("verb", ["reconstruct", "denoise"])
@pytest.mark.parametrize("out", ["me.png", "link.png", "hard.png", "folder/me.png"])
def test_an_input_is_not_overwritten(
    verb: str, out: str, mine: Path, denoising: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    before = mine.read_bytes()
    monkeypatch.chdir(mine.parent)
    arguments = [verb, str(denoising), "me.png", "--out", out]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    assert f"--out {out} is an input" in capsys.readouterr().err
    assert mine.read_bytes() == before


def test_pictures_and_pages_are_not_written_among_data(
    trained: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    data = prepare(faces, size=16, out=tmp_path / "set", say=lambda _: None)
    own = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((own / "config.json").read_text())
    config["schedule"]["source"] = str(shutil.copytree(faces, tmp_path / "images"))
    (own / "config.json").write_text(json.dumps(config))
    places = {
        data / "contact_sheet.png": "is a prepared data set",
        data / "records" / "new.png": "is a prepared data set",
        tmp_path / "images" / "new.png": "among the input",
        own / "faces.png": "what the run",
        own / "samples" / "epoch-0001-end.png": "what the run",
    }
    for place, words in places.items():
        before = place.read_bytes() if place.exists() else None
        for verb in (["sample"], ["reconstruct", str(faces / "000.png")]):
            arguments = [verb[0], str(own), *verb[1:], "--out", str(place)]
            assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
            assert words in capsys.readouterr().err
        assert before == (place.read_bytes() if place.exists() else None)
    assert vaejax("sample", str(own), f"--out={own}/new.png", monkeypatch=monkeypatch) == 0
    for place in (data / "export", own / "samples" / "export"):
        with pytest.raises(UserError, match=r"prepared data set|what the run"):
            publish.refuse_used(place)
    with pytest.raises(UserError, match="which is a prepared data set"):
        train(faces, data / "run", VAE(size=16), partial(losses.mse_kl, kl_weight=0.01))


def test_a_contact_sheet_is_not_overwritten_by_a_sheet_of_faces(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    data = prepare(faces, size=16, out=tmp_path / "set", say=lambda _: None)
    arguments = ["prepare", str(faces), "--crop-faces", f"--debug-sheet={data}/contact_sheet.png"]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    assert "which is a prepared data set" in capsys.readouterr().err
    arguments = ["prepare", str(faces), f"--out={data}/records/inner"]
    assert vaejax(*arguments, monkeypatch=monkeypatch) == 2
    assert "which is a prepared data set" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pipe.png", "/dev/zero", "huge.png"])
def test_an_image_that_never_ends_is_refused_at_once(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    with open("huge.png", "wb") as file:
        file.truncate(2**40)
    assert vaejax("reconstruct", str(trained), name, monkeypatch=monkeypatch) == 2
    assert "it is not a regular file" in (error := capsys.readouterr().err) or "more than" in error


def test_an_error_says_nothing_to_the_terminal(capsys):
    with pytest.raises(SystemExit), cli.errors_as_messages():
        raise UserError("\x1b[2J of a stranger\nerror: none")
    assert capsys.readouterr().err == "error: \\x1b[2J of a stranger\\x0aerror: none\n"
