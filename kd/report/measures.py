"""Accuracy, calibration and agreement with a teacher, computed from stored logits."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from kd.report.verdict import mean_and_std

TOP = 5
_SCALARS = (
    *("accuracy", "balanced_accuracy", "macro_f1", "auroc", "constant"),
    *("top5", "nll", "ece", "agreement", "kl_to_teacher"),
)
BINS = 15
"""Number of confidence bins, of equal width from 0 to 1; Guo et al. (2017)."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Predictions:
    """A network's logits ``(N, C)`` for the validation images, their labels ``(N,)`` and their paths ``(N,)``."""

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
            # Without pickles, reading a file can't run code.
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

    Returns:
        ``accuracy``; ``balanced_accuracy``, the mean recall of the classes; ``macro_f1``, the mean of their F1 scores;
        ``auroc``, the mean area under the ROC curve of each class against the others (all three over the classes with
        images); ``constant``, the accuracy of always predicting the most frequent class; ``top5`` (``None`` for five
        classes or fewer); ``nll``, the mean negative log-likelihood of the
        labels, in nats; ``ece``, the expected calibration error over 15 bins of confidence; ``bins``, each with
        ``count``, ``accuracy`` and ``confidence`` (a reliability diagram); ``classes``; ``per_class``, accuracies
        (recalls) in the order of the classes, ``precision``, likewise (``None`` for a class without images or
        predictions), and ``support``, their numbers of images; ``confusion``, counts by label and prediction.

    Source: Guo et al. (2017), section 2, https://arxiv.org/abs/1706.04599 (calibration)
    """
    count = len(predictions.classes)
    logits, labels = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.labels.astype(np.int64))
    probabilities = logits.softmax(dim=1)
    options: dict[str, Any] = {"num_classes": count, "validate_args": False}
    confusion = multiclass_confusion_matrix(probabilities, labels, **options)
    top5 = multiclass_accuracy(probabilities, labels, **options, average="micro", top_k=min(TOP, count))
    confidence, hits, support = probabilities.amax(dim=1).numpy(), confusion.diag(), confusion.sum(dim=1)
    recalls = _ratios(hits, support)
    with warnings.catch_warnings():
        # A class without images has no curve.
        warnings.filterwarnings("ignore", message="No (positive|negative) samples")
        areas = multiclass_auroc(probabilities, labels, **options, average="none")
    return {
        "accuracy": int(confusion.trace()) / len(predictions),
        "balanced_accuracy": float(np.mean([recall for recall in recalls if recall is not None])),
        "macro_f1": float(multiclass_f1_score(probabilities, labels, **options, average="none")[support > 0].mean()),
        "auroc": float(areas[support > 0].mean()) if int((support > 0).sum()) > 1 else None,
        "constant": int(support.max()) / len(predictions),
        "top5": float(top5) if count > TOP else None,
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": float(multiclass_calibration_error(probabilities, labels, **options, n_bins=BINS)),
        "bins": _bins(confidence, (predictions.decisions == predictions.labels).astype(float)),
        "classes": list(predictions.classes),
        "per_class": recalls,
        "precision": _ratios(hits, confusion.sum(dim=0)),
        "support": support.tolist(),
        "confusion": confusion.tolist(),
    }


def compare(student: Predictions, teacher: Predictions) -> dict[str, float] | None:
    """Compare a student's predictions with its teacher's; ``None`` if they were computed on different images.

    Returns:
        ``agreement``, the fraction of images for which both predict the same class, and ``kl_to_teacher``, the mean
        Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats.
    """
    if student.classes != teacher.classes or not np.array_equal(student.keys, teacher.keys):
        return None
    log_student, log_teacher = (log_softmax(network.logits, axis=1) for network in (student, teacher))
    divergence = (np.exp(log_teacher) * (log_teacher - log_student)).sum(axis=1)
    agreement = float((student.decisions == teacher.decisions).mean())
    return {"agreement": agreement, "kl_to_teacher": float(divergence.mean())}


def aggregate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Aggregate the merged results of :func:`measure` and :func:`compare` over the seeds of a phase.

    Returns:
        For each scalar its ``mean`` and ``std`` (over n - 1; ``None`` for one run); ``classes``; means of
        ``per_class`` and ``precision``; sums of ``confusion`` and ``bins``.
    """
    facts: dict[str, Any] = {}
    for name in _SCALARS:
        values = [run[name] for run in runs if run.get(name) is not None]
        facts[name] = dict(zip(("mean", "std"), mean_and_std(values), strict=True)) if values else None
    facts["classes"] = runs[0]["classes"]
    for name in ("per_class", "precision"):
        facts[name] = [
            mean_and_std(values)[0] if (values := [value for value in by_run if value is not None]) else None
            for by_run in zip(*(run[name] for run in runs), strict=True)
        ]
    facts["support"] = runs[0]["support"]
    facts["confusion"] = np.sum([run["confusion"] for run in runs], axis=0).tolist()
    facts["bins"] = [_merge_bins(bins) for bins in zip(*(run["bins"] for run in runs), strict=True)]
    return facts


def _ratios(counts: Tensor, sizes: Tensor) -> list[float | None]:
    pairs = zip(counts.tolist(), sizes.tolist(), strict=True)
    return [count / size if size else None for count, size in pairs]


def _bins(confidence: Floats, correct: Floats) -> list[dict[str, Any]]:
    """Return number of images, accuracy and mean confidence of each bin of confidence."""
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    totals = (np.bincount(index, weights, minlength=BINS).tolist() for weights in (None, correct, confidence))
    return [
        {"count": count, "accuracy": hits / count if count else None, "confidence": total / count if count else None}
        for count, hits, total in zip(*totals, strict=True)
    ]


def _merge_bins(bins: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    filled = [entry for entry in bins if entry["count"]]
    count = sum(entry["count"] for entry in filled)
    means = {
        name: sum(entry["count"] * entry[name] for entry in filled) / count if filled else None
        for name in ("accuracy", "confidence")
    }
    return {"count": count, **means}
