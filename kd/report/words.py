"""How figures are written, alike in the terminal and on the page."""

from collections.abc import Mapping, Sequence
from typing import Any

BEYOND_NOISE = {None: "can't tell", True: "yes", False: "no"}


def share(mean: float, std: float | None) -> str:
    """Write a share of 1, with its standard deviation in points."""
    return f"{mean:.2%}" if std is None else f"{mean:.2%} ± {100 * std:.2f}"


def mean_of(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """Write the mean of what is known of some runs, or nothing."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return form.format(sum(values) / len(values)) if values else ""
