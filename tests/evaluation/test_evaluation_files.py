"""The files of an evaluation show what it has computed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaejax import pictures, plots
from vaejax.errors import UserError
from vaejax.evaluation import tables


def test_an_evaluation_is_written_with_its_tables_and_pictures(written: Path, evaluation):
    assert json.loads((written / "evaluation.json").read_text()) == evaluation.json
    page = (written / "evaluation.md").read_text()
    assert page.startswith("# Evaluation of run on held-out images\n")
    for name in tables.CAPTIONS.keys() - {"samples_mixture.png"}:  # it has none
        assert f"(evaluation/{name})" in page
    terminal = "\n".join(tables.to_text(evaluation.json))
    for name in {name.split("/")[0] for name in evaluation.json["metrics"]}:
        assert f"| {name} |" in page
        assert f"  {name} " in terminal
    for note in tables.notes(evaluation.json):
        assert note in page
        assert note in terminal
    assert "Left out: memorized_pixels/reconstructions, memorized_pixels/samples" in page


def test_pictures_show_the_arrays_of_the_evaluation(written: Path, evaluation, tmp_path: Path):
    arrays = evaluation.pictures
    expected = {
        "samples_normal.png": pictures.grid(arrays.samples["normal"], columns=10),
        "reconstructions.png": pictures.stack_rows(arrays.reconstructions),
        "worst_and_best.png": pictures.stack_rows(arrays.worst_and_best, columns=10),
        "nearest.png": pictures.stack_rows(arrays.nearest),
    }
    for name, picture in expected.items():
        with Image.open(written / "evaluation" / name) as image:
            np.testing.assert_array_equal(np.asarray(image), picture)
    plots.rates(arrays.rate_per_dimension, tmp_path / "rates.png")
    drawn = (written / "evaluation" / "rates.png").read_bytes()
    assert drawn == (tmp_path / "rates.png").read_bytes()


def test_an_evaluation_is_not_written_into_what_a_link_leads_to(
    trained: Path, evaluation, tmp_path: Path
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    (folder / "evaluation").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="evaluation in it is a link"):
        tables.write(folder, evaluation)
    (folder / "evaluation").unlink()
    mine = tmp_path / "mine" / "file"
    mine.write_text("mine")
    for name in ("evaluation.json", "evaluation.md"):
        (folder / f".partial-{name}").symlink_to(mine)
        (folder / name).symlink_to(mine)
    tables.write(folder, evaluation)
    assert mine.read_text() == "mine"
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation.json
