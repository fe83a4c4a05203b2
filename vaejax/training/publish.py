"""A run as a folder for use elsewhere: ONNX, safetensors and a model card."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vaejax import export
from vaejax.data.sources import drawn_faces
from vaejax.errors import CheckpointError, UserError
from vaejax.export.card import Facts, card
from vaejax.files import atomic_folder, printable, read_json
from vaejax.models import autoencoder
from vaejax.training import copies, flow_prior, prior, run

CARD = "README.md"
FILES = {  # in the folder
    "decoder.onnx": "latents to images, `[b h w c]` in [0, 1]",
    "encoder.onnx": "images to latents",
    "prior.onnx": "noise to latents of new faces",
    export.ARRAYS: "all weights, by their names in vaejax",
}


def exported(loaded: run.LoadedRun) -> export.Exported:
    """Return a run's model with the prior that its new faces come from.

    A deterministic model without a learned prior has none. One whose recipe names a prior that
    cannot be loaded is exported without it, with a warning.
    """
    name = prior.default_name(loaded)
    try:
        chosen = prior.load(loaded, name)
    except (CheckpointError, UserError) as error:
        if autoencoder.is_variational(loaded.model):
            raise
        if name != "normal":
            text = f"warning: {error}. It is exported without a prior"
            print(printable(text), file=sys.stderr)
        chosen = None
    attributes = flow_prior.attributes(loaded) if name == "flow" and chosen else {}
    weights = loaded.weights
    return export.Exported(loaded.model, weights.params, weights.batch_stats, chosen, attributes)


def contents(loaded: run.LoadedRun, *, half: bool = False) -> export.Payload:
    """Return all files of a run's export: the networks, the arrays and the card."""
    what = exported(loaded)
    files, metadata = export.payload(what, half=half)
    files = files | {export.ARRAYS: export.to_safetensors(what, half=half)}
    described = {name: words for name, words in FILES.items() if name in files}
    text = card(metadata, facts(loaded), described)
    return export.Payload(files | {CARD: text.encode()}, metadata)


def facts(loaded: run.LoadedRun) -> Facts:
    """Return what the card tells of a run's training."""
    spec, schedule = loaded.spec, loaded.spec.schedule
    source = Path(schedule.source)
    return Facts(
        source=printable(source.name),
        # the drawn faces of another copy of vaejax, too
        drawn=source.parts[-3:] == drawn_faces().parts[-3:],
        recipe=schedule.recipe,
        loss=str(spec.loss.get("kind")),
        images=schedule.images,
        updates=loaded.weights.step,
        batch_size=spec.batch_size,
        evaluation=_evaluation(loaded.folder),
        copies=copies.section(run.last_status(loaded.folder).get("copies")),
    )


def _evaluation(folder: Path) -> Mapping[str, Any] | None:
    """Return a run's last evaluation; None where there is none, or it is damaged."""
    try:
        match read_json(folder / "evaluation.json"):
            case {"metrics": dict(metrics), "step": int(), "images": int()} as evaluation:
                valid = {name: m for name, m in metrics.items() if _is_estimate(m)}
                return {**evaluation, "metrics": valid}
    except (OSError, ValueError):
        pass
    return None


def _is_estimate(metric: Any) -> bool:
    match metric:
        case {"value": int() | float(), "error": int() | float() | None}:
            return True
    return False


def refuse_used(out: Path) -> None:
    """Raise UserError unless an export can be written there: in a new or an empty folder, and not
    in a prepared data set, nor among what a run keeps."""
    run.refuse_unwritable(out)
    run.refuse_output(out, inputs=[])
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {printable(out)} is not empty: name a new folder, or an empty one")


def write(out: Path, files: Mapping[str, bytes]) -> None:
    """Write an export's folder, complete or not at all. Raises UserError if it is not empty."""
    try:
        with atomic_folder(out) as partial:
            for name, data in files.items():
                (partial / name).write_bytes(data)
    except FileExistsError:
        refuse_used(out)
        raise
