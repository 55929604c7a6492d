"""Losses on the relations between predictions, across the images of a batch and across the classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import LOSSES, POSITIVE, SoftenedLoss, bounded


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

    Shape:
        - student: ``(B, C)``, logits $z$.
        - teacher: ``(B, C)``, logits $v$.
        - returns: scalar, from 0 to $2 T^2 (\beta + \gamma)$.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Huang et al. (2022), https://arxiv.org/abs/2205.10536
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = bounded(1.0, *POSITIVE)

    formula: ClassVar[str] = "T² · (beta · (1 - mean over b of ρ(p_b, q_b)) + gamma · (1 - mean over c of ρ(p_c, q_c)))"
    source: ClassVar[str] = "Huang et al. 2022 (DIST)"
    published: ClassVar[str] = "ce=1 dist=1"

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

    Shape:
        - student: ``(B, C)``, logits $z$.
        - teacher: ``(B, C)``, logits $v$.
        - returns: scalar.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Jin, Wang & Lin (2023), section 3,
    https://openaccess.thecvf.com/content/CVPR2023/html/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
    """

    batch: float = 1.0
    classes: float = 1.0

    formula: ClassVar[str] = "batch/B · ‖p pᵀ - q qᵀ‖² + classes/C · ‖pᵀp - qᵀq‖²"
    source: ClassVar[str] = "Jin, Wang & Lin 2023, batch and class level"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the weighted squared differences."""
        p, q = F.softmax(student / self.temperature, dim=1), F.softmax(teacher / self.temperature, dim=1)
        images, classes = (p @ p.T - q @ q.T).square().sum(), (p.T @ p - q.T @ q).square().sum()
        return self.batch * images / len(p) + self.classes * classes / p.shape[1]


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return the Pearson correlation between corresponding rows of two matrices, averaged over the rows."""
    centered = [matrix - matrix.mean(dim=1, keepdim=True) for matrix in (first, second)]
    return F.cosine_similarity(centered[0], centered[1], dim=1).mean()
