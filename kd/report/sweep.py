"""``sweep.html``: the trials of a sweep, best first, and their accuracy by parameter; also as Markdown."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kd.errors import UserError
from kd.metrics import metric_title
from kd.report.figures import COLORS, LOSS_COLOR, STYLE, Picture, short
from kd.report.page import place, render

_COLORS = {"finished": COLORS["student, distilled"], "pruned": COLORS["student, labels only"], "failed": LOSS_COLOR}
_COLUMNS = 3
_LOG_RATIO = 30
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""


def print_sweep(sweep: Mapping[str, Any], console: Console) -> None:
    """Print the trials of a sweep, as for :func:`write_sweep`, as a table."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in _heads(sweep):
        table.add_column(heading, no_wrap=heading not in sweep["searched"], overflow="fold")
    for trial in sweep["trials"]:
        table.add_row(*_cells(trial, sweep["searched"]))
    console.print(table)
    console.print(f"\n{_verdict(sweep)}")


def write_sweep(sweep: Mapping[str, Any], output: Path, *, config: str = "") -> Path:
    """Write the page of a sweep, its Markdown version and its figure; return the page.

    Args:
        sweep: ``name``, ``data``, ``metric``, ``best`` (a trial's number, or ``None``), ``searched`` (names of the
            parameters) and ``trials``, best first, each with ``number``, ``state``, ``reason``, ``val_acc`` (the metric
            after its last epoch, a fraction of 1), ``epochs`` (the metric after each), ``seconds`` and ``parameters``.
        output: Folder to write to.
        config: The best trial's settings, as text.

    Raises:
        UserError: If the folder can't be written to.
    """
    rows = [_cells(trial, sweep["searched"]) for trial in sweep["trials"]]
    facts = dict(sweep) | {
        "title": metric_title(sweep["metric"]),
        "verdict": _verdict(sweep),
        "heads": _heads(sweep),
        "rows": rows,
        "config": config,
    }
    try:
        return render("sweep", output, title=sweep["name"], sweep=facts, pictures=place(_pictures(sweep), output))
    except OSError as error:
        raise UserError(f"{output}: can't write the report: {error}") from None


def _verdict(sweep: Mapping[str, Any]) -> str:
    states = [trial["state"] for trial in sweep["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    for trial in sweep["trials"]:
        if trial["number"] == sweep["best"]:
            score = f"validation {metric_title(sweep['metric'])} {trial['val_acc']:.2%}"
            return f"Best: trial {trial['number']}, {score} ({counts})"
    return f"No finished trial ({counts})"


def _heads(sweep: Mapping[str, Any]) -> list[str]:
    heading = "val acc" if sweep["metric"] == "accuracy" else f"val {metric_title(sweep['metric'])}"
    return ["trial", "state", heading, *sweep["searched"], "epochs", "time"]


def _cells(trial: Mapping[str, Any], searched: Sequence[str]) -> list[str]:
    values = [trial["parameters"].get(name, "") for name in searched]
    return [
        str(trial["number"]),
        trial["state"],
        "" if trial["val_acc"] is None else f"{trial['val_acc']:.2%}",
        *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
        str(len(trial["epochs"])),
        "" if trial["seconds"] is None else f"{trial['seconds']:,.0f} s",
    ]


@mpl.rc_context(STYLE)
def _pictures(sweep: Mapping[str, Any]) -> list[Picture]:
    """Draw the accuracy over the trials, and by each parameter, colored by state."""
    trials = [trial for trial in sweep["trials"] if trial["val_acc"] is not None]
    if not trials:
        return []
    accuracies = [100 * trial["val_acc"] for trial in trials]
    colors = [_COLORS.get(trial["state"], "#999999") for trial in trials]
    columns = {"trial": [trial["number"] for trial in trials]}
    columns |= {name: [trial["parameters"][name] for trial in trials] for name in sweep["searched"]}
    rows = math.ceil(len(columns) / _COLUMNS)
    figure = Figure((7.2, 2.5 * rows))
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharey=True).ravel()
    for axes in grid[len(columns) :]:
        axes.axis("off")
    for axes in grid[::_COLUMNS]:
        axes.set_ylabel(f"validation {metric_title(sweep['metric'])}, %")
    for axes, (name, values) in zip(grid, columns.items(), strict=False):
        are_numbers = all(isinstance(value, int | float) for value in values)
        shown = values if are_numbers else [short(str(value), 20) for value in values]
        axes.scatter(shown, accuracies, color=colors, s=14, zorder=3)
        # Over several orders of magnitude, most points would lie in one place on a linear axis.
        if are_numbers and min(values) > 0 and max(values) / min(values) > _LOG_RATIO and name != "trial":
            axes.set_xscale("log")
        elif not are_numbers:
            axes.tick_params(axis="x", rotation=20, labelsize=7)
        axes.set_xlabel(short(name))
    title = metric_title(sweep["metric"])
    alt = f"validation {title} of each trial, over the trials and by parameter"
    return [Picture("parameters", f"{title[:1].upper()}{title[1:]} by parameter", alt, figure)]
