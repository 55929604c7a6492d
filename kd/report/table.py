"""The table at the end of a run."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.report.comparison import print_comparison

_TITLES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "baseline": "student alone",
    "distilled": "student distilled",
}


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the phases of a summary as a table, and the gain in points under it.

    Args:
        summary: As :func:`kd.report.summary.summarise` made it.
        console: Where to.
    """
    table = Table(
        title=escape(f"Accuracy on the validation images of {summary['data']}"),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
    )
    table.add_column("network", min_width=len(_TITLES["distilled"]), overflow="fold")
    for heading in ("parameters", "last epoch", "best", "agreement", "time"):
        table.add_column(heading, justify="right")
    for phase, facts in summary["phases"].items():
        runs = facts["runs"]
        of_seeds = f"\n{len(runs)} seeds" if len(runs) > 1 else ""
        table.add_row(
            f"{_title(phase, summary['phases'])}\n[dim]{escape(facts['model'])}{of_seeds}[/dim]",
            f"{facts['parameters']:,}",
            _accuracy(facts["val_acc_mean"], facts["val_acc_std"]),
            _mean(runs, "best_val_acc", "{:.2%}"),
            _mean(runs, "agreement", "{:.2%}"),
            _mean(runs, "seconds", "{:,.0f} s"),
        )
    console.print(table)
    if summary["compared"]:
        console.print()
        print_comparison(summary["compared"], console)
        if "distilled" not in summary["phases"]:
            return
    console.print(gain_sentence(summary), highlight=False, soft_wrap=True)


def _title(phase: str, phases: Mapping[str, Any]) -> str:
    kind, _, which = phase.partition("/")
    if kind == "assistant":
        return f"assistant {which.partition('-')[0]}"
    members = [other for other in phases if other.startswith("teacher/")]
    return "teachers as one" if phase == "teacher" and members else _TITLES[kind]


def gain_sentence(summary: Mapping[str, Any]) -> str:
    """Say what distillation gained over the student alone, in points of accuracy (hundredths of all images)."""
    gain = summary["gain"]
    if gain is None:
        missing = [name for name in ("baseline", "distilled") if name not in summary["phases"]]
        flags = " ".join({"baseline": "--baseline", "distilled": "--distill"}[name] for name in missing)
        return f"To see whether distillation pays, train the other student too: {flags}" if len(missing) == 1 else ""
    words = "Distillation against the student alone, last epoch:"
    points = [100 * run["val_acc"] for run in gain["runs"]]
    if gain["std"] is None:
        return f"{words} {points[0]:+.2f} points (one seed; --seeds 3 repeats it)."
    each = ", ".join(f"{value:+.2f}" for value in points)
    return f"{words} {100 * gain['mean']:+.2f} points ± {100 * gain['std']:.2f} (by seed: {each})."


def _accuracy(mean: float, std: float | None) -> str:
    return f"{mean:.2%}" if std is None else f"{mean:.2%} ± {100 * std:.2f}"


def _mean(runs: list[dict[str, Any]], key: str, form: str) -> str:
    values = [run[key] for run in runs if run[key] is not None]
    return form.format(sum(values) / len(values)) if values else ""
