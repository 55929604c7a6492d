"""Whether distillation helped: differences paired by seed, their confidence intervals, and a one-sentence verdict."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

LEVEL = 0.05
"""Significance level; intervals have a confidence of ``1 - LEVEL``."""


def paired_difference(
    runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], *, comparisons: int = 1
) -> dict[str, Any] | None:
    """Return the difference in score between two groups of runs, paired by seed; ``None`` without a common seed.

    Runs of one seed start from the same weights and see the same images in the same order, so their difference varies
    less than either score. What remains is the variation between seeds; the validation images are taken as fixed.

    Returns:
        ``mean``, ``std`` (over n - 1; ``None`` for one seed) and ``interval`` of the difference, fractions of 1, and
        ``runs``, the difference for each seed.
    """
    scores = {run["seed"]: score_of(run) for run in reference}
    pairs = [(run["seed"], score_of(run) - scores[run["seed"]]) for run in runs if run["seed"] in scores]
    if not pairs:
        return None
    mean, std = mean_and_std([difference for _, difference in pairs])
    return {
        "mean": mean,
        "std": std,
        "interval": confidence_interval([difference for _, difference in pairs], comparisons=comparisons),
        "runs": [{"seed": seed, "val_acc": difference} for seed, difference in pairs],
    }


def score_of(run: Mapping[str, Any]) -> float:
    """Return what a verdict is about: a run's score, or its validation accuracy in summaries of earlier versions."""
    return float(run["val_acc"] if run.get("score") is None else run["score"])


def best_score_of(run: Mapping[str, Any]) -> float:
    """Return the metric of a run's best epoch on the validation images, by which its checkpoint was chosen."""
    return float(run["best_val_acc"] if run.get("best_score") is None else run["best_score"])


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the standard deviation over n - 1; ``None`` for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def confidence_interval(differences: Sequence[float], *, comparisons: int = 1) -> list[float] | None:
    r"""Return the 95 % confidence interval of a mean difference by the paired t-test; ``None`` for a single difference.

    .. math:: \bar d \pm t_{n-1,\; 1 - 0.05 / (2m)} \; s / \sqrt n

    With Bonferroni's correction for :math:`m` ``comparisons``, all :math:`m` intervals that are reported together
    contain the true differences with 95 % confidence.

    Source: Student (1908), https://doi.org/10.1093/biomet/6.1.1; Dunn (1961), on Bonferroni's correction,
        https://doi.org/10.1080/01621459.1961.10482090; Dietterich (1998), on comparing classifiers,
        https://doi.org/10.1162/089976698300017197
    """
    count, (mean, std) = len(differences), mean_and_std(differences)
    if std is None:
        return None
    margin = float(stats.t.ppf(1 - LEVEL / (2 * comparisons), count - 1)) * std / math.sqrt(count)
    return [mean - margin, mean + margin]


def significance(difference: Mapping[str, Any] | None) -> int | None:
    """Return 1 for a significant gain, -1 for a significant loss, 0 for neither; ``None`` without an interval.

    A difference is significant if its interval excludes 0.
    """
    if difference is None or difference["interval"] is None:
        return None
    low, high = difference["interval"]
    return int(low > 0) - int(high < 0)


def compare_objectives(
    runs: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Compare the runs of several objectives with the best objective and with the baseline; return them best first.

    The intervals of the differences from the best are simultaneous over the other objectives, those of the gains over
    all objectives, so that selecting the best of several equal objectives doesn't appear as a gain.

    Returns:
        For each objective ``objective``, ``runs``, ``val_acc_mean``, ``val_acc_std`` (``None`` for one seed),
        ``score_mean`` and ``score_std``, by which they are ordered, ``difference`` from the best (``None`` for the best
        itself) and ``gain`` over the baseline; see :func:`paired_difference`.

    Source: Hsu (1984), on comparing with the best of several, https://doi.org/10.1214/aos/1176346732
    """
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(run["objective"], []).append(run)
    rows: list[dict[str, Any]] = []
    for objective, group in grouped.items():
        row: dict[str, Any] = {"objective": objective, "runs": group}
        row["val_acc_mean"], row["val_acc_std"] = mean_and_std([run["val_acc"] for run in group])
        row["score_mean"], row["score_std"] = mean_and_std([score_of(run) for run in group])
        row["gain"] = paired_difference(group, baseline, comparisons=len(grouped))
        rows.append(row)
    rows.sort(key=lambda row: -float(row["score_mean"]))
    for rank, row in enumerate(rows):
        others = len(rows) - 1
        row["difference"] = paired_difference(row["runs"], rows[0]["runs"], comparisons=others) if rank else None
    return rows


def gain_of(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the gain over the baseline of the distilled student, or else of the best objective."""
    best = summary["compared"][0]["gain"] if summary["compared"] else None
    gain: Mapping[str, Any] | None = best if summary["gain"] is None else summary["gain"]
    return gain


def gain_sentence(summary: Mapping[str, Any]) -> str:
    """State the gain from distillation over the student trained on labels only, in percentage points of the metric."""
    gain, compared = gain_of(summary), summary["compared"]
    metric = (summary.get("metric") or {}).get("title", "accuracy")
    if summary["gain"] is None and compared:
        best, count = compared[0], len(compared)
        which = f"Best of {count} objectives: {best['objective']}" if count > 1 else f"Objective {best['objective']}"
        sentence = f"{which}, {metric} {best['score_mean']:.2%}."
        return sentence if gain is None else f"{sentence} {_sentence(gain, metric, comparisons=count)}"
    if gain is not None:
        return _sentence(gain, metric)
    flags = {"baseline": "--baseline", "distilled": "--distill"}
    missing = [flag for phase, flag in flags.items() if phase not in summary["phases"]]
    return f"Add {missing[0]} to measure the gain from distillation." if len(missing) == 1 else ""


def _sentence(gain: Mapping[str, Any], metric: str, *, comparisons: int = 1) -> str:
    mean = 100 * gain["mean"]
    if gain["interval"] is None:
        advice = "one seed can't separate a gain from noise, use --seeds 3"
        return f"Distillation changed {metric} by {mean:+.1f} points; {advice}."
    low, high = (100 * bound for bound in gain["interval"])
    corrected = f", corrected for {comparisons} objectives" if comparisons > 1 else ""
    match significance(gain):
        case 1:
            change, bounds = f"Distillation improved {metric} by {mean:.1f} points", f"{low:.1f} to {high:.1f}"
        case -1:
            change, bounds = f"Distillation reduced {metric} by {-mean:.1f} points", f"{-high:.1f} to {-low:.1f}"
        case _:
            of = "" if metric == "accuracy" else f" of {metric}"
            change, bounds = f"No significant difference: {mean:+.1f} points{of}", f"{low:+.1f} to {high:+.1f}"
    return f"{change} (95 % confidence interval {bounds}{corrected}, {len(gain['runs'])} seeds)."
