"""The sweep as a person starts it: tiny, drawn once all are done, and gone on with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = ["--size", "16", "--width", "1", "--latent-dim", "4", "--batch-size", "8"]


def sweep(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments" / "rate_distortion.py"), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_each_weight_is_a_run_and_a_point_and_the_same_command_goes_on(faces: Path, tmp_path: Path):
    flags = ["--data", str(faces), *TINY, "--steps", "4", "--weights", "0.01", "--out", "sweep"]
    done = sweep(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "sweep"
    runs = sorted(path.parent.name for path in out.glob("*/config.json"))
    # pythae's 2 d / n, PyTorch-VAE's 0.00025 d
    assert runs == ["calibrated", "kl-0.001", "kl-0.01", "kl-0.01042"]  # the report's is among ours
    found = json.loads((out / "rate_distortion.json").read_text())
    assert found["curve"].keys() == {"0.001", "0.01", "0.01042"}
    assert [name.split(" ")[0] for name in found["named"]] == [
        "report",
        "PyTorch-VAE",
        "pythae",
        "calibrated",
    ]
    for point in (*found["curve"].values(), *found["named"].values()):
        np.testing.assert_allclose(point["elbo"], -(point["rate"] + point["distortion"]), rtol=1e-6)
        np.testing.assert_allclose(point["rate"], 4 * point["kl"], rtol=1e-5)
    with Image.open(out / "rate_distortion.png") as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 50
    before = (out / "rate_distortion.json").read_bytes()
    (out / "rate_distortion.json").unlink()
    done = sweep(*flags, cwd=tmp_path)
    assert done.stdout.count("is finished") == 4
    assert "held-out images" not in done.stderr  # they were measured
    assert (out / "rate_distortion.json").read_bytes() == before


def test_a_weight_that_cannot_be_is_refused(tmp_path: Path):
    done = sweep("--weights", "0.1", "-1", cwd=tmp_path)
    assert done.returncode == 2
    assert "--weights" in done.stderr
    assert "Traceback" not in done.stderr
