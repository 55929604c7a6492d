"""Losses that compare how predictions relate to one another, within the batch or among the classes."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from kd.losses.terms import LOSSES, Softened


@LOSSES.register("dist")
@dataclass(frozen=True)
class Correlation(Softened):
    r"""One minus Pearson's correlation of the softened predictions, along the classes and along the batch.

    .. math::
        T^2 \Big( \beta \big(1 - \tfrac1B \sum_{b} \rho(p_{b \cdot}, q_{b \cdot})\big)
        + \gamma \big(1 - \tfrac1C \sum_{c} \rho(p_{\cdot c}, q_{\cdot c})\big) \Big)

    with :math:`p = \sigma(z/T)` and :math:`q = \sigma(v/T)`: a strong teacher's preferences are matched, not the exact
    probabilities.

    Args:
        beta: Weight of the relations among the classes of an image.
        gamma: Weight of the relations among the images of a class.
        temperature: :math:`T > 0`.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar, from 0 to :math:`2 T^2 (\beta + \gamma)`.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Huang et al. (2022), https://arxiv.org/abs/2205.10536
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0

    formula: ClassVar[str] = "T² · (beta · (1 - mean over b of ρ(p_b, q_b)) + gamma · (1 - mean over c of ρ(p_c, q_c)))"
    source: ClassVar[str] = "Huang et al. 2022 (DIST)"
    paper: ClassVar[str] = "ce=1 dist=1"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the weighted distances."""
        p, q = F.softmax(student / self.temperature, dim=1), F.softmax(teacher / self.temperature, dim=1)
        distance = self.beta * (1 - _correlation(p, q)) + self.gamma * (1 - _correlation(p.T, q.T))
        return distance * self.temperature**2


@LOSSES.register("mlkd")
@dataclass(frozen=True)
class MultiLevel(Softened):
    r"""Squared difference of the Gram matrices of the softened predictions: among images, and among classes.

    .. math::
        \frac{w_B}{B} \big\| p p^\top - q q^\top \big\|_F^2 + \frac{w_C}{C} \big\| p^\top p - q^\top q \big\|_F^2

    with :math:`p = \sigma(z/T)` and :math:`q = \sigma(v/T)`. These are the batch and the class level of the paper; its
    instance level is ``kl`` at several temperatures, to be added beside: ``mlkd=1 'kl(temperature=2)=1' 'kl=1'``.

    Args:
        batch: Weight :math:`w_B` of the images' matrix.
        classes: Weight :math:`w_C` of the classes' matrix.
        temperature: :math:`T > 0`.

    Shape:
        - student: ``(B, C)``, logits :math:`z`.
        - teacher: ``(B, C)``, logits :math:`v`.
        - labels: not looked at.
        - returns: scalar.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Jin, Wang & Lin (2023), section 3, https://openaccess.thecvf.com/content/CVPR2023/html/
        Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.html
    """

    batch: float = 1.0
    classes: float = 1.0

    formula: ClassVar[str] = "batch/B · ‖p pᵀ - q qᵀ‖² + classes/C · ‖pᵀp - qᵀq‖²"
    source: ClassVar[str] = "Jin, Wang & Lin 2023, batch and class level"
    paper: ClassVar[str] = ""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the weighted differences."""
        p, q = F.softmax(student / self.temperature, dim=1), F.softmax(teacher / self.temperature, dim=1)
        images, classes = (p @ p.T - q @ q.T).square().sum(), (p.T @ p - q.T @ q).square().sum()
        return self.batch * images / len(p) + self.classes * classes / p.shape[1]


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return Pearson's correlation of two matrices, row by row, in the mean over the rows."""
    centerd = [matrix - matrix.mean(dim=1, keepdim=True) for matrix in (one, other)]
    return F.cosine_similarity(centerd[0], centerd[1], dim=1).mean()
