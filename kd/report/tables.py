"""Number formats and table cells, the same in the terminal and on the page, and the tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd.data import UNEVEN
from kd.report.summary import title_of
from kd.report.verdict import significance

OBJECTIVE_HEADINGS = ("objective", "{metric}", "difference", "95 % interval", "significant", "gain")


def leads(summary: Mapping[str, Any]) -> bool:
    """Return whether a column of scores leads the tables: they aren't the validation accuracies."""
    return str(summary["metric"]["title"]) != "accuracy"


def objective_headings(summary: Mapping[str, Any]) -> list[str]:
    """Return the headings of :func:`objective_cells`."""
    return [heading.format(metric=summary["metric"]["title"]) for heading in OBJECTIVE_HEADINGS]


def score_cell(facts: Mapping[str, Any]) -> str:
    """Format a phase's score; an empty string if it wasn't measured."""
    return "" if facts["score_mean"] is None else share(facts["score_mean"], facts["score_std"])


def share(mean: float, std: float | None) -> str:
    """Format a fraction of 1 as a percentage, with its standard deviation in percentage points."""
    return f"{mean:.2%}" if std is None else f"{mean:.2%} ± {100 * std:.2f}"


def mean_of(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """Format the mean of the values that are not ``None``; an empty string if there are none."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return form.format(sum(values) / len(values)) if values else ""


def _interval_in_points(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def gain_in_points(gain: Mapping[str, Any] | None) -> str:
    """Format a difference of :func:`kd.report.verdict.paired_difference` and its interval in percentage points."""
    if gain is None:
        return ""
    interval = _interval_in_points(gain.get("interval"))
    return f"{100 * gain['mean']:+.2f}" + (f" ({interval})" if interval else "")


def objective_cells(row: Mapping[str, Any], *, is_best: bool) -> list[str]:
    """Format a row of :func:`kd.report.compare_objectives`, one cell for each of ``OBJECTIVE_HEADINGS``."""
    difference = row["difference"]
    significant = {None: "n/a", 0: "no", 1: "yes", -1: "yes"}[significance(difference)]
    cells = ["best", "", ""] if is_best else ["", "", significant]
    if difference is not None:
        cells[:2] = [f"{100 * difference['mean']:+.2f}", _interval_in_points(difference["interval"])]
    return [row["objective"], share(row["score_mean"], row["score_std"]), *cells, gain_in_points(row["gain"])]


def objectives_caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the statistics of a table of objectives."""
    seeds, count = max(len(row["runs"]) for row in rows), len(rows)
    if seeds == 1:
        return "One seed can't separate a difference from noise, use --seeds 3."
    return (
        f"Mean ± standard deviation over {seeds} seeds. Differences from the best and "
        "gains over the student trained on labels only are paired by seed, in percentage points. The 95 % confidence "
        f"intervals are simultaneous (Bonferroni: {max(1, count - 1)} differences, {count} gains); a difference is "
        "significant if its interval excludes 0."
    )


def sizes(cost: Mapping[str, Any]) -> str:
    """Format the size of a network's weights by data type, in megabytes."""
    return " / ".join(f"{cost['megabytes'][name]:.2f}" for name in ("float32", "float16", "int8"))


def cost_headings(cost: Mapping[str, Any]) -> list[str]:
    """Return the headings of :func:`cost_cells`."""
    heads = ["network", "px", "parameters, M", "multiply-adds, M", "MB in float32 / 16 / int8"]
    return heads + [heading for device in cost["speed"] for heading in (f"ms on {device.upper()}", "images/s")]


def cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """Format a cost of :func:`kd.models.measure_cost_by_name`, one cell for each of :func:`cost_headings`."""
    numbers = [f"{cost['parameters'] / 1e6:,.2f}", f"{cost['multiply_adds'] / 1e6:,.0f}"]
    speeds = [(f"{speed['latency_ms']:.1f}", f"{speed['images_per_second']:,.0f}") for speed in cost["speed"].values()]
    return [cost["model"], str(cost["image_size"]), *numbers, sizes(cost), *sum(speeds, ())]


def measured_with(cost: Mapping[str, Any]) -> str:
    """Describe how and on which hardware a cost was measured."""
    threads = f"{cost['threads']} thread{'s' * (cost['threads'] != 1)}"
    return (
        f"Latency of one image and throughput in batches of 32, float32, medians, on {cost['machine']} with "
        f"{threads}; multiply-adds of one image; 1 MB is a million bytes."
    )


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print the phases of a summary as a table, and the compared objectives as another."""
    title, is_led = summary["metric"]["title"], leads(summary)
    # In 80 columns there is no room for both ends of the training besides another metric.
    accuracies = (title, "accuracy") if is_led else ("last epoch", "best")
    heading = f"{title[:1].upper()}{title[1:]}, and accuracy on the validation images" if is_led else ""
    table = _table(
        f"{heading or 'Accuracy on the validation images'} of {summary['data']}",
        ("network", "parameters", *accuracies, "agreement", "time"),
        no_wrap=True,
    )
    for phase, facts in summary["phases"].items():
        runs = facts["runs"]
        name = Text(title_of(phase, summary["phases"]))
        name.append(f"\n{facts['model']}" + (f"\n{len(runs)} seeds" if len(runs) > 1 else ""), style="dim")
        cells = (
            [score_cell(facts), f"{facts['val_acc_mean']:.2%}"]
            if is_led
            else [share(facts["val_acc_mean"], facts["val_acc_std"]), mean_of(runs, "best_val_acc", "{:.2%}")]
        )
        cells += [mean_of(runs, "agreement", "{:.2%}"), mean_of(runs, "seconds", "{:,.0f} s")]
        table.add_row(name, f"{facts['parameters']:,}", *cells)
    console.print(table)
    _print_uneven(summary, console)
    if summary["compared"]:
        console.print()
        print_comparison(summary, console)


def _print_uneven(summary: Mapping[str, Any], console: Console) -> None:
    """Print balanced accuracies where always predicting the most frequent class is better than chance."""
    measured = {phase: facts.get("measured") or {} for phase, facts in summary["phases"].items()}
    balanced = {
        phase: facts["balanced_accuracy"] for phase, facts in measured.items() if facts.get("balanced_accuracy")
    }
    constants = [facts["constant"]["mean"] for facts in measured.values() if facts.get("constant")]
    classes = max((len(facts["classes"]) for facts in measured.values() if facts.get("classes")), default=0)
    if not balanced or constants[0] < UNEVEN / classes:
        return
    each = ", ".join(f"{title_of(phase, summary['phases'])} {value['mean']:.2%}" for phase, value in balanced.items())
    console.print(
        f"Uneven classes: always predicting the most frequent one has an accuracy of {constants[0]:.2%}. Balanced "
        f"accuracy: {each}."
    )


def print_comparison(summary: Mapping[str, Any], console: Console) -> None:
    """Print the compared objectives of a summary as a table."""
    rows: Sequence[Mapping[str, Any]] = summary["compared"]
    has_gain = any(row["gain"] for row in rows)
    table = _table("Objectives, best first", [*objective_headings(summary)[:5], *["gain"] * has_gain], no_wrap=True)
    for rank, row in enumerate(rows):
        # In 80 columns there is no room for the gain's interval.
        gain = [f"{100 * row['gain']['mean']:+.2f}" if row["gain"] else ""] * has_gain
        table.add_row(*objective_cells(row, is_best=rank == 0)[:5], *gain)
    console.print(table)
    console.print(objectives_caption(rows))


def print_costs(costs: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print size and speed of networks, as :func:`kd.models.measure_cost_by_name` measures them."""
    table = _table("Size and speed of networks", cost_headings(costs[0]))
    for cost in costs:
        table.add_row(*cost_cells(cost))
    console.print(table)
    console.print(measured_with(costs[0]))


def _table(title: str, headings: Sequence[str], *, no_wrap: bool = False) -> Table:
    """Return a table; its first column takes the width that the other columns leave."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=no_wrap)
    return table
