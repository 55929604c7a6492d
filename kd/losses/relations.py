"""Losses on the relations between predictions: across images, across classes, of the labeled class to the others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import LOSSES, POSITIVE, SoftenedLoss, bounded, unit_vectors


@LOSSES.register("dist")
@dataclass(frozen=True)
class Correlation(SoftenedLoss):
    r"""One minus the Pearson correlation of softened predictions, across classes and across the batch (DIST).

    $$ T^2 \Big( \beta \big(1 - \tfrac1B \sum_{b} \rho(p_{b \cdot}, q_{b \cdot})\big)
    + \gamma \big(1 - \tfrac1C \sum_{c} \rho(p_{\cdot c}, q_{\cdot c})\big) \Big) $$

    with $p = \sigma(z/T)$ and $q = \sigma(v/T)$. The student matches a strong teacher's ranking of the classes rather
    than its exact probabilities.

    Args:
        beta: Weight of the inter-class correlation, within an image.
        gamma: Weight of the intra-class correlation, across images.
        temperature: $T > 0$, dimensionless.

    Shape: as `LogitLoss`; returns a scalar, from 0 to $2 T^2 (\beta + \gamma)$.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Huang et al. (2022), https://arxiv.org/abs/2205.10536
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = bounded(1.0, *POSITIVE)

    formula = "T² · (beta · (1 - mean over b of ρ(p_b, q_b)) + gamma · (1 - mean over c of ρ(p_c, q_c)))"
    source = "Huang et al. 2022 (DIST)"
    published = "ce=1 dist=2"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the weighted distance."""
        p, q = F.softmax(student / self.temperature, dim=1), F.softmax(teacher / self.temperature, dim=1)
        distance = self.beta * (1 - _correlation(p, q)) + self.gamma * (1 - _correlation(p.T, q.T))
        return distance * self.temperature**2


@LOSSES.register("mlkd")
@dataclass(frozen=True)
class MultiLevel(SoftenedLoss):
    r"""Squared difference of the Gram matrices of softened predictions, between images and between classes.

    $$ \frac{w_B}{B} \big\| p p^\top - q q^\top \big\|_F^2 + \frac{w_C}{C} \big\| p^\top p - q^\top q \big\|_F^2 $$

    with $p = \sigma(z/T)$ and $q = \sigma(v/T)$. These are the paper's batch and class levels; for its instance level
    add ``kl`` at several temperatures: ``mlkd=1 'kl(temperature=2)=1' 'kl=1'``.

    Args:
        batch: Weight $w_B$ of the Gram matrix of the images.
        classes: Weight $w_C$ of the Gram matrix of the classes.
        temperature: $T > 0$, dimensionless.

    Shape: as `LogitLoss`; returns a scalar.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Jin, Wang & Lin (2023), section 3,
    https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
    """

    batch: float = 1.0
    classes: float = 1.0
    temperature: float = bounded(1.0, *POSITIVE)

    formula = "batch/B · ‖p pᵀ - q qᵀ‖² + classes/C · ‖pᵀp - qᵀq‖²"
    source = "Jin, Wang & Lin 2023, batch and class level"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the weighted squared differences."""
        p, q = F.softmax(student / self.temperature, dim=1), F.softmax(teacher / self.temperature, dim=1)
        images, classes = (p @ p.T - q @ q.T).square().sum(), (p.T @ p - q.T @ q).square().sum()
        return self.batch * images / len(p) + self.classes * classes / p.shape[1]


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return the Pearson correlation between corresponding rows of two matrices, averaged over the rows.

    The standard deviation of a row of ``first`` counts as at least 5 % of the row's root mean square, which bounds the
    gradient where the row is constant.
    """
    floor = 0.05 * first.detach().norm(dim=1, keepdim=True).clamp(min=1e-6)
    first = unit_vectors(first - first.mean(dim=1, keepdim=True), floor=floor)
    second = unit_vectors(second - second.mean(dim=1, keepdim=True), floor=1e-12)
    return (first * second).sum(dim=1).mean()


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

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Zhao et al. (2022), https://arxiv.org/abs/2203.08679
    """

    alpha: float = 1.0
    beta: float = 8.0

    formula = "T² · mean over b of alpha · TCKD + beta · NCKD"
    source = "Zhao et al. 2022 (DKD)"
    published = "ce=1 'dkd(beta=8)=warmup(1, 20)'"
    needs_labels = True

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

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Yang et al. (2023), https://arxiv.org/abs/2303.13005
    """

    gamma: float = 1.5
    temperature: float = bounded(1.0, *POSITIVE)

    formula = "mean over b of -q_y log p_y - gamma · T² · sum over c ≠ y of q'_c log p'_c"
    source = "Yang et al. 2023 (NKD)"
    published = "ce=1 nkd=1"
    needs_labels = True

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
