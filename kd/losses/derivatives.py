"""Losses on the gradients of the outputs with respect to the input image."""

from dataclasses import dataclass

from torch import Tensor

from kd.losses.base import LOSSES, BaseLoss, unit_vectors


@LOSSES.register("jacobian")
@dataclass(frozen=True)
class JacobianMatching(BaseLoss):
    r"""Squared difference of input gradients: those of the logit of the teacher's top-1 class.

    $$ \frac1B \sum_{b} \Big\| \frac{J_b}{\|J_b\|} - \frac{K_b}{\|K_b\|} \Big\|^2, \quad
    J_b = \nabla_x \, z_{b m_b}, \quad K_b = \nabla_x \, v_{b m_b}, \quad m_b = \arg\max_c v_{bc} $$

    Combine it with a loss on logits to match values and derivatives: ``kl=1 jacobian=1``. It needs second derivatives
    of the student, at about twice the time and memory of a step. Batch norm in training mode normalizes with the
    statistics of the batch, so that $J_b$ then also contains the influence of image b on the logits of the others; it
    is the gradient of a single image only for students with other norms, such as ``vit_b_16`` or ``convnext_tiny``.

    Args:
        normalize: Whether to compare unit-norm gradients (Srinivas & Fleuret) or raw ones (Czarnecki et al.).

    Shape:
        - student: ``(B, 3, S, S)``, gradients $J$.
        - teacher: ``(B, 3, S, S)``, gradients $K$.
        - returns: scalar; from 0 to 4 if normalized.

    Raises:
        ValueError: If ``normalize`` is not a Boolean.

    Source: Srinivas & Fleuret (2018), section 4, https://arxiv.org/abs/1803.00443; Czarnecki et al. (2017), section 2,
    https://arxiv.org/abs/1706.04859
    """

    normalize: bool = True

    formula = "mean over b of ‖J_b/‖J_b‖ - K_b/‖K_b‖‖²; J, K: gradients to the image of the logit argmax v_b"
    source = "Srinivas & Fleuret 2018, section 4; Czarnecki et al. 2017, section 2"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean squared norm of the difference."""
        student, teacher = student.flatten(1), teacher.flatten(1)
        if self.normalize:
            # The student's gradients are zero at first if its last layer is zero-initialized.
            student, teacher = unit_vectors(student, floor=0.1), unit_vectors(teacher, floor=1e-6)
        return (student - teacher).square().sum(dim=1).mean()
