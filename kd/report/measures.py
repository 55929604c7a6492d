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
from scipy.special import expit, log_expit, log_softmax, softmax
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from kd.metrics import decide, multilabel_scores
from kd.report.verdict import mean_and_std

TOP = 5
_SCALARS = (
    *("accuracy", "balanced_accuracy", "macro_f1", "auroc", "constant", "map", "micro_f1"),
    *("top5", "nll", "ece", "agreement", "kl_to_teacher"),
)
MOST_CLASSES = 200
"""Largest number of classes with a confusion matrix."""

BINS = 15
"""Number of confidence bins, of equal width from 0 to 1; Guo et al. (2017)."""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Predictions:
    """A network's logits ``(N, C)`` for the validation images, their labels ``(N,)`` and their paths ``(N,)``.

    With several labels an image, the labels are ``(N, C)``, 0 or 1.
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
            # Without pickles, reading a file can't run code.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                logits = np.asarray(file["logits"], dtype=np.float64)
                read = cls(logits, file["labels"], file["keys"], tuple(map(str, file["classes"])))
        except Exception:  # noqa: BLE001 (NumPy raises many types of errors for damaged files)
            return None
        count, largest = len(read.labels), 1 if read.multilabel else len(read.classes) - 1
        fits = logits.shape == (count, len(read.classes)) and read.keys.shape == (count,)
        fits = fits and read.labels.shape in ((count,), logits.shape)
        is_valid = fits and read.labels.dtype.kind in "iu" and len(read) > 0
        return read if is_valid and 0 <= read.labels.min() <= read.labels.max() <= largest else None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2  # noqa: PLR2004 (N, C)

    @property
    def decisions(self) -> NDArray[np.int64]:
        """The predicted classes, ``(N,)``; with several labels an image ``(N, C)``, 0 or 1."""
        decided = decide(torch.from_numpy(self.logits), multilabel=self.multilabel)
        return np.asarray(decided.numpy(), dtype=np.int64)

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Return the probabilities at a temperature, ``(N, C)``."""
        logits = self.logits / temperature
        return np.asarray(expit(logits) if self.multilabel else softmax(logits, axis=1))


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

        With several labels an image, the metrics are those of :func:`kd.metrics.multilabel_scores`; ``nll`` is the mean
        over images and classes, and ``bins`` and ``ece`` are about the decision on each class of each image.

    Source: Guo et al. (2017), section 2, https://arxiv.org/abs/1706.04599 (calibration)
    """
    if predictions.multilabel:
        return _measure_multilabel(predictions)
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
        # Of thousands of classes it would take megabytes for each run.
        "confusion": confusion.tolist() if count <= MOST_CLASSES else None,
    }


def _measure_multilabel(predictions: Predictions) -> dict[str, Any]:
    logits, targets = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.labels.astype(np.float64))
    probabilities = predictions.probabilities().ravel()
    confidence = np.maximum(probabilities, 1 - probabilities)
    bins = _bins(confidence, (predictions.decisions == predictions.labels).astype(float).ravel())
    gaps = [each["count"] * abs(each["accuracy"] - each["confidence"]) for each in bins if each["count"]]
    return {
        **multilabel_scores(logits, targets),
        "nll": float(F.binary_cross_entropy_with_logits(logits, targets)),
        "ece": sum(gaps) / len(confidence),
        "bins": bins,
        "classes": list(predictions.classes),
        "confusion": None,
    }


def compare(student: Predictions, teacher: Predictions) -> dict[str, float] | None:
    """Compare a student's predictions with its teacher's; ``None`` if they were computed on different images.

    Returns:
        ``agreement``, the fraction of images for which both predict the same class, and ``kl_to_teacher``, the mean
        Kullback-Leibler divergence of the student's probabilities from the teacher's, in nats.
    """
    if student.classes != teacher.classes or not np.array_equal(student.keys, teacher.keys):
        return None
    if student.multilabel:
        each = [
            np.exp(log_expit(sign * teacher.logits))
            * (log_expit(sign * teacher.logits) - log_expit(sign * student.logits))
            for sign in (1, -1)
        ]
        divergence = (each[0] + each[1]).sum(axis=1)
    else:
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
    for name in ("per_class", "precision", *(["average_precision"] if "average_precision" in runs[0] else [])):
        facts[name] = [
            mean_and_std(values)[0] if (values := [value for value in by_run if value is not None]) else None
            for by_run in zip(*(run[name] for run in runs), strict=True)
        ]
    facts["support"] = runs[0]["support"]
    confusions = [run["confusion"] for run in runs if run["confusion"] is not None]
    facts["confusion"] = np.sum(confusions, axis=0).tolist() if confusions else None
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
