"""Objectives side by side: which is best, and which differences are significant."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kd.report.formatting import SIGNIFICANT, bounds_in_points, gain_in_points, share
from kd.report.verdict import paired_difference, significance

OBJECTIVE_HEADINGS = ("objective", "accuracy", "difference", "95 % interval", "significant", "gain")


def compare_objectives(
    runs: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Compare the runs of several objectives with the best one and with the baseline, best first.

    The intervals of the differences from the best are simultaneous over the other objectives, those of the gains over
    all objectives, so that choosing the best of several equal objectives is no gain by chance.

    Args:
        runs: The runs, each with its ``objective``.
        baseline: The runs of the student trained on labels only.

    Returns:
        For each objective ``objective``, ``runs``, ``val_acc_mean``, ``val_acc_std`` (``None`` for one seed),
        ``difference`` from the best (``None`` for the best itself) and ``gain`` over the baseline; see
        :func:`kd.report.verdict.paired_difference`.

    Source: Hsu (1984), on comparing with the best of several, https://doi.org/10.1214/aos/1176346732
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(run["objective"], []).append(run)
    ranked = sorted(grouped.items(), key=lambda item: -statistics.fmean(run["val_acc"] for run in item[1]))
    return [
        {
            "objective": objective,
            "runs": group,
            "val_acc_mean": statistics.fmean(run["val_acc"] for run in group),
            "val_acc_std": statistics.stdev(run["val_acc"] for run in group) if len(group) > 1 else None,
            "difference": paired_difference(group, ranked[0][1], comparisons=len(ranked) - 1) if rank else None,
            "gain": paired_difference(group, baseline, comparisons=len(ranked)),
        }
        for rank, (objective, group) in enumerate(ranked)
    ]


def objective_cells(row: Mapping[str, Any], *, is_best: bool) -> list[str]:
    """Format a row of :func:`compare_objectives`, one cell for each of ``OBJECTIVE_HEADINGS``."""
    difference = row["difference"]
    cells = ["best", "", ""] if is_best else ["", "", SIGNIFICANT[significance(difference)]]
    if difference is not None:
        cells[:2] = [f"{100 * difference['mean']:+.2f}", bounds_in_points(difference["interval"])]
    return [row["objective"], share(row["val_acc_mean"], row["val_acc_std"]), *cells, gain_in_points(row["gain"])]


def objectives_caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """Describe the statistics of a table of objectives."""
    seeds, count = max(len(row["runs"]) for row in rows), len(rows)
    if seeds == 1:
        return "One seed can't separate a difference from noise, use --seeds 3."
    return (
        f"Accuracy after the last epoch, mean ± standard deviation over {seeds} seeds. Differences from the best and "
        "gains over the student trained on labels only are paired by seed, in percentage points. The 95 % confidence "
        f"intervals are simultaneous (Bonferroni: {max(1, count - 1)} differences, {count} gains); a difference is "
        "significant if its interval excludes 0."
    )
