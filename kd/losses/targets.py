"""Losses on logits that treat the labeled class separately from the other classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import LOSSES, POSITIVE, SoftenedLoss, bounded


@LOSSES.register("dkd")
@dataclass(frozen=True)
class DecoupledKD(SoftenedLoss):
    r"""Decoupled knowledge distillation: target-class and non-target-class divergence with separate weights.

    $$ \frac{T^2}{B} \sum_b \alpha \underbrace{\mathrm{KL}\big((q_y, 1 - q_y) \,\|\, (p_y, 1 - p_y)\big)}_{\text{TCKD}}
    + \beta \underbrace{\mathrm{KL}\big(\hat q \,\|\, \hat p\big)}_{\text{NCKD}} $$

    with $q = \sigma(v_b/T)$, $p = \sigma(z_b/T)$, and $\hat q, \hat p$ these without the labeled class, renormalized.
    In `SoftenedKL`, NCKD has the weight $1 - q_y$, which suppresses it where the teacher is confident: per image,
    KL = TCKD + (1 - q_y) NCKD.

    Args:
        alpha: Weight of TCKD.
        beta: Weight of NCKD; in the paper 1 to 10: 8 for ResNets on CIFAR-100, 0.5 on ImageNet.
        temperature: $T > 0$, dimensionless.

    Shape:
        - student: ``(B, C)``, logits $z$.
        - teacher: ``(B, C)``, logits $v$.
        - labels: ``(B,)``, integers from 0 to C - 1.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Zhao et al. (2022), https://arxiv.org/abs/2203.08679
    """

    alpha: float = 1.0
    beta: float = 8.0

    formula: ClassVar[str] = "T² · mean over b of alpha · TCKD + beta · NCKD"
    source: ClassVar[str] = "Zhao et al. 2022 (DKD)"
    published: ClassVar[str] = "ce=1 'dkd(beta=8)=warmup(1, 20)'"
    needs_labels: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum of the two divergences."""
        target, others = self.parts(student, teacher, labels)
        return (self.alpha * target + self.beta * others).mean() * self.temperature**2

    def parts(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return TCKD and NCKD of each image, ``(B,)`` each, without the factor $T^2$."""
        log_p, log_p_rest, log_p_others = _split(student / self.temperature, labels)
        log_q, log_q_rest, log_q_others = _split(teacher / self.temperature, labels)
        binary_p, binary_q = torch.stack([log_p, log_p_rest], 1), torch.stack([log_q, log_q_rest], 1)
        target = F.kl_div(binary_p, binary_q, reduction="none", log_target=True).sum(dim=1)
        others = F.kl_div(log_p_others, log_q_others, reduction="none", log_target=True).sum(dim=1)
        return target, others


@LOSSES.register("nkd")
@dataclass(frozen=True)
class NormalizedKD(SoftenedLoss):
    r"""Normalized knowledge distillation: cross-entropy of the labeled class, and among the other classes.

    $$ -\frac{1}{B} \sum_b q_y \log p_y + \gamma T^2 \sum_{c \ne y} \hat q_c \log \hat p_c $$

    with $q = \sigma(v_b)$, $p = \sigma(z_b)$, and $\hat q, \hat p$ the predictions softened at temperature $T$ without
    the labeled class, renormalized.

    Args:
        gamma: Weight of the other classes.
        temperature: $T > 0$, dimensionless.

    Shape:
        - student: ``(B, C)``, logits $z$.
        - teacher: ``(B, C)``, logits $v$.
        - labels: ``(B,)``, integers from 0 to C - 1.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Yang et al. (2023), https://arxiv.org/abs/2303.13005
    """

    gamma: float = 1.5
    temperature: float = bounded(1.0, *POSITIVE)

    formula: ClassVar[str] = "mean over b of -q_y log p_y - gamma · T² · sum over c ≠ y of q'_c log p'_c"
    source: ClassVar[str] = "Yang et al. 2023 (NKD)"
    published: ClassVar[str] = "ce=1 nkd=1"
    needs_labels: ClassVar[bool] = True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum of the two cross-entropies."""
        log_p, _, _ = _split(student, labels)
        log_q, _, _ = _split(teacher, labels)
        _, _, log_p_others = _split(student / self.temperature, labels)
        _, _, log_q_others = _split(teacher / self.temperature, labels)
        target = -log_q.exp() * log_p
        others = -(log_q_others.exp() * log_p_others).sum(dim=1)
        return (target + self.gamma * self.temperature**2 * others).mean()


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities: of the label ``(B,)``, of all others ``(B,)``, and among the others ``(B, C - 1)``.

    The label's logits are removed rather than masked, and log(1 - p) is never computed, so that extreme logits give
    finite values.
    """
    is_other = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], value=False)
    others = logits[is_other].view(len(logits), -1)
    log_sum = logits.logsumexp(dim=1)
    log_label = logits.gather(1, labels[:, None]).squeeze(1) - log_sum
    return log_label, others.logsumexp(dim=1) - log_sum, F.log_softmax(others, dim=1)
