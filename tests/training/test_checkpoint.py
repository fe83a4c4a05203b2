"""A checkpoint is what was saved, or it is set aside by name: never something else in silence."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from test_fit import MODEL, RECIPE, digest, leave, train

from vaejax import commands, doctor
from vaejax.data import batches as data_batches
from vaejax.errors import CheckpointError, UserError, VaejaxError
from vaejax.files import partial_name
from vaejax.system import versions
from vaejax.training import checkpoint, devices, finish, run, visualize
from vaejax.training.checkpoint import Checkpoint
from vaejax.training.step import TrainState, init

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "a link": lambda path: (path.rename(f"{path}.x"), path.symlink_to(f"{path}.x")),
}


def flipped(content: bytes) -> bytes:
    """With one bit turned over, in the middle."""
    found = bytearray(content or b"?")
    found[len(found) // 2] ^= 1
    return bytes(found)


@pytest.fixture
def folder(complete_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete_run, tmp_path / "run"))


def files(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


def restored(saved: Checkpoint) -> str:
    """The digest of what Orbax reads."""
    begin = partial(init, trainer=RECIPE.trainer(updates=18))
    like: TrainState = jax.eval_shape(begin, jax.random.key(0))
    sharding = devices.replicated(devices.choose(1))
    state, position = checkpoint.restore(saved, like, sharding=sharding)
    assert int(state.step) == saved.step
    return checkpoint.digest(state, position)


def forge(folder: Path, **facts: object) -> None:
    """Put other facts into the newest manifest, with sums that agree."""
    path = checkpoint.path(folder, 18) / checkpoint.MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"], content["files"]
    path.unlink()
    checkpoint.write_manifest(path.parent, content | facts)


def newest(folder: Path) -> Checkpoint:
    found = checkpoint.newest(folder, expected=True)
    assert found is not None
    return found


def test_a_checkpoint_is_read_as_it_was_saved(folder: Path):
    assert checkpoint.steps(folder) == [7, 14, 18]
    saved = newest(folder)
    assert saved.step == 18
    assert restored(saved) == saved.state_digest
    content = checkpoint.check_manifest(saved.path)
    assert content["files"].keys() | {checkpoint.MANIFEST} == set(files(saved.path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_is_named_and_set_aside_for_the_one_before(
    damage: str, folder: Path, capsys
):
    place, aside = checkpoint.path(folder, 18), folder / "checkpoints" / "damaged" / "0000018"
    before = json.loads((checkpoint.path(folder, 14) / checkpoint.MANIFEST).read_text())
    names = files(place)
    assert len(names) > 10
    for name in names:
        content = (place / name).read_bytes()
        if not content and damage in ("truncated", "emptied"):
            continue  # there is nothing to take away
        DAMAGES[damage](place / name)
        saved = newest(folder)
        assert saved.step == 14, name
        assert saved.state_digest == before["state"]
        warning = capsys.readouterr().err
        assert "checkpoint of update 18 is damaged" in warning
        assert Path(name).name in warning
        assert "resuming from update 14" in warning
        assert checkpoint.steps(folder) == [7, 14]
        aside.rename(place)  # and mended
        for made in place.rglob("*.x"):
            made.unlink()
        (place / name).unlink(missing_ok=True)
        (place / name).write_bytes(content)
    assert newest(folder).step == 18


def test_a_stray_file_and_a_stray_folder_are_found(folder: Path, capsys):
    (checkpoint.path(folder, 18) / "state" / "core.123").write_text("")
    (folder / "checkpoints" / "0000099").mkdir()
    (folder / "checkpoints" / "notes").mkdir()
    assert newest(folder).step == 14
    warnings = capsys.readouterr().err
    assert "update 99 is damaged: manifest.json is missing" in warnings
    assert "state/core.123 does not belong there" in warnings
    assert (folder / "checkpoints" / "notes").is_dir()


def test_a_checkpoint_under_another_number_is_none(folder: Path, capsys):
    checkpoint.path(folder, 18).rename(checkpoint.path(folder, 20))
    assert newest(folder).step == 14
    assert "of update 18" in capsys.readouterr().err


def test_a_manifest_that_was_forged_with_its_files_is_still_not_the_state(folder: Path):
    """Files and sums that agree, of another state than the manifest says."""
    forge(folder, state="0" * 64)
    with pytest.raises(CheckpointError, match="another state than the saved one"):
        restored(newest(folder))


@pytest.mark.parametrize(
    "facts",
    [{"spec": None}, {"spec": 3}, {"versions": []}, {"state": 0}, {"step": "18"}, {"format": 3}],
)
def test_a_manifest_that_was_forged_is_damaged_and_no_traceback(folder: Path, facts: dict, capsys):
    forge(folder, **facts)
    assert newest(folder).step == 14
    assert "update 18 is damaged: manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("files", [None, [], {"a": 1}, {"a": {"bytes": "1", "sha256": "2"}}])
def test_a_manifest_whose_files_are_no_files_is_damaged(folder: Path, files: object, monkeypatch):
    path = checkpoint.path(folder, 18) / checkpoint.MANIFEST
    content = json.loads(path.read_text()) | {"files": files}
    del content["sha256"]
    path.write_text(json.dumps({"sha256": checkpoint._content_sum(content), **content}))
    with pytest.raises(checkpoint.Damaged, match="which files there are"):
        checkpoint.check_manifest(path.parent)


def test_a_run_goes_on_from_the_one_before_and_ends_as_it_would_have(
    complete_run: Path, folder: Path, data: Path, capsys
):
    shutil.rmtree(checkpoint.path(folder, 18))
    leave(folder, "stopped")
    largest = max(checkpoint.path(folder, 14).rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(flipped(largest.read_bytes()))
    train(data, folder)
    assert ": 7 of 18 updates are done" in capsys.readouterr().out
    assert digest(folder) == digest(complete_run)


def test_where_all_are_damaged_nothing_starts_from_zero(folder: Path, data: Path):
    for step in checkpoint.steps(folder):
        (checkpoint.path(folder, step) / checkpoint.MANIFEST).write_text("{}")
    leave(folder, "stopped")
    metrics = (folder / "metrics.jsonl").read_bytes()
    for _ in range(2):  # nor when they are all set aside
        with pytest.raises(CheckpointError, match="--fresh") as caught:
            train(data, folder)
        assert caught.value.exit_code == 3
    assert "0000018" in "".join(map(str, (folder / "checkpoints" / "damaged").iterdir()))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="they are gone"):
        train(data, folder)
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_pictures_are_drawn_with_the_newest_undamaged_weights_and_nothing_is_moved(
    folder: Path, capsys
):
    params = checkpoint.load_weights(folder, MODEL, ema=False).params
    flip = checkpoint.path(folder, 18) / "state" / "_METADATA"
    flip.write_bytes(flipped(flip.read_bytes()))
    older = checkpoint.load_weights(folder, MODEL, ema=False).params
    assert "taking that of update 14" in capsys.readouterr().err
    a, b = jax.tree.leaves(params)[0], jax.tree.leaves(older)[0]
    assert not np.array_equal(a, b)
    assert checkpoint.steps(folder) == [7, 14, 18]
    for step in (7, 14):
        (checkpoint.path(folder, step) / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"0000018 is damaged.*0000007 is damaged"):
        checkpoint.load_weights(folder, MODEL, ema=False)


def test_a_checkpoint_of_another_run_is_refused_with_what_differs(folder: Path, data: Path):
    spec = run.read_spec(folder).to_json()
    other = {**spec, "seed": 3, "model": {**spec["model"], "latent_dim": 5}}
    forge(folder, spec=other)
    leave(folder, "stopped")
    with pytest.raises(CheckpointError, match=r"model.latent_dim 5 → 4; seed 3 → 0"):
        train(data, folder)
    with pytest.raises(CheckpointError, match=r"another model .* model.latent_dim 5 → 4"):
        checkpoint.load_weights(folder, MODEL, ema=False)


def test_the_old_ones_go_when_the_new_one_is_complete_and_not_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = run.read_spec(folder)
    state = jax.jit(partial(init, trainer=RECIPE.trainer(updates=18)))(jax.random.key(0))
    images = data_batches.Images(Path(spec.schedule.prepared), "train")
    position = data_batches.stream(images, batch_size=8, seed=0).get_state()
    save = partial(checkpoint.save, folder, position=position, spec=spec.to_json(), keep=2)
    there: list[list[int]] = []
    written = checkpoint.write_manifest

    def watched(*arguments):
        there.append(checkpoint.steps(folder))
        written(*arguments)

    monkeypatch.setattr(checkpoint, "write_manifest", watched)
    save(state=state._replace(step=state.step + 20))
    assert there == [[7, 14, 18]]
    assert checkpoint.steps(folder) == [18, 20]
    with monkeypatch.context() as broken:
        broken.setattr(
            checkpoint, "write_manifest", partial(_raise, OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError, match="No space"):
            save(state=state._replace(step=state.step + 21))
    assert checkpoint.steps(folder) == [18, 20]
    checkpoint.path(folder, 9_999_999).mkdir()  # not ours, nor one to be counted
    checkpoint.path(folder, 3).write_text("")
    save(state=state._replace(step=state.step + 22), keep=1)
    assert checkpoint.steps(folder) == [3, 22, 9_999_999]
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")] == []


def _raise(error: Exception, *_: object) -> None:
    raise error


def test_what_a_kill_in_a_save_has_left_is_no_checkpoint_and_is_cleared_away(
    folder: Path, data: Path
):
    half = folder / "checkpoints" / partial_name("0000099")
    shutil.copytree(checkpoint.path(folder, 18), half)
    shutil.copytree(half, half.with_name(half.name + ".orbax-checkpoint-tmp"))
    mine = folder / "checkpoints" / ".partial-notes"  # which no save has left
    mine.mkdir()
    leave(folder, "stopped")
    assert newest(folder).step == 18
    train(data, folder)
    assert checkpoint.steps(folder) == [7, 14, 18]
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(names) == [mine.name, "0000007", "0000014", "0000018"]


def test_other_versions_are_one_warning(
    folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    leave(folder, "stopped")
    train(data, folder)
    assert "other versions" not in capsys.readouterr().err
    leave(folder, "stopped")
    now = versions()
    monkeypatch.setattr(finish, "versions", lambda: {**now, "flax": "99.0"})
    train(data, folder)
    assert capsys.readouterr().err.count(f"flax {now['flax']} → 99.0") == 1


# Other versions of vaejax ------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    written = ("run.lock", "log.txt")  # also by a command that is refused
    return {name: (folder / name).read_bytes() for name in files(folder) if name not in written}


def test_a_checkpoint_of_another_version_is_refused_and_left_as_it_is(folder: Path, data: Path):
    forge(folder, format="vaejax checkpoint 1")
    leave(folder, "stopped")
    before = content(folder)
    for act in (lambda: train(data, folder), lambda: run.load(folder)):
        with pytest.raises(CheckpointError, match="written by another version of vaejax"):
            act()
        assert content(folder) == before
    assert not (folder / "checkpoints" / "damaged").exists()


@pytest.mark.parametrize("format_", [None, "vaejax run 1", "vaejax run 99"])
def test_a_run_of_another_version_is_refused_and_left_as_it_is(
    format_: str | None, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "format"}
    config |= {} if format_ is None else {"format": format_}
    (folder / "config.json").write_text(json.dumps(config))
    before = content(folder)
    for act in (lambda: train(data, folder), lambda: run.load(folder)):
        with pytest.raises(UserError, match="written by another version of vaejax"):
            act()
        assert content(folder) == before
    # a command without --out starts a run of its own
    runs = folder.parent / "runs"
    runs.mkdir()
    folder.rename(runs / "00000-tiny")
    monkeypatch.chdir(folder.parent)
    assert train(data, None, steps=1) == Path("runs/00001-tiny")
    assert "another version of vaejax" in capsys.readouterr().err
    assert content(runs / "00000-tiny") == before


# Files that somebody has edited ------------------------------------------------------------------


def edited(value, chance: random.Random):
    """JSON with one value, somewhere, made into another kind of value, or taken away."""
    places = []

    def walk(inner):
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], dict | list):
                walk(inner[key])

    walk(value)
    where, key = chance.choice(places)
    others = [
        None,
        "",
        "x" * 999,
        -1,
        0,
        10**12,
        10**30,
        0.5,
        True,
        [],
        {},
        [[1]],
        {"a": 1},
        "drop",
    ]
    other = chance.choice(others)
    if other == "drop":
        del where[key]
    else:
        where[key] = other
    return value


def mutated(content: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(5)
    at = chance.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + content[at + chance.randrange(1, 40) :]
    if kind == 3:
        return content[:at] + b"[" * chance.choice([1, 50_000]) + content[at:]
    return json.dumps(edited(json.loads(content), chance)).encode()


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_file_that_somebody_edited_is_an_error_errors_as_messages_or_does_no_harm(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    chance = random.Random(name)
    spec, path = run.read_spec(folder), folder / name
    content = path.read_bytes()
    weights = checkpoint.Weights({}, {}, 0, "")
    monkeypatch.setattr(checkpoint, "restore_weights", lambda saved, like, ema: weights)

    def write_page() -> None:
        visualize.write_readme(folder, run.read_spec(folder), run.read_status(folder))

    acts: dict[str, list[Callable[[], object]]] = {
        "config.json": [
            lambda: run.choose_folder(
                "tiny", lambda _: spec, out=folder, fresh=False, accept_changed_data=False
            ),
            lambda: commands.load(str(folder)),
            write_page,
        ],
        "run.json": [
            lambda: run.actual_status(folder),
            lambda: run.initial_status(spec, devices="", before=run.last_status(folder)),
            write_page,
        ],
    }
    messages: list[str] = []
    for _ in range(100):
        broken = mutated(content, chance)
        for act in acts[name]:
            path.write_bytes(broken)
            try:
                act()
            except VaejaxError as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert [text for text in messages if "\n" in text or len(text) > 3000] == []


def test_a_manifest_that_somebody_edited_is_another_one_or_says_the_same(folder: Path):
    chance = random.Random(0)
    path = checkpoint.path(folder, 18) / checkpoint.MANIFEST
    content = path.read_bytes()
    facts = checkpoint.check_manifest(path.parent)
    found = []
    for _ in range(100):
        path.write_bytes(mutated(content, chance))
        try:
            found.append(checkpoint.check_manifest(path.parent))
        except checkpoint.Damaged:
            continue
    assert len(found) < 30
    assert all(same == facts for same in found)


def test_the_table_of_runs_goes_on_past_a_broken_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    runs = folder.parent / "runs"
    runs.mkdir()
    for number in range(2):
        shutil.copytree(folder, runs / f"0000{number}-tiny")
    (runs / "00000-tiny" / "run.json").write_text('{"status": [1]}')
    monkeypatch.chdir(folder.parent)
    rows = doctor.runs().splitlines()
    assert "unreadable" in rows[1]
    assert "finished" in rows[2]
    with pytest.raises(UserError, match='"status" is not a text'):
        run.read_status(runs / "00000-tiny")
