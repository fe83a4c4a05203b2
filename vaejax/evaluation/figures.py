"""What a run is judged by: each figure's unit, its good direction, and what it says."""

from typing import Literal, NamedTuple


class Estimate(NamedTuple):
    value: float
    error: float | None = None  # a standard error, or a standard deviation over sets of images


class Figure(NamedTuple):
    group: str
    unit: str
    better: Literal["higher", "lower", "1", "0", ""]  # or nearer to 1 or 0; "": neither
    meaning: str


REPORT, LIKELIHOOD = "The report's", "Likelihood"
PICTURES, FACES = "Reconstructions", "Faces, as a distribution"
PRIOR, MEMORY = "The hole in the prior", "Memory of the training set"

# the sets of faces that are held against the held-out ones
SAMPLES, RECONSTRUCTIONS, TRAIN = "samples", "reconstructions", "train"
HELD_OUT = "held_out"
SETS = (SAMPLES, RECONSTRUCTIONS, TRAIN, HELD_OUT)

FIGURES = {
    "mse": Figure(REPORT, "in [0, 1]²", "lower", "mean squared error of a sampled code's output"),
    "kl": Figure(REPORT, "nats/dim", "", "KL(q(z|x) ‖ N(0, I)), a mean over latent dimensions"),
    "report_loss": Figure(REPORT, "", "lower", "mse + 0.01 · kl"),
    "deviation": Figure(
        LIKELIHOOD, "levels", "lower", "σ of the likelihood, fitted on the validation split"
    ),
    "distortion": Figure(LIKELIHOOD, "nats/image", "lower", "−log p(x|z) over the 256 levels"),
    "rate": Figure(LIKELIHOOD, "nats/image", "", "KL(q(z|x) ‖ N(0, I))"),
    "elbo": Figure(LIKELIHOOD, "nats/image", "higher", "−(distortion + rate)"),
    "bits_per_dim": Figure(
        LIKELIHOOD, "bits/value", "lower", "(distortion + rate) / (values · log 2)"
    ),
    "distortion_bits": Figure(
        LIKELIHOOD, "bits/value", "lower", "distortion / (values · log 2): the code is not counted"
    ),
    "effective_beta": Figure(
        LIKELIHOOD, "", "1", "weight of the rate against the distortion: 1 is the ELBO"
    ),
    "importance_elbo": Figure(
        LIKELIHOOD, "nats/image", "higher", "the ELBO of the images of importance_bound"
    ),
    "importance_bound": Figure(
        LIKELIHOOD, "nats/image", "higher", "log-likelihood, from below: importance-weighted"
    ),
    "active_units": Figure(
        LIKELIHOOD, "dims", "", "dimensions whose posterior mean varies by more than 0.01"
    ),
    "psnr": Figure(PICTURES, "dB", "higher", "peak signal-to-noise ratio"),
    "ssim": Figure(PICTURES, "", "higher", "structural similarity, 1 for a copy"),
    "frechet": Figure(FACES, "", "lower", "Fréchet distance of two Gaussians over the features"),
    "kernel": Figure(FACES, "", "lower", "kernel distance: squared MMD over the features"),
    "precision": Figure(FACES, "", "higher", "share of the faces that lie among held-out ones"),
    "recall": Figure(FACES, "", "higher", "share of held-out faces that lie among these"),
    "density": Figure(FACES, "", "higher", "how many held-out neighbourhoods a face lies in"),
    "coverage": Figure(FACES, "", "higher", "share of held-out faces with one of these near"),
    "mmd": Figure(PRIOR, "", "0", "squared MMD of codes from N(0, I), below 2"),
    "index_code": Figure(
        PRIOR,
        "nats/image",
        "",
        "the share of the rate that tells images apart (≤ log of their number)",
    ),
    "marginal_kl": Figure(
        PRIOR, "nats/image", "lower", "the rest of the rate: KL(q(z) ‖ N(0, I)) of all codes"
    ),
    "frechet_gap": Figure(PRIOR, "", "", "frechet of samples − of reconstructions"),
    "kernel_gap": Figure(PRIOR, "", "", "kernel of samples − of reconstructions"),
    "nearest_pixels": Figure(
        MEMORY, "rms in [0, 1]", "", "median distance from the nearest training face, by pixels"
    ),
    "nearest_features": Figure(
        MEMORY, "", "", "median distance from the nearest training face, by features"
    ),
    "nearest_person": Figure(
        MEMORY, "", "", "median distance from the nearest training person's mean features"
    ),
    "copies_pixels": Figure(
        MEMORY,
        "",
        "lower",
        "share nearer to a training face than 99 % of held-out ones, by pixels: 0.01 by chance",
    ),
    "copies_features": Figure(MEMORY, "", "lower", "the same by features"),
    "copies_person": Figure(MEMORY, "", "lower", "the same to a training person's mean features"),
    "persons": Figure(MEMORY, "persons", "higher", "effective number of persons nearest to them"),
}


def name(figure: str, faces: str) -> str:
    """How a figure of a set of faces is called, as in "frechet/samples"."""
    return f"{figure}/{faces}"
