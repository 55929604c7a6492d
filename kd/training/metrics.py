"""The metrics that may choose the best epoch, and that a verdict may be about."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix
from torchmetrics.utilities import dim_zero_cat

from kd.metrics import ACCURACY, multilabel_scores


class BalancedAccuracy(MulticlassConfusionMatrix):
    """Mean recall of the classes that have images."""

    def compute(self) -> Tensor:
        """Return the metric, a scalar."""
        confusion = super().compute().float()
        support = confusion.sum(dim=1)
        mean: Tensor = (confusion.diag() / support)[support > 0].mean()
        return mean


class MacroF1(MulticlassConfusionMatrix):
    """Mean F1 score of the classes that have images."""

    def compute(self) -> Tensor:
        """Return the metric, a scalar."""
        confusion = super().compute().float()
        support = confusion.sum(dim=1)
        mean: Tensor = (2 * confusion.diag() / (support + confusion.sum(dim=0)))[support > 0].mean()
        return mean


class PresentAUROC(MulticlassAUROC):
    """Mean area under the ROC curve of each class that has images against the others."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none", validate_args=False)

    def compute(self) -> Tensor:  # type: ignore[override]  # its curves are of another type
        """Return the metric, a scalar."""
        areas = super().compute()
        targets = self.target if isinstance(self.target, list) else [self.target]
        present = sum(target.bincount(minlength=len(areas)) for target in targets) > 0
        mean: Tensor = areas[present].mean()
        return mean


class MultilabelMetric(Metric):
    """One of `kd.metrics.multilabel_scores`, of logits ``(B, C)`` and targets ``(B, C)``."""

    logits: list[Tensor]
    targets: list[Tensor]

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.logits.append(logits)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """Return the metric, a scalar."""
        return torch.tensor(multilabel_scores(dim_zero_cat(self.logits), dim_zero_cat(self.targets))[self._name])


def build_metric(name: str, num_classes: int, *, multilabel: bool = False) -> Metric | None:
    """Build a metric of logits ``(B, C)`` and targets; ``None`` for accuracy, which is always measured."""
    if name == ACCURACY:
        return None
    if multilabel:
        return MultilabelMetric(name)
    if name == "auroc":
        return PresentAUROC(num_classes)
    return {"balanced_accuracy": BalancedAccuracy, "macro_f1": MacroF1}[name](num_classes, validate_args=False)
