"""Accuracy, calibration and agreement with a teacher, computed from stored logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

TOP = 5
BINS = 15
"""Bins of confidence, of equal width from 0 to 1; Guo et al. (2017)."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Predictions:
    """A network's logits for the validation images.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``.
        keys: Identifier of each image, ``(N,)``: its path within its folder.
        classes: Names of the classes, ``(C,)``.
    """

    logits: Floats
    labels: NDArray[np.int64]
    keys: NDArray[np.str_]
    classes: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path | None) -> "Predictions | None":
        """Read predictions from a file; ``None`` if it is missing, damaged or not a file of predictions."""
        if path is None:
            return None
        try:
            # Without pickles, reading runs no code.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                logits = np.asarray(file["logits"], dtype=np.float64)
                read = cls(logits, file["labels"], file["keys"], tuple(map(str, file["classes"])))
        except Exception:  # noqa: BLE001 (NumPy raises many types of errors for damaged files)
            return None
        fits = logits.shape == (*read.labels.shape, len(read.classes)) and read.keys.shape == read.labels.shape
        is_valid = fits and read.labels.dtype.kind in "iu" and len(read) > 0
        return read if is_valid and 0 <= read.labels.min() <= read.labels.max() < len(read.classes) else None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def decisions(self) -> NDArray[np.int64]:
        """The predicted classes, ``(N,)``."""
        return np.asarray(self.logits.argmax(axis=1), dtype=np.int64)

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Return the probabilities at a temperature, ``(N, C)``."""
        return np.asarray(softmax(self.logits / temperature, axis=1))


def measure(predictions: Predictions) -> dict[str, Any]:
    """Compute the metrics of a network's predictions.

    Args:
        predictions: The predictions.

    Returns:
        ``accuracy``; ``top5`` (``None`` for five classes or fewer); ``nll``, the mean negative log-likelihood of the
        labels, in nats; ``ece``, the expected calibration error over 15 bins of confidence; ``bins``, each with
        ``count``, ``accuracy`` and ``confidence`` (a reliability diagram); ``classes``; ``per_class``, accuracies in
        the order of the classes (``None`` for a class without images); ``confusion``, counts by label and prediction.

    Source: Guo et al. (2017), section 2, https://arxiv.org/abs/1706.04599 (calibration)
    """
    count = len(predictions.classes)
    logits, labels = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.labels.astype(np.int64))
    probabilities = logits.softmax(dim=1)
    options: dict[str, Any] = {"num_classes": count, "validate_args": False}
    confusion = multiclass_confusion_matrix(probabilities, labels, **options)
    sizes = confusion.sum(dim=1).tolist()
    top5 = multiclass_accuracy(probabilities, labels, **options, average="micro", top_k=min(TOP, count))
    return {
        "accuracy": int(confusion.trace()) / len(predictions),
        "top5": float(top5) if count > TOP else None,
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": float(multiclass_calibration_error(probabilities, labels, **options, n_bins=BINS)),
        "bins": _bins(probabilities.numpy(), predictions),
        "classes": list(predictions.classes),
        "per_class": [
            hits / size if size else None for hits, size in zip(confusion.diag().tolist(), sizes, strict=True)
        ],
        "confusion": confusion.tolist(),
    }


def compare(student: Predictions, teacher: Predictions) -> dict[str, float] | None:
    """Compare a student's predictions with its teacher's.

    Returns:
        ``agreement``, the share of images for which both predict the same class, and ``kl_to_teacher``, the mean
        Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats; ``None`` if they were
        computed on different images.
    """
    if student.classes != teacher.classes or not np.array_equal(student.keys, teacher.keys):
        return None
    log_student, log_teacher = (np.asarray(log_softmax(one.logits, axis=1)) for one in (student, teacher))
    divergence = (np.exp(log_teacher) * (log_teacher - log_student)).sum(axis=1)
    return {
        "agreement": float((student.decisions == teacher.decisions).mean()),
        "kl_to_teacher": float(divergence.mean()),
    }


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Aggregate the metrics of several runs of a phase over their seeds.

    Args:
        runs: For each run what :func:`measure` and :func:`compare` return, merged.

    Returns:
        For each scalar its ``mean`` and ``std`` (over n - 1; ``None`` for one run); ``classes``; means of
        ``per_class``; sums of ``confusion`` and ``bins``.
    """
    names = ("accuracy", "top5", "nll", "ece", "agreement", "kl_to_teacher")
    facts: dict[str, Any] = {name: _mean_and_std([run.get(name) for run in runs]) for name in names}
    by_class = [_mean_and_std(list(values)) for values in zip(*(run["per_class"] for run in runs), strict=True)]
    facts["classes"] = runs[0]["classes"]
    facts["per_class"] = [None if one is None else one["mean"] for one in by_class]
    facts["confusion"] = np.sum([run["confusion"] for run in runs], axis=0).tolist()
    facts["bins"] = [_merged(list(bins)) for bins in zip(*(run["bins"] for run in runs), strict=True)]
    return facts


def _bins(probabilities: Floats, predictions: Predictions) -> list[dict[str, Any]]:
    """Return count, accuracy and mean confidence for each bin of confidence."""
    confidence, correct = probabilities.max(axis=1), predictions.decisions == predictions.labels
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "count": int(members.sum()),
            "accuracy": float(correct[members].mean()) if members.any() else None,
            "confidence": float(confidence[members].mean()) if members.any() else None,
        }
        for members in (index == number for number in range(BINS))
    ]


def _merged(bins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = sum(one["count"] for one in bins)
    means = {
        name: sum(one["count"] * one[name] for one in bins if one["count"]) / count if count else None
        for name in ("accuracy", "confidence")
    }
    return {"count": count, **means}


def _mean_and_std(values: Sequence[float | None]) -> dict[str, float | None] | None:
    present = [value for value in values if value is not None]
    if not present:
        return None
    return {"mean": float(np.mean(present)), "std": float(np.std(present, ddof=1)) if len(present) > 1 else None}
