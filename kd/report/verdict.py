"""Whether distillation helped: differences paired by seed, their confidence intervals, and one sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

LEVEL = 0.05
"""Significance level; intervals have a confidence of ``1 - LEVEL``."""

_ONE_SEED = "one seed can't separate a gain from noise, use --seeds 3"


def paired_difference(
    runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], *, comparisons: int = 1
) -> dict[str, Any] | None:
    """Compare the accuracies of two groups of runs, paired by seed.

    Runs of one seed start from the same weights and see the same images in the same order, so their difference varies
    less than either accuracy. What remains is the noise between seeds; the validation images are taken as fixed.

    Args:
        runs: Runs to compare, each with ``seed`` and ``val_acc``.
        reference: Runs to compare them with.
        comparisons: Number of comparisons that are reported together; see :func:`confidence_interval`.

    Returns:
        ``mean``, ``std`` (over n - 1; ``None`` for one seed) and ``interval`` of the difference, fractions of 1, and
        ``runs``, the difference of each seed; ``None`` without a common seed.
    """
    accuracies = {run["seed"]: run["val_acc"] for run in reference}
    pairs = [(run["seed"], run["val_acc"] - accuracies[run["seed"]]) for run in runs if run["seed"] in accuracies]
    if not pairs:
        return None
    differences = [difference for _, difference in pairs]
    return {
        "mean": statistics.fmean(differences),
        "std": statistics.stdev(differences) if len(differences) > 1 else None,
        "interval": confidence_interval(differences, comparisons=comparisons),
        "runs": [{"seed": seed, "val_acc": difference} for seed, difference in pairs],
    }


def confidence_interval(differences: Sequence[float], *, comparisons: int = 1) -> list[float] | None:
    r"""Return the 95 % confidence interval of a mean difference, by Student's paired t-test.

    .. math:: \bar d \pm t_{n-1,\; 1 - 0.05 / (2m)} \; s / \sqrt n

    Several intervals that are reported together each miss with probability 0.05; with Bonferroni's correction for
    :math:`m` comparisons, all of them hold the true differences at once with 95 % confidence.

    Args:
        differences: One for each seed.
        comparisons: :math:`m`, the number of intervals that are reported together.

    Returns:
        Lower and upper bound; ``None`` for fewer than two differences.

    Source: Student (1908), https://doi.org/10.1093/biomet/6.1.1; Dunn (1961), on Bonferroni's correction,
        https://doi.org/10.1080/01621459.1961.10482090; Dietterich (1998), on comparing classifiers,
        https://doi.org/10.1162/089976698300017197
    """
    count = len(differences)
    if count < 2:  # noqa: PLR2004 (one difference has no spread)
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)
    margin = float(stats.t.ppf(1 - LEVEL / (2 * comparisons), count - 1)) * error
    return [mean - margin, mean + margin]


def significance(difference: Mapping[str, Any] | None) -> int | None:
    """Return 1 for a significant gain, -1 for a significant loss, 0 for neither; ``None`` without an interval.

    Args:
        difference: As :func:`paired_difference` returns it. It is significant if its interval excludes 0.
    """
    if difference is None or difference["interval"] is None:
        return None
    low, high = difference["interval"]
    return int(low > 0) - int(high < 0)


def gain_of(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the gain over the baseline that the verdict is about: the distilled student's or the best objective's."""
    if summary["gain"] is None and summary["compared"]:
        best: Mapping[str, Any] | None = summary["compared"][0]["gain"]
        return best
    gain: Mapping[str, Any] | None = summary["gain"]
    return gain


def gain_sentence(summary: Mapping[str, Any]) -> str:
    """State what distillation gained over the student trained on labels only, in percentage points of accuracy.

    Args:
        summary: As :func:`kd.report.summary.summarize` returns it.
    """
    gain, compared = gain_of(summary), summary["compared"]
    if summary["gain"] is None and compared:
        best, count = compared[0], len(compared)
        which = f"Best of {count} objectives: {best['objective']}" if count > 1 else f"Objective {best['objective']}"
        sentences = [f"{which}, accuracy {best['val_acc_mean']:.2%}."]
        return " ".join(sentences + ([] if gain is None else [_sentence(gain, comparisons=count)]))
    if gain is not None:
        return _sentence(gain)
    missing = [flag for phase, flag in _FLAGS.items() if phase not in summary["phases"]]
    return f"Add {missing[0]} to measure the gain from distillation." if len(missing) == 1 else ""


_FLAGS = {"baseline": "--baseline", "distilled": "--distill"}


def _sentence(gain: Mapping[str, Any], *, comparisons: int = 1) -> str:
    mean = 100 * gain["mean"]
    if gain["interval"] is None:
        return f"Distillation changed accuracy by {mean:+.1f} points; {_ONE_SEED}."
    low, high = (100 * bound for bound in gain["interval"])
    corrected = f", corrected for {comparisons} objectives" if comparisons > 1 else ""
    seeds = f"{corrected}, {len(gain['runs'])} seeds"
    match significance(gain):
        case 1:
            change, bounds = f"Distillation improved accuracy by {mean:.1f} points", f"{low:.1f} to {high:.1f}"
        case -1:
            change, bounds = f"Distillation reduced accuracy by {-mean:.1f} points", f"{-high:.1f} to {-low:.1f}"
        case _:
            change, bounds = f"No significant difference: {mean:+.1f} points", f"{low:+.1f} to {high:+.1f}"
    return f"{change} (95 % confidence interval {bounds}{seeds})."
