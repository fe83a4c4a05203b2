"""Kernels of our own for a CPU, in C++: float32, one device.

A convolution's three maps: XLA's CPU backend multiplies everything, and copies images into other
layouts to do so; these need a quarter of the multiplications and no copies. And what an optimizer
does to every parameter, in one pass and without copies.

The machine's own C++ compiler builds them for its very processor when they are first used, in
seconds, and the user's cache folder keeps them. Without a compiler everything goes without them:
slower, and the same up to rounding.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vaejax.cache import folder, processor

Form = Literal["winograd", "windows"]
NAMES = [
    *(
        f"vaejax_{form}_{which}"
        for form in ("winograd", "windows")
        for which in ("forward", "input_gradient", "kernel_gradient")
    ),
    "vaejax_adam",
    "vaejax_squared_length",
]
FOLDER = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC", "-w"),
)
SWITCH = "VAEJAX_NATIVE"  # in the environment: 0 forbids them


def serves(dtype: Any) -> bool:
    """Whether the kernels can be used for numbers of this kind; builds them if need be.

    They are for one device: XLA does not know how to split what is not its own.
    """
    here = jax.default_backend() == "cpu" and jax.device_count() == 1
    return here and dtype == jnp.float32 and not missing()


@cache
def missing() -> str:
    """Why the kernels are not there; empty if they are."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        library = ctypes.CDLL(str(build()))
        found = {name: jax.ffi.pycapsule(getattr(library, name)) for name in NAMES}
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").splitlines()
        first = next((line for line in said if "error" in line), f"exit {error.returncode}")
        return f"{error.cmd[0]}: {first.strip()}"
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return str(error)
    for name, capsule in found.items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    return ""


def build() -> Path:
    """The library for this source, compiler, jaxlib and processor.

    Raises OSError or subprocess.SubprocessError where it cannot be built.
    """
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    )
    if not compiler:
        raise FileNotFoundError("no C++ compiler: install g++ or clang++, or name one in CXX")
    sources = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[hc]*"))]
    words = (*compiler, *FLAGS, version("jaxlib"), processor(), *sources)
    name = hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    library = folder() / "native" / f"{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as room:
            made = Path(room) / library.name
            command = [
                *compiler,
                *FLAGS,
                "-I",
                jax.ffi.include_dir(),
                str(FOLDER / "kernels.cc"),
                "-o",
                str(made),
            ]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(library)  # in one go: another run may be looking for it
    return library


def forward(
    form: Form, image: Float[Array, "b h w c"], kernel: Float[Array, "k l c o"], **window: int
) -> Float[Array, "b i j o"]:
    """The code of an image. "windows" needs the window's `stride`, and `top` and `left`, the zeros
    in front of the image; "winograd" knows its own."""
    stride = window.get("stride", 2)
    b, h, w, _ = image.shape
    shape = (b, -(-h // stride), -(-w // stride), kernel.shape[3])
    return _call(f"vaejax_{form}_forward", shape, image, kernel, window)


def input_gradient(
    form: Form,
    code: Float[Array, "b i j o"],
    kernel: Float[Array, "k l c o"],
    size: tuple[int, ...],
    **window: int,
) -> Float[Array, "b h w c"]:
    """The image, of `size` (h, w), that its adjoint makes of a code."""
    shape = (code.shape[0], *size, kernel.shape[2])
    if form == "winograd":
        kernel = kernel.swapaxes(2, 3)
    return _call(f"vaejax_{form}_input_gradient", shape, code, kernel, window)


def kernel_gradient(
    form: Form,
    image: Float[Array, "b h w c"],
    code: Float[Array, "b i j o"],
    size: tuple[int, ...],
    **window: int,
) -> Float[Array, "k l c o"]:
    """The gradient of the kernel, of `size` (k, l), by the code's."""
    shape = (*size, image.shape[3], code.shape[3])
    return _call(f"vaejax_{form}_kernel_gradient", shape, image, code, window)


def _call(target: str, shape: tuple[int, ...], a: Array, b: Array, window: dict[str, int]) -> Array:
    result = jax.ShapeDtypeStruct(shape, a.dtype)
    return jax.ffi.ffi_call(target, result, vmap_method="sequential")(a, b, **window)


def adam(
    gradient: Float[Array, "..."],
    mean: Float[Array, "..."],
    square: Float[Array, "..."],
    corrections: Float[Array, "2"],
    length: Float[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
) -> Sequence[Array]:
    """The step, of unit rate, and the new moments, in the memory of the three arguments;
    `corrections` are 1 - b1^t and 1 - b2^t (Kingma and Ba, 2015, algorithm 1).

    Where the `length` of all gradients is no finite number the step is zero and the moments stay.
    Whatever comes after it comes after the last use of any parameter, and XLA, which sees that,
    keeps no copies of what is overwritten.
    """
    results = [jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)] * 3
    call = jax.ffi.ffi_call(
        "vaejax_adam",
        results,
        input_output_aliases={0: 0, 1: 1, 2: 2},
        vmap_method="sequential",
    )
    settings = {"b1": np.float64(b1), "b2": np.float64(b2), "eps": np.float64(eps)}
    return call(gradient, mean, square, corrections, length, **settings)


def squared_length(x: Float[Array, "..."]) -> Float[Array, ""]:
    """The sum of the squares, which XLA would write down before it adds them."""
    result = jax.ShapeDtypeStruct((), x.dtype)
    return jax.ffi.ffi_call("vaejax_squared_length", result, vmap_method="sequential")(x)
