"""Losses that compare the student with the labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kd.losses.terms import LOSSES


@LOSSES.register("ce")
@dataclass(frozen=True)
class CrossEntropy:
    r"""Cross-entropy of the student's prediction with the labels.

    .. math:: -\frac{1}{B} \sum_{b=1}^{B} \sum_{c=1}^{C} y_{bc} \log \sigma(z_b)_c

    where :math:`y_{bc}` is :math:`1 - \epsilon + \epsilon / C` for the label and :math:`\epsilon / C` for the others.

    Args:
        label_smoothing: :math:`0 \le \epsilon \le 1`, the part of each label that is spread over all classes.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: not looked at.
        - labels: ``(B,)``, integers from 0 to C - 1, or ``(B, C)``, probabilities :math:`y`.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``label_smoothing`` is outside [0, 1].

    Source: Szegedy et al. (2015), section 7, https://arxiv.org/abs/1512.00567
    """

    label_smoothing: float = 0.0

    formula: ClassVar[str] = "mean over b of -log softmax(z_b)[y_b]"
    source: ClassVar[str] = "Szegedy et al. 2015, section 7 (label smoothing)"
    paper: ClassVar[str] = "ce=1"
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    takes_soft_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a part that is none."""
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be from 0 to 1, and is {self.label_smoothing}")

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the cross-entropy."""
        return F.cross_entropy(student, labels, label_smoothing=self.label_smoothing)
