"""The Inception network whose features the Fréchet Inception distance is taken of.

InceptionV3 (Szegedy et al., 2016) as TensorFlow's graph of 2015-12-05 has it, which Heusel et al.
(2017) took, in the form in which pytorch-fid (mseitzer/pytorch-fid 0.3.0, inception.py, on top of
torchvision's models/inception.py) gives it to everybody else, with its names of layers: means over
neighbours leave out what lies outside the image, and the last block takes their maximum instead.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vaejax.evaluation.layers import coloured, convolve, largest, mean_of_neighbours
from vaejax.evaluation.weights import Weights, take

DIM = 2048
SIZE = 299  # pixels, to which images are resized
EPSILON = 1e-3  # of its batch norms

# A convolution with batch norm and relu: (x, name, outputs, kernel, stride, padding) -> y
Layer = Callable[..., Float[Array, "b _ _ _"]]
Layers = dict[str, tuple[Float[Array, "k l c o"], Float[Array, " o"]]]
Image = Float[Array, "b _ _ _"]


def load(weights: Weights) -> Layers:
    """Kernels and biases by the names of layers, with the batch norms taken into them.

    Raises UserError for a tensor that is missing or has another shape.
    """
    layers = {}
    for name, shape in kernels().items():
        (k, l, c, o), of = shape, partial(take, weights)  # noqa: E741
        kernel = of(f"{name}.conv.weight", shape=(o, c, k, l)).transpose(2, 3, 1, 0)
        scale, shift, mean, variance = (
            of(f"{name}.bn.{part}", shape=(o,)).astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + EPSILON)
        layers[name] = tuple(
            jnp.asarray(values, jnp.float32) for values in (kernel * scale, shift - mean * scale)
        )
    return layers


def kernels() -> dict[str, tuple[int, int, int, int]]:
    """The shape [k l c o] of each layer's kernel, as the network asks for it."""
    shapes = {}

    def note(x: Image, name: str, outputs: int, kernel=(1, 1), *how) -> Image:
        shapes[name] = (*kernel, x.shape[3], outputs)
        return convolve(x, jnp.zeros(shapes[name]), *how)

    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    jax.eval_shape(partial(pool3, note), image)
    return shapes


def extract(layers: Layers, images: UInt8[Array, "b h w c"]) -> Float[Array, "b d"]:
    """The 2048 features of images of any size."""
    x = coloured(images) / 255
    x = jax.image.resize(x, (len(x), SIZE, SIZE, 3), "bilinear", antialias=False)

    def layer(x: Image, name: str, outputs: int, kernel=(1, 1), *how) -> Image:
        weights, bias = layers[name]
        return jax.nn.relu(convolve(x, weights, *how) + bias[None, None, None])

    return pool3(layer, 2 * x - 1)


def pool3(layer: Layer, x: Image) -> Float[Array, "b d"]:
    """From images in [-1, 1] to the mean over positions of the last block."""
    x = layer(x, "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
    x = layer(x, "Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")
    x = layer(x, "Conv2d_2b_3x3", 64, (3, 3))
    x = largest(x, size=3, stride=2)
    x = layer(x, "Conv2d_3b_1x1", 80)
    x = layer(x, "Conv2d_4a_3x3", 192, (3, 3), 1, "VALID")
    x = largest(x, size=3, stride=2)
    for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        x = block_a(_within(layer, name), x, pooled)
    x = block_b(_within(layer, "6a"), x)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        x = block_c(_within(layer, name), x, width)
    x = block_d(_within(layer, "7a"), x)
    x = block_e(_within(layer, "7b"), x, mean_of_neighbours)
    x = block_e(_within(layer, "7c"), x, partial(largest, size=3, stride=1, padding="SAME"))
    return jnp.mean(x, axis=(1, 2))


def _within(layer: Layer, block: str) -> Layer:
    def inner(x: Image, name: str, *how) -> Image:
        return layer(x, f"Mixed_{block}.branch{name}", *how)

    return inner


def block_a(layer: Layer, x: Image, pooled: int) -> Image:
    one = layer(x, "1x1", 64)
    five = layer(layer(x, "5x5_1", 48), "5x5_2", 64, (5, 5))
    double = layer(layer(x, "3x3dbl_1", 64), "3x3dbl_2", 96, (3, 3))
    double = layer(double, "3x3dbl_3", 96, (3, 3))
    return _side_by_side(one, five, double, layer(mean_of_neighbours(x), "_pool", pooled))


def block_b(layer: Layer, x: Image) -> Image:
    three = layer(x, "3x3", 384, (3, 3), 2, "VALID")
    double = layer(layer(x, "3x3dbl_1", 64), "3x3dbl_2", 96, (3, 3))
    double = layer(double, "3x3dbl_3", 96, (3, 3), 2, "VALID")
    return _side_by_side(three, double, largest(x, size=3, stride=2))


def block_c(layer: Layer, x: Image, width: int) -> Image:
    one = layer(x, "1x1", 192)
    seven = layer(layer(x, "7x7_1", width), "7x7_2", width, (1, 7))
    seven = layer(seven, "7x7_3", 192, (7, 1))
    double = layer(layer(x, "7x7dbl_1", width), "7x7dbl_2", width, (7, 1))
    double = layer(layer(double, "7x7dbl_3", width, (1, 7)), "7x7dbl_4", width, (7, 1))
    double = layer(double, "7x7dbl_5", 192, (1, 7))
    return _side_by_side(one, seven, double, layer(mean_of_neighbours(x), "_pool", 192))


def block_d(layer: Layer, x: Image) -> Image:
    three = layer(layer(x, "3x3_1", 192), "3x3_2", 320, (3, 3), 2, "VALID")
    seven = layer(layer(x, "7x7x3_1", 192), "7x7x3_2", 192, (1, 7))
    seven = layer(layer(seven, "7x7x3_3", 192, (7, 1)), "7x7x3_4", 192, (3, 3), 2, "VALID")
    return _side_by_side(three, seven, largest(x, size=3, stride=2))


def block_e(layer: Layer, x: Image, pool: Callable[[Image], Image]) -> Image:
    one, three = layer(x, "1x1", 320), layer(x, "3x3_1", 384)
    three = _side_by_side(layer(three, "3x3_2a", 384, (1, 3)), layer(three, "3x3_2b", 384, (3, 1)))
    double = layer(layer(x, "3x3dbl_1", 448), "3x3dbl_2", 384, (3, 3))
    double = _side_by_side(
        layer(double, "3x3dbl_3a", 384, (1, 3)), layer(double, "3x3dbl_3b", 384, (3, 1))
    )
    return _side_by_side(one, three, double, layer(pool(x), "_pool", 192))


def _side_by_side(*branches: Image) -> Image:
    return jnp.concatenate(branches, axis=3)
