"""C++ kernels for a CPU, in float32: convolutions, group norm with SiLU, and Adam's update.

The convolutions are faster than XLA's because they need a quarter of the multiplications, and do
not copy images into other memory layouts. Group norm with SiLU, and its gradient, go over an image
while it is in a cache. Adam's update reads and writes every number once and in place.

Every kernel makes the same bits with any number of threads.

The C++ compiler of the machine builds the kernels for its own processor when they are first used,
which takes seconds; the cache folder keeps the library. Where they cannot be built, and on other
backends, XLA computes the same up to rounding, more slowly. `VAEJAX_NATIVE=0` in the environment
turns them off.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaejax.cache import cache_folder
from vaejax.files import atomic, read_bytes, write_text
from vaejax.system import processor_id

# "winograd": 3x3 kernels of stride 1 and 5x5 kernels of stride 2, whose stride divides the image's
# sides, by Winograd's minimal filtering.
# "windows": few input channels, any square kernel and stride, by products with the image's windows.
Algorithm = Literal["winograd", "windows"]

SYMBOLS = [
    *(
        f"vaejax_{algorithm}_{operation}"
        for algorithm in ("winograd", "windows")
        for operation in ("forward", "input_gradient", "kernel_gradient")
    ),
    "vaejax_norm_silu",
    "vaejax_norm_silu_gradient",
    "vaejax_adam",
    "vaejax_squared_norm",
]
SOURCES = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC", "-w"),
)
MAX_LIBRARY_BYTES = 64 << 20
SWITCH = "VAEJAX_NATIVE"  # environment variable; 0 turns the kernels off


# Building -----------------------------------------------------------------------------------------


_plain = ContextVar("plain", default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Compute what is traced within by XLA's own operations alone, so that others can read it.

    No C++ kernels and no other forms of convolutions; the results are the same up to rounding. A
    program that JAX has already traced for the same shapes stays as it is.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def only_plain() -> bool:
    """Tell whether this runs within `plain_operations`."""
    return _plain.get()


def supports(dtype: Any) -> bool:
    """Tell whether the kernels can be used here for arrays of this dtype; build them if necessary.

    They need a single CPU device: XLA cannot split a foreign call over several.
    """
    if only_plain():
        return False
    single_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return single_cpu and dtype == jnp.float32 and not unavailable_reason()


@cache
def unavailable_reason() -> str:
    """Build, load and register the kernels; return why that failed, or "" if it did not."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        library = ctypes.CDLL(str(build()))
        capsules = {name: jax.ffi.pycapsule(getattr(library, name)) for name in SYMBOLS}
    except subprocess.CalledProcessError as error:
        output = error.stderr.decode(errors="replace").splitlines()
        first = next((line for line in output if "error" in line), f"exit {error.returncode}")
        return f"{error.cmd[0]}: {first.strip()}"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return str(error)
    for name, capsule in capsules.items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return ""


def build() -> Path:
    """Compile the library unless the cache folder has it, and return its path.

    Its name is a hash of the sources, the compiler, the version of jaxlib and the processor. Beside
    it lies its own SHA-256: half of a library, as a power cut may leave it, would kill the process
    that loads it, and is built again.

    Raises OSError or subprocess.SubprocessError if it cannot be built.
    """
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    )
    if not compiler:
        raise FileNotFoundError("no C++ compiler: install g++ or clang++, or name one in CXX")
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.[hc]*"))]
    inputs = (*compiler, *FLAGS, version("jaxlib"), processor_id(), *sources)
    name = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    library = cache_folder() / "kernels" / f"{name}.so"
    checksum = library.with_suffix(".so.sha256")
    if not _is_as_built(library, checksum):
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            headers = ["-I", jax.ffi.include_dir()]
            command = [*compiler, *FLAGS, *headers, str(SOURCES / "kernels.cc"), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            content = built.read_bytes()
        with atomic(library) as partial:  # because other processes may load it
            partial.write_bytes(content)
        write_text(checksum, f"{hashlib.sha256(content).hexdigest()}  {library.name}\n")
    return library


def _is_as_built(library: Path, checksum: Path) -> bool:
    try:
        content = read_bytes(library, max_bytes=MAX_LIBRARY_BYTES)
        expected = read_bytes(checksum, max_bytes=MAX_LIBRARY_BYTES)
    except OSError:
        return False
    return expected[:64] == hashlib.sha256(content).hexdigest().encode()


# Convolutions -------------------------------------------------------------------------------------


def forward(
    algorithm: Algorithm,
    image: Float[Array, "b h w c"],
    kernel: Float[Array, "k l c o"],
    **window: int,
) -> Float[Array, "b i j o"]:
    """Convolve an image with a kernel, with "same" padding.

    Both algorithms need the `stride`; "windows" also needs, as `top` and `left`, the zeros in front
    of the image's rows and columns.
    """
    stride = window["stride"]
    b, h, w, _ = image.shape
    shape = (b, -(-h // stride), -(-w // stride), kernel.shape[3])
    return _call(f"vaejax_{algorithm}_forward", shape, image, kernel, window)


def input_gradient(
    algorithm: Algorithm,
    features: Float[Array, "b i j o"],
    kernel: Float[Array, "k l c o"],
    size: tuple[int, ...],
    **window: int,
) -> Float[Array, "b h w c"]:
    """Apply the adjoint of `forward` as a function of the image, whose `size` is (h, w)."""
    shape = (features.shape[0], *size, kernel.shape[2])
    if algorithm == "winograd":
        kernel = kernel.swapaxes(2, 3)
    return _call(f"vaejax_{algorithm}_input_gradient", shape, features, kernel, window)


def kernel_gradient(
    algorithm: Algorithm,
    image: Float[Array, "b h w c"],
    features: Float[Array, "b i j o"],
    size: tuple[int, ...],
    **window: int,
) -> Float[Array, "k l c o"]:
    """Apply the adjoint of `forward` as a function of the kernel, whose `size` is (k, l)."""
    shape = (*size, image.shape[3], features.shape[3])
    return _call(f"vaejax_{algorithm}_kernel_gradient", shape, image, features, window)


def _call(target: str, shape: tuple[int, ...], a: Array, b: Array, window: dict[str, int]) -> Array:
    result = jax.ShapeDtypeStruct(shape, a.dtype)
    return jax.ffi.ffi_call(target, result, vmap_method="sequential")(a, b, **window)


# Group norm ---------------------------------------------------------------------------------------


def norm_silu(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    modulation: Float[Array, "b 2 c"],
    *,
    groups: int,
    epsilon: float,
) -> Sequence[Array]:
    """Return silu((scale x' + bias) (1 + a) + b) and the statistics `[b 2 groups]` of x.

    x' is x by group norm, the modulation is a and b of each image, and the statistics are the mean
    and 1 / sqrt(variance + epsilon) of each group.
    """
    statistics = (x.shape[0], 2, groups)
    results = [jax.ShapeDtypeStruct(shape, x.dtype) for shape in (x.shape, statistics)]
    call = jax.ffi.ffi_call("vaejax_norm_silu", results, vmap_method="sequential")
    return call(x, scale, bias, modulation, epsilon=np.float64(epsilon))


def norm_silu_gradient(
    dy: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    modulation: Float[Array, "b 2 c"],
    statistics: Float[Array, "b 2 g"],
) -> Sequence[Array]:
    """Return the gradients by x, scale, bias and modulation, if that by `norm_silu` is dy."""
    arguments = (x, scale, bias, modulation)
    results = [jax.ShapeDtypeStruct(array.shape, x.dtype) for array in arguments]
    call = jax.ffi.ffi_call("vaejax_norm_silu_gradient", results, vmap_method="sequential")
    return call(dy, *arguments, statistics)


# Optimizer ----------------------------------------------------------------------------------------


def adam(
    gradient: Float[Array, "..."],
    mean: Float[Array, "..."],
    square: Float[Array, "..."],
    corrections: Float[Array, "2"],
    norm: Float[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
) -> Sequence[Array]:
    """Return Adam's step for a learning rate of 1, and the new moments `mean` and `square`.

    Kingma and Ba (2015), algorithm 1; `corrections` are 1 - b1^t and 1 - b2^t. The three results
    take the memory of the first three arguments.

    `norm` decides whether the update is applied: it is the norm of the gradient of all parameters,
    and where it is NaN or infinite the step is zero and the moments stay as they were. Since it
    depends on every gradient, the update comes after the last use of any parameter, and XLA makes
    no copies of what the update overwrites.
    """
    results = [jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)] * 3
    call = jax.ffi.ffi_call(
        "vaejax_adam",
        results,
        input_output_aliases={0: 0, 1: 1, 2: 2},
        vmap_method="sequential",
    )
    constants = {"b1": np.float64(b1), "b2": np.float64(b2), "eps": np.float64(eps)}
    return call(gradient, mean, square, corrections, norm, **constants)


def squared_norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Return the sum of squares in one pass; XLA would write the squares to memory first."""
    result = jax.ShapeDtypeStruct((), x.dtype)
    return jax.ffi.ffi_call("vaejax_squared_norm", result, vmap_method="sequential")(x)
