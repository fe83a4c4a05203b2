"""Plots show the numbers that they are made from, under the names that the table of metrics has."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vaejax import plots
from vaejax.metrics import METRICS, shown_in

COMMON = {"step": 0, "epoch": 1, "split": "train"}


def write_metrics(path: Path, *names: str, **changes: float) -> list[dict]:
    """Write five lines of training and two of validation, with other values in each line."""
    random = np.random.default_rng(0)
    steps = [("train", 10 * i) for i in range(1, 6)] + [("validation", 25), ("validation", 50)]
    lines = [
        {"step": step, "epoch": 1, "split": split}
        | {name: random.uniform(0.1, 9) for name in names}
        | changes
        for split, step in sorted(steps, key=lambda item: item[1])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def panels(figure: Figure | None) -> dict[str, Axes]:
    assert figure is not None
    return {axes.get_title(): axes for axes in figure.axes}


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Return the points of every line with a label."""
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        for line in axes.lines
    }


def test_curves_show_the_lines_of_metrics_jsonl_panel_by_panel(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = write_metrics(path, *METRICS)
    figure = panels(plots.curves_figure(path))
    assert list(figure) == [
        f"{name} ({metric.unit})" if metric.unit else name
        for name, metric in shown_in("curves").items()
    ]
    for name, axes in zip(shown_in("curves"), figure.values(), strict=True):
        assert points(axes) == {
            split: [(line["step"], line[name]) for line in lines if line["split"] == split]
            for split in ("train", "validation")
        }


def test_a_split_without_a_metric_has_no_line_of_it(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    entries = [
        {**COMMON, "step": 1, "mse": 0.5},
        {**COMMON, "step": 2, "kl": 3.0},
        {**COMMON, "step": 2, "split": "validation", "mse": 0.25},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    mse, kl = panels(plots.curves_figure(path)).values()
    assert points(mse) == {"train": [(1, 0.5)], "validation": [(2, 0.25)]}
    assert points(kl) == {"train": [(2, 3.0)]}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"loss": 0.2, "mse": 0.1, "bce": 0.2}, ["loss", "mse (in [0, 1]²)"]),
        ({"loss": 0.1, "mse": 0.1}, ["mse (in [0, 1]²)"]),  # the loss is the mse: shown once
    ],
)
def test_only_metrics_of_the_run_have_a_panel(tmp_path: Path, values: dict, names: list[str]):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, **values)
    assert list(panels(plots.curves_figure(path))) == names


@pytest.mark.parametrize(
    ("loss", "scale"), [(0.2, "log"), (-1.5, "linear"), (0.0, "linear")], ids=str
)
def test_values_without_a_logarithm_have_a_linear_axis(tmp_path: Path, loss: float, scale: str):
    path = tmp_path / "metrics.jsonl"
    write_metrics(path, "mse", "bits_per_dim", loss=loss)
    figure = panels(plots.curves_figure(path))
    assert [axes.get_yscale() for axes in figure.values()] == [scale, "log", "linear"]
    plots.curves(path, tmp_path / "curves.png")


def test_curves_are_written_as_a_png_of_600_by_360_pixels_a_panel(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for names, size in (
        (("loss", "mse", "kl", "bits_per_dim"), (1200, 720)),
        (("loss", "mse", "kl"), (1200, 720)),
        (("loss", "mse"), (1200, 360)),
        (("mse",), (600, 360)),
    ):
        write_metrics(path, *names)
        plots.curves(path, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as image:
            assert image.size == size


def test_a_run_without_metrics_has_no_curves(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(COMMON) + "\n")
    for path in (tmp_path / "metrics.jsonl", tmp_path / "none.jsonl"):
        assert plots.curves_figure(path) is None
        plots.curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_rates_are_sorted_and_summed(tmp_path: Path):
    kl = np.array([0.5, 0.0, 2.0, 0.25])
    (axes,) = plots.rates_figure(kl).axes
    assert axes.get_title() == "2.8 nats in 4 dimensions, 3 above 0.01"
    (area,) = axes.collections
    (outline,) = area.get_paths()
    for x, rate in ((0.2, 2.0), (1.0, 0.5), (2.0, 0.25), (2.8, 1e-6)):  # a step around each integer
        assert outline.contains_point((x, 0.99 * rate)) == (rate > 1e-6)
        assert not outline.contains_point((x, 1.01 * rate))
    plots.rates(kl, tmp_path / "rates.png")
    with Image.open(tmp_path / "rates.png") as image:
        assert image.size == (840, 360)


CURVE = {"0.1": (5.0, 900.0, 0.02), "0.001": (80.0, 700.0, 0.004), "0.01": (30.0, 760.0, 0.008)}
OTHERS = {"report": (30.0, 760.0, 0.008), "sigma-VAE": (60.0, 705.0, 0.005)}


def test_rate_and_distortion_are_a_curve_by_rate_and_labelled_points():
    figure = plots.rate_distortion_figure(CURVE, OTHERS, title="A sweep")
    assert figure.get_suptitle() == "A sweep"
    for axes, column in zip(figure.axes, (1, 2), strict=True):
        curve, *others = (line for line in axes.lines if line.get_linestyle() != "--")
        in_order = [CURVE[name] for name in ("0.1", "0.01", "0.001")]
        expected = [(point[0], point[column]) for point in in_order]
        np.testing.assert_array_equal(curve.get_xydata(), expected)
        assert [text.get_text() for text in axes.texts][:3] == ["0.1", "0.01", "0.001"]
        assert {str(line.get_label()): tuple(line.get_xydata()[0]) for line in others} == {
            "report: ELBO −790 nats": (30.0, OTHERS["report"][column]),
            "sigma-VAE: ELBO −765 nats": (60.0, OTHERS["sigma-VAE"][column]),
        }


def test_dashed_lines_connect_points_of_equal_elbo():
    left, right = plots.rate_distortion_figure(CURVE, OTHERS, title="A sweep").axes
    dashed = [line for line in left.lines if line.get_linestyle() == "--"]
    assert len(dashed) > 3
    costs = [np.sum(line.get_xydata(), axis=1) for line in dashed]
    for cost in costs:
        np.testing.assert_allclose(cost, cost[0])
    labels = [text for text in left.texts if text.get_text().startswith("ELBO")]
    assert labels
    for label in labels:
        elbo = float(label.get_text().removeprefix("ELBO ").replace("−", "-").replace(",", ""))
        assert sum(label.get_position()) == pytest.approx(-elbo, abs=0.5)
    assert not [line for line in right.lines if line.get_linestyle() == "--"]


def test_rate_and_distortion_are_written(tmp_path: Path):
    plots.rate_distortion(CURVE, OTHERS, tmp_path / "plot.png", title="A sweep")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (1380, 672)
