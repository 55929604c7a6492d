"""Losses that compare how the outputs change with the image."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kd.losses.features import units
from kd.losses.terms import LOSSES


@LOSSES.register("jacobian")
@dataclass(frozen=True)
class JacobianMatching:
    r"""Squared difference of the gradients of one logit to the image: the one that the teacher puts first.

    .. math::
        \frac1B \sum_{b} \Big\| \frac{J_b}{\|J_b\|} - \frac{K_b}{\|K_b\|} \Big\|^2, \quad
        J_b = \nabla_x \, z_{b m_b}, \quad K_b = \nabla_x \, v_{b m_b}, \quad m_b = \arg\max_c v_{bc}

    To match values and derivatives together, add a loss on logits beside: ``kl=1 jacobian=1``. The student's step
    differentiates its own gradient, which takes about twice the time and the memory.

    Args:
        normalize: Whether gradients are compared at length 1 (Srinivas & Fleuret), or as they are (Czarnecki et al.).

    Shape:
        - student: ``(B, 3, S, S)``, gradients :math:`J`.
        - teacher: ``(B, 3, S, S)``, gradients :math:`K`.
        - returns: scalar; from 0 to 4 if normalized.

    Source: Srinivas & Fleuret (2018), section 4, https://arxiv.org/abs/1803.00443; Czarnecki et al. (2017), section 2,
        https://arxiv.org/abs/1706.04859
    """

    normalize: bool = True

    formula: ClassVar[str] = (
        "mean over b of ‖J_b/‖J_b‖ - K_b/‖K_b‖‖²; J, K: gradients to the image of the logit argmax v_b"
    )
    source: ClassVar[str] = "Srinivas & Fleuret 2018, section 4; Czarnecki et al. 2017, section 2"
    paper: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what is neither true nor false."""
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize is True or False, and not {self.normalize!r}")  # noqa: TRY004 (as all others)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the squared difference."""
        rows = [one.flatten(1) for one in (student, teacher)]
        if self.normalize:
            rows = [units(one) for one in rows]
        return (rows[0] - rows[1]).square().sum(dim=1).mean()
