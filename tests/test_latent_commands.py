"""Walks, traversals, edits and nearest faces of small runs, and what a person may get wrong."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest
from PIL import Image
from test_cli import vaejax

from vaejax import generate, latent, losses, pictures
from vaejax.data.batches import Images
from vaejax.data.prepare import prepare
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.vae import VAE
from vaejax.training import directions, run
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit


class Quarters(Autoencoder):
    """A deterministic model whose latents, `[b 2 2 3]`, are the means of an image's quarters."""

    def setup(self):
        self.gain = self.param("gain", nn.initializers.constant(4.0), (1,))

    def encode(self, x, *, train, axis=None):
        side = self.size // 2
        return x.reshape(len(x), 2, side, 2, side, 3).mean(axis=(2, 4))

    def decode(self, z, *, train, axis=None):
        z = nn.sigmoid(self.gain[None, None, None] * (z - 0.5))
        return z.repeat(self.size // 2, axis=1).repeat(self.size // 2, axis=2)


MODELS = {
    "variational": (
        VAE(size=16, latent_dim=4, width=1, norm="batch"),
        partial(losses.mse_kl, kl_weight=0.01),
    ),
    "deterministic": (Quarters(size=16), partial(losses.reconstruction, error="mse")),
}


@pytest.fixture(scope="module")
def many(shared: Callable[..., Path], draw: Callable[..., np.ndarray]) -> Path:
    """A folder of 400 PNGs of 16 x 16, and beside it labels: which are bright, and chance."""

    def make(folder: Path) -> None:
        (folder / "faces").mkdir(parents=True)
        lines = ["file,bright,day"]
        for i, image in enumerate(draw(400, 16)):
            Image.fromarray(image).save(folder / "faces" / f"{i:03}.png")
            lines.append(
                f"{i:03}.png,{'yes' if image.mean() > 128 else 'no'},{('mo', 'tu')[i % 2]}"
            )
        (folder / "labels.csv").write_text("\n".join(lines))

    return shared("many", make)


@pytest.fixture(scope="module")
def runs(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    data = prepare(many / "faces", size=16, say=lambda _: None)
    for name, (model, loss) in MODELS.items():
        config = Config(data=data, out=folder / name, recipe="quick", steps=2)
        recipe = Recipe("quick", model, loss, epochs=1, batch_size=8)
        fit("tiny", config, resolve(config, recipe))
    return {name: folder / name for name in MODELS}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """call("verb", ...) -> exit code, and what was printed."""

    def run_command(*arguments: object) -> tuple[int, str]:
        code = vaejax(*map(str, arguments), monkeypatch=monkeypatch)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run_command


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def faces_of(sheet: np.ndarray, *, side: int = 16, left: int = 0, top: int = 0) -> np.ndarray:
    """The images in a picture, by row and column."""
    rows, columns = ((n - 2) // (side + 2) for n in (sheet.shape[0] - top, sheet.shape[1] - left))
    cut = lambda i, j: sheet[  # noqa: E731
        top + 2 + i * (side + 2) :, left + 2 + j * (side + 2) :][:side, :side]  # fmt: skip
    return np.stack([np.stack([cut(i, j) for j in range(columns)]) for i in range(rows)])


# Interpolate


def test_the_ends_of_a_strip_are_the_faces_of_its_seeds(runs, call, tmp_path: Path):
    out, sampled = tmp_path / "strip.png", tmp_path / "sampled.png"
    assert call("interpolate", runs["variational"], 3, 17, 5, "--out", out)[0] == 0
    assert call("sample", runs["variational"], "--seeds", "3,17,5", "--out", sampled)[0] == 0
    strip, seeds = faces_of(read(out)), faces_of(read(sampled)).reshape(-1, 16, 16, 3)[:3]
    assert strip.shape == (2, 8, 16, 16, 3)
    ends = strip[[0, 0, 1, 1], [0, 7, 0, 7]].astype(int)
    assert np.abs(ends - seeds[[0, 1, 1, 2]]).max() <= 1  # of the number that is decoded at a time
    assert len({face.tobytes() for face in strip[0]}) == 8


@pytest.mark.parametrize("kind", MODELS)
def test_the_ends_of_a_strip_are_the_reconstructions_of_its_images(
    kind: str, runs, many: Path, call, tmp_path: Path
):
    out, known = tmp_path / "strip.png", tmp_path / "known.png"
    images = many / "faces" / "000.png", many / "faces" / "001.png"
    arguments = ["interpolate", runs[kind], "--images", *images, "--frames", 3, "--out", out]
    assert call(*arguments)[0] == 0
    assert call("reconstruct", runs[kind], *images, "--out", known)[0] == 0
    strip, expected = faces_of(read(out))[0].astype(int), faces_of(read(known))[1]
    assert len(strip) == 3
    assert np.abs(strip[[0, 2]] - expected).max() <= 1


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_a_film_has_its_frames_at_the_size_of_its_grid(kind: str, runs, call, tmp_path: Path):
    import cv2

    out = tmp_path / f"walk.{kind}"
    arguments = ["interpolate", runs["variational"], "--seeds", "0-3", "--grid", "2x1"]
    assert call(*arguments, "--frames", 12, "--out", out)[0] == 0
    film = cv2.VideoCapture(str(out))
    frames = []
    while (frame := film.read())[0]:
        frames.append(frame[1])
    assert len(frames) == 12
    assert frames[0].shape == (260, 518, 3)
    apart = [np.abs(frame.astype(float) - frames[0]).mean() for frame in frames]
    assert apart[11] < 0.6 * max(apart)  # it comes back


def test_a_film_is_drawn_a_few_frames_at_a_time(runs, call, tmp_path: Path, monkeypatch):
    sizes = []
    decode = generate.decode_vectors

    def counted(params, stats, vectors, **settings):
        sizes.append((len(vectors), settings["batch_size"]))
        return decode(params, stats, vectors, **settings)

    monkeypatch.setattr(generate, "decode_vectors", counted)
    monkeypatch.setattr(generate, "BATCH", 8)
    out = tmp_path / "walk.mp4"
    assert call("interpolate", runs["variational"], 0, 1, "--frames", 20, "--out", out)[0] == 0
    assert sizes == [(8, 8), (8, 8), (4, 8)]


# Traverse


def test_the_middle_of_a_traversal_is_the_face_and_the_components_are_kept(
    runs, call, tmp_path: Path, monkeypatch
):
    out, sampled = tmp_path / "sheet.png", tmp_path / "sampled.png"
    loaded = run.load(runs["variational"])
    first = directions.components(loaded)
    monkeypatch.setattr(generate, "posterior_means", None)  # it is not needed again
    assert call("traverse", runs["variational"], "--seed", 4, "--out", out)[0] == 0
    assert call("sample", runs["variational"], "--seeds", 4, "--out", sampled)[0] == 0
    face = pictures.enlarge(faces_of(read(sampled))[0], 4)[0].astype(int)
    sheet = read(out)
    left, top = sheet.shape[1] - 7 * 66 - 2, sheet.shape[0] - 4 * 66 - 2
    rows = faces_of(sheet, side=64, left=left, top=top)
    assert rows.shape[:2] == (4, 7)
    assert np.abs(rows[:, 3] - face).max() <= 3
    moved = loaded._replace(weights=loaded.weights._replace(digest="other"))
    with pytest.raises(TypeError):  # those of other weights are computed anew
        directions.components(moved)
    again = directions.components(loaded)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_deterministic_model_is_traversed_from_the_mean_or_an_image(
    runs, many: Path, call, tmp_path: Path
):
    for start in ([], ["--image", many / "faces" / "000.png"]):
        out = tmp_path / f"sheet{len(start)}.png"
        arguments = ["traverse", runs["deterministic"], "--directions", 2, *start, "--out", out]
        assert call(*arguments)[0] == 0
    a, b = (read(tmp_path / f"sheet{n}.png") for n in (0, 2))
    assert a.shape == b.shape
    assert not np.array_equal(a, b)


def test_damaged_components_are_computed_again(runs):
    loaded = run.load(runs["deterministic"])
    first = directions.components(loaded)
    path = runs["deterministic"] / "latents" / "components.npz"
    for damage in (b"", path.read_bytes()[:-30]):
        path.write_bytes(damage)
        again = directions.components(loaded)
        assert np.array_equal(first.vectors, again.vectors)
    np.savez(path, format=directions.FORMAT, digest=loaded.weights.digest, mean=np.zeros(3))
    assert np.array_equal(first.vectors, directions.components(loaded).vectors)


# Directions and edits


@pytest.fixture(scope="module")
def with_directions(runs, many: Path) -> None:
    for folder in runs.values():
        directions.fit(run.load(folder), many / "labels.csv")


def test_directions_say_what_the_latents_have_and_what_not(runs, many: Path, call):
    code, printed = call("directions", runs["deterministic"], "--labels", many / "labels.csv")
    assert code == 0
    table, left_out = printed.split("Left out")
    assert "bright=yes" in table
    assert "day=mo (0." in left_out
    assert "day" not in table


def test_an_edit_towards_an_attribute_gives_the_face_that_attribute(
    with_directions, runs, many: Path, call, tmp_path: Path
):
    out, image = tmp_path / "edited.png", many / "faces" / "000.png"
    brightness = {}
    for change in ("bright=+2", "bright=-2", "bright=+0", "bright=yes", "bright=no"):
        arguments = ["edit", runs["deterministic"], image, "--set", change, "--out", out]
        assert call(*arguments)[0] == 0
        sheet = read(out)
        shown, decoded, edited = faces_of(sheet, side=64, left=sheet.shape[1] - 68)[:, 0]
        assert np.array_equal(shown, pictures.enlarge(read(image)[None], 4)[0])
        brightness[change] = edited.mean() - decoded.astype(float).mean()
    assert brightness["bright=-2"] < brightness["bright=+0"] == 0 < brightness["bright=+2"]
    assert brightness["bright=no"] < brightness["bright=yes"]
    assert 0 in (brightness["bright=no"], brightness["bright=yes"])  # the one that it has


def test_edits_of_seeds_stand_below_their_faces(
    with_directions, runs, call, tmp_path: Path, monkeypatch
):
    out, sampled = tmp_path / "edited.png", tmp_path / "sampled.png"
    arguments = ["edit", runs["variational"], "--seeds", "0-11", "--set", "bright=+0"]
    monkeypatch.setattr(latent, "MIN_AUC", 0.0)  # after two updates it knows of nothing
    assert call(*arguments, "--out", out)[0] == 0
    assert call("sample", runs["variational"], "--seeds", "0-11", "--out", sampled)[0] == 0
    expected = pictures.enlarge(faces_of(read(sampled)).reshape(-1, 16, 16, 3), 4).astype(int)
    sheet = read(out)
    left = sheet.shape[1] - 10 * 66 - 2
    first, second = sheet[: 2 * 66 + 2], sheet[2 * 66 + 2 :]
    for part, some in ((first, expected[:10]), (second, expected[10:12])):
        rows = faces_of(part, side=64, left=left)[:, : len(some)]
        assert np.abs(rows - some).max() <= 3


# Nearest


def test_the_nearest_training_face_of_a_training_face_is_itself(
    runs, call, tmp_path: Path, many: Path
):
    out = tmp_path / "nearest.png"
    loaded = run.load(runs["deterministic"])
    training = Images(Path(loaded.spec.schedule.prepared), "train")
    paths = [training.metadata(i)["path"] for i in (3, 7)]
    files = [many / "faces" / path for path in paths]
    code, printed = call("nearest", runs["deterministic"], *files, "--out", out)
    assert code == 0
    assert "pixels only" in printed  # VGG16 takes no images of 16 pixels
    for path in paths:
        assert any(line.split()[:4] == [path, "0.0000", "0", "%"] and line.endswith(path)
                   for line in printed.splitlines())  # fmt: skip
    sheet = read(out)
    rows = faces_of(sheet, side=64, left=sheet.shape[1] - 2 * 66 - 2)
    assert np.array_equal(rows[0], rows[1])


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["interpolate", "variational"], "in one way"),
        (["interpolate", "variational", "3", "--seeds", "0-7"], "in one way"),
        (["interpolate", "variational", "3"], "1 faces for 1 walk: each needs two"),
        (["interpolate", "variational", "3", "x"], "neither a number"),
        (["interpolate", "variational", "3", "4", "--frames", "1"], "2 frames or more"),
        (["interpolate", "variational", "3", "4", "--out", "a.jpg"], ".png or .mp4 or .gif"),
        (["interpolate", "variational", "3", "4", "--grid", "2"], "as in 4x2"),
        (["interpolate", "variational", "3", "4", "--grid", "2x1"], "is of films"),
        (
            ["interpolate", "variational", "3", "4", "5", "--grid", "2x1", "--out", "a.mp4"],
            "3 faces for 2 walks",
        ),
        (
            ["interpolate", "variational", "3", "4", "--frames", "1", "--out", "a.mp4"],
            "less than the 2 faces",
        ),
        (["interpolate", "deterministic", "3", "4"], "which has no prior"),
        (["interpolate", "variational", "--images", "a.png", "b.png"], "a.png cannot be read"),
        (["traverse", "variational", "--seed", "1", "--image", "a.png"], "of which face"),
        (["traverse", "variational", "--directions", "0"], "at least 1"),
        (["traverse", "deterministic", "--seed", "1"], "which has no prior"),
        (["directions", "variational"], "trained without labels"),
        (["edit", "variational", "--set", "bright=+2"], "in one way"),
        (["edit", "variational", "--seed", "3"], "nothing to change"),
        (["edit", "deterministic", "IMAGE", "--set", "age=+2"], "age=+2: there is bright=no|yes"),
        (["edit", "variational", "--seed", "3", "--set", "bright=ye"], "bright is no, yes or a nu"),
        (["edit", "variational", "--seed", "3", "--set", "day=tu"], "do not have day=tu (AUC"),
        (["nearest", "variational", "a.png", "--seeds", "3"], "in one way"),
        (["nearest", "deterministic"], "which has no prior"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, with_directions, runs, many: Path, call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    verb, kind, *rest = arguments
    rest = [str(many / "faces" / "000.png") if word == "IMAGE" else word for word in rest]
    code, printed = call(verb, runs[kind], *rest)
    assert code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert words in printed
    assert list(tmp_path.iterdir()) == []


def test_labels_of_other_images_are_refused_with_the_counts_of_both(runs, call, tmp_path: Path):
    labels = tmp_path / "labels.csv"
    labels.write_text("file,hair\nx/1.jpg,red\nx/2.jpg,blue\n")
    code, printed = call("directions", runs["variational"], "--labels", labels)
    assert code == 2
    assert "names 2 files" in printed
    assert "training images, but no file is one of them: it names 'x/1.jpg'" in printed
