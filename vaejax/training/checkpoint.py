"""Checkpoints of the state and the position in the data, together. The only user of Orbax."""

from functools import partial
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from vaejax.errors import CheckpointError
from vaejax.models import autoencoder
from vaejax.training.state import TrainState


def manager(folder: Path, *, keep: int | None = None) -> ocp.CheckpointManager:
    """The checkpoints in `folder`, of which the newest `keep` stay; without it, to read from.

    Saving is synchronous: the step donates its state, and a copy in the background of a buffer
    that the next step writes over would not be the state it is said to be.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        enable_async_checkpointing=False,
        step_format_fixed_length=7,
        # What a kill in the middle of a save has left. A reader must not: it may be what the run,
        # which is alive, is writing at the moment.
        cleanup_tmp_directories=keep is not None,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    checkpoints: ocp.CheckpointManager, state: TrainState, batches: grain.DatasetIterator
) -> None:
    """Write the state and the position; a kill in between leaves no step that looks whole."""
    step = int(state.step)
    if step not in checkpoints.all_steps():
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(batches.get_state())
        )
        checkpoints.save(step, args=arguments)


def restore(
    checkpoints: ocp.CheckpointManager,
    like: TrainState,
    batches: grain.DatasetIterator,
    *,
    sharding: Sharding,
) -> TrainState | None:
    """The newest state, laid out as asked for, wherever it came from, and `batches` set to its
    position; None where there is no checkpoint."""
    step = checkpoints.latest_step()
    if step is None:
        return None
    arguments = ocp.args.Composite(
        state=ocp.args.StandardRestore(_shapes(like, sharding)), data=ocp.args.JsonRestore()
    )
    restored = checkpoints.restore(step, args=arguments)
    batches.set_state(restored["data"])
    return restored["state"]


def weights(run: Path, model: autoencoder.Autoencoder) -> tuple[PyTree, PyTree]:
    """The newest parameters and statistics of a run, without the optimiser's share.

    Raises CheckpointError where there is none yet.
    """
    folder = run / "checkpoints"
    checkpoints = manager(folder) if folder.is_dir() else None
    step = checkpoints.latest_step() if checkpoints else None
    if checkpoints is None or step is None:
        raise CheckpointError(f"{run} has no checkpoint yet: let it train for a while")
    params, statistics = jax.eval_shape(partial(autoencoder.init, model), jax.random.key(0))
    here = SingleDeviceSharding(jax.devices()[0])
    item = _shapes({"params": params, "statistics": statistics}, here)
    arguments = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    restored = checkpoints.restore(step, args=ocp.args.Composite(state=arguments))["state"]
    return restored["params"], restored["statistics"]


def _shapes(tree: PyTree, sharding: Sharding) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
