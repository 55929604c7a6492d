"""Metrics of predictions with several labels an image, by torchmetrics."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multilabel_average_precision,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

ACCURACY = "accuracy"
MULTILABEL = ("map", "micro_f1", "macro_f1")
"""Their names: the mean average precision, and F1 scores over all labels and as the mean of the classes."""


def metric_title(name: str) -> str:
    """Return a metric's name in words."""
    return {"auroc": "AUROC", "macro_f1": "macro F1", "micro_f1": "micro F1", "map": "mAP"}.get(
        name, name.replace("_", " ")
    )


def logged_as(name: str) -> str:
    """Return the name under which a metric of the validation images is logged."""
    return "val/acc" if name == ACCURACY else f"val/{name}"


def decide(logits: Tensor, *, multilabel: bool) -> Tensor:
    """Return the predicted classes ``(B,)``; with several labels an image ``(B, C)``, whether each is likely."""
    return logits > 0 if multilabel else logits.argmax(dim=1)


def multilabel_scores(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return metrics of independent decisions on each class, at a probability of 0.5.

    Args:
        logits: ``(N, C)``.
        targets: ``(N, C)``, 0 or 1.

    Returns:
        ``accuracy``, the fraction of images with just the right labels; ``map``, ``micro_f1`` and ``macro_f1``; by
        class ``average_precision``, ``per_class`` (recall), ``precision`` and ``support``. Means, and values by class
        (otherwise ``None``), are those of the classes with images.
    """
    probabilities, present = logits.float().sigmoid(), targets.sum(dim=0) > 0
    wanted = targets.long()
    options: dict[str, Any] = {"num_labels": logits.shape[1], "validate_args": False}
    with warnings.catch_warnings():
        # A class without images has no recall.
        warnings.filterwarnings("ignore", message="No positive samples")
        areas = multilabel_average_precision(probabilities, wanted, **options, average="none")
    by_class = {
        "average_precision": areas,
        "per_class": multilabel_recall(probabilities, wanted, **options, average="none"),
        "precision": multilabel_precision(probabilities, wanted, **options, average="none"),
    }
    f1 = multilabel_f1_score(probabilities, wanted, **options, average="none")
    listed = present.tolist()
    return {
        "accuracy": float(((probabilities > 0.5) == (wanted > 0)).all(dim=1).float().mean()),  # noqa: PLR2004
        "map": float(areas[present].mean()),
        "micro_f1": float(multilabel_f1_score(probabilities, wanted, **options, average="micro")),
        "macro_f1": float(f1[present].mean()),
        **{
            name: [value if there else None for value, there in zip(values.tolist(), listed, strict=True)]
            for name, values in by_class.items()
        },
        "support": wanted.sum(dim=0).tolist(),
    }


def best_thresholds(logits: Tensor, targets: Tensor) -> list[float]:
    """Return for each class the probability from which on it is predicted, so that its F1 score is the highest.

    It is halfway between two of the images; 0.5 for a class without images, or where all images have it.

    Args:
        logits: ``(N, C)``.
        targets: ``(N, C)``, 0 or 1.
    """
    probabilities, chosen = logits.double().sigmoid(), []
    for values, wanted in zip(probabilities.T, targets.T.bool(), strict=True):
        if not wanted.any() or wanted.all():
            chosen.append(0.5)
            continue
        ordered, order = values.sort(descending=True)
        hits = wanted[order].cumsum(0)
        counts = torch.arange(1, len(values) + 1)
        scores = 2 * hits / (counts + wanted.sum())
        # Between equal probabilities there is no threshold.
        following = torch.cat([ordered[1:], ordered.new_zeros(1)])
        best = int(torch.where(following < ordered, scores, -1.0).argmax())
        chosen.append(float((ordered[best] + following[best]) / 2))
    return chosen
