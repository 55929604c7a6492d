"""Losses that compare how the features of the images in a batch relate to one another."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.features import FeatureLoss, Projection, Shape, units
from kd.losses.terms import LOSSES

_LEAST = 1e-7


@LOSSES.register("sp")
@dataclass(frozen=True)
class SimilarityPreserving(FeatureLoss):
    r"""Squared difference of the similarities between the images of a batch.

    .. math:: \frac{1}{B^2} \big\| S(F) - S(G) \big\|_F^2,
        \quad S(F)_{i \cdot} = \frac{(F F^\top)_{i \cdot}}{\|(F F^\top)_{i \cdot}\|}

    with the maps as rows, ``(B, CHW)``. Neither widths nor sizes need to agree.

    Args:
        student_node: Node of the student's map; ``None``: the last map before the pooling.
        teacher_node: Of the teacher's, likewise.

    Shape:
        - student: ``(B, C', H', W')``, maps :math:`F`.
        - teacher: ``(B, C, H, W)``, maps :math:`G`.
        - returns: scalar.

    Source: Tung & Mori (2019), section 3, https://arxiv.org/abs/1907.09682
    """

    formula: ClassVar[str] = "1/B² · ‖S(F) - S(G)‖²; S: rows of F Fᵀ divided by their norm"
    source: ClassVar[str] = "Tung & Mori 2019 (SP), section 3"
    paper: ClassVar[str] = "ce=1 sp=3000"

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the squared difference."""
        return F.mse_loss(self._similarity(student.flatten(1)), self._similarity(teacher.flatten(1)))

    def _similarity(self, rows: Tensor) -> Tensor:
        return units(rows @ rows.T)


@LOSSES.register("rkd")
@dataclass(frozen=True)
class RelationalKD(FeatureLoss):
    r"""Smooth L1 difference of the distances within pairs, and of the angles within triplets, of a batch's features.

    .. math::
        \frac{\lambda_D}{B^2} \sum_{ij} \ell\Big( \frac{\|f_i - f_j\|}{\mu(f)}, \frac{\|g_i - g_j\|}{\mu(g)} \Big)
        + \frac{\lambda_A}{B^3} \sum_{ijk} \ell\big( \cos \angle f_i f_j f_k, \cos \angle g_i g_j g_k \big)

    where :math:`f, g` are the means of the maps over their pixels, :math:`\mu` is the mean distance within pairs of
    different images, and :math:`\ell` the Huber loss with :math:`\delta = 1`. Neither widths nor sizes need to agree.

    Args:
        student_node: Node of the student's map; ``None``: the last map before the pooling.
        teacher_node: Of the teacher's, likewise.
        distance: Weight :math:`\lambda_D`.
        angle: Weight :math:`\lambda_A`.

    Shape:
        - student: ``(B, C', H', W')``.
        - teacher: ``(B, C, H, W)``.
        - returns: scalar.

    Source: Park et al. (2019), section 3.2, https://arxiv.org/abs/1904.05068
    """

    distance: float = 25.0
    angle: float = 50.0

    formula: ClassVar[str] = (
        "distance · mean over i, j of ℓ(‖f_i - f_j‖/μ) + angle · mean over i, j, k of ℓ(cos ∠ f_i f_j f_k)"
    )
    source: ClassVar[str] = "Park et al. 2019 (RKD), section 3.2"
    paper: ClassVar[str] = "ce=1 rkd=1"

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the weighted differences."""
        f, g = student.mean(dim=(2, 3)), teacher.mean(dim=(2, 3))
        distances = F.smooth_l1_loss(self._distances(f), self._distances(g))
        return self.distance * distances + self.angle * F.smooth_l1_loss(self._angles(f), self._angles(g))

    def _distances(self, rows: Tensor) -> Tensor:
        # The other way, over matrix products, is not exact for images that are alike.
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = max(1, len(rows) * (len(rows) - 1))
        mean = distances.sum() / pairs
        is_nothing = mean < _LEAST
        return (distances / mean.masked_fill(is_nothing, 1.0)).masked_fill(is_nothing, 0.0)

    def _angles(self, rows: Tensor) -> Tensor:
        # By the image j at the corner: (B, B, C) directions from j.
        directions = units(rows[None] - rows[:, None])
        return directions @ directions.transpose(1, 2)


@LOSSES.register("pkt")
@dataclass(frozen=True)
class ProbabilisticTransfer(FeatureLoss):
    r"""Divergence of how probable each image's neighbors are.

    .. math::
        \frac1B \sum_{i} \sum_{j} q_{ij} \log \frac{q_{ij}}{p_{ij}}, \quad
        p_{ij} = \frac{1 + \cos(f_i, f_j)}{\sum_k 1 + \cos(f_i, f_k)}

    where :math:`q` is made likewise of :math:`g`, and :math:`f, g` are the means of the maps over their pixels. Neither
    widths nor sizes need to agree.

    Args:
        student_node: Node of the student's map; ``None``: the last map before the pooling.
        teacher_node: Of the teacher's, likewise.

    Shape:
        - student: ``(B, C', H', W')``.
        - teacher: ``(B, C, H, W)``.
        - returns: scalar, in nats.

    Source: Passalis & Tefas (2018), section 3, https://arxiv.org/abs/1803.10837
    """

    formula: ClassVar[str] = "mean over i of KL(q_i ‖ p_i); p_ij = (1 + cos(f_i, f_j)) / Σ_k (1 + cos(f_i, f_k))"
    source: ClassVar[str] = "Passalis & Tefas 2018 (PKT), section 3"
    paper: ClassVar[str] = ""

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the divergence."""
        log_p, log_q = (self._neighbors(one.mean(dim=(2, 3))) for one in (student, teacher))
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    def _neighbors(self, rows: Tensor) -> Tensor:
        directions = units(rows)
        # Opposite directions would have the logarithm of nothing.
        weights = (1 + directions @ directions.T).clamp(min=_LEAST)
        return weights.log() - weights.sum(dim=1, keepdim=True).log()


@LOSSES.register("crd")
@dataclass(frozen=True)
class ContrastiveRepresentation(FeatureLoss):
    r"""How surprising it is which of the batch's images the student's features belong to, by the teacher's.

    .. math::
        -\frac1B \sum_{i} \log
        \frac{\exp(\langle s_i, t_i \rangle / \tau)}{\sum_j \exp(\langle s_i, t_j \rangle / \tau)}

    where :math:`s, t` are the means of the maps over their pixels, through a learned linear layer each, at length 1.
    The
    negatives are the other images of the batch, whatever their class; the paper draws them from a memory of the whole
    data set, of other classes, and so can take many more.

    Args:
        student_node: Node of the student's map; ``None``: the last map before the pooling.
        teacher_node: Of the teacher's, likewise.
        tau: Temperature :math:`\tau > 0`.
        width: Length of the vectors :math:`s, t`.

    Shape:
        - student: ``(B, C', H', W')``.
        - teacher: ``(B, C, H, W)``.
        - returns: scalar, in nats.

    Raises:
        ValueError: If ``tau`` is not positive, or ``width`` no whole number above 0.

    Source: Tian, Krishnan & Isola (2019), section 3, https://arxiv.org/abs/1910.10699; in this form van den Oord, Li &
        Vinyals (2018), section 2.3, https://arxiv.org/abs/1807.03748
    """

    tau: float = 0.07
    width: int = 128

    formula: ClassVar[str] = "mean over i of -log softmax_j(⟨s_i, t_j⟩/τ)[i]; s, t: learned projections at length 1"
    source: ClassVar[str] = "Tian, Krishnan & Isola 2019 (CRD), in-batch negatives"
    fixed: ClassVar[tuple[str, ...]] = (*FeatureLoss.fixed, "width")
    paper: ClassVar[str] = "ce=1 crd=0.8"

    def __post_init__(self) -> None:
        """Refuse a temperature at which nothing is defined, and a width that is none."""
        super().__post_init__()
        given = self.tau
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise ValueError(f"tau must be above 0, and is {given}")
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width must be a whole number above 0, and is {self.width}")

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module:
        """Build the two linear layers."""
        return nn.ModuleList([Projection(student[0], self.width), Projection(teacher[0], self.width)])

    def compare(self, student: Tensor, teacher: Tensor, adapter: Any) -> Tensor:  # noqa: ANN401 (two projections)
        """Return the cross-entropy."""
        pooled = [one.mean(dim=(2, 3), keepdim=True) for one in (student, teacher)]
        s, t = (units(to(one).flatten(1)) for to, one in zip(adapter, pooled, strict=True))
        return F.cross_entropy(s @ t.T / self.tau, torch.arange(len(s), device=s.device))
