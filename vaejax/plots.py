"""Plots of metrics: functions that return a matplotlib figure, and functions that write it as PNG.

matplotlib is used without its global state, and files are written atomically.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vaejax.files import atomic
from vaejax.metrics import read_lines, shown_in

# What a run reaches on held-out images: rate and distortion in nats per image, and the mse, a mean
# over values in [0, 1].
Point = tuple[float, float, float]

DPI = 120
STYLES: dict[str, dict[str, Any]] = {
    "train": {"alpha": 0.5, "lw": 1},
    "validation": {"marker": "."},
}
LINEAR = ("bits_per_dim",)  # curves with a linear axis: bits are a logarithm already
MIN_RATE = 1e-6  # nats: zero cannot be shown on a logarithmic axis


def curves(metrics: Path, path: Path) -> None:
    """Write `curves_figure` of a `metrics.jsonl` to `path`, or nothing if there are no metrics."""
    figure = curves_figure(metrics)
    if figure is not None:
        _save(figure, path)


def rates(kl: Float[np.ndarray, " d"], path: Path) -> None:
    """Write `rates_figure` to `path`."""
    _save(rates_figure(kl), path)


def rate_distortion(
    curve: Mapping[str, Point], others: Mapping[str, Point], path: Path, *, title: str
) -> None:
    """Write `rate_distortion_figure` to `path`."""
    _save(rate_distortion_figure(curve, others, title=title), path)


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as partial:
        figure.savefig(partial)


# Training curves ----------------------------------------------------------------------------------


def curves_figure(metrics: Path) -> Figure | None:
    """Plot a run's metrics over its steps, a panel for each one that `vaejax.metrics` lists.

    A panel has a line for the training and one for the validation split. Metrics that the file does
    not have get no panel, nor does the loss if it is always equal to the mse. Returns None if no
    metric is left.
    """
    lines: dict[str, list[dict]] = {split: [] for split in STYLES}
    for _, line in read_lines(metrics):
        lines[line["split"]].append(line)
    both = lines["train"] + lines["validation"]
    panels = {
        name: f"{name} ({metric.unit})" if metric.unit else name
        for name, metric in shown_in("curves").items()
        if any(name in line for line in both)
    }
    if all(line.get("loss") == line.get("mse") for line in both):
        panels.pop("loss", None)
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    for panel, (name, label) in zip(axes, panels.items(), strict=True):
        for split, style in STYLES.items():
            points = [(line["step"], line[name]) for line in lines[split] if name in line]
            if points:
                panel.plot(*zip(*points, strict=True), label=split, **style)
        values = [line[name] for line in both if name in line]
        # a loss that is the negative logarithm of a density may be negative
        linear = name in LINEAR or min(values) < 0 or not any(values)
        panel.set(xlabel="step", title=label, yscale="linear" if linear else "log")
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure and its `count` axes, of 600 x 360 pixels each, in at most two columns."""
    rows, columns = -(-count // 2), min(2, count)
    width, height = 5 * columns, 3 * rows
    figure = Figure(figsize=(width, height), dpi=DPI)
    # Margins in inches: matplotlib's computed layouts draw everything twice, and a run draws its
    # curves often.
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - 0.35 / height,
        wspace=0.2,
        hspace=0.4,
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for surplus in axes[count:]:
        surplus.remove()
    return figure, axes[:count]


# Latent dimensions --------------------------------------------------------------------------------


def rates_figure(kl: Float[np.ndarray, " d"]) -> Figure:
    """Plot the rate of every latent dimension, in nats, largest first."""
    figure = Figure(figsize=(7, 3), layout="constrained", dpi=DPI)
    axes = figure.subplots()
    ordered = np.sort(np.maximum(kl, MIN_RATE))[::-1]
    axes.fill_between(np.arange(len(ordered)), ordered, MIN_RATE, step="mid", alpha=0.6)
    axes.set(
        xlabel="latent dimension, by its rate",
        ylabel="nats",
        yscale="log",
        title=f"{np.sum(kl):,.1f} nats in {len(kl)} dimensions, {np.sum(kl > 0.01)} above 0.01",
        ylim=(1e-3, 2 * max(float(ordered[0]), 1e-2)),
        xlim=(0, max(1, len(ordered) - 1)),
    )
    axes.grid(alpha=0.3)
    return figure


# Rate and distortion ------------------------------------------------------------------------------


def rate_distortion_figure(
    curve: Mapping[str, Point], others: Mapping[str, Point], *, title: str
) -> Figure:
    """Plot the distortion (left) and the mse (right) of runs over their rates.

    `curve` has the runs of a sweep by their names: they are connected in the order of their rates
    and labelled. `others` are single runs, which stand in the legend with their ELBO. Dashed lines
    on the left connect points of equal ELBO. The rate's axis is linear up to 1 nat, where the
    posterior is the prior, and logarithmic beyond.
    """
    figure = Figure(figsize=(11.5, 5.6), layout="constrained", dpi=DPI)
    figure.suptitle(title, fontsize=11)
    left, right = figure.subplots(1, 2, sharex=True)
    by_rate = sorted(curve.items(), key=lambda item: item[1])
    panels = [
        (left, 1, "distortion, −log p(x|z) (nats per image)", "What an image costs"),
        (right, 2, "mse (mean over values in [0, 1])", "What the mse alone would show"),
    ]
    for axes, column, label, heading in panels:
        points = np.array([(point[0], point[column]) for _, point in by_rate])
        axes.plot(*points.T, ".-", color="0.45", lw=1.2, zorder=3)
        for i, (name, _) in enumerate(by_rate):
            # a falling curve leaves room above it on the right, and below it on the left
            offset, side = ((-5, -12), "right") if i % 2 else ((5, 5), "left")
            style = {"fontsize": 8, "color": "0.35", "textcoords": "offset points", "ha": side}
            axes.annotate(name, points[i], xytext=offset, zorder=5, **style)
        for (name, point), marker in zip(others.items(), itertools.cycle("osD^vP")):
            text = f"{name}: ELBO {_format_integer(-point[0] - point[1])} nats"
            style = {"marker": marker, "ms": 9, "mec": "white", "mew": 1, "ls": "", "zorder": 4}
            axes.plot(point[0], point[column], label=text, **style)
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.margins(0.11)
        axes.set(xlabel="rate, KL(q(z|x) ‖ N(0, I)) (nats per image)", ylabel=label)
        axes.set_title(heading, fontsize=10)
        axes.grid(alpha=0.25)
    left.set_xlim(left=max(0.0, left.get_xlim()[0]))
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    right.legend(fontsize=9)
    _draw_equal_elbo(left)
    return figure


def _draw_equal_elbo(axes: Axes) -> None:
    """Draw lines of equal rate + distortion over the visible area, with labels at the left."""
    (first, last), (low, high) = axes.get_xlim(), axes.get_ylim()
    rates = np.concatenate([np.linspace(first, last, 400), np.geomspace(1e-3, 1, 400) * last])
    rates = np.sort(rates[(rates >= first) & (rates <= last)])
    label_rate = axes.transData.inverted().transform(axes.transAxes.transform((0.015, 0)))[0]
    for cost in MaxNLocator(8).tick_values(low + first, high + last):
        axes.plot(rates, cost - rates, "--", color="C0", lw=0.8, alpha=0.4, zorder=1)
        if low < cost - label_rate < low + 0.95 * (high - low):
            style = {"fontsize": 7, "color": "C0", "alpha": 0.8, "va": "bottom"}
            axes.text(
                label_rate, cost - label_rate, f"ELBO {_format_integer(-cost)}", zorder=1, **style
            )
    axes.set(xlim=(first, last), ylim=(low, high))


def _format_integer(value: float) -> str:
    """Format an integer with a thousands separator and a true minus sign."""
    return f"{value:,.0f}".replace("-", "−")
