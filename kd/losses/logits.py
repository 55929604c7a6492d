"""Losses that compare the student's logits with the teacher's."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.terms import LOSSES, Softened


@LOSSES.register("mse")
@dataclass(frozen=True)
class LogitMSE:
    r"""Mean squared difference of the logits.

    .. math:: \frac{1}{BC} \sum_{b=1}^{B} \sum_{c=1}^{C} (z_{bc} - v_{bc})^2

    It is what the softened divergence tends to at high temperature, but for a factor: for centerd logits,
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
    paper: ClassVar[str] = "mse=1"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the mean squared difference."""
        return F.mse_loss(student, teacher)


@LOSSES.register("kl")
@dataclass(frozen=True)
class SoftenedKL(Softened):
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

    formula: ClassVar[str] = "T² · mean over b of KL(softmax(v_b/T) ‖ softmax(z_b/T))"
    source: ClassVar[str] = "Hinton, Vinyals & Dean 2015, section 2"
    paper: ClassVar[str] = "ce=0.1 kl=0.9"

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
    paper: ClassVar[str] = "ce=0.5 hard=0.5"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the cross-entropy."""
        return F.cross_entropy(student, teacher.argmax(dim=1))


@LOSSES.register("soft_ce")
@dataclass(frozen=True)
class SoftCrossEntropy(Softened):
    r"""Cross-entropy of the student's softened prediction with the teacher's.

    .. math:: -\frac{T^2}{B} \sum_{b=1}^{B} \sum_{c=1}^{C} \sigma(v_b/T)_c \log \sigma(z_b/T)_c

    It is :class:`SoftenedKL` and the entropy of the teacher's prediction, which the student can't change: the gradient
    is the same, the value is not zero at equality.

    Args:
        temperature: :math:`T > 0`.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Hinton, Vinyals & Dean (2015), section 2, https://arxiv.org/abs/1503.02531
    """

    formula: ClassVar[str] = "-T² · mean over b of sum over c of softmax(v_b/T)_c log softmax(z_b/T)_c"
    source: ClassVar[str] = "Hinton, Vinyals & Dean 2015, section 2"
    paper: ClassVar[str] = "ce=0.1 soft_ce=0.9"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the cross-entropy."""
        targets = F.softmax(teacher / self.temperature, dim=1)
        return F.cross_entropy(student / self.temperature, targets) * self.temperature**2


@LOSSES.register("ttm")
@dataclass(frozen=True)
class TransformedTeacherMatching(Softened):
    r"""Divergence of the student's prediction, as it is, from the teacher's softened one.

    .. math:: \frac{1}{B} \sum_{b=1}^{B} w_b \, \mathrm{KL}\big(\sigma(v_b/T) \,\|\, \sigma(z_b)\big)

    Without a temperature on the student's side, its prediction is pushed towards higher Renyi entropy. Weighted (WTTM),
    :math:`w_b = \sum_c \sigma(v_b)_c^{1/T}` makes images count by how undecided the teacher is; else it is 1.

    Args:
        temperature: :math:`T > 0`; the paper's exponent is :math:`\gamma = 1/T`.
        weighted: Whether to weigh the images.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Zheng & Yang (2024), https://arxiv.org/abs/2402.11148
    """

    weighted: bool = False

    formula: ClassVar[str] = "mean over b of w_b · KL(softmax(v_b/T) ‖ softmax(z_b))"
    source: ClassVar[str] = "Zheng & Yang 2024 (TTM; weighted: WTTM)"
    paper: ClassVar[str] = ""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the divergence."""
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        divergence = F.kl_div(F.log_softmax(student, dim=1), log_teacher, reduction="none", log_target=True).sum(dim=1)
        if self.weighted:
            divergence = divergence * (F.log_softmax(teacher, dim=1) / self.temperature).logsumexp(dim=1).exp()
        return divergence.mean()


@LOSSES.register("jsd")
@dataclass(frozen=True)
class JensenShannon(Softened):
    r"""Jensen-Shannon divergence of the softened predictions: symmetric, and at most :math:`T^2 \log 2`.

    .. math::
        \frac{T^2}{2B} \sum_{b=1}^{B} \mathrm{KL}(q_b \,\|\, m_b) + \mathrm{KL}(p_b \,\|\, m_b),
        \quad m_b = \tfrac12 (p_b + q_b)

    with :math:`p_b = \sigma(z_b/T)` and :math:`q_b = \sigma(v_b/T)`.

    Args:
        temperature: :math:`T > 0`.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Lin (1991), https://doi.org/10.1109/18.61115
    """

    formula: ClassVar[str] = "T² · mean over b of JSD(softmax(v_b/T), softmax(z_b/T))"
    source: ClassVar[str] = "Lin 1991"
    paper: ClassVar[str] = ""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the divergence."""
        log_p = F.log_softmax(student / self.temperature, dim=1)
        log_q = F.log_softmax(teacher / self.temperature, dim=1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        both = [F.kl_div(log_m, one, reduction="batchmean", log_target=True) for one in (log_p, log_q)]
        return (both[0] + both[1]) / 2 * self.temperature**2


@LOSSES.register("cosine")
@dataclass(frozen=True)
class CosineDistance:
    r"""One minus the cosine between the logits: their direction is matched, their size is not.

    .. math:: 1 - \frac{1}{B} \sum_{b=1}^{B} \frac{\langle z_b, v_b \rangle}{\|z_b\| \, \|v_b\|}

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar, from 0 to 2.

    Source: Sanh et al. (2019), section 3 (on hidden states), https://arxiv.org/abs/1910.01108
    """

    formula: ClassVar[str] = "1 - mean over b of cos(z_b, v_b)"
    source: ClassVar[str] = "Sanh et al. 2019 (DistilBERT, on hidden states), section 3"
    paper: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the distance."""
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean()
