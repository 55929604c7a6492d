"""How numbers are formatted, the same in the terminal and on the page."""

from collections.abc import Mapping, Sequence
from typing import Any

_MILLION = 1e6

SIGNIFICANT = {None: "n/a", 0: "no", 1: "yes", -1: "yes"}
"""By what :func:`kd.report.verdict.significance` returns."""


def share(mean: float, std: float | None) -> str:
    """Format a fraction of 1 as a percentage, with its standard deviation in percentage points."""
    return f"{mean:.2%}" if std is None else f"{mean:.2%} ± {100 * std:.2f}"


def mean_of(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """Format the mean of the values that are not ``None``; an empty string if there are none."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return form.format(sum(values) / len(values)) if values else ""


def bounds_in_points(interval: Sequence[float] | None) -> str:
    """Format an interval of fractions of 1 in percentage points."""
    return "" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}"


def gain_in_points(gain: Mapping[str, Any] | None) -> str:
    """Format a gain in percentage points, followed by its interval if it has one.

    Args:
        gain: As :func:`kd.report.verdict.paired_difference` returns it.
    """
    if gain is None:
        return ""
    mean, bounds = f"{100 * gain['mean']:+.2f}", bounds_in_points(gain.get("interval"))
    return f"{mean} ({bounds})" if bounds else mean


def sizes(cost: Mapping[str, Any]) -> str:
    """Format the megabytes of a network's weights, by data type."""
    return " / ".join(f"{cost['megabytes'][name]:.2f}" for name in ("float32", "float16", "int8"))


def cost_headings(cost: Mapping[str, Any]) -> list[str]:
    """Return the headings of :func:`cost_cells`."""
    heads = ["network", "px", "parameters, M", "multiply-adds, M", "MB in float32 / 16 / int8"]
    return heads + [heading for device in cost["speed"] for heading in (f"ms on {device.upper()}", "images/s")]


def cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """Format a network's cost, as :func:`kd.models.measure_cost_by_name` returns it: one cell for each heading."""
    parameters, multiply_adds = cost["parameters"] / _MILLION, cost["multiply_adds"] / _MILLION
    speeds = [(f"{speed['latency_ms']:.1f}", f"{speed['images_per_second']:,.0f}") for speed in cost["speed"].values()]
    size = str(cost["image_size"])
    return [cost["model"], size, f"{parameters:,.2f}", f"{multiply_adds:,.0f}", sizes(cost), *sum(speeds, ())]


def measured_with(cost: Mapping[str, Any]) -> str:
    """Describe how and on which hardware a cost was measured."""
    threads = f"{cost['threads']} thread{'s' * (cost['threads'] != 1)}"
    return (
        f"Latency of one image and throughput in batches of 32, float32, medians, on {cost['machine']} with "
        f"{threads}; multiply-adds of one image; 1 MB is a million bytes."
    )
