"""A run is judged as it is, on images that it never saw, and what cannot be said is said so."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vaejax import cli, generate
from vaejax.data.batches import Images
from vaejax.errors import CheckpointError, UserError
from vaejax.evaluation import copies, evaluate, features, judge, show
from vaejax.evaluation.figures import FIGURES
from vaejax.evaluation.judge import Questions
from vaejax.models import autoencoder
from vaejax.models.convolutional import Convolutional
from vaejax.training import checkpoint, run

QUICK = Questions(samples=70, bound_images=3, bound_samples=9)


@pytest.fixture(scope="module")
def judged(trained: Path) -> judge.Judged:
    return judge.find(trained, "test")


@pytest.fixture(scope="module")
def evaluation(judged: judge.Judged, plain) -> dict:
    return judge.judge(judged, QUICK, plain)


def value(evaluation: dict, name: str) -> float:
    return evaluation["figures"][name]["value"]


def test_the_figures_are_those_of_the_model_on_the_held_out_images(
    evaluation: dict, judged: judge.Judged
):
    """Written out once more, all images at once, with the posterior's mode where that is asked."""
    model, params, statistics = judged.subject[:3]
    images = judged.held_out.read(np.arange(len(judged.held_out)))
    again = np.asarray(generate.reconstruct(params, statistics, images, model=model), float)
    psnr = 10 * np.log10(255**2 / ((again - images) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(value(evaluation, "psnr"), psnr.mean(), rtol=1e-4)
    figures = evaluation["figures"]
    assert evaluation["images"] == len(images) == len(psnr)
    elbo = -(figures["distortion"]["value"] + figures["rate"]["value"])
    np.testing.assert_allclose(figures["elbo"]["value"], elbo, rtol=1e-6)
    values = 16 * 16 * 3
    bits = -elbo / (values * math.log(2))
    np.testing.assert_allclose(figures["bits_per_dim"]["value"], bits, rtol=1e-6)
    rates = evaluation["rate_per_dimension"]
    np.testing.assert_allclose(figures["rate"]["value"], sum(rates), rtol=1e-5)
    np.testing.assert_allclose(figures["kl"]["value"], np.mean(rates), rtol=1e-5)
    loss = figures["mse"]["value"] + 0.01 * figures["kl"]["value"]
    np.testing.assert_allclose(figures["report_loss"]["value"], loss, rtol=1e-5)
    parts = figures["index_code"]["value"] + figures["marginal_kl"]["value"]
    np.testing.assert_allclose(parts, figures["rate"]["value"], atol=0.2)  # at one z an image
    assert figures["importance_bound"]["value"] > figures["importance_elbo"]["value"]


def test_every_figure_is_given_or_left_out_with_a_reason(evaluation: dict):
    named = {name.split("/")[0] for name in (*evaluation["figures"], *evaluation["left_out"])}
    assert named == FIGURES.keys() - {"distortion_bits"}  # of models without a posterior
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
    assert all(len(reason) > 20 for reason in evaluation["left_out"].values())


def test_no_column_of_a_table_is_empty(evaluation: dict):
    for title, head, rows in show.sections([evaluation]):
        for place in range(1, len(head) - 3):
            assert any(row[place] != "–" for row in rows), (title, head[place])


def test_the_same_questions_have_the_same_answers(evaluation: dict, judged, plain):
    again = judge.judge(judged, QUICK, plain)
    assert again["figures"] == evaluation["figures"]
    other = judge.judge(judged, QUICK._replace(seed=1), plain)
    assert value(other, "mse") != value(evaluation, "mse")
    assert value(other, "psnr") == value(evaluation, "psnr")  # of the mode, without noise


def test_batches_do_not_matter(evaluation: dict, judged, plain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "at_a_time", lambda model: 5)
    small = judge.judge(judged, QUICK, plain)
    for name, estimate in evaluation["figures"].items():
        if not name.startswith("importance"):  # whose latents are drawn in parts
            np.testing.assert_allclose(
                small["figures"][name]["value"], estimate["value"], rtol=1e-4, atol=1e-5
            )


def test_a_likelihood_is_fitted_on_other_images_than_it_is_judged_on(judged: judge.Judged):
    key = jax.random.key(0)
    validation = Images(judged.prepared, "validation")
    best = evaluate.calibrate(judged.subject, validation, key)
    totals = [
        evaluate.walk(judged.subject, validation, key, best + away, look=lambda _: None)
        .distortion.astype(float)
        .sum()
        for away in (-0.02, 0.0, 0.02)
    ]
    assert totals[1] < min(totals[0], totals[2])


def test_a_run_that_gives_its_training_faces_back_is_found_out(judged, plain, monkeypatch):
    """A decoder that knows one training face by heart."""
    known = Images(judged.prepared, "train").read(np.array([3]))

    def by_heart(params, statistics, z, *, model):
        return np.repeat(known, len(z), axis=0)

    monkeypatch.setattr(generate, "decode", by_heart)
    monkeypatch.setattr(copies, "LEAST", 20)
    found = judge.judge(judged, QUICK, plain)
    assert value(found, "copies_pixels/samples") == value(found, "copies_features/samples") == 1
    assert value(found, "nearest_pixels/samples") == 0
    assert value(found, "nearest_features/samples") < 1e-5
    assert value(found, "persons/samples") == pytest.approx(1)


def test_the_pages_show_it(evaluation: dict, judged: judge.Judged):
    show.write(judged.folder, evaluation)
    page = (judged.folder / "evaluation.md").read_text()
    for name in show.TITLES:
        assert f"(evaluation/{name})" in page
        with Image.open(judged.folder / "evaluation" / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 5
    for name in ("bits_per_dim", "kernel", "marginal_kl", "Left out"):
        assert name in page
        assert name in "\n".join(show.table(evaluation))
    assert "‖ N(0, I)" in page
    assert "\\|x) ‖" in page  # or else the bar would end the cell


def test_a_deterministic_autoencoder_has_no_figures_of_codes(trained: Path, plain, judged):
    model = Convolutional(size=16, width=2)
    params, statistics = jax.jit(partial(autoencoder.init, model))(jax.random.key(0))
    subject = evaluate.Subject(model, params, statistics, None)
    found = judge.judge(judged._replace(subject=subject), QUICK, plain)
    assert {"mse", "psnr", "distortion", "distortion_bits"} <= found["figures"].keys()
    assert {"kl", "elbo", "mmd", "samples"} <= found["left_out"].keys()
    assert "kernel/samples" not in found["figures"]
    assert "kernel/reconstructions" in found["left_out"]  # so few are held out


# What cannot be done ------------------------------------------------------------------------------


def test_without_features_all_else_is_given(judged: judge.Judged):
    found = judge.judge(judged, QUICK, None, why="they are on the moon, and cannot be fetched")
    assert found["left_out"]["features"].startswith("they are on the moon")
    assert "psnr" in found["figures"]
    assert "nearest_pixels/samples" in found["figures"]
    assert not any(name.startswith("kernel") for name in found["figures"])


def test_images_that_are_others_or_gone_and_runs_without_weights_are_refused(
    trained: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    settings = run.read(folder)
    run.write(folder, "config.json", settings | {"data": {"fingerprint": "0"}})
    with pytest.raises(UserError, match="other images than"):
        judge.find(folder, "test")
    by_nobody = settings["data"] | {"persons": 0}  # the same images, split in another way
    run.write(folder, "config.json", settings | {"data": by_nobody})
    with pytest.raises(UserError, match="or splits them in another way"):
        judge.find(folder, "test")
    schedule = settings["schedule"] | {"prepared": str(tmp_path / "gone")}
    run.write(folder, "config.json", settings | {"schedule": schedule})
    with pytest.raises(UserError, match="prepares them again"):
        judge.find(folder, "test")
    run.write(folder, "config.json", settings)
    shutil.rmtree(folder / checkpoint.FOLDER)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        judge.find(folder, "test")


def evaluated(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["vaejax", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_writes_and_says_it_all_and_compare_shows_two(
    trained: Path, plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / name, ignore=shutil.ignore_patterns("evaluation*"))
    asked = ["--samples", "60", "--bound-images", "2", "--bound-samples", "3"]
    assert evaluated("compare", "a", "b", monkeypatch=monkeypatch) == 2
    assert "not evaluated yet: vaejax evaluate a" in capsys.readouterr().err
    assert evaluated("evaluate", "a", *asked, monkeypatch=monkeypatch) == 0
    told = capsys.readouterr().out
    assert "VGG16's features are of images of 32 px and more" in told
    assert "bits_per_dim" in told
    monkeypatch.setattr(features, "vgg16", lambda size: plain)
    assert evaluated("evaluate", "b", *asked, monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert evaluated("compare", "a", "b", monkeypatch=monkeypatch) == 0
    told = capsys.readouterr().out
    assert "no figure that rests on them is given" in told
    assert "bits_per_dim" in told
    page = (tmp_path / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * len(show.TITLES)
    assert "http" not in page.replace("<!doctype html>", "")  # it needs nothing from elsewhere
    path = tmp_path / "a" / "evaluation.json"
    whole = json.loads(path.read_text())
    for damaged in (
        {"format": judge.FORMAT},
        {**whole, "features": "VGG16"},
        {**whole, "features": {"name": 3}},
        {**whole, "compared": "all"},
        {**whole, "figures": {"mse": 3}},
    ):
        path.write_text(json.dumps(damaged))
        assert evaluated("compare", "a", "b", monkeypatch=monkeypatch) == 2
        assert "writes it anew" in capsys.readouterr().err
    few = json.loads((tmp_path / "b" / "evaluation.json").read_text())
    path.write_text(json.dumps({**few, "compared": 30}))
    assert evaluated("compare", "a", "b", monkeypatch=monkeypatch) == 0
    assert "no figure of so many is given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "latest"], "there is no run"),
        (["evaluate", "7", "--samples", "0"], "--samples 0: at least 1"),
        (["evaluate", "7", "--seed", "-1"], "--seed -1"),
        (["evaluate", "7", "--split", "train"], "--split"),
        (["compare"], "no run was named"),
        (["compare", "7", "--out", "a.png"], "must end in .html"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert evaluated(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_digits_are_those_that_can_be_believed():
    assert show.number({"value": 1234.5678, "error": 12.3}) == "1,235 ± 12"
    assert show.number({"value": 0.0123456, "error": 0.00034}) == "0.01235 ± 0.00034"
    assert show.number({"value": 0.0123456, "error": None}) == "0.012346"
    assert show.number(None) == "–"


def test_every_figure_is_defined_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "figures.md").read_text()
    tables = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in FIGURES if f"`{name}`" not in tables] == []


def test_what_is_no_number_is_left_out_and_weights_that_say_nothing_are_refused(
    judged: judge.Judged, plain, monkeypatch: pytest.MonkeyPatch
):
    see = evaluate.see_batch

    def overflows(*arguments):
        found = see(*arguments)
        assert found.posterior is not None
        far = found.posterior.log_variance.at[0, 0].set(200.0)  # whose variance is no float32
        return found._replace(posterior=found.posterior._replace(log_variance=far))

    with monkeypatch.context() as there:
        there.setattr(evaluate, "see_batch", overflows)
        found = judge.judge(judged, QUICK, plain)
    assert {"rate", "kl", "elbo"} <= found["left_out"].keys()
    assert found["rate_per_dimension"][0] is None
    assert "mse" in found["figures"]
    json.dumps(found, allow_nan=False)

    nothing = jax.tree.map(lambda leaf: leaf * np.nan, judged.subject.params)
    broken = judged._replace(subject=judged.subject._replace(params=nothing))
    with pytest.raises(UserError, match="is no number"):
        judge.judge(broken, QUICK, plain)
