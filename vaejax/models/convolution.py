"""Convolutions and transposed convolutions with "same" padding as in Keras and any stride.

A convolution is linear in its input x and in its kernel w. Three functions compute it, its
transpose and the gradients of both:

    forward(x, w)             a convolution; the input gradient of a transposed convolution
    input_gradient(g, w)      a transposed convolution; the input gradient of a convolution
    kernel_gradient(x, g)     the kernel gradient of either

`jax.custom_vjp` connects them, because XLA runs the gradients that JAX derives slowly on a CPU,
some of them a hundred times slower. The result is the same up to rounding, whichever way it is
computed: `native_algorithm` chooses one of the C++ kernels, and `xla_form` the expression that XLA
gets otherwise. Only these two know what is fast on which backend; within
`kernels.plain_operations` they leave everything to XLA's own operation. Whoever compiles a program
with convolutions passes it `compiler_options`. `benchmarks/convolutions.py` measures the speed.
"""

from functools import cache, partial
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vaejax import kernels

Form = Literal["plain", "phases", "patches"]  # names of the functions below
Shape = tuple[int, ...]
Paddings = list[tuple[int, int]]  # before and after, of rows and columns; negative values crop

# With fewer multiplications the slowest form takes a few milliseconds, and "plain" compiles sooner.
MIN_PRODUCTS = 2**20
# Kernels that Winograd's algorithm can be used for: taps of rows and columns, and stride.
WINOGRAD = [(3, 3, 1), (5, 5, 2)]
# With fewer tiles, Winograd's transform of the kernel takes longer than the products. More are
# needed where so many transformed numbers do not stay in a cache (16 MiB).
MIN_TILES = 8
MIN_TILES_UNCACHED, MAX_CACHED = 32, 2**22
# The "windows" kernels are for images of few channels.
MAX_WINDOW_CHANNELS = 4

# On a CPU jaxlib 0.10 computes convolutions with YNNPACK, which runs those of few channels on one
# thread. These options make it use Eigen, which uses all cores, for convolutions only: YNNPACK is
# faster for matrix products and sums.
EIGEN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


@cache
def compiler_options() -> dict[str, str]:
    """Return the options of `jax.jit` for a program with convolutions: they change only its speed.

    Empty on other backends than a CPU, and if jaxlib, which calls the option experimental, does not
    know it.
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=EIGEN_CONVOLUTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return EIGEN_CONVOLUTIONS


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k l c o"], *, stride: int
) -> Float[Array, "b i j o"]:
    """Convolve with "same" padding; i and j are h and w divided by the stride, rounded up."""
    return _convolve(x, kernel, stride)


def convolve_transposed(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k l o c"], *, stride: int
) -> Float[Array, "b i j o"]:
    """Apply the adjoint of `convolve`, which is Keras' Conv2DTranspose; i, j are h, w times stride.

    The kernel is that of the convolution that is transposed, so that its output channels come
    before its input channels, as in Keras.
    """
    return _convolve_transposed(x, kernel, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, stride):
    return forward(x, kernel, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_transposed(x, kernel, stride):
    size = (x.shape[1] * stride, x.shape[2] * stride)
    return input_gradient(x, kernel, stride, size)


def _convolve_forward(x, kernel, stride):
    return _convolve(x, kernel, stride), (x, kernel)


def _convolve_backward(stride, saved, g):
    x, kernel = saved
    dx = input_gradient(g, kernel, stride, x.shape[1:3])
    return dx, kernel_gradient(x, g, stride, kernel.shape[:2])


def _convolve_transposed_forward(x, kernel, stride):
    return _convolve_transposed(x, kernel, stride), (x, kernel)


def _convolve_transposed_backward(stride, saved, g):
    x, kernel = saved  # x has the shape of the convolution's output, g that of its input
    return forward(g, kernel, stride), kernel_gradient(g, x, stride, kernel.shape[:2])


_convolve.defvjp(_convolve_forward, _convolve_backward)
_convolve_transposed.defvjp(_convolve_transposed_forward, _convolve_transposed_backward)


# Forward, input gradient, kernel gradient. The formulas are for one direction of the image. -------


def forward(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k l c o"], stride: int
) -> Float[Array, "b i j o"]:
    """Compute y[i] = sum over p of x[stride i + p - low] w[p].

    `low` is the number of zeros in front of the image.
    """
    outputs = tuple(-(-n // stride) for n in x.shape[1:3])
    paddings = _same(x.shape[1:3], outputs, kernel.shape[:2], stride)
    if algorithm := native_algorithm(x.shape, kernel.shape, stride, x, kernel):
        return kernels.forward(algorithm, x, kernel, **_window(algorithm, paddings, stride))
    return correlate(x, kernel, paddings, stride=stride)


def input_gradient(
    g: Float[Array, "b i j o"], kernel: Float[Array, "k l c o"], stride: int, size: Shape
) -> Float[Array, "b h w c"]:
    """Compute dx[n] = sum of g[i] w[p] over all i and p with stride i + p - low = n.

    `size` is the (h, w) of the result. This is the sum of `forward` for g with stride - 1 zeros
    between its pixels and the kernel rotated by 180 degrees.
    """
    taps = kernel.shape[:2]
    same = _same(size, g.shape[1:3], taps, stride)
    shape = (g.shape[0], *size, kernel.shape[2])
    if algorithm := native_algorithm(shape, kernel.shape, stride, g, kernel):
        window = _window(algorithm, same, stride)
        return kernels.input_gradient(algorithm, g, kernel, size, **window)
    paddings = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(taps, same, strict=True)]
    rotated = kernel[::-1, ::-1].swapaxes(2, 3)  # [k l o c]
    return correlate(g, rotated, paddings, dilation=stride)


def kernel_gradient(
    x: Float[Array, "b h w c"], g: Float[Array, "b i j o"], stride: int, size: Shape
) -> Float[Array, "k l c o"]:
    """Compute dw[p] = sum over i of x[stride i + p - low] g[i].

    `size` is the (k, l) of the result. This is a convolution of x by g, with the batch as its
    channels and the channels as its batch. As it is g, the kernel, that is dilated, it is fast in
    XLA as it stands, and needs no other form.
    """
    paddings = _same(x.shape[1:3], g.shape[1:3], size, stride)
    shape = (*size, x.shape[3], g.shape[3])
    if algorithm := native_algorithm(x.shape, shape, stride, x, g):
        window = _window(algorithm, paddings, stride)
        return kernels.kernel_gradient(algorithm, x, g, size, **window)
    return lax.conv_general_dilated(
        x,
        g,
        window_strides=(1, 1),
        padding=paddings,
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


def native_algorithm(
    image: Shape, kernel: Shape, stride: int, *operands: Array
) -> kernels.Algorithm | None:
    """Choose the C++ kernels for a convolution and its gradients; None leaves it to XLA.

    `image` and `kernel` are the shapes of the convolution, whichever of the three functions is
    computed; `operands` are the arrays that it is computed from.
    """
    (b, h, w, c), (rows, columns, *_) = image, kernel
    algorithm: kernels.Algorithm
    if rows == columns and rows >= stride and c <= MAX_WINDOW_CHANNELS:
        algorithm = "windows"
    elif (rows, columns, stride) in WINOGRAD and winograd_is_faster(image, kernel, stride):
        algorithm = "winograd"
    else:
        return None
    products = b * h * w * prod(kernel) // stride**2
    if h % stride or w % stride or products < MIN_PRODUCTS:
        return None
    return algorithm if all(kernels.supports(array.dtype) for array in operands) else None


def winograd_is_faster(image: Shape, kernel: Shape, stride: int) -> bool:
    """Tell whether Winograd's algorithm takes less time than XLA for all three functions together.

    Measured on two cores with AVX-512 for 3 to 512 channels, by the ratio of XLA's time to its own:
    1.5 to 3.5 for most shapes; 0.2 to 1 for outputs of 1x1 and 2x2, which leave three quarters or
    more of a tile empty; 1.2 at 5x5, which leaves 61% empty; 1 at 4 tiles, 1.7 to 2.6 at 8; with a
    kernel of 384 or 512 channels 0.8 at 8 tiles, 1 to 1.2 at 16 and 1.4 at 32.
    """
    b, h, w, c = image
    tiles = b * -(-h // (4 * stride)) * -(-w // (4 * stride))
    filled = b * h * w // stride**2 / (16 * tiles)
    points = 36 * stride**2 * c * kernel[3]
    return filled > 1 / 3 and tiles >= (MIN_TILES if points <= MAX_CACHED else MIN_TILES_UNCACHED)


def _window(algorithm: kernels.Algorithm, paddings: Paddings, stride: int) -> dict[str, int]:
    """Return the keyword arguments that the kernels need besides the arrays."""
    if algorithm == "winograd":
        return {"stride": stride}
    (top, _), (left, _) = paddings
    return {"stride": stride, "top": top, "left": left}


def _same(inputs: Shape, outputs: Shape, taps: Shape, stride: int) -> Paddings:
    """Return TensorFlow's "same" padding, whose odd pixel comes last.

    It is negative, and so crops, where the stride is larger than the kernel.
    """
    paddings = []
    for n, m, k in zip(inputs, outputs, taps, strict=True):
        total = (m - 1) * stride + k - n
        low = max(total, 0) // 2
        paddings.append((low, total - low))
    return paddings


# Correlations in XLA: y[i] = sum over p of x[stride i + p - low] w[p], where x is the image with
# dilation - 1 zeros between its pixels, and zeros around it. --------------------------------------


def xla_form(image: Shape, kernel: Shape, *, stride: int = 1, dilation: int = 1) -> Form:
    """Choose the form that is fastest on this backend, by the shapes of image and kernel."""
    products = prod(image[:3]) * prod(kernel) // stride**2
    if kernels.only_plain() or jax.default_backend() != "cpu" or products < MIN_PRODUCTS:
        return "plain"
    if 1 < dilation <= min(kernel[:2]):
        return "phases"
    if dilation == 1 and (kernel[0] > image[1] or kernel[1] > image[2]):
        return "patches"
    return "plain"


def correlate(
    image: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    paddings: Paddings,
    *,
    stride: int = 1,
    dilation: int = 1,
) -> Float[Array, "b i j o"]:
    """Compute the sum above in the form that `xla_form` chooses."""
    match xla_form(image.shape, kernel.shape, stride=stride, dilation=dilation):
        case "plain":
            return plain(image, kernel, paddings, stride, dilation)
        case "phases":
            return phases(image, kernel, paddings, dilation)
        case "patches":
            return patches(image, kernel, paddings, stride)


def plain(
    image: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    paddings: Paddings,
    stride: int = 1,
    dilation: int = 1,
) -> Float[Array, "b i j o"]:
    """Convolve with XLA's own operation.

    The fastest form on a GPU, where cuDNN computes it directly, and on a CPU for images without
    dilation that are at least as large as the kernel.
    """
    return lax.conv_general_dilated(
        image,
        kernel,
        window_strides=(stride, stride),
        padding=paddings,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def phases(
    image: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    paddings: Paddings,
    dilation: int,
) -> Float[Array, "b i j o"]:
    """Convolve a dilated image without multiplying its zeros: the fastest form on a CPU.

    The outputs n = dilation a + r of phase r depend on every dilation-th tap only:
    p = first + dilation t, where low - r = dilation before + first. So
    y[dilation a + r] = sum over t of image[a + t - before] w[first + dilation t]
    is a small convolution without dilation for each phase; their outputs are interleaved.
    """
    directions = zip(image.shape[1:3], kernel.shape[:2], paddings, strict=True)
    (i, rows), (j, columns) = (_phases(*direction, dilation) for direction in directions)
    phase_rows = [
        jnp.stack(
            [
                correlate(image, kernel[top::dilation, left::dilation], [row, column])
                for left, column in columns
            ],
            axis=3,
        )
        for top, row in rows
    ]
    interleaved = jnp.stack(phase_rows, axis=2)  # [b a (row's phase) a (column's phase) o]
    b, a, _, _, _, o = interleaved.shape
    return interleaved.reshape(b, a * dilation, -1, o)[:, :i, :j]


def _phases(n: int, taps: int, padding: tuple[int, int], dilation: int):
    """Return the size of the output, and the first tap and the padding of every phase."""
    low, high = padding
    size = dilation * (n - 1) + 1 + low + high - taps + 1
    firsts_and_paddings = []
    for r in range(dilation):
        before, first = divmod(low - r, dilation)
        count = -(-(taps - first) // dilation)
        after = -(-size // dilation) - n - before + count - 1
        firsts_and_paddings.append((first, (before, after)))
    return size, firsts_and_paddings


def patches(
    image: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    paddings: Paddings,
    stride: int = 1,
) -> Float[Array, "b i j o"]:
    """Convolve by one matrix product of the image's patches and the kernel (im2col).

    The fastest form on a CPU for an image smaller than the kernel, for which XLA uses a naive loop;
    the patches of such an image take little memory.
    """
    rows, columns = kernel.shape[:2]
    edges = [(0, 0, 0), *((low, high, 0) for low, high in paddings), (0, 0, 0)]
    padded = lax.pad(image, jnp.zeros((), image.dtype), edges)
    i, j = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    shifted = [  # the pixels that each tap multiplies, [b i j c]
        padded[:, p : p + i : stride, q : q + j : stride]
        for p in range(rows)
        for q in range(columns)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
