"""The report's students: a VAE of 150 million parameters at 256 pixels, on photographs of people.

    python experiments/students.py --data students.zip                    the report's run
    python experiments/students.py --data students.zip --micro-batch 16   the same in less memory
    python experiments/students.py --data students.zip --recipe faces --size 128   better faces
    python experiments/students.py --help                                 every flag

Each photograph is cut down to its largest face (--no-crop-faces leaves it as it is), and whoever is
held out is a person never seen.

The report trained on 832 photographs of 49 students. Of 1,500 epochs it made 234, then its memory
ran out. On its last training batch it had mse 0.00543 and kl 0.179, from 0.0802 and 0.00069.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from vaejax import cli, losses
from vaejax.errors import UserError
from vaejax.models.layers import Norm
from vaejax.models.residual import ResidualVAE
from vaejax.models.vae import VAE
from vaejax.recipes import FACES
from vaejax.training.config import Config, Recipe, resolve
from vaejax.training.fit import fit


@dataclass(frozen=True)
class Flags(Config):
    data: Path | None = None  # folder or zip of photographs, one sub-folder a person (needed)
    recipe: Literal["report", "faces"] | None = None  # "faces" draws better ones, in minutes
    crop_faces: bool = True  # cut every picture down to its largest face
    kl_weight: float | None = None  # loss = mse + kl_weight * kl, both means
    latent_dim: int | None = None  # numbers that describe a face
    norm: Norm | None = None  # "affine": what the report really trained; "batch": batch norm
    beta: float | None = None  # weight of the rate in nats; 1 is the ELBO's


REPORT = Recipe("report", VAE(size=256), partial(losses.mse_kl, kl_weight=0.01), epochs=1500)
# of some hundred photographs a prior cannot learn how the regions of a face go together
FEW_FACES = replace(FACES, model=ResidualVAE(), prior_width=512)


def main(config: Flags) -> None:
    if config.data is None:
        raise UserError(
            "no photographs ship with vaejax: give --data, a folder or zip with one sub-folder a "
            "person, such as students/anna/1.jpg, students/anna/2.jpg, students/ben/1.jpg"
        )
    fit("students", config, resolve(config, REPORT, FEW_FACES))


if __name__ == "__main__":
    cli.experiment(main, Flags, __doc__)
