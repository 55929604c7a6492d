"""The figures of a report, as SVG in the page's text color and as PNG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd.report.measures import BINS

# Text and lines have this color, which SVG replaces by the page's text color: readable in light and in dark mode.
_INK = "#123456"
_STYLE: dict[Any, Any] = {
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
_LOSS_COLOR = "#c0504d"
_OTHER_COLORS = ("#4f86c6", "#b5651d", "#7a9a01", "#c0504d", "#6a6a9a", "#999999", "#d4a017", "#3b7a57")
_MAX_NAMED = 40
"""Largest number of classes whose names fit on an axis."""
_MAX_NUMBERED = 12
"""Largest number of classes whose confusion matrix has room for numbers."""

Histories = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]
"""By a phase's title, the history of each run: a mapping for each epoch."""


@dataclass
class Picture:
    """A figure of the report.

    Args:
        name: Name of its file and its TensorBoard tag.
        title: The heading above it.
        alt: Text alternative for screen readers.
        figure: The figure.
        note: The caption below it.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    note: str = ""

    def svg(self) -> str:
        """Return an SVG element that scales with the page and has its text color."""
        text = io.StringIO()
        with mpl.rc_context(_STYLE):
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        element = text.getvalue()[text.getvalue().index("<svg") :].replace(_INK, "currentColor")
        # Identifiers must be unique among all figures of a page.
        references = re.compile(r'(\bid="|url\(#|href="#)')
        element = references.sub(rf"\g<1>{self.name}-", element)
        element = re.sub(r'<svg ([^>]*?)width="[^"]+"', r"<svg \1", element, count=1)
        return re.sub(r'<svg ([^>]*?)height="[^"]+"', r'<svg role="img" \1', element, count=1)

    def write_png(self, folder: Path) -> Path:
        """Write a PNG on a white background."""
        path = folder / f"{self.name}.png"
        self.figure.savefig(path, dpi=150, facecolor="white")
        return path


def accuracy_curves(histories: Histories) -> Picture | None:
    """Draw the validation accuracy by epoch: a thin line for each run, a thick one for the mean over the seeds."""

    def draw(axes: Axes) -> None:
        for number, (title, runs) in enumerate(histories.items()):
            color = _color(title, number)
            for run in runs:
                axes.plot(*_points(run, "val/acc"), color=color, alpha=0.35 if len(runs) > 1 else 1, linewidth=1.2)
            if len(runs) > 1:
                epochs = min(len(run) for run in runs)
                mean = np.mean([[one.get("val/acc") or np.nan for one in run[:epochs]] for run in runs], axis=0)
                axes.plot(range(1, epochs + 1), 100 * mean, color=color, linewidth=2.2)
            axes.plot([], [], color=color, label=short(title, 48), linewidth=2.2)
        axes.set(xlabel="epoch", ylabel="validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_below(axes)

    if not any(len(run) for runs in histories.values() for run in runs):
        return None
    has_seeds = any(len(runs) > 1 for runs in histories.values())
    note = "Thin lines are single seeds, thick lines their mean." if has_seeds else ""
    return drawn("accuracy", "Accuracy per epoch", "validation accuracy of each phase by epoch", draw, note=note)


def loss_terms(histories: Histories) -> Picture | None:
    """Draw the terms of the loss and the learning rate by epoch, for the first run of each phase."""
    lines = [
        (f"{title}: {name.removeprefix('train/')}", *_points(runs[0], name, factor=1))
        for title, runs in histories.items()
        for name in dict.fromkeys(name for epoch in runs[0] for name in epoch)
        if name.startswith("train/") and name not in ("train/acc", "train/loss")
    ]
    rates = [(title, *_points(runs[0], "lr", factor=1)) for title, runs in histories.items()]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2, 1]})
        for number, (label, epochs, values) in enumerate(lines):
            left.plot(epochs, values, label=short(label, 48), color=_OTHER_COLORS[number % len(_OTHER_COLORS)])
        left.set(xlabel="epoch", title="loss terms, unweighted", yscale="log")
        for number, (title, epochs, values) in enumerate(rates):
            right.plot(epochs, values, color=_color(title, number), label=short(title, 48))
        right.set(xlabel="epoch", title="learning rate")
        for axes in (left, right):
            axes.grid(visible=True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    if not lines:
        return None
    alt = "terms of the loss and learning rate by epoch"
    return panels("loss-terms", "Loss terms and learning rate", alt, draw, (7.2, 3.6), note="First seed of each phase.")


def per_class_accuracy(classes: Sequence[str], accuracies: Mapping[str, Sequence[float | None]]) -> Picture | None:
    """Draw the students' accuracy on each class, from the largest loss by distillation to the largest gain."""
    titles = ("student, labels only", "student, distilled")
    if not set(titles) <= accuracies.keys():
        return None
    baseline, distilled = (
        np.array([np.nan if one is None else one for one in accuracies[title]], dtype=float) for title in titles
    )
    order = np.argsort(np.nan_to_num(distilled - baseline), kind="stable")
    note = "Sorted by the change in accuracy."
    if len(order) > _MAX_NAMED:
        order = np.concatenate([order[: _MAX_NAMED // 2], order[-_MAX_NAMED // 2 :]])
        note += f" Shown are the {_MAX_NAMED} classes of {len(classes)} that changed most."

    def draw(axes: Axes) -> None:
        rows = np.arange(len(order))
        colors = np.where(distilled[order] >= baseline[order], COLORS["student, distilled"], _LOSS_COLOR)
        axes.hlines(rows, 100 * baseline[order], 100 * distilled[order], color=colors)
        for title, values, marker in zip(titles, (baseline, distilled), "oD", strict=True):
            axes.scatter(100 * values[order], rows, label=title, color=COLORS[title], marker=marker, zorder=3, s=22)
        axes.set_yticks(rows, [short(classes[index]) for index in order])
        axes.set(xlabel="validation accuracy, %", ylim=(-0.6, len(order) - 0.4))
        _legend_below(axes)

    alt = "accuracy on each class, with labels only and distilled"
    size = (7.2, 1.4 + 0.22 * len(order))
    return drawn("per-class-accuracy", "Per-class accuracy", alt, draw, size, note=note)


def calibration(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture | None:
    """Draw a reliability diagram for each network: accuracy against confidence."""
    if not bins:
        return None
    columns = min(3, len(bins))
    rows = -(-len(bins) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.ravel()[len(bins) :]:
            axes.axis("off")
        for number, (axes, (title, values)) in enumerate(zip(grid.ravel(), bins.items(), strict=False)):
            filled = [(place, one) for place, one in enumerate(values) if one["count"]]
            centers = [(place + 0.5) / BINS for place, _ in filled]
            accuracies, confidences = ([one[key] for _, one in filled] for key in ("accuracy", "confidence"))
            axes.plot([0, 1], [0, 1], linestyle=":", color=_INK, linewidth=1)
            axes.bar(centers, accuracies, 0.9 / BINS, color=_color(title, number), alpha=0.8)
            axes.plot(confidences, accuracies, ".", color=_INK, markersize=4)
            axes.set(title=short(title), xlim=(0, 1), ylim=(0, 1))
        figure.supxlabel("confidence", fontsize=9)
        figure.supylabel("accuracy", fontsize=9)

    alt = "accuracy by confidence, one panel for each network"
    note = (
        "Accuracy of the predictions in each bin of confidence. On the dotted line, a network is perfectly calibrated; "
        "below it, overconfident. Dots mark the mean confidence of a bin."
    )
    return panels("calibration", "Calibration", alt, draw, (2.4 * columns, 0.4 + 2.4 * rows), note=note)


def confusion_matrix(classes: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> Picture:
    """Draw the confusion matrix of a network, each row in percent of its class."""
    percent = np.array(counts, dtype=float)
    percent = 100 * percent / np.maximum(percent.sum(axis=1, keepdims=True), 1)

    def draw(axes: Axes) -> None:
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
        axes.figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)

    side = 3 + min(3.5, 0.2 * len(classes))
    alt, size = f"confusion matrix of the {title}", (min(7.2, side + 1), side)
    return drawn("confusion-matrix", "Confusion matrix", alt, draw, size, note=f"Network: {title}.")


def soft_targets(
    images: Sequence[np.ndarray[Any, Any]],
    names: Sequence[str],
    rows: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    classes: Sequence[str],
    *,
    name: str,
    title: str,
) -> Picture:
    """Draw images beside the probabilities of their most likely classes.

    Args:
        images: ``(H, W, 3)``, uint8.
        names: True class of each image.
        rows: For each image, probabilities ``(C,)`` by network.
        classes: Names of the classes.
        name: Name of the figure's file.
        title: Heading above the figure.
    """

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(images), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 3.4]})
        for (left, right), image, label, networks in zip(grid, images, names, rows, strict=True):
            left.imshow(image)
            left.set_title(short(label), fontsize=8)
            left.axis("off")
            likeliest = np.argsort(-np.mean(list(networks.values()), axis=0), kind="stable")[:5]
            width = 0.8 / len(networks)
            for number, (network, probabilities) in enumerate(networks.items()):
                is_teacher = network.startswith("teacher")
                color = mpl.colormaps["Purples"](0.95 - 0.2 * number) if is_teacher else _color(network, number)
                centers = np.arange(len(likeliest)) + (number - (len(networks) - 1) / 2) * width
                right.bar(centers, 100 * probabilities[likeliest], width, label=network, color=color)
            right.set_xticks(range(len(likeliest)), [short(classes[index], 14) for index in likeliest], fontsize=8)
            right.set(ylim=(0, 100), ylabel="probability, %")
        handles, labels = grid[0][1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)

    alt = f"{len(images)} validation images with the probabilities of their most likely classes"
    note = "Above each image its true class, beside it the five most likely classes."
    return panels(name, title, alt, draw, (7.2, 0.4 + 1.9 * len(images)), note=note)


def drawn(
    name: str,
    title: str,
    alt: str,
    draw: Callable[[Axes], None],
    size: tuple[float, float] = (7.2, 3.6),
    *,
    note: str = "",
) -> Picture:
    """Draw a figure with a single pair of axes; see :func:`panels`."""

    def draw_axes(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=True)
        draw(axes)

    return panels(name, title, alt, draw_axes, size, note=note)


def panels(
    name: str, title: str, alt: str, draw: Callable[[Figure], None], size: tuple[float, float], *, note: str = ""
) -> Picture:
    """Draw a figure in the report's style.

    Args:
        name: Name of its file.
        title: Heading above it.
        alt: Text alternative.
        draw: Draws on the empty figure.
        size: Width and height, in inches.
        note: Caption below it.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
    return Picture(name, title, alt, figure, note)


def short(name: str, length: int = 24) -> str:
    """Shorten a name to fit a figure, and escape the dollar sign, which starts a formula in matplotlib."""
    shown = name if len(name) <= length else f"{name[: length - 1]}…"
    return shown.replace("$", r"\$")


def _points(run: Sequence[Mapping[str, Any]], name: str, *, factor: float = 100) -> tuple[list[float], list[float]]:
    points = [(float(epoch["epoch"]), factor * float(epoch[name])) for epoch in run if epoch.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _color(title: str, number: int) -> str:
    by_title = (color for prefix, color in COLORS.items() if title.startswith(prefix))
    return next(by_title, _OTHER_COLORS[number % len(_OTHER_COLORS)])


def _legend_below(axes: Axes) -> None:
    """Put the legend below the axis label, outside the axes, whatever their height."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if all(len(str(label)) <= 24 for label in labels) else 2  # noqa: PLR2004 (what fits a third)
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
