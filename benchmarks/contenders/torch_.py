"""PyTorch: eager, with channels last, and compiled (with channels last).

With a stride of 2 Keras pads one pixel in front and two behind, which PyTorch's layers cannot. On
mirrored images with mirrored kernels it is two in front and one behind: that is PyTorch's padding
of 2 on both sides, whose last pixel the stride never reaches. So images and kernels are mirrored
once, while they are loaded, and no layer has to copy its input in order to pad it.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.contenders import B1, KL_WEIGHT, LATENT_DIM, LEARNING_RATE, Contender, Task


def block(layer: nn.Module, activation: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    """Return a layer, its activation and its norm under the names of vaejax's parameters."""
    modules = nn.Sequential()
    modules.add_module("layer", layer)
    modules.add_module("activation", activation)
    if norm is not None:
        modules.add_module("norm", norm)
    return modules


class VAE(nn.Module):
    """The report's VAE, on mirrored images."""

    def __init__(self, task: Task):
        super().__init__()
        self.task = task
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        channels, side = 3, task.size
        for name, out, stride in task.encoder:
            layer = nn.Conv2d(channels, out, 5, stride, padding=2)
            self.encoder[name] = block(layer, nn.LeakyReLU(0.02), nn.BatchNorm2d(out, 1e-3))
            channels, side = out, side // stride
        layer = nn.Linear(side**2 * channels, 1024)
        self.encoder["dense"] = block(layer, nn.SELU(), nn.BatchNorm1d(1024, 1e-3))
        self.encoder["mean"] = block(nn.Linear(1024, LATENT_DIM), nn.Identity())
        self.encoder["log_variance"] = block(nn.Linear(1024, LATENT_DIM), nn.Identity())
        side, channels = task.decoder_input
        layer = nn.Linear(LATENT_DIM, 1024)
        self.decoder["dense"] = block(layer, nn.SELU(), nn.BatchNorm1d(1024, 1e-3))
        self.decoder["reshape"] = block(nn.Linear(1024, side**2 * channels), nn.SELU())
        for name, out, stride, normed in task.decoder:
            layer = nn.ConvTranspose2d(channels, out, 5, stride, padding=2, output_padding=1)
            norm = nn.BatchNorm2d(out, 1e-3) if normed else None
            self.decoder[name] = block(layer, nn.LeakyReLU(0.02), norm)
            channels = out
        stride = task.last_stride
        padding, more = (2, 0) if stride == 1 else (1, 1)
        layer = nn.ConvTranspose2d(channels, 3, 5, stride, padding, more)
        self.decoder["output"] = block(layer, nn.Sigmoid(), nn.BatchNorm2d(3, 1e-3))

    def forward(self, x, noise):
        for name, _, _ in self.task.encoder:
            x = self.encoder[name](x)
        x = self.encoder["dense"](x.flatten(1))
        mean = self.encoder["mean"](x).float()
        log_variance = self.encoder["log_variance"](x).float()
        side, channels = self.task.decoder_input
        x = self.decoder["dense"](mean + torch.exp(log_variance / 2) * noise)
        x = self.decoder["reshape"](x).view(-1, channels, side, side)
        for name, *_ in [*self.task.decoder, ("output",)]:
            x = self.decoder[name](x)
        return x.float(), mean, log_variance


def to_torch(path: str, array: np.ndarray, task: Task) -> torch.Tensor:
    """Convert a parameter to PyTorch's layout, mirrored."""
    if array.ndim == 4:  # [h w in out], and [h w out in] of a transposed one: both as PyTorch's
        array = array[::-1, ::-1].transpose(3, 2, 0, 1)
    elif path == "encoder/dense/layer/kernel":  # from [h w c] to mirrored [c h w]
        out, side = array.shape[1], task.size // 16
        array = array.reshape(side, side, -1, out)[::-1, ::-1].transpose(3, 2, 0, 1)
        array = array.reshape(out, -1)
    elif path.startswith("decoder/reshape/layer"):
        (side, channels), inputs = task.decoder_input, array.shape[:-1]
        array = array.reshape(-1, side, side, channels)[:, ::-1, ::-1].transpose(3, 1, 2, 0)
        array = array.reshape(-1, *inputs)
    elif array.ndim == 2:
        array = array.T
    return torch.from_numpy(np.ascontiguousarray(array))


def contender(task: Task, *, channels_last: bool = False, compiled: bool = False) -> Contender:
    """Return the update of a usual training loop, by torch.compile if `compiled`."""
    torch.set_num_threads(task.threads)
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":  # as JAX does in float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    arrays, images, noise = task.load()
    model = VAE(task).to(device).eval()  # the report's norm keeps a mean of 0 and a variance of 1
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for path, array in arrays.items():
            *parents, leaf = path.split("/")
            weights.pop(".".join([*parents, leaves[leaf]])).copy_(to_torch(path, array, task))
    assert not weights, f"parameters without a value: {list(weights)}"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = model.to(memory_format=layout)
    mirrored = np.ascontiguousarray(images[:, ::-1, ::-1].transpose(0, 3, 1, 2))
    pixels = torch.from_numpy(mirrored).contiguous(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, (B1, 0.999), fused=True)

    def loss(pixels, noise):
        with torch.autocast(device, torch.bfloat16, enabled=task.precision == "bfloat16"):
            x = pixels.float() / 255
            output, mean, log_variance = model(x, noise)
        kl = 0.5 * (mean**2 + torch.exp(log_variance) - log_variance - 1)
        return F.mse_loss(output, x) + KL_WEIGHT * kl.mean()

    forward = torch.compile(loss) if compiled else loss

    def update(noise):
        optimizer.zero_grad(set_to_none=True)
        value = forward(pixels.to(device), noise)
        value.backward()
        optimizer.step()
        return value

    def losses() -> list[float]:
        return [update(update_noise).item() for update_noise in torch.from_numpy(noise).to(device)]

    def updates(count: int) -> None:
        for _ in range(count):
            update(torch.randn(noise.shape[1:], device=device))
        finish()

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def matrix_products(count: int) -> None:
        a = (torch.randn(4096, 4096, device=device) / 64).to(getattr(torch, task.precision))
        x = a
        for _ in range(count):
            x = a @ x
        finish()

    def device_memory() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    return Contender(f"torch {torch.__version__}", losses, updates, matrix_products, device_memory)
