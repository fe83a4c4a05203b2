"""One device, four by jit, four by pmap, micro-batches, two processes: the same learning."""

import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import MODEL, lines, train

from vaejax import objectives
from vaejax.data.batches import Images
from vaejax.errors import UserError
from vaejax.models.vae import VAE
from vaejax.training import checkpoint, parallel, programs, run
from vaejax.training.config import Recipe
from vaejax.training.fit import refuse_uneven
from vaejax.training.state import TrainState, init
from vaejax.training.step import train_step
from vaejax.training.validation import validate

# whose parameters show the gradients, the size of which Adam would hide
OPTIMIZER = optax.sgd(0.01)

# one of two processes with two devices each
PROGRAM = """
import sys
from pathlib import Path
import jax
from vaejax.training import parallel, programs
jax.config.update("jax_num_cpu_devices", 2)
parallel.join({coordinator!r}, 2, int(sys.argv[1]))
sys.path.insert(0, {tests!r})
from test_fit import train
train(Path({data!r}), Path({out!r}), devices=None, steps=6, norm="frozen")
"""


@pytest.fixture(scope="module")
def images(draw) -> np.ndarray:
    return draw(16, 16)


def updates(
    images: np.ndarray,
    norm: str,
    *,
    devices: parallel.Devices,
    micro_batches: int = 1,
) -> tuple[TrainState, TrainState, dict]:
    """The states before and after three updates, and the last one's figures."""
    model = VAE(size=16, latent_dim=4, width=2, norm=norm)
    loss = partial(objectives.report, model=model, kl_weight=0.01)
    everywhere = parallel.whole(devices)
    begin = partial(init, model=model, optimizer=OPTIMIZER)
    state = programs.compile_init(begin, devices=devices)(jax.random.key(0))
    first = jax.tree.map(np.array, parallel.here(state))
    key = jax.device_put(jax.random.key(1), everywhere)
    step = programs.compile_train_step(
        loss,
        OPTIMIZER,
        state,
        jax.ShapeDtypeStruct(images.shape, images.dtype),
        key,
        devices=devices,
        micro_batches=micro_batches,
    )
    for _ in range(3):
        state, figures = step.run(state, images, key)
    return first, parallel.here(state), figures


def waves(params, statistics, images, keys, *, train: bool, axis: str | None = None):
    """A loss of few operations and much memory, with noise in it."""
    x = objectives.to_float(images)
    noise = jax.vmap(partial(jax.random.normal, shape=x.shape[1:]))(keys)
    loss = jnp.mean(jnp.sin((x + noise).reshape(len(x), -1) @ params))
    return loss, ({"loss": loss, "pixels": jnp.mean(x)}, statistics)


def state() -> TrainState:
    weights = jnp.linspace(-1, 1, 768 * 64).reshape(768, 64)
    zeros = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(*zeros, weights, {}, OPTIMIZER.init(weights))


@pytest.fixture(scope="module")
def alone(images: np.ndarray) -> dict[str, tuple]:
    """On one device, in one piece."""
    return {norm: updates(images, norm, devices=parallel.choose(1)) for norm in ("frozen", "batch")}


def difference(a, b) -> float:
    """The length of the difference of two trees, as a part of the first one's."""
    apart = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)
    return float(optax.tree.norm(apart) / optax.tree.norm(a))


def gradients(before: TrainState, after: TrainState):
    return jax.tree.map(lambda p, q: p - np.asarray(q), before.params, after.params)


@pytest.mark.parametrize("how", ["jit", "pmap"])
def test_four_devices_learn_what_one_learns(how: str, images: np.ndarray, alone: dict):
    before, after, figures = alone["batch"]
    _, other, others = updates(images, "batch", devices=parallel.choose(4, how))
    # the norms' variances, over few images, lengthen what rounding leaves
    assert difference(gradients(before, after), gradients(before, other)) < 1e-3
    assert difference(after.statistics, other.statistics) < 1e-5
    assert difference(before.statistics, after.statistics) > 1e-3
    for name, value in figures.items():
        np.testing.assert_allclose(others[name], value, rtol=1e-4, err_msg=name)


def test_a_step_by_axis_learns_the_same_where_shard_map_keeps_track_of_what_varies(
    images: np.ndarray,
):
    step = partial(train_step, loss=waves, optimizer=OPTIMIZER)
    alone, _ = jax.jit(step)(state(), images, jax.random.key(1))
    mesh, spec = parallel.choose(4).mesh, jax.P(parallel.AXIS)
    parts = jax.shard_map(
        partial(step, axis=parallel.AXIS),
        mesh=mesh,
        in_specs=(jax.P(), spec, jax.P()),
        out_specs=jax.P(),
    )
    together, _ = jax.jit(parts)(state(), images, jax.random.key(1))
    one, other = gradients(state(), alone), gradients(state(), together)
    assert difference(one, other) < 1e-5


@pytest.mark.parametrize(("count", "how"), [(1, "jit"), (4, "jit"), (4, "pmap")])
def test_micro_batches_have_the_whole_batchs_gradient_under_the_frozen_norm(
    count: int, how: str, images: np.ndarray, alone: dict
):
    before, after, figures = alone["frozen"]
    _, other, others = updates(
        images, "frozen", devices=parallel.choose(count, how), micro_batches=4
    )
    assert difference(gradients(before, after), gradients(before, other)) < 1e-4
    for name in ("loss", "mse", "kl", "rate", "gradient_norm"):  # which are means over images
        np.testing.assert_allclose(others[name], figures[name], rtol=1e-4, err_msg=name)


def test_micro_batches_and_devices_take_less_memory(images: np.ndarray):
    def memory(count: int, micro_batches: int) -> int:
        many = jax.ShapeDtypeStruct((1024, *images.shape[1:]), images.dtype)
        devices = parallel.choose(count)
        key = jax.device_put(jax.random.key(1), parallel.whole(devices))
        step = programs.compile_train_step(
            waves, OPTIMIZER, state(), many, key, devices=devices, micro_batches=micro_batches
        )
        return step.memory

    whole = memory(1, 1)
    assert memory(1, 8) < whole / 3
    assert memory(4, 1) < whole / 2  # each device its part: nothing is gathered


def test_checkpoints_move_between_devices_and_the_images_keep_their_order(
    whole: Path, data: Path, tmp_path: Path
):
    for steps, devices, how in ((5, 1, "jit"), (9, 4, "jit"), (None, 2, "pmap")):
        train(data, tmp_path / "moved", steps=steps, devices=devices, parallel=how)
    one, moved = (
        {line["step"]: line for line in lines(folder) if line["split"] == "train"}
        for folder in (whole, tmp_path / "moved")
    )
    assert one.keys() == moved.keys()
    for step, line in one.items():  # another batch would have another mse, by percents
        np.testing.assert_allclose(moved[step]["mse"], line["mse"], rtol=1e-3)


def test_the_figures_of_held_out_images_are_means_whatever_the_devices_and_batches(data: Path):
    held_out = Images(data, "train")
    found = []
    for count, batch_size in ((1, 55), (1, 20), (4, 8)):  # 8 leaves 7, which do not divide
        devices = parallel.choose(count)
        everywhere = parallel.whole(devices)
        placed, key = jax.device_put((state(), jax.random.key(1)), everywhere)
        step = programs.compile_eval_step(waves, devices=devices)
        figures = validate(step, placed, held_out, key, batch_size, devices=devices)
        found.append([figures[name] for name in ("loss", "pixels")])
    pixels = held_out.read(np.arange(len(held_out))) / 255
    for loss, mean in found:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-5)
        np.testing.assert_allclose(mean, pixels.mean(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_two_processes_of_two_devices_end_as_one_process_does(data: Path, tmp_path: Path):
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
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "in 2 processes" in run.read(tmp_path / "two", "run.json")["devices"]
    train(data, tmp_path / "one", devices=4, steps=6, norm="frozen")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [x["step"] for x in one] == [x["step"] for x in two]
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(y["mse"], x["mse"], rtol=1e-5)
    model = replace(MODEL, norm="frozen")
    one, two = (checkpoint.weights(tmp_path / name, model) for name in ("one", "two"))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(y, x, atol=1e-5)  # of a way of 6e-3 at Adam's rate
    assert (tmp_path / "two" / "faces.png").exists()


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "count", "words"),
    [
        (6, None, 4, "does not divide over 4 devices: take 4 or 8, or --devices 3"),
        (2, None, 4, "take 4, or --devices 2"),
        (8, 3, 1, "a batch of 8 images is no whole number of them: take 2 or 4"),
        (8, 2, 4, "over 4 devices: take 4"),
        (8, 9, 1, "take 8"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(
    batch_size: int, micro_batch: int | None, count: int, words: str
):
    loss = partial(objectives.report, kl_weight=0.01)
    recipe = Recipe("r", MODEL, loss, epochs=1, batch_size=batch_size, micro_batch=micro_batch)
    with pytest.raises(UserError, match=words):
        refuse_uneven(recipe, parallel.choose(count))


def test_devices_that_are_not_there_are_refused():
    assert parallel.choose().count == 4
    for count in (0, 5):
        with pytest.raises(UserError, match=f"--devices {count}: there are 4 here"):
            parallel.choose(count)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("host:1", None, None), "go together"),
        ((None, 2, 0), "go together"),
        (("host", 2, 0), "--coordinator host: must be HOST:PORT"),
        (("host:1", 2, 2), "--process-id 2: must be from 0 to 1"),
    ],
)
def test_processes_that_cannot_be_are_refused(arguments: tuple, words: str):
    with pytest.raises(UserError, match=words):
        parallel.join(*arguments)


def test_nothing_is_joined_where_nothing_was_launched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    parallel.join(None, None, None)
    assert parallel.alone()
