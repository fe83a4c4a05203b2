"""Where the codes of images lie, against where the prior would have them. NumPy, in float64."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

ACTIVE = 0.01  # variance of a dimension's mean over the data (Burda et al., 2016, section 5.3)
BLOCK = 512  # images that are held against all others at a time

Codes = Float[np.ndarray, "n d"]


def active_units(means: Codes) -> int:
    """Latent dimensions whose posterior mean has a variance above 0.01 over the images: those that
    tell images apart (Burda et al., 2016, equation 9)."""
    return int(np.sum(np.var(means.astype(np.float64), axis=0) > ACTIVE))


class Rate(NamedTuple):
    """A rate in two parts, nats per image."""

    index_code: float  # what z tells of which image it came from
    marginal_kl: float  # KL from the aggregated posterior to the prior


def split_rate(means: Codes, log_variances: Codes, z: Codes) -> Rate:
    """The rate as mutual information and the hole in the prior, of z drawn once for each image.

    With q(z) = 1/n sum of q(z|x_i) over these very images, the rate is the index-code information
    I(i; z), at most log n, plus KL(q(z) || p(z)) (Hoffman and Johnson, 2016, ELBO surgery,
    equation 8). Both are estimated at z; their sum is the rate as estimated there.
    """
    means, log_variances, z = (a.astype(np.float64) for a in (means, log_variances, z))
    precisions = np.exp(-log_variances)
    # log q(z_i | x_j) + d/2 log 2 pi = -1/2 sum of (z_i - m_j)^2 / v_j + log v_j, as products
    constant = np.sum(means**2 * precisions + log_variances, axis=1)
    own, mixed = np.empty(len(z)), np.empty(len(z))
    for first in range(0, len(z), BLOCK):
        some = slice(first, first + BLOCK)
        squares = z[some] ** 2 @ precisions.T - 2 * z[some] @ (means * precisions).T
        logs = -0.5 * (squares + constant)
        mixed[some] = logsumexp(logs, axis=1) - np.log(len(z))
        own[some] = logs[np.arange(len(logs)), np.arange(first, first + len(logs))]
    prior = -0.5 * np.sum(z**2, axis=1)
    return Rate(float(np.mean(own - mixed)), float(np.mean(mixed - prior)))


def prior_mmd(z: Codes) -> float:
    """Squared maximum mean discrepancy of z from N(0, I): 0 in expectation if it is where they come
    from, negative by chance, at most 1.

    The unbiased estimate of Gretton et al. (2012), equation 3, for the kernel
    exp(-|x - y|^2 / 2d), whose width is that of the prior; the expectations over the prior are
    taken exactly, so that no draws of it add noise. Raises ValueError for less than two z.
    """
    n, d = z.shape
    if n < 2:
        raise ValueError("one point has no distance from others")
    z = z.astype(np.float64)
    squares = np.sum(z**2, axis=1)
    within = -float(n)  # the pairs of a point with itself
    for first in range(0, n, BLOCK):
        some = slice(first, first + BLOCK)
        distances = squares[some, None] + squares[None] - 2 * z[some] @ z.T
        within += float(np.sum(np.exp(-np.maximum(distances, 0) / (2 * d))))
    # the kernel's mean over one or two arguments from N(0, I): Gaussian integrals, width^2 = d
    across = np.mean((d / (d + 1)) ** (d / 2) * np.exp(-squares / (2 * (d + 1))))
    prior = (d / (d + 2)) ** (d / 2)
    return float(within / (n * (n - 1)) - 2 * across + prior)
