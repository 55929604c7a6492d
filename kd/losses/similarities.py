"""Losses on the relations between the features of the images in a batch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import LOSSES, POSITIVE, bounded, unit_vectors
from kd.losses.features import FeatureLoss, Projection, Shape

_EPSILON = 1e-7


@LOSSES.register("sp")
@dataclass(frozen=True)
class SimilarityPreserving(FeatureLoss):
    r"""Mean squared difference between the row-normalized similarity matrices of a batch.

    $$ \frac{1}{B^2} \big\| S(F) - S(G) \big\|_F^2,
    \quad S(F)_{i \cdot} = \frac{(F F^\top)_{i \cdot}}{\|(F F^\top)_{i \cdot}\|} $$

    with the flattened maps as rows, ``(B, CHW)``. Neither widths nor sizes need to agree.

    Nodes and Shape: as `FeatureLoss`; returns a scalar.

    Source: Tung & Mori (2019), section 3, https://arxiv.org/abs/1907.09682
    """

    formula = "1/B² · ‖S(F) - S(G)‖²; S: rows of F Fᵀ divided by their norm"
    source = "Tung & Mori 2019 (SP), section 3"
    published = "ce=1 sp=3000"

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the mean squared difference."""
        similarities = [unit_vectors(rows @ rows.T) for rows in (student.flatten(1), teacher.flatten(1))]
        return F.mse_loss(similarities[0], similarities[1])


@LOSSES.register("rkd")
@dataclass(frozen=True)
class RelationalKD(FeatureLoss):
    r"""Relational knowledge distillation: Huber loss on pairwise distances and on angles of triplets in a batch.

    $$ \frac{\lambda_D}{B^2} \sum_{ij} \ell\Big( \frac{\|f_i - f_j\|}{\mu(f)}, \frac{\|g_i - g_j\|}{\mu(g)} \Big)
    + \frac{\lambda_A}{B^3} \sum_{ijk} \ell\big( \cos \angle f_i f_j f_k, \cos \angle g_i g_j g_k \big) $$

    where $f, g$ are the globally average-pooled maps, $\mu$ is the mean distance between different images, and $\ell$
    is the Huber loss with $\delta = 1$. Neither widths nor sizes need to agree.

    Args:
        distance: Weight $\lambda_D$.
        angle: Weight $\lambda_A$.

    Nodes and Shape: as `FeatureLoss`; returns a scalar.

    Source: Park et al. (2019), section 3.2, https://arxiv.org/abs/1904.05068
    """

    distance: float = 25.0
    angle: float = 50.0

    formula = "distance · mean over i, j of ℓ(‖f_i - f_j‖/μ) + angle · mean over i, j, k of ℓ(cos ∠ f_i f_j f_k)"
    source = "Park et al. 2019 (RKD), section 3.2"
    published = "ce=1 rkd=1"

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the weighted sum of the two losses."""
        f, g = student.mean(dim=(2, 3)), teacher.mean(dim=(2, 3))
        distances = F.smooth_l1_loss(_distances(f), _distances(g))
        return self.distance * distances + self.angle * F.smooth_l1_loss(_angles(f), _angles(g))


def _distances(rows: Tensor) -> Tensor:
    """Return the pairwise distances ``(B, B)`` relative to their mean."""
    # Computing distances by matrix multiplication is inexact for similar rows.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / max(1, len(rows) * (len(rows) - 1))
    return distances / mean.clamp(min=0.01)


def _angles(rows: Tensor) -> Tensor:
    """Return the cosine of the angle at row j between rows i and k, ``(j, i, k)``."""
    directions = unit_vectors(rows[None] - rows[:, None])
    return directions @ directions.transpose(1, 2)


@LOSSES.register("pkt")
@dataclass(frozen=True)
class ProbabilisticTransfer(FeatureLoss):
    r"""Kullback-Leibler divergence between the neighbor distributions of a batch, by cosine similarity (PKT).

    $$ \frac1B \sum_{i} \sum_{j} q_{ij} \log \frac{q_{ij}}{p_{ij}}, \quad
    p_{ij} = \frac{1 + \cos(f_i, f_j)}{\sum_k 1 + \cos(f_i, f_k)} $$

    where $q$ is the same for $g$, and $f, g$ are the globally average-pooled maps. Neither widths nor sizes need to
    agree.

    Nodes and Shape: as `FeatureLoss`; returns a scalar, in nats.

    Source: Passalis & Tefas (2018), section 3, https://arxiv.org/abs/1803.10837
    """

    formula = "mean over i of KL(q_i ‖ p_i); p_ij = (1 + cos(f_i, f_j)) / Σ_k (1 + cos(f_i, f_k))"
    source = "Passalis & Tefas 2018 (PKT), section 3"

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the divergence."""
        log_p, log_q = (self._log_neighbors(maps.mean(dim=(2, 3))) for maps in (student, teacher))
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    def _log_neighbors(self, rows: Tensor) -> Tensor:
        directions = unit_vectors(rows)
        # Opposite directions have probability 0, whose logarithm is infinite.
        weights = (1 + directions @ directions.T).clamp(min=_EPSILON)
        return weights.log() - weights.sum(dim=1, keepdim=True).log()


@LOSSES.register("crd")
@dataclass(frozen=True)
class ContrastiveRepresentation(FeatureLoss):
    r"""InfoNCE between student and teacher embeddings, with in-batch negatives (CRD).

    $$ -\frac1B \sum_{i} \log
    \frac{\exp(\langle s_i, t_i \rangle / \tau)}{\sum_j \exp(\langle s_i, t_j \rangle / \tau)} $$

    where $s, t$ are the globally average-pooled maps after a learned linear projection each, scaled to norm 1. The
    negatives are the other images of the batch, whatever their class; the paper draws many more, of other classes only,
    from a memory bank of the whole data set.

    Args:
        tau: Temperature $\tau > 0$, dimensionless.
        width: Dimension of the embeddings $s, t$.

    Nodes and Shape: as `FeatureLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``tau`` is not positive, or ``width`` is not a positive integer.

    Source: Tian, Krishnan & Isola (2019), section 3, https://arxiv.org/abs/1910.10699; in this form van den Oord, Li &
    Vinyals (2018), section 2.3, https://arxiv.org/abs/1807.03748
    """

    tau: float = bounded(0.07, *POSITIVE)
    width: int = bounded(128, lambda value: value > 0, "a whole number above 0")

    formula = "mean over i of -log softmax_j(⟨s_i, t_j⟩/τ)[i]; s, t: learned projections at length 1"
    source = "Tian, Krishnan & Isola 2019 (CRD), in-batch negatives"
    constants = (*FeatureLoss.constants, "width")
    published = "ce=1 crd=0.8"

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module:
        """Build the two projections."""
        return nn.ModuleList([Projection(student[0], self.width), Projection(teacher[0], self.width)])

    def compare(self, student: Tensor, teacher: Tensor, adapter: Any) -> Tensor:  # noqa: ANN401 (two projections)
        """Return the cross-entropy."""
        pooled = [maps.mean(dim=(2, 3), keepdim=True) for maps in (student, teacher)]
        s, t = (unit_vectors(project(maps).flatten(1)) for project, maps in zip(adapter, pooled, strict=True))
        return F.cross_entropy(s @ t.T / self.tau, torch.arange(len(s), device=s.device))
