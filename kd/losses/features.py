"""Losses that compare feature maps place by place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.terms import LOSSES

Shape = tuple[int, int, int]
_NOTHING = 1e-12


@dataclass(frozen=True)
class FeatureLoss:
    """A loss on pairs of maps, one of the student and one of the teacher; it is the sum over the pairs.

    Args:
        student_node: Node of the student's network, or several; ``None`` finds it: the last map before the pooling, or
            the last map of each stage where the loss is made for that.
        teacher_node: The teacher's, likewise; as many as the student's.

    Raises:
        ValueError: If a node is no name.
    """

    student_node: str | int | Sequence[str | int] | None = None
    teacher_node: str | int | Sequence[str | int] | None = None

    formula: ClassVar[str]
    source: ClassVar[str]
    paper: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    every_stage: ClassVar[bool] = False
    fixed: ClassVar[tuple[str, ...]] = ("student_node", "teacher_node")

    def __post_init__(self) -> None:
        """Refuse what is no name."""
        for field in ("student_node", "teacher_node"):
            given = getattr(self, field)
            names = given if isinstance(given, list | tuple) else [given]
            # The layers of a torch.nn.Sequential are numbers.
            are_names = all(isinstance(one, str | int) and one != "" for one in names)
            if given is not None and not (names and are_names):
                quoted = "; a name such as '1.2' stands in quotes" if isinstance(given, float) else ""
                raise ValueError(f"{field} is the name of a node, or a list of names, and not {given!r}{quoted}")

    def nodes(self, side: str) -> list[str]:
        """Return the nodes that are named of the ``student``'s network or of the ``teacher``'s."""
        given = getattr(self, f"{side}_node")
        names = given if isinstance(given, list | tuple) else [] if given is None else [given]
        return [str(one) for one in names]

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module | None:  # noqa: ARG002 (for those that need it)
        """Build what is learned with the student to make a pair comparable, or nothing.

        Args:
            student: ``(C, H, W)`` of the student's map.
            teacher: Of the teacher's.

        Raises:
            ValueError: If such maps can't be compared.
        """
        return None

    def compare(self, student: Tensor, teacher: Tensor, adapter: Any) -> Tensor:  # noqa: ANN401 (what it built)
        """Compare a pair: ``(B, C, H, W)`` and ``(B, C', H', W')``, float32, to a scalar, the mean over the batch."""
        raise NotImplementedError


class Projection(nn.Conv2d):
    """A 1x1 convolution, computed in the precision of what comes in, whatever its weights are in.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        bias: Whether it adds a number to each.

    Shape:
        ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Mix the channels of each pixel."""
        bias = None if self.bias is None else self.bias.to(features.dtype)
        mixed: Tensor = F.conv2d(features, self.weight.to(features.dtype), bias)
        return mixed


@LOSSES.register("hint")
@dataclass(frozen=True)
class Hint(FeatureLoss):
    r"""Mean squared difference of the maps, after a learned 1x1 convolution :math:`r` where the widths differ.

    .. math:: \frac{1}{BCHW} \sum_{bchw} \big(r(F_b) - G_b\big)_{chw}^2

    The larger map is pooled to the size of the smaller one.

    Args:
        student_node: Node of the student's map; ``None``: the last map before the pooling.
        teacher_node: Of the teacher's, likewise.

    Shape:
        - student: ``(B, C', H', W')``, maps :math:`F`.
        - teacher: ``(B, C, H, W)``, maps :math:`G`.
        - returns: scalar.

    Source: Romero et al. (2014), section 2.2, https://arxiv.org/abs/1412.6550
    """

    formula: ClassVar[str] = "mean over b, c, h, w of (r(F_b) - G_b)²; r: learned 1x1 convolution where widths differ"
    source: ClassVar[str] = "Romero et al. 2014 (FitNets), section 2.2"
    paper: ClassVar[str] = "ce=1 hint=100"

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module | None:
        """Build the convolution, where the widths differ."""
        return None if student[0] == teacher[0] else Projection(student[0], teacher[0])

    def compare(self, student: Tensor, teacher: Tensor, adapter: Projection | None) -> Tensor:
        """Return the mean squared difference."""
        student, teacher = of_one_size(student, teacher)
        return F.mse_loss(student if adapter is None else adapter(student), teacher)


@LOSSES.register("at")
@dataclass(frozen=True)
class AttentionTransfer(FeatureLoss):
    r"""Mean squared difference of the attention maps, of each stage.

    .. math::
        \sum_{\mathrm{stages}} \frac{1}{BHW} \sum_{b}
        \Big\| \frac{Q(F_b)}{\|Q(F_b)\|} - \frac{Q(G_b)}{\|Q(G_b)\|} \Big\|^2,
        \quad Q(F)_{hw} = \sum_{c} |F_{chw}|^p

    The larger map is pooled to the size of the smaller one. The paper's equation has the norm itself; its authors'
    code, and the weight of 1000, have its square in the mean over the pixels, as here.

    Args:
        student_node: Nodes of the student's maps; ``None``: the last map of each stage, paired from the last one on.
        teacher_node: Of the teacher's, likewise.
        p: Power :math:`p \ge 1`.

    Shape:
        - student: ``(B, C', H', W')``, maps :math:`F`.
        - teacher: ``(B, C, H, W)``, maps :math:`G`.
        - returns: scalar.

    Raises:
        ValueError: If ``p`` is under 1, or a map has one pixel.

    Source: Zagoruyko & Komodakis (2016), section 3.1, https://arxiv.org/abs/1612.03928
    """

    p: float = 2.0

    formula: ClassVar[str] = (
        "sum over stages of mean over b, h, w of (Q(F_b)/‖Q(F_b)‖ - Q(G_b)/‖Q(G_b)‖)²; Q = Σ_c |F_c|^p"
    )
    source: ClassVar[str] = "Zagoruyko & Komodakis 2016 (AT), section 3.1"
    paper: ClassVar[str] = "ce=1 at=1000"
    every_stage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a power that makes no map of attention."""
        super().__post_init__()
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 1 <= self.p < math.inf:
            raise ValueError(f"p must be 1 or more, and is {self.p}")

    def build_adapter(self, student: Shape, teacher: Shape) -> None:
        """Refuse maps without a place to attend to."""
        if min(student[1], teacher[1]) == 1:
            raise ValueError(
                f"a map of one pixel has no attention: the student's is {student}, the teacher's {teacher}"
            )

    def compare(self, student: Tensor, teacher: Tensor, adapter: None) -> Tensor:  # noqa: ARG002 (one signature)
        """Return the mean squared difference."""
        student, teacher = of_one_size(student, teacher)
        return F.mse_loss(self._attention(student), self._attention(teacher))

    def _attention(self, features: Tensor) -> Tensor:
        # Relative to its largest number, so that no power of it overflows.
        largest = features.detach().abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        return units((features / largest).abs().pow(self.p).sum(dim=1).flatten(1))


@LOSSES.register("vid")
@dataclass(frozen=True)
class VariationalInformation(FeatureLoss):
    r"""Negative log-likelihood of the teacher's map under a Gaussian that is predicted from the student's.

    .. math::
        \frac{1}{BCHW} \sum_{bchw} \tfrac12 \Big( \log \sigma_c^2 + \frac{(G_b - \mu(F_b))_{chw}^2}{\sigma_c^2} \Big)

    It is a bound, but for constants, on the information that the two maps share. The mean :math:`\mu` is three 1x1
    convolutions with ReLU between, and the variance one number a channel; both are learned with the student. The larger
    map is pooled to the size of the smaller one.

    Args:
        student_node: Node of the student's map; ``None``: the last map before the pooling.
        teacher_node: Of the teacher's, likewise.
        variance: The variance :math:`\sigma_c^2` to begin with, above 0.00001.

    Shape:
        - student: ``(B, C', H', W')``, maps :math:`F`.
        - teacher: ``(B, C, H, W)``, maps :math:`G`.
        - returns: scalar, in nats; it may be negative.

    Raises:
        ValueError: If ``variance`` is not above 0.00001.

    Source: Ahn et al. (2019), section 3, https://arxiv.org/abs/1904.05835
    """

    variance: float = 5.0

    formula: ClassVar[str] = "mean over b, c, h, w of (log σ_c² + (G_b - μ(F_b))²/σ_c²)/2; μ, σ: learned"
    source: ClassVar[str] = "Ahn et al. 2019 (VID), section 3"
    fixed: ClassVar[tuple[str, ...]] = (*FeatureLoss.fixed, "variance")
    paper: ClassVar[str] = "ce=1 vid=1"

    def __post_init__(self) -> None:
        """Refuse a variance that the softplus can't give."""
        super().__post_init__()
        given = self.variance
        if isinstance(given, bool) or not isinstance(given, int | float) or not Gaussian.LEAST < given < math.inf:
            raise ValueError(f"variance must be above {Gaussian.LEAST}, and is {given}")

    def build_adapter(self, student: Shape, teacher: Shape) -> nn.Module:
        """Build the Gaussian."""
        return Gaussian(student[0], teacher[0], variance=self.variance)

    def compare(self, student: Tensor, teacher: Tensor, adapter: "Gaussian") -> Tensor:
        """Return the negative log-likelihood."""
        student, teacher = of_one_size(student, teacher)
        mean, variance = adapter(student)
        likelihood: Tensor = 0.5 * (variance.log() + (teacher - mean).square() / variance)
        return likelihood.mean()


class Gaussian(nn.Module):
    """Predicts each channel of a teacher's map with its variance.

    Args:
        inputs: Channels of the student's map.
        outputs: Channels of the teacher's; as many are within.
        variance: The variance to begin with.

    Shape:
        ``(B, inputs, H, W)`` to the mean ``(B, outputs, H, W)`` and the variance ``(outputs, 1, 1)``.
    """

    LEAST: ClassVar[float] = 1e-5

    def __init__(self, inputs: int, outputs: int, *, variance: float) -> None:
        super().__init__()
        widths = [(inputs, outputs), (outputs, outputs), (outputs, outputs)]
        first, second, third = (Projection(one, other, bias=False) for one, other in widths)
        self.mean = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        # What softplus makes the variance of; expm1 of a large number is infinite, and softplus the number itself.
        softplus_of = variance - self.LEAST
        start = softplus_of + math.log(-math.expm1(-softplus_of))
        self.spread = nn.Parameter(torch.full((outputs, 1, 1), start))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Predict a map."""
        return self.mean(features), F.softplus(self.spread.to(features.dtype)) + self.LEAST


def units(rows: Tensor) -> Tensor:
    """Scale rows ``(..., N)`` to length 1; a row of zeros stays one, and gets no gradient (it would be infinite)."""
    norms = rows.norm(dim=-1, keepdim=True)
    is_zero = norms < _NOTHING
    scaled: Tensor = rows / norms.masked_fill(is_zero, 1.0)
    return scaled.masked_fill(is_zero, 0.0)


def of_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the larger of two maps to the size of the smaller one."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    pooled = [one if one.shape[2:] == size else F.adaptive_avg_pool2d(one, size) for one in (student, teacher)]
    return pooled[0], pooled[1]
