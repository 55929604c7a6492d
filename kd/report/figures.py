"""The figures of a report, as SVG in the page's text color and as PNG."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kd.metrics import ACCURACY, logged_as, metric_title
from kd.report.measures import BINS

# SVG replaces this color of text and lines by the page's text color: readable in light and in dark mode.
_INK = "#123456"
_WIDTH = 7.2
STYLE: Any = {
    "figure.figsize": (_WIDTH, 3.6),
    "figure.constrained_layout.use": True,
    "figure.labelsize": 9,
    "font.size": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "kd",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}
COLORS = {
    "teacher": "#8a6fd1",
    "assistant": "#c77dba",
    "student, labels only": "#e08a3c",
    "student, distilled": "#2a9d8f",
}
LOSS_COLOR = "#c0504d"
_OTHER_COLORS = ("#4f86c6", "#b5651d", "#7a9a01", LOSS_COLOR, "#6a6a9a", "#999999", "#d4a017", "#3b7a57")
_MAX_NAMED = 40
"""Largest number of classes with their names on an axis."""
_MAX_NUMBERED = 12
"""Largest number of classes with numbers in the confusion matrix."""

Histories = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""By a phase's title, the history of each run: a mapping for each epoch."""


@dataclass
class Picture:
    """A figure of the report, with its file name, its heading, its text alternative and its caption."""

    name: str
    title: str
    alt: str
    figure: Figure
    note: str = ""

    def svg(self) -> str:
        """Return an SVG element in the page's text color."""
        text = io.StringIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        element = text.getvalue()[text.getvalue().index("<svg") :].replace(_INK, "currentColor")
        # A narrow figure keeps the size of its letters.
        share = self.figure.get_figwidth() / _WIDTH
        if share < 1:
            element = element.replace("<svg", f'<svg style="max-width: {46 * share:.1f}rem; min-width: 0"', 1)
        # Identifiers must be unique among all figures of a page.
        return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", element)


@mpl.rc_context(STYLE)
def accuracy_curves(histories: Histories, metric: str = ACCURACY) -> Picture | None:
    """Draw the validation accuracy by epoch: a thin line for each run, a thick one for the mean over the seeds."""
    title_of_metric = metric_title(metric)
    if not any(run for runs in histories.values() for run in runs):
        return None
    figure = Figure()
    axes = figure.subplots()
    for number, (title, runs) in enumerate(histories.items()):
        color = _color(title, number)
        for run in runs:
            alpha = 0.35 if len(runs) > 1 else 1
            axes.plot(
                *_points(run, logged_as(metric), 100), color=color, alpha=alpha, linewidth=1.2, marker=_marker(run)
            )
        if len(runs) > 1:
            epochs = min(len(run) for run in runs)
            accuracies = np.array(
                [[epoch.get(logged_as(metric)) for epoch in run[:epochs]] for run in runs], dtype=float
            )
            axes.plot(range(1, epochs + 1), 100 * accuracies.mean(axis=0), color=color, linewidth=2.2)
        axes.plot([], [], color=color, label=short(title, 48), linewidth=2.2)
    axes.set(xlabel="epoch", ylabel=f"validation {title_of_metric}, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _add_legend(figure)
    has_seeds = any(len(runs) > 1 for runs in histories.values())
    note = "Thin lines are single seeds, thick lines their mean." if has_seeds else ""
    heading = f"{title_of_metric[:1].upper()}{title_of_metric[1:]} per epoch"
    return Picture("accuracy", heading, f"validation {title_of_metric} of each phase by epoch", figure, note)


@mpl.rc_context(STYLE)
def loss_terms(histories: Histories) -> Picture | None:
    """Draw the terms of the loss and the learning rate by epoch, for the first run of each phase."""
    figure = Figure()
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for number, (title, (run, *_)) in enumerate(histories.items()):
        color, styles = _color(title, number), itertools.cycle(["-", "--", ":", "-."])
        for name in dict.fromkeys(name for epoch in run for name in epoch):
            if name.startswith("train/") and name not in ("train/acc", "train/loss"):
                label = short(f"{title}: {name.removeprefix('train/')}", 48)
                left.plot(*_points(run, name), color=color, linestyle=next(styles), label=label, marker=_marker(run))
        right.plot(*_points(run, "lr"), color=color, marker=_marker(run))
    if not left.lines:
        return None
    # A logarithmic axis needs a positive value; all terms can be exactly 0.
    scale = "log" if any(np.nanmax(line.get_ydata()) > 0 for line in left.lines) else "linear"
    left.set(xlabel="epoch", title="loss terms, unweighted", yscale=scale)
    right.set(xlabel="epoch", title="learning rate")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _add_legend(figure)
    alt, note = "terms of the loss and learning rate by epoch", "First seed of each phase."
    return Picture("loss-terms", "Loss terms and learning rate", alt, figure, note)


@mpl.rc_context(STYLE)
def per_class_accuracy(
    classes: Sequence[str], accuracies: Mapping[str, Sequence[float | None]], *, what: str = "validation accuracy"
) -> Picture | None:
    """Draw the students' accuracy on each class, from the largest loss by distillation to the largest gain."""
    titles = ("student, labels only", "student, distilled")
    if not set(titles) <= accuracies.keys():
        return None
    baseline, distilled = (100 * np.array(accuracies[title], dtype=float) for title in titles)
    order = np.argsort(np.nan_to_num(distilled - baseline), kind="stable")
    note = f"Sorted by the change in {what.removeprefix('validation ')}."
    if len(order) > _MAX_NAMED:
        order = np.concatenate([order[: _MAX_NAMED // 2], order[-_MAX_NAMED // 2 :]])
        note += f" Shown are the {_MAX_NAMED} classes of {len(classes)} that changed most."
    figure = Figure((_WIDTH, 1.4 + 0.22 * len(order)))
    axes, rows = figure.subplots(), np.arange(len(order))
    colors = np.where(distilled[order] >= baseline[order], COLORS["student, distilled"], LOSS_COLOR)
    axes.hlines(rows, baseline[order], distilled[order], color=colors)
    for title, values, marker in zip(titles, (baseline, distilled), "oD", strict=True):
        axes.scatter(values[order], rows, label=title, color=COLORS[title], marker=marker, zorder=3, s=22)
    axes.set_yticks(rows, [short(classes[index]) for index in order])
    axes.set(xlabel=f"{what}, %", ylim=(-0.6, len(order) - 0.4))
    _add_legend(figure)
    of_class = what.removeprefix("validation ")
    alt = f"{of_class} on each class, with labels only and distilled"
    return Picture("per-class-accuracy", f"Per-class {of_class}", alt, figure, note)


@mpl.rc_context(STYLE)
def calibration(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """Draw a reliability diagram for each network: accuracy against confidence."""
    columns = min(3, len(bins))
    rows = -(-len(bins) // columns)
    figure = Figure((2.4 * columns, 0.4 + 2.4 * rows))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(bins) :]:
        axes.axis("off")
    for number, (axes, (title, values)) in enumerate(zip(grid, bins.items(), strict=False)):
        filled = [(index, values[index]) for index in range(BINS) if values[index]["count"]]
        accuracies, confidences = ([entry[key] for _, entry in filled] for key in ("accuracy", "confidence"))
        axes.plot([0, 1], [0, 1], linestyle=":", color=_INK, linewidth=1)
        centers = [(index + 0.5) / BINS for index, _ in filled]
        axes.bar(centers, accuracies, 0.9 / BINS, color=_color(title, number), alpha=0.8)
        axes.plot(confidences, accuracies, ".", color=_INK, markersize=4)
        axes.set(title=short(title), xlim=(0, 1), ylim=(0, 1))
    figure.supxlabel("confidence")
    figure.supylabel("accuracy")
    note = (
        "Accuracy of the predictions in each bin of confidence. On the dotted line, a network is perfectly calibrated; "
        "below it, overconfident. Dots mark the mean confidence of a bin."
    )
    return Picture("calibration", "Calibration", "accuracy by confidence, one panel for each network", figure, note)


@mpl.rc_context(STYLE)
def confusion_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> Picture:
    """Draw the confusion matrix of a network, each row in percent of its class."""
    percent = np.array(counts, dtype=float)
    percent = 100 * percent / np.maximum(percent.sum(axis=1, keepdims=True), 1)
    side = 3 + min(3.5, 0.2 * len(classes))
    figure = Figure((min(_WIDTH, side + 1), side))
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="viridis", vmin=0, vmax=100)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= _MAX_NAMED:
        names = [short(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= _MAX_NUMBERED:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 1:
                ink = "black" if value > 60 else "white"  # noqa: PLR2004 (where the color map turns light)
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=7)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    alt = f"confusion matrix of the {title}"
    return Picture("confusion-matrix", "Confusion matrix", alt, figure, f"Network: {title}.")


@mpl.rc_context(STYLE)
def soft_targets(
    name: str,
    title: str,
    images: Sequence[NDArray[np.uint8]],
    labels: Sequence[str],
    probabilities: Sequence[Mapping[str, NDArray[np.floating[Any]]]],
    classes: Sequence[str],
) -> Picture:
    """Draw images ``(H, W, 3)`` beside the probabilities ``(C,)`` that each network assigns to their likeliest classes.

    Args:
        name: Name of the figure's file.
        title: Heading above the figure.
        images: The images.
        labels: True class of each image.
        probabilities: For each image, by network.
        classes: Names of the classes.
    """
    figure = Figure((_WIDTH, 0.4 + 1.9 * len(images)))
    grid = figure.subplots(len(images), 2, squeeze=False, width_ratios=[1, 3.4])
    for (left, right), image, label, networks in zip(grid, images, labels, probabilities, strict=True):
        left.imshow(image)
        left.set_title(short(label), fontsize=8)
        left.axis("off")
        likeliest = np.argsort(-np.mean(list(networks.values()), axis=0), kind="stable")[:5]
        width = 0.8 / len(networks)
        for number, (network, values) in enumerate(networks.items()):
            is_teacher = network.startswith("teacher")
            color = mpl.colormaps["Purples"](0.95 - 0.2 * number) if is_teacher else _color(network, number)
            centers = np.arange(len(likeliest)) + (number - (len(networks) - 1) / 2) * width
            right.bar(centers, 100 * values[likeliest], width, label=network, color=color)
        right.set_xticks(range(len(likeliest)), [short(classes[index], 14) for index in likeliest], fontsize=8)
        right.set(ylim=(0, 100), ylabel="probability, %")
        right.grid(visible=False, axis="x")
    _add_legend(figure)
    alt = f"{len(images)} validation images with the probabilities of their most likely classes"
    note = "Above each image its true class, beside it the five most likely classes."
    return Picture(name, title, alt, figure, note)


def short(name: str, length: int = 24) -> str:
    """Shorten a name to fit a figure, and escape the dollar sign, which starts a formula in matplotlib."""
    shown = name if len(name) <= length else f"{name[: length - 1]}…"
    return shown.replace("$", r"\$")


def _marker(run: Sequence[object]) -> str:
    """Return the marker of a curve: a single epoch would be invisible without one."""
    return "o" if len(run) == 1 else ""


def _points(run: Sequence[Mapping[str, Any]], name: str, factor: float = 1) -> NDArray[np.float64]:
    """Return the epochs and the values of a metric, ``(2, N)``."""
    points = [(epoch["epoch"], factor * epoch[name]) for epoch in run if epoch.get(name) is not None]
    return np.array(points, dtype=float).reshape(-1, 2).T


def _color(title: str, number: int) -> str:
    by_title = (color for prefix, color in COLORS.items() if title.startswith(prefix))
    return next(by_title, _OTHER_COLORS[number % len(_OTHER_COLORS)])


def _add_legend(figure: Figure) -> None:
    """Add a legend of all axes below their labels, outside the axes, whatever their height."""
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    columns = 3 if all(len(label) <= 24 for label in entries) else 2  # noqa: PLR2004 (what fits a third of the width)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
