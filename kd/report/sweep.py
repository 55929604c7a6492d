"""``sweep.html``: the trials of a sweep, best first, and their accuracy by parameter; also as Markdown."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kd.errors import UserError
from kd.files import write_text
from kd.report.figures import COLORS, Picture, panels, short
from kd.report.page import PICTURES, environment, placed

PAGE = "sweep.html"
_COLORS = {"finished": COLORS["student, distilled"], "pruned": COLORS["student, labels only"], "failed": "#c0504d"}
_COLUMNS = 3
_LOG_RATIO = 30


def print_sweep(sweep: Mapping[str, Any], console: Console) -> None:
    """Print the trials of a sweep as a table, best first.

    Args:
        sweep: As for :func:`write_sweep`.
        console: Where to print.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in _heads(sweep):
        is_parameter = heading in sweep["searched"]
        table.add_column(heading, no_wrap=not is_parameter, overflow="fold")
    for trial in sweep["trials"]:
        table.add_row(*_cells(trial, sweep["searched"]))
    console.print(table)
    console.print(f"\n{_verdict(sweep)}")


def write_sweep(sweep: Mapping[str, Any], output: Path, *, config: str = "") -> Path:
    """Write the page of a sweep, its Markdown version and its figure.

    Args:
        sweep: ``name``, ``data``, ``best`` (a trial's number, or ``None``), ``searched`` (names of the parameters) and
            ``trials``, best first, each with ``number``, ``state``, ``reason``, ``val_acc`` (after its last epoch, a
            fraction of 1), ``epochs`` (the accuracy after each), ``seconds`` and ``parameters``.
        output: Folder to write to.
        config: The best trial's settings, as text.

    Returns:
        The page.

    Raises:
        UserError: If the folder can't be written to.
    """
    rows = [_cells(trial, sweep["searched"]) for trial in sweep["trials"]]
    facts = dict(sweep) | {"verdict": _verdict(sweep), "heads": _heads(sweep), "rows": rows, "config": config}
    try:
        (output / PICTURES).mkdir(parents=True, exist_ok=True)
        facts["pictures"] = [placed(picture, output) for picture in _pictures(sweep)]
        for name in (PAGE, "sweep.md"):
            write_text(output / name, environment().get_template(f"{name}.j2").render(sweep=facts))
    except OSError as error:
        raise UserError(f"{output}: can't write the report: {error}") from None
    return output / PAGE


def _verdict(sweep: Mapping[str, Any]) -> str:
    states = [trial["state"] for trial in sweep["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    accuracies = [trial["val_acc"] for trial in sweep["trials"] if trial["number"] == sweep["best"]]
    best = (
        f"Best: trial {sweep['best']}, validation accuracy {accuracies[0]:.2%}" if accuracies else "No finished trial"
    )
    return f"{best} ({counts})"


def _heads(sweep: Mapping[str, Any]) -> list[str]:
    return ["trial", "state", "val acc", *sweep["searched"], "epochs", "time"]


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


def _pictures(sweep: Mapping[str, Any]) -> list[Picture]:
    """Draw the accuracy over the trials, and by each parameter, colored by state."""
    trials = [trial for trial in sweep["trials"] if trial["val_acc"] is not None]
    columns = {"trial": [trial["number"] for trial in trials]}
    columns |= {name: [trial["parameters"][name] for trial in trials] for name in sweep["searched"]}
    rows = math.ceil(len(columns) / _COLUMNS)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharey=True).ravel()
        for axes in grid[len(columns) :]:
            axes.axis("off")
        for axes in grid[::_COLUMNS]:
            axes.set_ylabel("validation accuracy, %")
        for axes, (name, values) in zip(grid, columns.items(), strict=False):
            are_numbers = all(isinstance(value, int | float) for value in values)
            axes.scatter(
                values if are_numbers else [short(str(value), 20) for value in values],
                [100 * trial["val_acc"] for trial in trials],
                color=[_COLORS.get(trial["state"], "#999999") for trial in trials],
                s=14,
                zorder=3,
            )
            # Over several orders of magnitude, most points would lie on one spot of a linear axis.
            if are_numbers and min(values) > 0 and max(values) / min(values) > _LOG_RATIO and name != "trial":
                axes.set_xscale("log")
            elif not are_numbers:
                axes.tick_params(axis="x", rotation=20, labelsize=7)
            axes.set_xlabel(short(name))
            axes.grid(visible=True)

    alt = "validation accuracy of each trial, over the trials and by parameter"
    return [panels("parameters", "Accuracy by parameter", alt, draw, (7.2, 2.5 * rows))] if trials else []
