"""Trains the flow of a run on the posterior means of its images, and loads it.

A flow is trained by the same loop as the autoencoder, on posterior means that are computed once: an
update takes 256 of them, where the autoencoder sees a few images, and none of them moves any more.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from vaejax import flow, generate, priors
from vaejax.data import batches as data
from vaejax.data.batches import Images
from vaejax.data.labels import NO_LABELS, Labels, parse_condition, read_labels
from vaejax.errors import CheckpointError, UserError
from vaejax.files import printable
from vaejax.priors import FlowPrior
from vaejax.training import checkpoint, run
from vaejax.training import devices as dev
from vaejax.training.compiled import (
    compile_eval_step,
    compile_init,
    compile_train_step,
    state_bytes,
)
from vaejax.training.config import Recipe, RunSpec, describe, differences
from vaejax.training.devices import Devices
from vaejax.training.guards import DiskGuard, FiniteGuard, MemoryGuard, SignalGuard
from vaejax.training.logger import PriorLogger
from vaejax.training.loop import Checkpoints, Guards, Steps, train
from vaejax.training.optimizer import adam, schedule
from vaejax.training.step import Trainer, init

MAX_IMAGES = 100_000  # whose posterior means are fitted
PROGRESS_PARTS = 10  # of a flow's training, each with a validation at its end
HELD_OUT_DRAWS = 16  # of noise and time, for each held-out face
BATCH, LEARNING_RATE, WARMUP, EMA_DECAY = 256, 1e-3, 50, 0.999  # of a flow
OPTIMIZER = partial(adam, b1=0.9, b2=0.99, clip_norm=1.0)


class Resources(NamedTuple):
    """What the training of a flow needs besides the run."""

    devices: Devices
    signals: SignalGuard
    max_ram: float | None = None  # GiB
    say: Callable[[str], None] = print


def flow_folder(folder: Path) -> Path:
    """Return where a run keeps its flow."""
    return folder / priors.FOLDER / "flow"


def load(loaded: run.LoadedRun, *, steps: int, condition: str = "") -> FlowPrior:
    """Read the flow of a run.

    Raises UserError unless it is complete and of these weights, CheckpointError if it is damaged.
    """
    folder, digest = flow_folder(loaded.folder), loaded.weights.digest
    again = f"`vaejax fit-prior {quote(str(loaded.folder))}` fits one"
    if not checkpoint.steps(folder):
        raise UserError(f"{loaded.folder} has no flow as its prior yet: {again}")

    def restore(saved: checkpoint.Checkpoint) -> FlowPrior:
        try:
            spec = RunSpec.from_json(saved.spec)
            network = flow.from_json(spec.model, latents=priors.latent_dimensions(loaded.model))
            attributes = _attributes(spec, network)
        except ValueError as error:
            raise CheckpointError(f"{saved.path} is of no flow: {error}") from None
        if spec.data.get("weights") != digest:
            raise UserError(
                f"the flow in {folder} was fitted to other weights of this run: {again} anew"
            )
        if saved.step < spec.schedule.updates:
            raise UserError(
                f"the flow of {loaded.folder} is not trained to its end ({saved.step:,} of "
                f"{spec.schedule.updates:,} updates): the run's own command goes on with it"
            )
        like = jax.eval_shape(partial(flow.init, network), jax.random.key(0))
        weights = checkpoint.restore_weights(saved, like, ema=True)
        return FlowPrior(
            network,
            weights.params,
            weights.batch_stats,
            loaded.model,
            steps=steps,
            condition=parse_condition(condition, attributes) if condition else (),
        )

    try:
        return checkpoint.with_newest(folder, restore)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {again} anew") from None


def attributes(loaded: run.LoadedRun) -> dict[str, list[str]]:
    """Return the values of each attribute that a run's flow knows."""
    spec = RunSpec.from_json(checkpoint.saved_spec(flow_folder(loaded.folder)))
    latents = priors.latent_dimensions(loaded.model)
    return _attributes(spec, flow.from_json(spec.model, latents=latents))


def _attributes(spec: RunSpec, network: flow.FlowMLP) -> dict[str, list[str]]:
    """Return the values of each attribute that a flow knows. Raises ValueError if damaged."""
    found: Any = spec.data.get("attributes", {})
    attributes: dict[Any, Any] = found if isinstance(found, dict) else {"": None}
    lists = all(isinstance(values, list) for values in attributes.values())
    if not lists or tuple(map(len, attributes.values())) != network.labels:
        raise ValueError("its attributes are not those of its network")
    return {str(name): [str(value) for value in values] for name, values in attributes.items()}


def fit(loaded: run.LoadedRun, resources: Resources) -> None:
    """Train a flow on the posterior means of a run, from its last checkpoint if it has one."""
    devices, folder = resources.devices, flow_folder(loaded.folder)
    resources.say("fitting the prior: the posterior means of all images …")
    labels = _labels(loaded)
    codes, held_out = _codes(loaded, labels)
    network = _network(loaded, labels)
    spec = _flow_spec(loaded, network, labels, images=len(codes.z), devices=devices)
    trainer = _trainer(network, updates=spec.schedule.updates)
    replicated = dev.replicated(devices)
    root = jax.random.fold_in(jax.random.key(spec.seed), 1)  # the run's own keys are split from it
    init_key, train_key, validation_key = jax.device_put(jax.random.split(root, 3), replicated)
    batches = data.stream_indices(
        len(codes.z),
        batch_size=spec.batch_size,
        seed=spec.seed,
        shard=jax.process_index(),
        shards=jax.process_count(),
    )
    saved = dev.broadcast(lambda: _resumable(folder, spec))
    if saved is None:
        state = compile_init(trainer, devices=devices)(init_key)
        stats = jax.device_put(flow.standardization(codes.z), replicated)
        state = state._replace(batch_stats=stats)
    else:
        like = jax.eval_shape(partial(init, trainer=trainer), init_key)
        newest = checkpoint.Checkpoint(Path(saved[0]), *saved[1:])
        state, position = checkpoint.restore(newest, like, sharding=replicated)
        batches.set_state(dict(position))
    done = int(state.step)
    batch = jax.ShapeDtypeStruct((spec.batch_size,), np.int32)
    compiled = compile_train_step(trainer, state, codes, batch, train_key, devices=devices)
    validate = _validation(trainer, held_out, validation_key, devices=devices)
    steps = Steps(lambda state, batch: compiled.run(state, batch, train_key), validate)
    disk = DiskGuard(loaded.folder)
    logger = None
    if dev.is_first():
        logger = PriorLogger(folder, spec, disk=disk, done=done)
    try:
        train(
            state,
            batches,
            spec=spec,
            steps=steps,
            logger=logger,
            checkpoints=Checkpoints(folder, spec, disk),
            guards=_guards(folder, spec, state_bytes(state), resources),
        )
    finally:
        if logger:
            logger.close()
    disk.refuse_failing(checkpoint.newest_path(folder))


def _trainer(network: flow.FlowMLP, *, updates: int) -> Trainer:
    rate = schedule(LEARNING_RATE, warmup_steps=WARMUP, decay_steps=updates)
    return Trainer(
        network,
        partial(flow.flow_matching),
        OPTIMIZER(rate),
        ema_decay=EMA_DECAY,
        init=flow.init,
        batch_loss=flow.batch_loss,
    )


def measure(recipe: Recipe, *, images: int, devices: Devices, repeats: int) -> float:
    """Return the median seconds of an update of a recipe's flow, on noise in place of latents."""
    latents = priors.latent_dimensions(recipe.model)
    network = flow.FlowMLP(latents, recipe.prior_width, recipe.prior_depth)
    trainer = _trainer(network, updates=1000)
    replicated = dev.replicated(devices)
    key = jax.device_put(jax.random.key(0), replicated)
    state = compile_init(trainer, devices=devices)(key)
    batch_size = _batch_size(images, devices)
    z = np.random.default_rng(0).standard_normal((batch_size, latents), np.float32)
    batch = jax.ShapeDtypeStruct((batch_size,), np.int32)
    step = compile_train_step(trainer, state, _unlabeled(z), batch, key, devices=devices)
    indices = np.arange(batch_size, dtype=np.int32)[dev.rows(devices, batch_size)]
    seconds = []
    for _ in range(1 + repeats):
        began = time.monotonic()
        state, metrics = step.run(state, indices, key)
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - began)
    return median(seconds[1:])  # the first one also warms up


def _batch_size(images: int, devices: Devices) -> int:
    # a power of 2, which most numbers of devices divide: none of them trains another flow
    return min(BATCH, 1 << (images.bit_length() - 1)) // devices.count * devices.count


def _labels(loaded: run.LoadedRun) -> Labels:
    path = loaded.spec.schedule.labels
    return read_labels(Path(path)) if path else NO_LABELS


def _network(loaded: run.LoadedRun, labels: Labels) -> flow.FlowMLP:
    settings, latents = loaded.spec.schedule, priors.latent_dimensions(loaded.model)
    values = tuple(len(values) for values in labels.attributes.values())
    return flow.FlowMLP(latents, settings.prior_width, settings.prior_depth, values)


def is_as_scheduled(loaded: run.LoadedRun) -> bool:
    """Tell whether the flow that a run has is the one that its schedule describes."""
    settings = loaded.spec.schedule
    saved = RunSpec.from_json(checkpoint.saved_spec(flow_folder(loaded.folder)))
    labels = _labels(loaded)
    same_length = saved.schedule.updates == settings.prior_steps
    same_labels = saved.data.get("labels") == labels.sha256
    return same_length and same_labels and saved.model == flow.to_json(_network(loaded, labels))


def _codes(loaded: run.LoadedRun, labels: Labels) -> tuple[flow.Codes, flow.Codes]:
    """Compute what a flow learns from, and what it is validated on."""
    images = [Images(Path(loaded.spec.schedule.prepared), s) for s in ("train", "validation")]
    train, held_out = (
        flow.Codes(posterior_means(loaded, split), _numbers(labels, of))
        for split, of in zip(("train", "validation"), images, strict=True)
    )
    if loaded.spec.flip:
        mirrored = posterior_means(loaded, "train", mirrored=True)
        train = flow.Codes(
            np.concatenate([train.z, mirrored]), np.concatenate([train.labels, train.labels])
        )
    return train, held_out


def _numbers(labels: Labels, images: Images) -> Int[np.ndarray, "n a"]:
    count = min(len(images), MAX_IMAGES)
    if not labels.attributes:  # which spares reading the paths
        return np.zeros((count, 0), np.int32)
    return labels.of(images.metadata(i)["path"] for i in range(count))


def _unlabeled(z: Float[np.ndarray, "n d"]) -> flow.Codes:
    return flow.Codes(z, np.zeros((len(z), 0), np.int32))


def _flow_spec(
    loaded: run.LoadedRun,
    network: flow.FlowMLP,
    labels: Labels,
    *,
    images: int,
    devices: Devices,
) -> RunSpec:
    """Describe the training of a flow as that of a run."""
    settings = loaded.spec.schedule
    updates = settings.prior_steps
    optimizer = {
        **describe(OPTIMIZER),
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP,
        "decay_steps": updates,
    }
    return RunSpec(
        experiment=f"{loaded.spec.experiment}: prior",
        model=flow.to_json(network),
        loss={"kind": "flow_matching"},
        optimizer=optimizer,
        batch_size=_batch_size(images, devices),
        micro_batch=None,
        ema_decay=EMA_DECAY,
        flip=loaded.spec.flip,
        minutes=None,
        seed=loaded.spec.seed,
        data={
            "weights": loaded.weights.digest,
            "labels": labels.sha256,
            "attributes": labels.attributes,
        },
        schedule=replace(
            settings,
            images=images,
            updates=updates,
            updates_per_epoch=math.ceil(updates / PROGRESS_PARTS),
        ),
    )


def _resumable(folder: Path, spec: RunSpec) -> list | None:
    """Return the checkpoint to go on from; delete a flow that is another one, or of other weights.

    A flow of which every checkpoint is damaged is trained anew: nothing but its own time is lost.
    """
    checkpoint.delete_unfinished(folder)
    try:
        newest = checkpoint.newest(folder, expected=False)
        if newest is None:
            return None
        if not differences(RunSpec.from_json(newest.spec), spec):
            return [str(newest.path), *newest[1:]]
    except (CheckpointError, ValueError) as error:
        print(printable(f"warning: {error}; the flow is trained anew"), file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _validation(trainer: Trainer, held_out: flow.Codes, key: Any, *, devices: Devices):
    """Return the function that computes the loss of the held-out faces, with the same noise each
    time."""
    eval_step = compile_eval_step(trainer, held_out, devices=devices)
    indices = np.tile(np.arange(len(held_out.z), dtype=np.int32), HELD_OUT_DRAWS)

    def validate(state: Any) -> dict[str, float]:
        total = 0.0
        for first in range(0, len(indices), BATCH):
            part = indices[first : first + BATCH]
            mine = part[dev.rows(devices, len(part))]
            metrics = eval_step(state, mine, key, first, 1.0, batch=len(part))
            total += float(metrics["loss"]) * len(part)
        return {"loss": total / len(indices)}

    return validate


def _guards(folder: Path, spec: RunSpec, state_size: int, resources: Resources) -> Guards:
    finite = FiniteGuard(
        folder,
        updates_per_epoch=spec.schedule.updates_per_epoch,
        advice="The posterior means may be out of range: train the autoencoder at a smaller rate",
        image_paths=None,
        last_checkpoint=partial(checkpoint.newest_path, folder),
        writes=dev.is_first(),
    )
    memory = MemoryGuard(state_size, images=1, max_ram=resources.max_ram)
    return Guards(resources.signals, finite, memory)


def posterior_means(
    loaded: run.LoadedRun, split: str, *, mirrored: bool = False
) -> Float[np.ndarray, "n d"]:
    """Compute the posterior means of a split of a run, or of its mirrored images."""
    images = Images(Path(loaded.spec.schedule.prepared), split)
    params, stats = loaded.weights.params, loaded.weights.batch_stats
    return generate.posterior_means(
        params, stats, images, model=loaded.model, most=MAX_IMAGES, mirrored=mirrored
    )
