"""Convolutions and their transposes: "same" padding as in Keras, any stride, exact in every form.

A convolution is linear in its image x and in its kernel w. Three maps, each the adjoint of the
others, are all that it, its transpose and the gradients of both need:

    forward(x, w)             a convolution; the gradient of a transposed one by its input
    input_gradient(g, w)      a transposed convolution; the gradient of a convolution by its input
    kernel_gradient(x, g)     the gradient of either by its kernel

`jax.custom_vjp` ties them together, because what JAX derives by itself is the same mathematics in
shapes that XLA runs slowly on a CPU, some of them a hundred times slower. `native_form` says which
are taken by kernels of our own, `form` in which shape XLA gets the rest: the only places that know
what is fast where. `compiler_options` is for whoever compiles the program.
`benchmarks/convolutions.py` measures both.
"""

from functools import cache, partial
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vaejax import native

Form = Literal["plain", "phases", "patches"]  # of what XLA computes
Shape = tuple[int, ...]
Paddings = list[tuple[int, int]]  # before and after, rows and columns; negative cuts off

# below this many products the slowest form ends in a few milliseconds, and "plain" compiles sooner
TINY = 2**20
# below this many tiles Winograd's kernels take longer to transform than the tiles to multiply
FEW_TILES = 32
FEW_CHANNELS = 4

# jaxlib 0.10 gives a CPU's convolutions to YNNPACK, which runs those of few channels on one thread;
# Eigen takes every core. Matrix products and sums stay with YNNPACK, which is faster there.
EIGEN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    )
}


@cache
def compiler_options() -> dict[str, str]:
    """For `jax.jit` of a program with convolutions: they change its speed, not its results.

    Empty on other backends, and where jaxlib does not know the option: it calls it experimental.
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
    """Convolve with "same" padding: `i` and `j` are `h` and `w` over the stride, rounded up."""
    return _convolve(x, kernel, stride)


def convolve_transposed(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k l o c"], *, stride: int
) -> Float[Array, "b i j o"]:
    """Apply the adjoint of `convolve`: `i` and `j` are `h` and `w` times the stride.

    Keras' Conv2DTranspose. The kernel has its layout too, outputs before inputs: it is the kernel
    of the convolution that is transposed.
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
    x, kernel = saved  # x takes the place of the convolution's output, g that of its input
    return forward(g, kernel, stride), kernel_gradient(g, x, stride, kernel.shape[:2])


_convolve.defvjp(_convolve_forward, _convolve_backward)
_convolve_transposed.defvjp(_convolve_transposed_forward, _convolve_transposed_backward)


# The three maps. In formulas one direction of the image stands for both. -------------------------


def forward(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k l c o"], stride: int
) -> Float[Array, "b i j o"]:
    """y[i] = sum over p of x[stride i + p - low] w[p]."""
    outputs = tuple(-(-n // stride) for n in x.shape[1:3])
    paddings = _same(x.shape[1:3], outputs, kernel.shape[:2], stride)
    if (ours := native_form(x.shape, kernel.shape, stride, x, kernel)) is not None:
        return native.forward(ours, x, kernel, **_window(ours, paddings, stride))
    return correlate(x, kernel, paddings, stride=stride)


def input_gradient(
    g: Float[Array, "b i j o"], kernel: Float[Array, "k l c o"], stride: int, size: Shape
) -> Float[Array, "b h w c"]:
    """dx[n] = sum of g[i] w[p] over the i and p with stride i + p - low = n; `size` is (h, w).

    The same kind of sum as `forward`, of g with stride - 1 zeros between its pixels, by the kernel
    turned by 180 degrees.
    """
    taps = kernel.shape[:2]
    same = _same(size, g.shape[1:3], taps, stride)
    image = (g.shape[0], *size, kernel.shape[2])
    if (ours := native_form(image, kernel.shape, stride, g, kernel)) is not None:
        return native.input_gradient(ours, g, kernel, size, **_window(ours, same, stride))
    paddings = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(taps, same, strict=True)]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)  # [k l o c]
    return correlate(g, turned, paddings, dilation=stride)


def kernel_gradient(
    x: Float[Array, "b h w c"], g: Float[Array, "b i j o"], stride: int, size: Shape
) -> Float[Array, "k l c o"]:
    """dw[p] = sum over i of x[stride i + p - low] g[i]; `size` is (k, l).

    A convolution of x by g in which the images of the batch play the channels, and the channels
    the images. Here the kernel, g, is what is dilated, which XLA takes well: one form is enough.
    """
    paddings = _same(x.shape[1:3], g.shape[1:3], size, stride)
    kernel = (*size, x.shape[3], g.shape[3])
    if (ours := native_form(x.shape, kernel, stride, x, g)) is not None:
        return native.kernel_gradient(ours, x, g, size, **_window(ours, paddings, stride))
    return lax.conv_general_dilated(
        x,
        g,
        window_strides=(1, 1),
        padding=paddings,
        rhs_dilation=(stride, stride),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )


def native_form(image: Shape, kernel: Shape, stride: int, *given: Array) -> native.Form | None:
    """The kernels of our own that take this convolution and all its maps, of the shapes of image
    and kernel, for the arrays that are given; None for XLA."""
    (b, h, w, c), (k, taps, *_) = image, kernel
    found: native.Form | None = None
    if k == taps and k >= stride and c <= FEW_CHANNELS:
        found = "windows"
    elif (k, taps, stride) == (5, 5, 2) and b * -(-h // 8) * -(-w // 8) >= FEW_TILES:
        found = "winograd"
    products = b * h * w * prod(kernel) // stride**2
    fits = h % stride == w % stride == 0 and products >= TINY
    serves = found and fits and all(native.serves(array.dtype) for array in given)
    return found if serves else None


def _window(ours: native.Form, paddings: Paddings, stride: int) -> dict[str, int]:
    if ours == "winograd":
        return {}
    (top, _), (left, _) = paddings
    return {"stride": stride, "top": top, "left": left}


def _same(inputs: Shape, outputs: Shape, taps: Shape, stride: int) -> Paddings:
    """TensorFlow's "same" padding, the odd pixel behind; cuts off what no tap meets."""
    paddings = []
    for n, m, k in zip(inputs, outputs, taps, strict=True):
        total = (m - 1) * stride + k - n
        low = max(total, 0) // 2
        paddings.append((low, total - low))
    return paddings


# Forms of y[i] = sum over p of z[stride i + p - low] w[p], where z is the image with
# dilation - 1 zeros between its pixels, padded. ---------------------------------------------------


def form(image: Shape, kernel: Shape, *, stride: int = 1, dilation: int = 1) -> Form:
    """The form that is fast on this backend, by the shapes of image and kernel."""
    products = prod(image[:3]) * prod(kernel) // stride**2
    if jax.default_backend() != "cpu" or products < TINY:
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
    """The sum above in the form that `form` chooses."""
    match form(image.shape, kernel.shape, stride=stride, dilation=dilation):
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
    """XLA's own convolution: best on a GPU, where cuDNN takes it as it is, and best on a CPU for
    images without dilation that are no smaller than the kernel."""
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
    """A dilated image, without multiplying its zeros: best on a CPU.

    The output's pixels n = dilation a + r of phase r meet every dilation-th tap only,
    p = first + dilation t where low - r = dilation before + first, so that
    y[dilation a + r] = sum over t of image[a + t - before] w[first + dilation t]:
    a small convolution without dilation for each phase, whose outputs are then interleaved.
    """
    directions = zip(image.shape[1:3], kernel.shape[:2], paddings, strict=True)
    (i, rows), (j, columns) = (_phases(*direction, dilation) for direction in directions)
    lines = [
        jnp.stack(
            [
                correlate(image, kernel[top::dilation, left::dilation], [row, column])
                for left, column in columns
            ],
            axis=3,
        )
        for top, row in rows
    ]
    interleaved = jnp.stack(lines, axis=2)  # [b a (phase of the row) a (phase of the column) o]
    b, a, _, _, _, o = interleaved.shape
    return interleaved.reshape(b, a * dilation, -1, o)[:, :i, :j]


def _phases(n: int, taps: int, padding: tuple[int, int], dilation: int):
    """The size of the output, and of each phase the first tap and the padding."""
    low, high = padding
    size = dilation * (n - 1) + 1 + low + high - taps + 1
    found = []
    for r in range(dilation):
        before, first = divmod(low - r, dilation)
        count = -(-(taps - first) // dilation)
        after = -(-size // dilation) - n - before + count - 1
        found.append((first, (before, after)))
    return size, found


def patches(
    image: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    paddings: Paddings,
    stride: int = 1,
) -> Float[Array, "b i j o"]:
    """One matrix product, of the patches that the kernel meets, laid side by side, by the kernel.

    Best on a CPU for an image smaller than the kernel, which XLA leaves to a naive loop: there the
    patches take little memory.
    """
    rows, columns = kernel.shape[:2]
    edges = [(0, 0, 0), *((low, high, 0) for low, high in paddings), (0, 0, 0)]
    padded = lax.pad(image, jnp.zeros((), image.dtype), edges)
    i, j = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    met = [  # by each tap, [b i j c]
        padded[:, p : p + i : stride, q : q + j : stride]
        for p in range(rows)
        for q in range(columns)
    ]
    return jnp.concatenate(met, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
