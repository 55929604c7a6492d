"""How figures are written, alike in the terminal and on the page."""

from collections.abc import Mapping, Sequence
from typing import Any

_MILLION = 1e6

BEYOND_NOISE = {None: "can't tell", True: "yes", False: "no"}


def share(mean: float, std: float | None) -> str:
    """Write a share of 1, with its standard deviation in points."""
    return f"{mean:.2%}" if std is None else f"{mean:.2%} ± {100 * std:.2f}"


def mean_of(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """Write the mean of what is known of some runs, or nothing."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return form.format(sum(values) / len(values)) if values else ""


def sizes(cost: Mapping[str, Any]) -> str:
    """Write the megabytes of a network's weights, by their type."""
    return " / ".join(f"{cost['megabytes'][name]:.2f}" for name in ("float32", "float16", "int8"))


def cost_headings(cost: Mapping[str, Any]) -> list[str]:
    """Write what stands above :func:`cost_cells`."""
    heads = ["network", "px", "parameters, M", "multiply-adds, M", "MB in float32 / 16 / int8"]
    return heads + [words for device in cost["speed"] for words in (f"ms on {device.upper()}", "images/s")]


def cost_cells(cost: Mapping[str, Any]) -> list[str]:
    """Write what a network costs, as :func:`kd.models.measure_cost_by_name` returned it: a cell for each heading."""
    parameters, multiply_adds = cost["parameters"] / _MILLION, cost["multiply_adds"] / _MILLION
    speeds = [(f"{one['latency_ms']:.1f}", f"{one['images_per_second']:,.0f}") for one in cost["speed"].values()]
    size = str(cost["image_size"])
    return [cost["model"], size, f"{parameters:,.2f}", f"{multiply_adds:,.0f}", sizes(cost), *sum(speeds, ())]


def measured_with(cost: Mapping[str, Any]) -> str:
    """Say what the figures of a cost are, and on what they were measured."""
    threads = f"{cost['threads']} thread{'s' * (cost['threads'] != 1)}"
    return (
        f"Latency of one image and throughput in batches of 32, float32, medians, on {cost['machine']} with "
        f"{threads}; multiply-adds of one image; 1 MB is a million bytes."
    )
