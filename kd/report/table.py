"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.report.comparison import print_comparison
from kd.report.formatting import cost_cells, cost_headings, mean_of, measured_with, share
from kd.report.summary import title_of


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the phases of a summary as a table, and the objectives that were compared as another.

    Args:
        summary: As :func:`kd.report.summary.summarize` made it.
        console: Where to.
    """
    table = Table(
        title=escape(f"Accuracy on the validation images of {summary['data']}"),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
    )
    table.add_column("network", min_width=len("student distilled"), overflow="fold")
    for heading in ("parameters", "last epoch", "best", "agreement", "time"):
        table.add_column(heading, justify="right")
    for phase, facts in summary["phases"].items():
        runs = facts["runs"]
        of_seeds = f"\n{len(runs)} seeds" if len(runs) > 1 else ""
        table.add_row(
            f"{title_of(phase, summary['phases'])}\n[dim]{escape(facts['model'])}{of_seeds}[/dim]",
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


def print_costs(costs: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what networks cost to run.

    Args:
        costs: As :func:`kd.models.measure_cost_by_name` returned them, at least one.
        console: Where to.
    """
    table = Table(title="What networks cost", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("network", overflow="fold")
    for heading in cost_headings(costs[0])[1:]:
        table.add_column(heading, justify="right")
    for cost in costs:
        table.add_row(*map(escape, cost_cells(cost)))
    console.print(table)
    console.print(measured_with(costs[0]), highlight=False, soft_wrap=True)
