"""The metrics that may choose the best epoch, and that a verdict may be about."""

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix

ACCURACY = "accuracy"


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


def build_metric(name: str, num_classes: int) -> Metric | None:
    """Build a metric of logits ``(B, C)`` and labels ``(B,)``; ``None`` for accuracy, which is always measured."""
    if name == ACCURACY:
        return None
    if name == "auroc":
        return PresentAUROC(num_classes)
    return {"balanced_accuracy": BalancedAccuracy, "macro_f1": MacroF1}[name](num_classes, validate_args=False)


def logged_as(name: str) -> str:
    """Return the name under which a metric of the validation images is logged."""
    return "val/acc" if name == ACCURACY else f"val/{name}"
