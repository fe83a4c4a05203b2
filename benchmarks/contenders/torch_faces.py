"""What the contenders of `faces.py` that use PyTorch share: their command line and their files.

    CONTENDER.py speed DATA BEGAN
    CONTENDER.py train DATA OUT UPDATES PRIOR_UPDATES SEED

`speed` prints one line of JSON: the seconds that do not depend on the length of the training, those
of an update of the model and of its prior, and of a sample. BEGAN is `time.monotonic()` when the
process was started. `train` reads train.npy, half.npy and test.npy (uint8, `[n h w c]`) from DATA,
and writes samples.npy, the reconstructions of the other two, if there are any, and facts.json.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

SAMPLES = 1000
WARM, TIMED = 3, 15  # updates that are made before the time is taken, and of which it is


class Drawn(NamedTuple):
    """What a trained contender leaves."""

    samples: torch.Tensor  # [n c h w], in [0, 1]
    reconstructions: Callable[[torch.Tensor], torch.Tensor] | None
    parameters: int
    seen: int  # images


class Contender(NamedTuple):
    """How a contender is measured and trained."""

    packages: tuple[str, ...]
    speed: Callable[[torch.Tensor, float], dict[str, float]]  # of training images, and of BEGAN
    train: Callable[[torch.Tensor, Path, int, int], Drawn]  # images, folder, both updates


def main(contender: Contender) -> None:
    """Do what the command line asks for."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    command, data = sys.argv[1], Path(sys.argv[2])
    images = read(data / "train.npy")
    if command == "speed":
        print(json.dumps(contender.speed(images, float(sys.argv[3]))))
        return
    out, updates, prior_updates, seed = Path(sys.argv[3]), *map(int, sys.argv[4:])
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  scikit-learn draws from it
    drawn = contender.train(images, out, updates, prior_updates)
    np.save(out / "samples.npy", to_levels(drawn.samples))
    if drawn.reconstructions:
        for split in ("half", "test"):
            with torch.no_grad():
                parts = [drawn.reconstructions(x) for x in read(data / f"{split}.npy").split(100)]
            np.save(out / f"{split}.npy", to_levels(torch.cat(parts)))
    versions = {name: version(name) for name in ("torch", *contender.packages)}
    facts = {"parameters": drawn.parameters, "seen": drawn.seen, "versions": versions}
    (out / "facts.json").write_text(json.dumps(facts))


def read(path: Path) -> torch.Tensor:
    """Read images as floats in [0, 1], `[n c h w]`."""
    return torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).float().div_(255).contiguous()


def to_levels(x: torch.Tensor) -> np.ndarray:
    """Round images `[n c h w]` in [0, 1] to levels `[n h w c]`."""
    levels = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).numpy()


def count(*modules: Any) -> int:
    """Count the parameters of modules."""
    return sum(p.numel() for module in modules for p in module.parameters())


def median_interval(times: list[float]) -> float:
    """Return the median time between two updates, without the first ones."""
    return median(b - a for a, b in zip(times[WARM:], times[WARM + 1 :], strict=False))


def seconds(act: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median time of a call, after a first one."""
    times = []
    for _ in range(1 + repeats):
        began = time.monotonic()
        act()
        times.append(time.monotonic() - began)
    return median(times[1:])
