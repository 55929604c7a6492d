"""Whether distillation was worth it: the gain, its interval, and one sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

LEVEL = 0.05
"""One in twenty intervals misses what it is an interval of."""

_ONE_SEED = "one seed can't tell a gain from the noise (--seeds 3 repeats it)"


@dataclass(frozen=True)
class Paired:
    """Differences of pairs of runs of the same seed, and what they tell of the mean difference.

    Args:
        mean: Their mean.
        std: Their standard deviation, the sample's, over n - 1; ``None`` for one pair.
        interval: The 95 % interval of the mean; ``None`` for one pair.
        p: The probability of such a mean, or one further from 0, where there is no difference; ``None`` for one pair.
    """

    mean: float
    std: float | None
    interval: tuple[float, float] | None
    p: float | None


def paired(differences: Sequence[float], *, looks: int = 1) -> Paired:
    r"""Judge differences by Student's paired t-test.

    The interval is :math:`\bar d \pm t_{n-1, 0.975} s / \sqrt n`. Runs of one seed begin with the same weights and see
    the same images in the same order, so that their difference varies less than either; what is left is the noise
    between seeds. The images that accuracy is measured on are taken as given.

    Args:
        differences: One of each seed, at least one.
        looks: How many such means this one was chosen from; the interval is widened by Bonferroni's method, to the
            level 0.05 / looks, so that the best of several is no gain by chance. The probability is not.

    Source: Student (1908), https://doi.org/10.1093/biomet/6.1.1; Dietterich (1998), on comparing classifiers,
        https://doi.org/10.1162/089976698300017197
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return Paired(mean, None, None, None)
    std = statistics.stdev(differences)
    error = std / math.sqrt(count)
    half = float(stats.t.ppf(1 - LEVEL / (2 * looks), count - 1)) * error
    # Differences without any spread can't be compared with their spread.
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else float(mean == 0)
    return Paired(mean, std, (mean - half, mean + half), p)


def gain_in_points(gain: Mapping[str, Any] | None) -> str:
    """Write a gain over the baseline in points, with its interval where there is one; nothing where there is no gain.

    Args:
        gain: As :func:`kd.report.summary.summarize` made it.
    """
    if gain is None:
        return ""
    words = f"{100 * gain['mean']:+.2f}"
    return words if gain.get("interval") is None else f"{words} ({_ends(gain['interval'])})"


def gain_sentence(summary: Mapping[str, Any]) -> str:
    """Say what distillation gained over the student alone, in points of accuracy (hundredths of all images).

    Args:
        summary: As :func:`kd.report.summary.summarize` made it.
    """
    gain = summary["gain"]
    if gain is None and summary["compared"]:
        best = summary["compared"][0]
        count, accuracy = len(summary["compared"]), best["val_acc_mean"]
        name, several = best["objective"], count > 1
        words = f"Of {count} objectives {name} came out best, at" if several else f"{name} came out at"
        return f"{words} {accuracy:.2%}{_gain_of_best(best.get('gain'), looks=count)}."
    if gain is None:
        missing = [name for name in ("baseline", "distilled") if name not in summary["phases"]]
        flags = " ".join({"baseline": "--baseline", "distilled": "--distill"}[name] for name in missing)
        return f"To see whether distillation pays, train the other student too: {flags}" if len(missing) == 1 else ""
    mean, points = 100 * gain["mean"], [100 * run["val_acc"] for run in gain["runs"]]
    if gain["interval"] is None:
        return f"Distillation: {mean:+.1f} points; {_ONE_SEED}."
    low, high = (100 * end for end in gain["interval"])
    each = f"by seed {', '.join(f'{value:+.1f}' for value in points)}"
    if low > 0:
        return f"Distillation gained {mean:.1f} points ({low:.1f} to {high:.1f}; {each})."
    if high < 0:
        return f"Distillation lost {-mean:.1f} points ({-high:.1f} to {-low:.1f}; {each})."
    return f"No gain beyond the noise between seeds: {mean:+.1f} points ({low:+.1f} to {high:+.1f}; {each})."


def _gain_of_best(gain: Mapping[str, Any] | None, *, looks: int) -> str:
    if gain is None:
        return ""
    words = f": {100 * gain['mean']:+.2f} points over the student alone"
    known = paired([run["val_acc"] for run in gain["runs"]], looks=looks)
    if known.interval is None:
        return f"{words}; {_ONE_SEED}"
    low, high = known.interval
    widened = f"{_ends(known.interval)}{f', widened for the best of {looks}' * (looks > 1)}"
    return f"{words}{', no gain beyond the noise between seeds' * (low <= 0 <= high)} ({widened})"


def _ends(interval: Sequence[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{low:+.2f} to {high:+.2f}"
