"""Losses that compare the student's logits with the teacher's."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kd.losses.terms import LOSSES


@LOSSES.register("mse")
@dataclass(frozen=True)
class LogitMSE:
    r"""Mean squared difference of the logits.

    .. math:: \frac{1}{BC} \sum_{b=1}^{B} \sum_{c=1}^{C} (z_{bc} - v_{bc})^2

    It is what the softened divergence tends to at high temperature, but for a factor: for centred logits,
    :class:`SoftenedKL` tends to one half of it.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar.

    Source: Ba & Caruana (2013), section 2, https://arxiv.org/abs/1312.6184
    """

    formula: ClassVar[str] = "mean over b, c of (z_bc - v_bc)²"
    source: ClassVar[str] = "Ba & Caruana 2013, section 2"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the mean squared difference."""
        return F.mse_loss(student, teacher)


@LOSSES.register("kl")
@dataclass(frozen=True)
class SoftenedKL:
    r"""Divergence of the student's softened prediction from the teacher's.

    .. math:: \frac{T^2}{B} \sum_{b=1}^{B} \mathrm{KL}\big(\sigma(v_b/T) \,\|\, \sigma(z_b/T)\big)

    The factor :math:`T^2` makes the size of the gradient independent of the temperature.

    Args:
        temperature: :math:`T > 0`, dimensionless; 1 compares the predictions as they are.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> SoftenedKL(temperature=2.0)(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1)).item()
        0.0

    Source: Hinton, Vinyals & Dean (2015), section 2, https://arxiv.org/abs/1503.02531
    """

    temperature: float = 4.0

    formula: ClassVar[str] = "T² · mean over b of KL(softmax(v_b/T) ‖ softmax(z_b/T))"
    source: ClassVar[str] = "Hinton, Vinyals & Dean 2015, section 2"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a temperature at which nothing is defined."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, and is {self.temperature}")

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the divergence."""
        log_student = F.log_softmax(student / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        # "batchmean" is the definition; "mean" would divide by the number of classes too.
        divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


@LOSSES.register("hard")
@dataclass(frozen=True)
class HardDistillation:
    r"""Cross-entropy of the student's prediction with the teacher's decision.

    .. math:: -\frac{1}{B} \sum_{b=1}^{B} \log \sigma(z_b)_{\arg\max_c v_{bc}}

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar, in nats.

    Source: Touvron et al. (2020), section 4, https://arxiv.org/abs/2012.12877
    """

    formula: ClassVar[str] = "mean over b of -log softmax(z_b)[argmax v_b]"
    source: ClassVar[str] = "Touvron et al. 2020 (DeiT), section 4"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the cross-entropy."""
        return F.cross_entropy(student, teacher.argmax(dim=1))
