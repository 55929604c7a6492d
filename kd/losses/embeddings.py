"""Losses on a network's last features: pooled to one vector per image, or projected into the teacher's."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import LOSSES, unit_vectors
from kd.losses.features import FeatureLoss, Projection, Shape, match_sizes


@LOSSES.register("embedding")
@dataclass(frozen=True)
class Embedding(FeatureLoss):
    r"""Distance between the pooled features of teacher and student, the latter behind a learned linear projection.

    $$ \frac1B \sum_b \big(1 - \cos(P f_b, g_b)\big) \quad\text{or}\quad \frac{1}{BD} \sum_b \| P f_b - g_b \|^2,
    \qquad f_b = \frac{1}{HW} \sum_{hw} F_{bhw} $$

    It needs neither labels nor the teacher's classes, so that backbones without a classifier layer can teach.

    Args:
        distance: ``cosine`` or ``mse``.

    Nodes and Shape: as `FeatureLoss`; returns a scalar; the cosine distance lies between 0 and 2.

    Raises:
        ValueError: If ``distance`` is neither.

    Source: Yu et al. (2019), section 3.1 (absolute teacher), https://arxiv.org/abs/1904.03624
    """

    distance: Literal["cosine", "mse"] = "cosine"

    formula = "mean over b of 1 - cos(P f_b, g_b), or mean over b, d of (P f_b - g_b)²; f, g: pooled; P: learned"
    source = "Yu et al. 2019, section 3.1"

    def __post_init__(self) -> None:
        """Check the hyperparameters."""
        super().__post_init__()
        if self.distance not in ("cosine", "mse"):
            raise ValueError(f"distance must be cosine or mse, not {self.distance!r}")

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module:
        """Build the projection."""
        return Projection(student[0], teacher[0])

    def compare(self, student: Tensor, teacher: Tensor, adapter: Projection) -> Tensor:
        """Return the mean distance."""
        projected = adapter(student.mean(dim=(2, 3), keepdim=True)).flatten(1)
        target = teacher.mean(dim=(2, 3))
        if self.distance == "mse":
            return F.mse_loss(projected, target)
        similarities: Tensor = (unit_vectors(projected) * unit_vectors(target)).sum(dim=1)
        return (1 - similarities).mean()


@LOSSES.register("simkd")
@dataclass(frozen=True)
class ReusedClassifier(FeatureLoss):
    r"""Mean squared error between projected features of the student and the teacher's last; its head is reused (SimKD).

    $$ \frac{1}{BCHW} \sum_{bchw} \big(P(F_b) - G_b\big)_{chw}^2 $$

    The student is its backbone, three learned convolutions $P$, and the teacher's frozen classifier layer, and is saved
    and exported as this one network. The larger map is average-pooled to the size of the smaller one.

    Nodes and Shape: as `FeatureLoss`; the student's node is the projection; returns a scalar.

    Source: Chen et al. (2022), section 3.2, https://arxiv.org/abs/2203.14001
    """

    formula = "mean over b, c, h, w of (P(F_b) - G_b)²; P: learned convolutions, followed by the teacher's head"
    source = "Chen et al. 2022 (SimKD), section 3.2"
    published = "simkd=1"
    reuses_head = True

    def nodes(self, network: str) -> list[str]:
        """Return the node of the projection."""
        return super().nodes(network) or (["projector"] if network == "student" else [])

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the mean squared error."""
        return F.mse_loss(*match_sizes(student, teacher))
