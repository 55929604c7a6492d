"""The pictures of a report, as SVG that takes the page's own color, and as PNG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd.report.measures import BINS

# Text and lines are drawn in it, and take the page's color: the same picture is read in light and in dark.
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
    "student alone": "#e08a3c",
    "student distilled": "#2a9d8f",
}
_WIDE = 24
_OTHERS = ("#4f86c6", "#b5651d", "#7a9a01", "#c0504d", "#6a6a9a", "#999999", "#d4a017", "#3b7a57")
_MOST_NAMED = 40


class Picture:
    """A drawn figure.

    Args:
        name: Its short name, for a file and an anchor.
        title: What it shows.
        alt: The same for who can't see it.
        figure: The figure.
        note: What a reader must know besides.
    """

    def __init__(self, name: str, title: str, alt: str, figure: Figure, note: str = "") -> None:
        self.name = name
        self.title = title
        self.alt = alt
        self.note = note
        self._figure = figure

    def svg(self) -> str:
        """Return it as an SVG element that grows and shrinks with the page and has its color."""
        text = io.StringIO()
        with mpl.rc_context(_STYLE):
            self._figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        element = text.getvalue()[text.getvalue().index("<svg") :].replace(_INK, "currentColor")
        # Two figures in one page must not share the names that they refer to within themselves.
        refers = re.compile(r'(\bid="|url\(#|href="#)')
        element = refers.sub(rf"\g<1>{self.name}-", element)
        element = re.sub(r'<svg ([^>]*?)width="[^"]+"', r"<svg \1", element, count=1)
        return re.sub(r'<svg ([^>]*?)height="[^"]+"', r'<svg role="img" \1', element, count=1)

    def write_png(self, folder: Path) -> Path:
        """Write it as a PNG on white."""
        path = folder / f"{self.name}.png"
        self._figure.savefig(path, dpi=150, facecolor="white")
        return path


def curves(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Picture | None:
    """Draw the validation accuracy of all phases over the epochs, a line a run and a thick one for their mean.

    Args:
        histories: By the phase's title, for each run what each of its epochs came to.
    """

    def draw(axes: Axes) -> None:
        for number, (title, runs) in enumerate(histories.items()):
            color = _color(title, number)
            for run in runs:
                axes.plot(*_points(run, "val/acc"), color=color, alpha=0.35 if len(runs) > 1 else 1, linewidth=1.2)
            if len(runs) > 1:
                longest = min(len(run) for run in runs)
                mean = np.mean([[one.get("val/acc") or np.nan for one in run[:longest]] for run in runs], axis=0)
                axes.plot(range(1, longest + 1), 100 * mean, color=color, linewidth=2.2)
            axes.plot([], [], color=color, label=short(title, 2 * _WIDE), linewidth=2.2)
        axes.set(xlabel="epoch", ylabel="accuracy on validation images, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_below(axes)

    if not any(len(run) for runs in histories.values() for run in runs):
        return None
    return drawn("curves", "Accuracy over the epochs", "validation accuracy of each phase by epoch", draw)


def terms(histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> Picture | None:
    """Draw the terms of the objective and the learning rate over the epochs, of the first run of each phase."""
    lines = [
        (f"{title}: {name.removeprefix('train/')}", *_points(runs[0], name, factor=1))
        for title, runs in histories.items()
        for name in dict.fromkeys(name for one in runs[0] for name in one)
        if name.startswith("train/") and name not in ("train/acc", "train/loss")
    ]
    rates = [(title, *_points(runs[0], "lr", factor=1)) for title, runs in histories.items()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, gridspec_kw={"width_ratios": [2, 1]})
        for number, (label, epochs, values) in enumerate(lines):
            axes[0].plot(epochs, values, label=label, color=_OTHERS[number % len(_OTHERS)])
        axes[0].set(xlabel="epoch", title="terms, unweighted", yscale="log")
        axes[0].legend(fontsize=7)
        for number, (label, epochs, values) in enumerate(rates):
            axes[1].plot(epochs, values, label=label, color=_color(label, number))
        axes[1].set(xlabel="epoch", title="learning rate")
        for one in axes:
            one.grid(visible=True)
            one.xaxis.set_major_locator(MaxNLocator(integer=True))

    if not lines:
        return None
    return panels("terms", "The objective's terms and the learning rate", "terms of the loss by epoch", draw, (7.2, 3))


def by_class(classes: Sequence[str], accuracies: Mapping[str, Sequence[float | None]]) -> Picture | None:
    """Draw the accuracy on each class, and what distillation changed, from what lost most to what gained most."""
    if not {"student alone", "student distilled"} <= accuracies.keys():
        return None
    alone, distilled = (
        np.array([np.nan if one is None else one for one in accuracies[title]])
        for title in ("student alone", "student distilled")
    )
    order = np.argsort(np.nan_to_num(distilled - alone), kind="stable")
    if len(order) > _MOST_NAMED:
        order = np.concatenate([order[: _MOST_NAMED // 2], order[-_MOST_NAMED // 2 :]])

    def draw(axes: Axes) -> None:
        rows = np.arange(len(order))
        gained = distilled[order] >= alone[order]
        axes.hlines(rows, 100 * alone[order], 100 * distilled[order], color=np.where(gained, "#2a9d8f", "#c0504d"))
        for title, values, marker in (("student alone", alone, "o"), ("student distilled", distilled, "D")):
            axes.scatter(100 * values[order], rows, label=title, color=_color(title, 0), marker=marker, zorder=3, s=22)
        axes.set_yticks(rows, [short(classes[index]) for index in order])
        axes.set(xlabel="accuracy on validation images, %")
        _legend_below(axes)

    size = (7.2, 1.4 + 0.22 * len(order))
    return drawn("classes", "Who gained and who lost", "accuracy on each class, alone and distilled", draw, size)


def reliability(bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture | None:
    """Draw how often each network is right against how sure it is."""
    if not bins:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(bins), sharey=True, squeeze=False)[0]
        for number, (one, (title, some)) in enumerate(zip(axes, bins.items(), strict=True)):
            known = [(place, row) for place, row in enumerate(some) if row["count"]]
            places = [(place + 0.5) / BINS for place, _ in known]
            one.plot([0, 1], [0, 1], linestyle=":", color=_INK, linewidth=1)
            one.bar(places, [row["accuracy"] for _, row in known], 0.9 / BINS, color=_color(title, number), alpha=0.8)
            one.plot(
                [row["confidence"] for _, row in known],
                [row["accuracy"] for _, row in known],
                ".",
                color=_INK,
                markersize=4,
            )
            one.set(title=title, xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
        axes[0].set_ylabel("share that is right")

    width = min(7.2, 2.4 * len(bins))
    return panels(
        "reliability",
        "Is it as right as it is sure?",
        "accuracy by confidence, one panel a network",
        draw,
        (width, 2.8),
    )


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]], title: str) -> Picture:
    """Draw what was taken for what, each row in parts of its class."""
    parts = np.array(counts, dtype=float)
    parts = 100 * parts / np.maximum(parts.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= _MOST_NAMED

    def draw(axes: Axes) -> None:
        image = axes.imshow(parts, cmap="viridis", vmin=0, vmax=100)
        axes.set(xlabel="decided for", ylabel="is")
        if named:
            names = [short(name) for name in classes]
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        if len(classes) <= 12:  # noqa: PLR2004 (more numbers could not be read)
            for row, column in np.ndindex(*parts.shape):
                if parts[row, column] >= 1:
                    ink = "black" if parts[row, column] > 60 else "white"  # noqa: PLR2004 (of the color map)
                    axes.text(column, row, f"{parts[row, column]:.0f}", ha="center", va="center", color=ink, fontsize=7)
        axes.grid(visible=False)
        axes.figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)

    side = 3 + min(3.5, 0.2 * len(classes))
    return drawn("confusion", f"What is taken for what: {title}", "confusion matrix", draw, (min(7.2, side + 1), side))


def soft_targets(
    images: Sequence[np.ndarray[Any, Any]],
    names: Sequence[str],
    rows: Sequence[Mapping[str, np.ndarray[Any, Any]]],
    classes: Sequence[str],
    *,
    name: str,
    title: str,
) -> Picture | None:
    """Draw images beside what was said of them: the likeliest classes, a group of bars a class.

    Args:
        images: ``(H, W, 3)``, uint8.
        names: What each is, over its picture.
        rows: For each, probabilities ``(C,)`` by who said so.
        classes: Names of the classes.
        name: The picture's short name.
        title: What it shows.
    """
    if not images:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(images), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 3.4]})
        for number, (pixels, who) in enumerate(zip(images, rows, strict=True)):
            picture, bars = axes[number]
            picture.imshow(pixels)
            picture.set_title(short(names[number]), fontsize=8)
            picture.axis("off")
            likeliest = np.argsort(-np.mean(list(who.values()), axis=0), kind="stable")[:5]
            width = 0.8 / len(who)
            for place, (said_by, probabilities) in enumerate(who.items()):
                tops = np.arange(len(likeliest)) + (place - (len(who) - 1) / 2) * width
                bars.bar(tops, 100 * probabilities[likeliest], width, label=said_by, color=_shade(said_by, place))
            bars.set_xticks(range(len(likeliest)), [short(classes[index], 14) for index in likeliest], fontsize=8)
            bars.set_ylim(0, 100)
            bars.set_ylabel("%")
        axes[0][1].legend(fontsize=7, ncols=2)

    alt = f"{len(images)} validation images with probabilities of their likeliest classes"
    return panels(name, title, alt, draw, (7.2, 1.9 * len(images)))


def _shade(said_by: str, place: int) -> Any:  # noqa: ANN401 (matplotlib's colors are of many forms)
    if said_by.startswith("teacher"):
        return mpl.colormaps["Purples"](0.95 - 0.2 * place)
    return _color(said_by, place)


def drawn(
    name: str, title: str, alt: str, draw: Callable[[Axes], None], size: tuple[float, float] = (7.2, 3.6)
) -> Picture:
    """Draw on the axes of a figure that has one pair of them."""

    def on_axes(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(visible=True)
        draw(axes)

    return panels(name, title, alt, on_axes, size)


def panels(name: str, title: str, alt: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> Picture:
    """Draw on a figure.

    Args:
        name: The picture's short name.
        title: What it shows.
        alt: The same for who can't see it.
        draw: What is drawn.
        size: Width and height, in inches.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
    return Picture(name, title, alt, figure)


def _points(run: Sequence[Mapping[str, Any]], name: str, *, factor: float = 100) -> tuple[list[float], list[float]]:
    known = [(one["epoch"], one[name]) for one in run if one.get(name) is not None]
    return [float(epoch) for epoch, _ in known], [factor * float(value) for _, value in known]


def _color(title: str, number: int) -> str:
    for words, color in COLORS.items():
        if title.startswith(words):
            return color
    return _OTHERS[number % len(_OTHERS)]


def _legend_below(axes: Axes) -> None:
    labels = [str(label) for label in axes.get_legend_handles_labels()[1]]
    columns = 3 if all(len(label) <= _WIDE for label in labels) else 2
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns)


def short(name: str, length: int = 24) -> str:
    """Return a name as it fits into a picture, and as matplotlib shows it."""
    # A dollar sign would begin a formula.
    shown = name if len(name) <= length else f"{name[: length - 1]}…"
    return shown.replace("$", r"\$")
