"""One device, four by jit, four by pmap, micro-batches, two processes: the same training."""

import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import MODEL, lines, train

from vaejax import losses
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.models.autoencoder import Autoencoder
from vaejax.models.feed_forward import FeedForward
from vaejax.models.vae import VAE
from vaejax.training import checkpoint, compiled, run
from vaejax.training import devices as dev
from vaejax.training.config import Recipe
from vaejax.training.fit import refuse_uneven
from vaejax.training.loop import validate
from vaejax.training.step import Trainer, TrainState, init, train_step

# whose steps show the gradients' norm, which Adam would hide
pytestmark = pytest.mark.slow
OPTIMIZER = optax.sgd(0.01)
KEY = jax.random.key(1)

# one of two processes with two devices each
PROGRAM = """
import sys
from pathlib import Path
import jax
from vaejax.training import devices
jax.config.update("jax_num_cpu_devices", 2)
devices.initialize_processes({coordinator!r}, 2, int(sys.argv[1]))
sys.path.insert(0, {tests!r})
from test_fit import train
train(Path({data!r}), Path({out!r}), devices=None, steps=6, norm="affine")
"""


class Waves(Autoencoder):
    """A model of few operations and much memory, with noise in it."""

    def setup(self) -> None:
        self.kernel = self.param("kernel", lambda _: jnp.linspace(-1, 1, 768 * 64).reshape(768, 64))

    def encode(self, x, *, train, axis=None):
        return jnp.sin(x.reshape(len(x), -1) @ self.kernel)

    def decode(self, z, *, train, axis=None):
        return nn.sigmoid(z @ self.kernel.T).reshape(-1, self.size, self.size, self.channels)

    def corrupt(self, x, keys):
        return x + jax.vmap(partial(jax.random.normal, shape=x.shape[1:]))(keys)


def waves(x, out, context):
    return jnp.mean(out.z), {"pixels": jnp.mean(x)}


WAVES = Trainer(Waves(size=16), waves, OPTIMIZER)


@cache
def waves_state() -> TrainState:
    return jax.jit(partial(init, trainer=WAVES))(jax.random.key(0))


def trainer(norm: str, micro_batches: int = 1) -> Trainer:
    model = VAE(size=16, latent_dim=4, width=1, norm=norm)
    loss = partial(losses.mse_kl, kl_weight=0.01)
    return Trainer(model, loss, OPTIMIZER, micro_batches=micro_batches)


@pytest.fixture(scope="module")
def images(draw) -> np.ndarray:
    return draw(16, 16)


def updates(
    trainer: Trainer, images: np.ndarray, devices: dev.Devices, *, frozen: Any = None
) -> tuple[TrainState, TrainState, dict]:
    """The states before and after three updates, and the last one's metrics."""
    state = compiled.compile_init(trainer, devices=devices)(jax.random.key(0))
    first = jax.tree.map(np.array, dev.local(state))
    key = jax.device_put(KEY, dev.replicated(devices))
    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    step = compiled.compile_train_step(trainer, state, frozen, shape, key, devices=devices)
    for _ in range(3):
        state, metrics = step.run(state, images, key)
    return first, dev.local(state), metrics


@pytest.fixture(scope="module")
def alone(images: np.ndarray) -> dict[str, tuple]:
    """On one device, in one piece."""
    one = dev.choose(1)
    return {norm: updates(trainer(norm), images, one) for norm in ("affine", "batch")}


def difference(a, b) -> float:
    """The norm of the difference of two trees, as a part of the first one's."""
    apart = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)
    return float(optax.tree.norm(apart) / optax.tree.norm(a))


def gradients(before: TrainState, after: TrainState):
    return jax.tree.map(lambda p, q: p - np.asarray(q), before.params, after.params)


@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_four_devices_train_as_one_does(how: str, images: np.ndarray, alone: dict):
    before, after, metrics = alone["batch"]
    _, other, others = updates(trainer("batch"), images, dev.choose(4, how))
    # the variances in norms, over few images, amplify rounding
    assert difference(gradients(before, after), gradients(before, other)) < 1e-3
    assert difference(after.batch_stats, other.batch_stats) < 1e-5
    assert difference(before.batch_stats, after.batch_stats) > 1e-3
    for name, value in metrics.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4, err_msg=name)


def test_a_step_by_axis_is_the_same_where_shard_map_keeps_track_of_what_varies(
    images: np.ndarray,
):
    step = partial(train_step, trainer=WAVES)
    before = waves_state()
    alone, _ = jax.jit(step)(before, None, images, KEY)
    spec = jax.P(dev.AXIS)
    parts = jax.shard_map(
        partial(step, axis=dev.AXIS),
        mesh=dev.choose(4).mesh,
        in_specs=(jax.P(), jax.P(), spec, jax.P()),
        out_specs=jax.P(),
    )
    together, _ = jax.jit(parts)(before, None, images, KEY)
    # with the sum over devices in place of their mean it would be 3
    assert difference(gradients(before, alone), gradients(before, together)) < 1e-4


@pytest.mark.parametrize(("count", "how"), [(1, "jit"), (4, "jit"), (4, "pmap")])
def test_micro_batches_have_the_gradient_of_the_batch_under_the_affine_norm(
    count: int, how: str, images: np.ndarray, alone: dict
):
    before, after, metrics = alone["affine"]
    _, other, others = updates(trainer("affine", 4), images, dev.choose(count, how))
    assert difference(gradients(before, after), gradients(before, other)) < 1e-4
    for name in ("loss", "mse", "kl", "rate", "gradient_norm"):  # which are means over images
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-4, err_msg=name)


def test_micro_batches_and_devices_take_less_memory(images: np.ndarray):
    def memory(count: int, micro_batches: int) -> int:
        many = jax.ShapeDtypeStruct((1024, *images.shape[1:]), images.dtype)
        devices = dev.choose(count)
        key = jax.device_put(KEY, dev.replicated(devices))
        split = WAVES._replace(micro_batches=micro_batches)
        arguments = (split, waves_state(), None, many, key)
        return compiled.compile_train_step(*arguments, devices=devices).memory

    undivided = memory(1, 1)
    assert memory(1, 8) < undivided / 3
    assert memory(4, 1) < undivided / 2  # each device its part: nothing is gathered


def test_memory_counts_a_moving_average_with_micro_batches_too(images: np.ndarray):
    def memory(ema_decay: float | None) -> int:
        averaged = WAVES._replace(micro_batches=2, ema_decay=ema_decay)
        state = jax.jit(partial(init, trainer=averaged))(jax.random.key(0))
        shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
        arguments = (averaged, state, None, shape, KEY)
        return compiled.compile_train_step(*arguments, devices=dev.choose(1)).memory

    assert memory(0.9) - memory(None) >= 768 * 64 * 4


# Frozen networks, averages and flips on several devices -------------------------------------------


def shifted(x, out, context):
    """A loss that uses a network which is not trained."""
    return jnp.mean((out.z - context.frozen["shift"].reshape(1, -1)) ** 2), {}


@pytest.mark.parametrize(("count", "how"), [(1, "jit"), (4, "jit"), (4, "pmap")])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_frozen_networks_averages_and_flips_are_the_same_on_every_device(
    count: int, how: str, micro_batches: int, images: np.ndarray
):
    all_on = Trainer(Waves(size=16), shifted, OPTIMIZER, ema_decay=0.5, flip=True)
    frozen = {"shift": np.linspace(0, 1, 64, dtype=np.float32)}
    before, after, metrics = updates(all_on, images, dev.choose(1), frozen=frozen)
    divided = all_on._replace(micro_batches=micro_batches)
    _, other, others = updates(divided, images, dev.choose(count, how), frozen=frozen)
    assert difference(gradients(before, after), gradients(before, other)) < 1e-4
    assert difference(after.ema, other.ema) < 1e-5
    np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-4)
    unflipped = updates(all_on._replace(flip=False), images, dev.choose(1), frozen=frozen)[2]
    assert abs(unflipped["loss"] - metrics["loss"]) > 1e-4 * metrics["loss"]


# Runs and evaluations -----------------------------------------------------------------------------


def test_checkpoints_move_between_devices_and_the_images_keep_their_order(
    complete_run: Path, data: Path, tmp_path: Path
):
    for steps, devices, how in ((5, 1, "jit"), (9, 4, "jit"), (None, 2, "pmap")):
        train(data, tmp_path / "moved", steps=steps, devices=devices, parallel=how)
    one, moved = (
        {line["step"]: line for line in lines(folder) if line["split"] == "train"}
        for folder in (complete_run, tmp_path / "moved")
    )
    assert one.keys() == moved.keys()
    for step, line in one.items():  # another batch would have another mse, by percents
        np.testing.assert_allclose(moved[step]["mse"], line["mse"], rtol=1e-3)


class Held(Images):
    """Images in memory."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels[indices]


def validated(
    trainer: Trainer, state: TrainState, held_out: Images, batch_size: int, count: int = 1
) -> dict[str, float]:
    devices = dev.choose(count)
    state, key = jax.device_put((state, KEY), dev.replicated(devices))
    step = compiled.compile_eval_step(trainer, None, devices=devices)
    metrics = validate(step, state, held_out, key, batch_size, devices=devices)
    assert metrics.pop("images_per_second") > 0
    return metrics


def test_validation_is_a_mean_over_images_whatever_the_devices_and_batches(data: Path):
    held_out = Images(data, "train")
    one, *others = (
        validated(WAVES, waves_state(), held_out, batch_size, count)
        for count, batch_size in ((1, 55), (1, 20), (4, 8))  # 8 leaves 7, which do not divide
    )
    pixels = held_out.read(np.arange(len(held_out))) / 255
    np.testing.assert_allclose(one["pixels"], pixels.mean(), rtol=1e-5)
    for metrics in others:
        for name, value in one.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (VAE(size=16, latent_dim=4, width=1), partial(losses.mse_kl, kl_weight=0.01)),
        (VAE(size=16, latent_dim=4, width=1, norm="batch"), partial(losses.sigma_vae)),
        (FeedForward(size=16, latent_dim=4), partial(losses.reconstruction, error="bce")),
    ],
    ids=["mse_kl", "sigma_vae", "reconstruction"],
)
def test_validation_does_not_depend_on_the_batch_size(model: Autoencoder, loss, draw):
    pixels = draw(64, 16)
    # dark images first, so that batches differ as much as they can
    held_out = Held(pixels[np.argsort(pixels.mean(axis=(1, 2, 3)))])
    evaluated = Trainer(model, loss, OPTIMIZER)
    state = jax.jit(partial(init, trainer=evaluated))(jax.random.key(0))
    by_size = {size: validated(evaluated, state, held_out, size) for size in (4, 16, 64)}
    for name, value in by_size[64].items():
        for size in (4, 16):
            np.testing.assert_allclose(by_size[size][name], value, rtol=1e-5, err_msg=name)
    if "effective_beta" in by_size[64] and loss.func is losses.mse_kl:
        beta = 0.01 * 768 / (2 * by_size[64]["mse"] * 4)
        assert by_size[4]["effective_beta"] == pytest.approx(beta, rel=1e-5)


def test_validation_is_of_the_moving_average_where_there_is_one(draw):
    state = waves_state()
    averaged = state._replace(ema=jax.tree.map(lambda a: -a, state.params))
    held_out = Held(draw(4, 16))
    own = validated(WAVES, state, held_out, 4)
    assert validated(WAVES, averaged, held_out, 4)["loss"] == pytest.approx(-own["loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_two_processes_of_two_devices_end_as_one_process_does(
    data: Path, tmp_path: Path, patience: float
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    text = PROGRAM.format(
        coordinator=coordinator,
        tests=str(Path(__file__).parent),
        data=str(data),
        out=str(tmp_path / "two"),
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=patience)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "in 2 processes" in run.read_status(tmp_path / "two")["devices"]
    train(data, tmp_path / "one", devices=4, steps=6, norm="affine")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [x["step"] for x in one] == [x["step"] for x in two]
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(y["mse"], x["mse"], rtol=1e-5)
    model = replace(MODEL, norm="affine")
    one, two = (
        checkpoint.load_weights(tmp_path / name, model, ema=False) for name in ("one", "two")
    )
    for x, y in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5)  # six steps of Adam are of 6e-3
    assert (tmp_path / "two" / "faces.png").exists()


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "count", "words"),
    [
        (6, None, 4, "does not divide over 4 devices: take 4 or 8, or --devices 3"),
        (2, None, 4, "take 4, or --devices 2"),
        (8, 3, 1, "a batch of 8 images does not divide into them: take 2 or 4"),
        (8, 2, 4, "over 4 devices: take 4"),
        (8, 9, 1, "take 8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(
    batch_size: int, micro_batch: int | None, count: int, words: str
):
    loss = partial(losses.mse_kl, kl_weight=0.01)
    recipe = Recipe("r", MODEL, loss, epochs=1, batch_size=batch_size, micro_batch=micro_batch)
    with pytest.raises(UserError, match=words):
        refuse_uneven(recipe, dev.choose(count))


def test_more_devices_than_there_are_is_refused():
    assert dev.choose().count == 4
    for count in (0, 5):
        with pytest.raises(UserError, match=f"--devices {count}: there are 4 here"):
            dev.choose(count)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("host:1", None, None), "go together"),
        ((None, 2, 0), "go together"),
        (("host", 2, 0), "--coordinator host: must be HOST:PORT"),
        (("host:1", 2, 2), "--process-id 2: must be from 0 to 1"),
    ],
)
def test_arguments_that_name_no_process_are_refused(arguments: tuple, words: str):
    with pytest.raises(UserError, match=words):
        dev.initialize_processes(*arguments)


def test_without_arguments_and_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    dev.initialize_processes(None, None, None)
    assert dev.is_single_process()
