"""Objectives side by side: which is best, and which differences exceed the noise between seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.report.formatting import BEYOND_NOISE, share
from kd.report.verdict import LEVEL, paired


def compare_objectives(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the runs of several objectives side by side, best first.

    Each is compared with the best by the differences of the same seeds (same first weights, same images in the same
    order), by a paired t-test. Several comparisons find something by chance, so that the probabilities are corrected by
    Holm's method before a difference is called one.

    Args:
        runs: What each training came to, with its objective under ``objective``.

    Returns:
        For each objective ``objective``, ``runs``, ``val_acc_mean``, ``val_acc_std`` (``None`` for one seed), and
        against the best: ``behind`` (mean difference, a fraction of 1), ``interval`` (its 95 % interval, uncorrected,
        or ``None`` for fewer than two seeds in common) and ``is_beyond_noise`` (``None`` where that can't be told).

    Source: Holm (1979), https://www.jstor.org/stable/4615733
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(run["objective"], []).append(run)
    rows: list[dict[str, Any]] = [
        {
            "objective": objective,
            "runs": list(group),
            "val_acc_mean": statistics.fmean(run["val_acc"] for run in group),
            "val_acc_std": statistics.stdev(run["val_acc"] for run in group) if len(group) > 1 else None,
        }
        for objective, group in grouped.items()
    ]
    rows.sort(key=lambda row: -row["val_acc_mean"])
    for row in rows:
        row.update(_against(row["runs"], rows[0]["runs"]))
    _correct([row for row in rows[1:] if row["p"] is not None])
    for row in rows:
        row.pop("p")
    return rows


def print_comparison(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what :func:`compare_objectives` returned as a table."""
    table = Table(title="Objectives, best first", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("objective", overflow="fold")
    has_gain = any(row.get("gain") for row in rows)
    for heading in ("last epoch", "difference", "95 % interval", "beyond noise", *["over alone"] * has_gain):
        table.add_column(heading, justify="right")
    for row in rows:
        interval = row["interval"]
        is_best = row is rows[0]
        verdict = BEYOND_NOISE[row["is_beyond_noise"]]
        table.add_row(
            escape(row["objective"]),
            share(row["val_acc_mean"], row["val_acc_std"]),
            "best" if is_best else f"{100 * row['behind']:+.2f}",
            "" if is_best or interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}",
            "" if is_best else verdict,
            *[f"{100 * row['gain']['mean']:+.2f}" if row.get("gain") else ""] * has_gain,
        )
    console.print(table)
    seeds = max(len(row["runs"]) for row in rows)
    words = f"Mean ± standard deviation over {seeds} seeds; differences are paired by seed, in points."
    if seeds == 1:
        words = "One seed can't tell a difference from noise: --seeds 3 repeats each."
    console.print(words, highlight=False, soft_wrap=True)


def _against(runs: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_best = {run["seed"]: run["val_acc"] for run in best}
    differences = [run["val_acc"] - of_best[run["seed"]] for run in runs if run["seed"] in of_best]
    if not differences:
        return {"behind": None, "interval": None, "p": None, "is_beyond_noise": None}
    known = paired(differences)
    interval = None if known.interval is None else list(known.interval)
    return {"behind": known.mean, "interval": interval, "p": known.p, "is_beyond_noise": None}


def _correct(rows: list[dict[str, Any]]) -> None:
    """Decide by Holm's method: from the least probability on, each at a level for those that are left."""
    holds = True
    for rank, row in enumerate(sorted(rows, key=lambda one: float(one["p"]))):
        holds = holds and row["p"] <= LEVEL / (len(rows) - rank)
        row["is_beyond_noise"] = holds
