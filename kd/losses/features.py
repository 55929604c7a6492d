"""Losses that compare feature maps position by position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.base import LOSSES, BaseLoss, bounded, unit_vectors

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class FeatureLoss(BaseLoss):
    """Base class of the losses on pairs of feature maps; the loss is summed over the pairs.

    Args:
        student_node: Name of a node of the student, or several; ``None`` selects the last feature map before the global
            pooling, or the last of each stage for losses with ``every_stage``.
        teacher_node: The same for the teacher; as many as for the student.

    Attributes:
        every_stage: Whether the loss compares the last feature map of each stage by default.
        reuses_head: Whether the student ends in the teacher's classifier layer, see `kd.models.reuse_head`.

    Shape:
        - student: ``(B, C', H', W')``, feature maps $F$, float32.
        - teacher: ``(B, C, H, W)``, feature maps $G$, float32, without gradient.
        - returns: scalar, the mean over the batch.

    Raises:
        ValueError: If a node is not a name.
    """

    student_node: str | int | Sequence[str | int] | None = None
    teacher_node: str | int | Sequence[str | int] | None = None

    is_multilabel: ClassVar[bool] = True
    every_stage: ClassVar[bool] = False
    reuses_head: ClassVar[bool] = False
    constants: ClassVar[tuple[str, ...]] = ("student_node", "teacher_node")

    def __post_init__(self) -> None:
        """Check the hyperparameters and the names of the nodes."""
        super().__post_init__()
        self.nodes("student")
        self.nodes("teacher")

    def nodes(self, network: str) -> list[str]:
        """Return the node names given for the ``student`` or the ``teacher``; empty if they are to be found."""
        value = getattr(self, f"{network}_node")
        if value is None:
            return []
        names = value if isinstance(value, list | tuple) else [value]
        # The children of a torch.nn.Sequential are named by numbers.
        if not names or not all(isinstance(name, str | int) and name != "" for name in names):
            hint = "; put a name such as '1.2' in quotes" if isinstance(value, float) else ""
            raise ValueError(f"{network}_node must be the name of a node or a list of names, not {value!r}{hint}")
        return [str(name) for name in names]

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module | None:  # noqa: ARG002 (for subclasses)
        """Build the module, trained along with the student, that makes a pair comparable; ``None`` if none is needed.

        Raises:
            ValueError: If the loss is not defined for feature maps of these shapes, ``(C, H, W)``.
        """
        return None

    def compare(self, student: Tensor, teacher: Tensor, adapter: Any) -> Tensor:  # noqa: ANN401 (see build_adapter)
        """Return the loss of one pair of feature maps, with what `build_adapter` returned for it."""
        raise NotImplementedError


class Projection(nn.Conv2d):
    """A 1x1 convolution computed in the precision of its input, whatever that of its weights."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the convolution."""
        bias = None if self.bias is None else self.bias.to(features.dtype)
        return F.conv2d(features, self.weight.to(features.dtype), bias)


@LOSSES.register("hint")
@dataclass(frozen=True)
class Hint(FeatureLoss):
    r"""Mean squared error between feature maps, with a learned 1x1 convolution $r$ where the widths differ (FitNets).

    $$ \frac{1}{BCHW} \sum_{bchw} \big(r(F_b) - G_b\big)_{chw}^2 $$

    The larger map is average-pooled to the size of the smaller one.

    Nodes and Shape: as `FeatureLoss`; returns a scalar.

    Source: Romero et al. (2014), section 2.2, https://arxiv.org/abs/1412.6550
    """

    formula = "mean over b, c, h, w of (r(F_b) - G_b)²; r: learned 1x1 convolution where widths differ"
    source = "Romero et al. 2014 (FitNets), section 2.2"
    published = "ce=1 hint=100"

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module | None:
        """Build the convolution where the widths differ."""
        return None if student[0] == teacher[0] else Projection(student[0], teacher[0])

    def compare(self, student: Tensor, teacher: Tensor, adapter: Projection | None) -> Tensor:
        """Return the mean squared error."""
        student, teacher = match_sizes(student, teacher)
        return F.mse_loss(student if adapter is None else adapter(student), teacher)


@LOSSES.register("at")
@dataclass(frozen=True)
class AttentionTransfer(FeatureLoss):
    r"""Mean squared difference between normalized spatial attention maps, summed over the stages.

    $$ \sum_{\mathrm{stages}} \frac{1}{BHW} \sum_{b}
    \Big\| \frac{Q(F_b)}{\|Q(F_b)\|} - \frac{Q(G_b)}{\|Q(G_b)\|} \Big\|^2,
    \quad Q(F)_{hw} = \sum_{c} |F_{chw}|^p $$

    The larger map is average-pooled to the size of the smaller one. The paper's equation uses the norm itself; the
    authors' code, for which the weight of 1000 was chosen, averages its square over the pixels, as here.

    The nodes default to the last map of each stage, paired from the last stage on.

    Args:
        p: Power $p \ge 1$.

    Nodes and Shape: as `FeatureLoss`; returns a scalar.

    Raises:
        ValueError: If ``p`` is below 1, or a map has a single pixel.

    Source: Zagoruyko & Komodakis (2016), section 3.1, https://arxiv.org/abs/1612.03928
    """

    p: float = bounded(2.0, lambda value: value >= 1, "a number of at least 1")

    formula = "sum over stages of mean over b, h, w of (Q(F_b)/‖Q(F_b)‖ - Q(G_b)/‖Q(G_b)‖)²; Q = Σ_c |F_c|^p"
    source = "Zagoruyko & Komodakis 2016 (AT), section 3.1"
    published = "ce=1 at=1000"
    every_stage = True

    def build_adapter(self, student: Shape, teacher: Shape) -> None:
        """Refuse maps of a single pixel, whose attention is constant."""
        if min(student[1], teacher[1]) == 1:
            shapes = f"student's shape: {student}, teacher's: {teacher}"
            raise ValueError(f"a map of one pixel has no spatial attention ({shapes})")

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the mean squared difference."""
        student, teacher = match_sizes(student, teacher)
        return F.mse_loss(self._attention(student), self._attention(teacher))

    def _attention(self, features: Tensor) -> Tensor:
        # Divided by the largest magnitude, which cancels in the normalization, so that no power overflows.
        largest = features.detach().abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.01)
        return unit_vectors((features / largest).abs().pow(self.p).sum(dim=1).flatten(1))


_MIN_VARIANCE = 1e-5


@LOSSES.register("vid")
@dataclass(frozen=True)
class VariationalInformation(FeatureLoss):
    r"""Negative log-likelihood of the teacher's features under a Gaussian predicted from the student's (VID).

    $$ \frac{1}{BCHW} \sum_{bchw} \tfrac12 \Big( \log \sigma_c^2 + \frac{(G_b - \mu(F_b))_{chw}^2}{\sigma_c^2} \Big) $$

    Up to constants, its negative is a lower bound on the mutual information of the two maps. The mean $\mu$ consists of
    three 1x1 convolutions with ReLU between them, and there is one variance per channel; both are trained along with
    the student. The larger map is average-pooled to the size of the smaller one.

    Args:
        variance: Initial variance $\sigma_c^2 > 10^{-5}$.

    Nodes and Shape: as `FeatureLoss`; returns a scalar, in nats; may be negative.

    Raises:
        ValueError: If ``variance`` is not above 0.00001.

    Source: Ahn et al. (2019), section 3, https://arxiv.org/abs/1904.05835
    """

    variance: float = bounded(5.0, lambda value: value > _MIN_VARIANCE, "a number above 1e-05")

    formula = "mean over b, c, h, w of (log σ_c² + (G_b - μ(F_b))²/σ_c²)/2; μ, σ: learned"
    source = "Ahn et al. 2019 (VID), section 3"
    constants = (*FeatureLoss.constants, "variance")
    published = "ce=1 vid=1"

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module:
        """Build the network that predicts the Gaussian."""
        return Gaussian(student[0], teacher[0], variance=self.variance)

    def compare(self, student: Tensor, teacher: Tensor, adapter: "Gaussian") -> Tensor:
        """Return the negative log-likelihood."""
        student, teacher = match_sizes(student, teacher)
        mean, variance = adapter(student)
        likelihood: Tensor = 0.5 * (variance.log() + (teacher - mean).square() / variance)
        return likelihood.mean()


class Gaussian(nn.Module):
    """A Gaussian over the teacher's features: the mean is predicted from the student's, the variance is learned.

    Shape:
        ``(B, inputs, H, W)`` to the mean ``(B, outputs, H, W)`` and the variance ``(outputs, 1, 1)``.
    """

    def __init__(self, inputs: int, outputs: int, *, variance: float) -> None:
        super().__init__()
        widths = [(inputs, outputs), (outputs, outputs), (outputs, outputs)]
        first, second, third = (Projection(*pair, bias=False) for pair in widths)
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        # The inverse of softplus, written with expm1 so that it doesn't overflow for large variances.
        target = variance - _MIN_VARIANCE
        start = target + math.log(-math.expm1(-target))
        self.spread = nn.Parameter(torch.full((outputs, 1, 1), start))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance."""
        return self.mean(features), F.softplus(self.spread.to(features.dtype)) + _MIN_VARIANCE


def match_sizes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two feature maps to the size of the smaller one."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    pooled = [maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher)]
    return pooled[0], pooled[1]
