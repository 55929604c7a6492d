"""The tables that are printed to the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd.report.comparison import OBJECTIVE_HEADINGS, objective_cells, objectives_caption
from kd.report.formatting import cost_cells, cost_headings, mean_of, measured_with, share
from kd.report.summary import title_of


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the phases of a summary as a table, and the compared objectives as another.

    Args:
        summary: As :func:`kd.report.summary.summarize` returns it.
        console: Where to print.
    """
    columns = ("network", "parameters", "last epoch", "best", "agreement", "time")
    table = _table(f"Accuracy on the validation images of {summary['data']}", columns, no_wrap=True)
    for phase, facts in summary["phases"].items():
        runs = facts["runs"]
        name = Text(title_of(phase, summary["phases"]))
        name.append(f"\n{facts['model']}" + (f"\n{len(runs)} seeds" if len(runs) > 1 else ""), style="dim")
        table.add_row(
            name,
            f"{facts['parameters']:,}",
            share(facts["val_acc_mean"], facts["val_acc_std"]),
            mean_of(runs, "best_val_acc", "{:.2%}"),
            mean_of(runs, "agreement", "{:.2%}"),
            mean_of(runs, "seconds", "{:,.0f} s"),
        )
    console.print(table)
    if summary["compared"]:
        console.print()
        print_comparison(summary["compared"], console)


def print_comparison(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the objectives of :func:`kd.report.comparison.compare_objectives` as a table, best first."""
    has_gain = any(row["gain"] for row in rows)
    table = _table("Objectives, best first", [*OBJECTIVE_HEADINGS[:5], *["gain"] * has_gain], no_wrap=True)
    for rank, row in enumerate(rows):
        # The gain's interval has no room in 80 columns.
        gain = [f"{100 * row['gain']['mean']:+.2f}" if row["gain"] else ""] * has_gain
        table.add_row(*objective_cells(row, is_best=rank == 0)[:5], *gain)
    console.print(table)
    console.print(objectives_caption(rows))


def print_costs(costs: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print size and speed of networks.

    Args:
        costs: As :func:`kd.models.measure_cost_by_name` returns them, at least one.
        console: Where to print.
    """
    table = _table("Size and speed of networks", cost_headings(costs[0]))
    for cost in costs:
        table.add_row(*cost_cells(cost))
    console.print(table)
    console.print(measured_with(costs[0]))


def _table(title: str, headings: Sequence[str], *, no_wrap: bool = False) -> Table:
    """Return a table whose first column takes the width that the others leave."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=no_wrap)
    return table
