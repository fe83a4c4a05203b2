"""The files of docs/extending.md run as they are."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax import cli, metrics
from vaejax.models import autoencoder
from vaejax.training import checkpoint, run

pytestmark = pytest.mark.slow
TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
TINY = ["--size", "16", "--batch-size", "8", "--log-steps", "1", "--devices", "1"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """start(name, *arguments) -> what the file defines, after it was run as a program."""
    monkeypatch.chdir(tmp_path)

    def run_file(name: str, *arguments: str) -> dict:
        module = name.removesuffix(".py")
        Path(name).write_text(FILES[name])
        monkeypatch.setattr(sys, "argv", ["vaejax", "--import", name, *arguments])
        cli._import_files()
        defined = vars(sys.modules[module])
        if "Recipe" in defined:
            flags = cli.parse(defined.get("Flags", defined["Config"]), description="")
            defined["main"](flags)
        else:
            defined["main"](*arguments)
        return defined

    return run_file


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_document_has_the_files_that_are_run_here():
    assert list(FILES) == ["spatial.py", "critic.py", "cautious.py", "mean_absolute.py"]


def test_a_model_of_ones_own_trains_resumes_bit_for_bit_and_samples(
    start, faces: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = ["--data", str(faces), *TINY, "--z-channels", "2", "--checkpoint-steps", "3"]
    flags += ["--epochs", "1"]
    defined = start("spatial.py", *flags, "--out", "run")
    spec = run.read_spec(Path("run"))
    assert spec.model["widths"] == [16, 32, 32]
    assert spec.model["z_channels"] == 2
    assert autoencoder.from_json(spec.model) == defined["GridVAE"](size=16, z_channels=2)
    before = checkpoint.newest(Path("run"), expected=True)
    faces_before = Path("run/faces.png").read_bytes()
    assert before is not None
    last = before.step
    Path("run/faces.png").unlink()
    (Path("run") / "checkpoints" / f"{last:07}" / "manifest.json").unlink()  # as if never written
    status = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**status, "status": "stopped"}))
    start("spatial.py", *flags, "--out", "run")
    after = checkpoint.newest(Path("run"), expected=True)
    assert after is not None
    assert (after.step, after.state_digest) == (last, before.state_digest)
    assert Path("run/faces.png").read_bytes() == faces_before

    arguments = ["vaejax", "--import", "spatial.py", "sample", "run", "--seeds", "0-3"]
    for prior in ("normal", "mixture"):
        monkeypatch.setattr(sys, "argv", [*arguments, "--prior", prior, "--out", f"{prior}.png"])
        cli.main()
    normal, mixture = (np.asarray(Image.open(f"{name}.png")) for name in ("normal", "mixture"))
    assert normal.shape == mixture.shape == (38, 38, 3)
    assert Path("run/priors/mixture.npz").exists()


def test_a_critic_of_ones_own_is_trained_by_one_scalar_loss(start, faces: Path):
    flags = ["--data", str(faces), *TINY, "--latent-dim", "4", "--steps", "3", "--out", "run"]
    start("critic.py", *flags, "--adversarial-weight", "0.5")
    train = [line for line in lines(Path("run")) if line["split"] == "train"]
    assert [line["step"] for line in train] == [0, 1, 2]
    assert train[2]["critic_loss"] != train[0]["critic_loss"]
    assert run.read_spec(Path("run")).loss["adversarial_weight"] == 0.5
    assert all(line["effective_beta"] == 1 for line in train)


def test_a_prior_and_a_metric_of_ones_own(start, faces: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "METRICS", metrics.METRICS)  # the row goes with the test
    rows = dict(metrics.METRICS)
    try:
        flags = ["--data", str(faces), *TINY, "--steps", "3", "--out", "run"]
        start("mean_absolute.py", *flags)
        assert all(0 < line["mae"] < 1 for line in lines(Path("run")))
        assert "| mae | " in Path("run/README.md").read_text()
    finally:
        metrics.METRICS.clear()
        metrics.METRICS.update(rows)
    defined = start("cautious.py", "run")
    with Image.open("cautious.png") as picture:
        assert picture.size == (5 * 18 + 2, 5 * 18 + 2)
    model = run.load(Path("run")).model
    prior, normal = (defined["Cautious"](model, scale) for scale in (0.5, 1.0))
    z = prior.sample([3, 4])
    np.testing.assert_allclose(z, 0.5 * np.asarray(normal.sample([3, 4])), rtol=1e-6)
    expected = -0.5 * np.sum((np.asarray(z) / 0.5) ** 2 + np.log(2 * np.pi * 0.25), axis=1)
    np.testing.assert_allclose(prior.log_prob(z), expected, rtol=1e-5)
