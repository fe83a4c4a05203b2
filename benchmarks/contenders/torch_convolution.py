"""A convolution with stride 1 and its gradients in PyTorch, with channels last."""

from collections.abc import Callable

import numpy as np
import torch


def operations(
    x: np.ndarray, kernel: np.ndarray, g: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """Return forward, dx and dw of "same" padding by the names of `convolutions.py`.

    x [b h w c], kernel [k k c o] and the output's gradient g [b h w o] are as in JAX. A result is
    a view in the same order of axes: it copies nothing.
    """
    image, gradient = (torch.from_numpy(np.array(array)).permute(0, 3, 1, 2) for array in (x, g))
    weight = torch.from_numpy(np.array(kernel)).permute(3, 2, 0, 1)
    weight = weight.contiguous(memory_format=torch.channels_last)
    padding = [kernel.shape[0] // 2] * 2

    def forward() -> np.ndarray:
        y = torch.conv2d(image, weight, padding=padding)
        return y.permute(0, 2, 3, 1).numpy()

    def gradients(*wanted: bool) -> tuple[torch.Tensor, ...]:
        backward = torch.ops.aten.convolution_backward
        settings = ([1, 1], padding, [1, 1], False, [0, 0], 1)
        return backward(gradient, image, weight, None, *settings, [*wanted, False])

    return {
        "forward": forward,
        "dx": lambda: gradients(True, False)[0].permute(0, 2, 3, 1).numpy(),
        "dw": lambda: gradients(False, True)[1].permute(2, 3, 1, 0).numpy(),
    }
