"""Accuracy, calibration and agreement with a teacher, computed from stored logits with numpy alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

TOP = 5
BINS = 15
"""Of confidence, from 0 to 1; Guo et al. (2017)."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Predictions:
    """What a network said of each validation image.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``.
        keys: What identifies each image, ``(N,)``: its path within its folder.
        classes: Names of the classes, ``(C,)``.
    """

    logits: Floats
    labels: NDArray[np.int64]
    keys: NDArray[np.str_]
    classes: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path | None) -> "Predictions | None":
        """Read them from a file; ``None`` where there is none, or none that is whole."""
        if path is None:
            return None
        try:
            # Plain arrays: nothing that runs.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                logits = np.asarray(file["logits"], dtype=np.float64)
                read = cls(logits, file["labels"], file["keys"], tuple(map(str, file["classes"])))
        except Exception:  # noqa: BLE001 (bytes that are not numpy's make it raise anything)
            return None
        fits = logits.shape == (*read.labels.shape, len(read.classes)) and read.keys.shape == read.labels.shape
        is_known = fits and read.labels.dtype.kind in "iu" and len(read) > 0
        return read if is_known and 0 <= read.labels.min() <= read.labels.max() < len(read.classes) else None

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    @property
    def decisions(self) -> NDArray[np.int64]:
        """The class decided for, ``(N,)``."""
        return np.asarray(self.logits.argmax(axis=1), dtype=np.int64)

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Return the probabilities ``(N, C)`` at a temperature."""
        return np.asarray(softmax(self.logits / temperature, axis=1))


def measure(predictions: Predictions) -> dict[str, Any]:
    r"""Measure predictions by themselves.

    The expected calibration error is :math:`\sum_m \frac{|B_m|}{N} |\mathrm{acc}(B_m) - \mathrm{conf}(B_m)|` over
    bins of equal width of the confidence, the probability of the class decided for.

    Args:
        predictions: The predictions.

    Returns:
        ``accuracy``; ``top5`` (``None`` for five classes or fewer); ``nll``, the mean negative log-likelihood of the
        labels, in nats; ``ece``; ``bins``, for each its ``count``, ``accuracy`` and ``confidence``; ``per_class``,
        accuracies in the order of the classes (``None`` where a class has no image); ``confusion``, counts by label and
        decision.

    Source: Guo et al. (2017), section 2, https://arxiv.org/abs/1706.04599 (calibration)
    """
    labels, decisions, count = predictions.labels, predictions.decisions, len(predictions.classes)
    right = decisions == labels
    log = np.asarray(log_softmax(predictions.logits, axis=1))
    confidence = predictions.probabilities().max(axis=1)
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        {
            "count": int(members.sum()),
            "accuracy": float(right[members].mean()) if members.any() else None,
            "confidence": float(confidence[members].mean()) if members.any() else None,
        }
        for members in (which == number for number in range(BINS))
    ]
    shares = np.bincount(which, minlength=BINS)
    gaps = np.bincount(which, weights=right - confidence, minlength=BINS) / np.maximum(shares, 1)
    error = (shares * np.abs(gaps)).sum()
    confusion = np.zeros((count, count), dtype=int)
    np.add.at(confusion, (labels, decisions), 1)
    # As many classes as would have to be named until the label was.
    rank = (predictions.logits > np.take_along_axis(predictions.logits, labels[:, None], axis=1)).sum(axis=1)
    return {
        "accuracy": float(right.mean()),
        "top5": float((rank < TOP).mean()) if count > TOP else None,
        "nll": float(-np.take_along_axis(log, labels[:, None], axis=1).mean()),
        "ece": float(error / len(predictions)),
        "bins": bins,
        "per_class": [float(right[labels == one].mean()) if (labels == one).any() else None for one in range(count)],
        "confusion": confusion.tolist(),
    }


def compare(student: Predictions, teacher: Predictions) -> dict[str, float] | None:
    """Measure how alike a student and its teacher are, on the same images.

    Returns:
        ``agreement``, the share of images on which both decide alike, and ``kl_to_teacher``, the mean divergence of the
        student's probabilities from the teacher's, in nats; ``None`` where their images differ.
    """
    if student.classes != teacher.classes or not np.array_equal(student.keys, teacher.keys):
        return None
    ours, theirs = (np.asarray(log_softmax(one.logits, axis=1)) for one in (student, teacher))
    divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=1)
    return {
        "agreement": float((student.decisions == teacher.decisions).mean()),
        "kl_to_teacher": float(divergence.mean()),
    }


def mean_and_std(values: list[float | None]) -> dict[str, float | None] | None:
    """Return mean and standard deviation (the sample's; ``None`` for one value) of what is known, or ``None``."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": float(np.mean(known)), "std": float(np.std(known, ddof=1)) if len(known) > 1 else None}


def together(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put what was measured of several runs of a phase together: mean and standard deviation over the seeds.

    Args:
        runs: As :func:`measure` and :func:`compare` returned it, merged, one a run.

    Returns:
        For each number its ``mean`` and ``std``; ``per_class`` means, ``confusion`` and ``bins`` summed over the runs.
    """
    names = ("accuracy", "top5", "nll", "ece", "agreement", "kl_to_teacher")
    facts: dict[str, Any] = {name: mean_and_std([run.get(name) for run in runs]) for name in names}
    by_class = [mean_and_std(list(values)) for values in zip(*(run["per_class"] for run in runs), strict=True)]
    facts["per_class"] = [None if one is None else one["mean"] for one in by_class]
    facts["confusion"] = np.sum([run["confusion"] for run in runs], axis=0).tolist()
    facts["bins"] = [_merged(list(some)) for some in zip(*(run["bins"] for run in runs), strict=True)]
    return facts


def _merged(bins: list[Mapping[str, Any]]) -> dict[str, Any]:
    count = sum(one["count"] for one in bins)
    known = {
        name: sum(one["count"] * one[name] for one in bins if one["count"]) / count if count else None
        for name in ("accuracy", "confidence")
    }
    return {"count": count, **known}
