"""Losses on logits: against the labels, and against the teacher's logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import LOSSES, POSITIVE, LogitLoss, SoftenedLoss, bounded, unit_vectors

_SMALLEST = 1e-6


def balanced_weights(counts: Sequence[int]) -> tuple[float, ...]:
    r"""Return class weights that give each class the same total weight, $N / (C n_c)$; 0 for a class without images.

    Args:
        counts: Number $n_c$ of training images of each class.

    Source: King & Zeng (2001), section 3.2, https://doi.org/10.1093/oxfordjournals.pan.a004868
    """
    present = sum(count > 0 for count in counts)
    return tuple(sum(counts) / (present * count) if count else 0.0 for count in counts)


def as_weights(class_weights: Sequence[float], logits: Tensor) -> Tensor | None:
    """Return class weights ``(C,)`` on the device of the logits; ``None`` if there are none.

    Raises:
        ValueError: If their number isn't that of the classes.
    """
    if not class_weights:
        return None
    if len(class_weights) != logits.shape[1]:
        raise ValueError(f"{len(class_weights)} class weights for {logits.shape[1]} classes")
    return torch.tensor(class_weights, dtype=logits.dtype, device=logits.device)


@LOSSES.register("ce")
@dataclass(frozen=True)
class CrossEntropy(LogitLoss):
    r"""Cross-entropy between the student's predictions and the labels, with optional label smoothing.

    $$ -\frac{1}{B} \sum_{b=1}^{B} \sum_{c=1}^{C} y_{bc} \log \sigma(z_b)_c $$

    For integer labels, $y_{bc} = 1 - \epsilon + \epsilon / C$ for the labeled class and $\epsilon / C$ for the others.
    With class weights $w$, each summand is multiplied by $w_c$; those of :func:`balanced_weights` have a mean of 1 over
    the training images.

    Args:
        label_smoothing: $0 \le \epsilon \le 1$, the fraction of the label's probability spread over all classes.
        class_weights: $w_c \ge 0$ in the order of the classes; empty: all are 1.

    Shape: as `LogitLoss`; the labels may be probabilities $y$; returns a scalar, in nats.

    Raises:
        ValueError: If ``label_smoothing`` is outside [0, 1], or a class weight is negative.

    Source: Szegedy et al. (2015), section 7, https://arxiv.org/abs/1512.00567
    """

    label_smoothing: float = bounded(0.0, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    class_weights: tuple[float, ...] = ()

    formula = "mean over b of -w[y_b] log softmax(z_b)[y_b]"
    source = "Szegedy et al. 2015, section 7 (label smoothing)"
    published = "ce=1"
    needs_teacher = False
    needs_labels = True
    takes_soft_labels = True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the cross-entropy."""
        weights = as_weights(self.class_weights, student)
        # Not the weighted mean of torch, which would depend on how images are divided among processes.
        each = F.cross_entropy(student, labels, weight=weights, label_smoothing=self.label_smoothing, reduction="none")
        return each.mean()


@LOSSES.register("focal")
@dataclass(frozen=True)
class Focal(LogitLoss):
    r"""Focal loss: cross-entropy that gives less weight to images whose class is predicted with confidence.

    $$ -\frac{1}{B} \sum_{b=1}^{B} (1 - p_b)^\gamma \log p_b, \qquad p_b = \sigma(z_b)_{y_b} $$

    With class weights $w$, each summand is multiplied by $w_{y_b}$, which the source calls $\alpha$.

    Args:
        gamma: $\gamma \ge 0$; 0 is the cross-entropy.
        class_weights: $w_c \ge 0$ in the order of the classes; empty: all are 1.

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``gamma`` or a class weight is negative.

    Source: Lin et al. (2017), section 3.2, https://arxiv.org/abs/1708.02002
    """

    gamma: float = bounded(2.0, lambda value: value >= 0, "a number of at least 0")
    class_weights: tuple[float, ...] = ()

    formula = "mean over b of -(1 - p_b)^γ log p_b; p_b: softmax(z_b)[y_b]"
    source = "Lin et al. 2017, section 3.2"
    needs_teacher = False
    needs_labels = True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the focal loss."""
        log_probabilities = F.log_softmax(student, dim=1).gather(1, labels[:, None])[:, 0]
        # Bounded below, as a power below 1 has an infinite gradient at 0.
        missing = (-torch.expm1(log_probabilities)).clamp(min=_SMALLEST)
        weights = as_weights(self.class_weights, student)
        factors = missing.pow(self.gamma) if weights is None else missing.pow(self.gamma) * weights[labels]
        return -(factors * log_probabilities).mean()


@LOSSES.register("mse")
@dataclass(frozen=True)
class LogitMSE(LogitLoss):
    r"""Mean squared error between the student's and the teacher's logits.

    $$ \frac{1}{BC} \sum_{b=1}^{B} \sum_{c=1}^{C} (z_{bc} - v_{bc})^2 $$

    For logits of mean zero, `SoftenedKL` tends to half of it as the temperature grows.

    Shape: as `LogitLoss`; returns a scalar.

    Source: Ba & Caruana (2013), section 2, https://arxiv.org/abs/1312.6184
    """

    formula = "mean over b, c of (z_bc - v_bc)²"
    source = "Ba & Caruana 2013, section 2"
    published = "mse=1"
    is_multilabel = True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the mean squared error."""
        return F.mse_loss(student, teacher)


@LOSSES.register("kl")
@dataclass(frozen=True)
class SoftenedKL(SoftenedLoss):
    r"""Kullback-Leibler divergence between softened teacher and student predictions.

    $$ \frac{T^2}{B} \sum_{b=1}^{B} \mathrm{KL}\big(\sigma(v_b/T) \,\|\, \sigma(z_b/T)\big) $$

    The factor $T^2$ keeps gradient magnitudes independent of the temperature.

    Args:
        temperature: $T > 0$, dimensionless; 1 compares the predictions as they are.

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> SoftenedKL(temperature=2.0)(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1)).item()
        0.0

    Source: Hinton, Vinyals & Dean (2015), section 2, https://arxiv.org/abs/1503.02531
    """

    formula = "T² · mean over b of KL(softmax(v_b/T) ‖ softmax(z_b/T))"
    source = "Hinton, Vinyals & Dean 2015, section 2"
    published = "ce=0.1 kl=0.9"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the divergence."""
        log_student = F.log_softmax(student / self.temperature, dim=1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        # "batchmean" is the definition; "mean" would divide by the number of classes as well.
        divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


@LOSSES.register("hard")
@dataclass(frozen=True)
class HardDistillation(LogitLoss):
    r"""Cross-entropy between the student's predictions and the teacher's top-1 classes.

    $$ -\frac{1}{B} \sum_{b=1}^{B} \log \sigma(z_b)_{\arg\max_c v_{bc}} $$

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Source: Touvron et al. (2020), section 4, https://arxiv.org/abs/2012.12877
    """

    formula = "mean over b of -log softmax(z_b)[argmax v_b]"
    source = "Touvron et al. 2020 (DeiT), section 4"
    published = "ce=0.5 hard=0.5"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the cross-entropy."""
        return F.cross_entropy(student, teacher.argmax(dim=1))


@LOSSES.register("soft_ce")
@dataclass(frozen=True)
class SoftCrossEntropy(SoftenedLoss):
    r"""Cross-entropy between softened teacher and student predictions.

    $$ -\frac{T^2}{B} \sum_{b=1}^{B} \sum_{c=1}^{C} \sigma(v_b/T)_c \log \sigma(z_b/T)_c $$

    Equals `SoftenedKL` plus the entropy of the teacher's predictions, which doesn't depend on the student: the gradient
    is the same, but the value at equality is not zero.

    Args:
        temperature: $T > 0$, dimensionless.

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Hinton, Vinyals & Dean (2015), section 2, https://arxiv.org/abs/1503.02531
    """

    formula = "-T² · mean over b of sum over c of softmax(v_b/T)_c log softmax(z_b/T)_c"
    source = "Hinton, Vinyals & Dean 2015, section 2"
    published = "ce=0.1 soft_ce=0.9"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the cross-entropy."""
        targets = F.softmax(teacher / self.temperature, dim=1)
        return F.cross_entropy(student / self.temperature, targets) * self.temperature**2


@LOSSES.register("ttm")
@dataclass(frozen=True)
class TransformedTeacherMatching(SoftenedLoss):
    r"""Kullback-Leibler divergence between softened teacher and unsoftened student predictions.

    $$ \frac{1}{B} \sum_{b=1}^{B} w_b \, \mathrm{KL}\big(\sigma(v_b/T) \,\|\, \sigma(z_b)\big) $$

    Without a temperature on the student's side, the loss favors student predictions of higher Renyi entropy. With
    ``weighted`` (WTTM), $w_b = \sum_c \sigma(v_b)_c^{1/T}$ gives images on which the teacher is uncertain a larger
    weight; otherwise $w_b = 1$.

    Args:
        temperature: $T > 0$, dimensionless; the paper's exponent is $\gamma = 1/T$.
        weighted: Whether to weight the images.

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Zheng & Yang (2024), https://arxiv.org/abs/2402.11148
    """

    weighted: bool = False

    formula = "mean over b of w_b · KL(softmax(v_b/T) ‖ softmax(z_b))"
    source = "Zheng & Yang 2024 (TTM; weighted: WTTM)"
    published = "ce=1 'ttm(temperature=10)=45'"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the divergence."""
        log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
        divergence = F.kl_div(F.log_softmax(student, dim=1), log_teacher, reduction="none", log_target=True).sum(dim=1)
        if self.weighted:
            divergence = divergence * (F.log_softmax(teacher, dim=1) / self.temperature).logsumexp(dim=1).exp()
        return divergence.mean()


@LOSSES.register("jsd")
@dataclass(frozen=True)
class JensenShannon(SoftenedLoss):
    r"""Jensen-Shannon divergence between softened predictions: symmetric, and at most $T^2 \log 2$.

    $$ \frac{T^2}{2B} \sum_{b=1}^{B} \mathrm{KL}(q_b \,\|\, m_b) + \mathrm{KL}(p_b \,\|\, m_b),
    \quad m_b = \tfrac12 (p_b + q_b) $$

    with $p_b = \sigma(z_b/T)$ and $q_b = \sigma(v_b/T)$.

    Args:
        temperature: $T > 0$, dimensionless.

    Shape: as `LogitLoss`; returns a scalar, in nats.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Lin (1991), https://doi.org/10.1109/18.61115
    """

    formula = "T² · mean over b of JSD(softmax(v_b/T), softmax(z_b/T))"
    source = "Lin 1991"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the divergence."""
        log_p = F.log_softmax(student / self.temperature, dim=1)
        log_q = F.log_softmax(teacher / self.temperature, dim=1)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        halves = [F.kl_div(log_m, each, reduction="batchmean", log_target=True) for each in (log_p, log_q)]
        return (halves[0] + halves[1]) / 2 * self.temperature**2


@LOSSES.register("cosine")
@dataclass(frozen=True)
class CosineDistance(LogitLoss):
    r"""Cosine distance between the student's and the teacher's logits, whatever their norms.

    $$ 1 - \frac{1}{B} \sum_{b=1}^{B} \frac{\langle z_b, v_b \rangle}{\max(\|z_b\|, \sqrt{C} / 10) \, \|v_b\|} $$

    Shape: as `LogitLoss`; returns a scalar, from 0 to 2.

    Source: Sanh et al. (2019), section 3 (on hidden states), https://arxiv.org/abs/1910.01108
    """

    formula = "1 - mean over b of cos(z_b, v_b)"
    source = "Sanh et al. 2019 (DistilBERT, on hidden states), section 3"

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the distance."""
        # The gradient is largest where the student's logits are zero, as those of a zero-initialized head.
        student = unit_vectors(student, floor=0.1 * math.sqrt(student.shape[1]))
        return 1 - (student * unit_vectors(teacher, floor=1e-6)).sum(dim=1).mean()


@LOSSES.register("bce")
@dataclass(frozen=True)
class BinaryCrossEntropy(LogitLoss):
    r"""Binary cross-entropy of each class, with several labels an image.

    $$ -\frac{1}{BC} \sum_{b=1}^{B} \sum_{c=1}^{C} y_{bc} \log \sigma(z_{bc}) + (1 - y_{bc}) \log (1 -
    \sigma(z_{bc})) $$

    with the logistic function $\sigma(z) = 1 / (1 + e^{-z})$.

    Shape:
        - student: ``(B, C)``, logits $z$.
        - labels: ``(B, C)``, $y$, 1 for each class of an image and else 0.
        - returns: scalar, in nats per image and class.

    Source: Bishop (2006), Pattern Recognition and Machine Learning, section 4.3.2
    """

    formula = "mean over b, c of -y_bc log σ(z_bc) - (1 - y_bc) log(1 - σ(z_bc)); σ: logistic function"
    source = "Bishop 2006, section 4.3.2"
    needs_teacher = False
    needs_labels = True
    is_multilabel = True
    is_single_label = False

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(student, labels.to(student.dtype))


@LOSSES.register("binary_kl")
@dataclass(frozen=True)
class BinaryKL(SoftenedLoss):
    r"""Kullback-Leibler divergence of each class's softened probability, with several labels an image.

    $$ \frac{T^2}{BC} \sum_{b=1}^{B} \sum_{c=1}^{C} q_{bc} \log \frac{q_{bc}}{p_{bc}} + (1 - q_{bc}) \log \frac{1 -
    q_{bc}}{1 - p_{bc}}, \qquad q = \sigma(v / T), \; p = \sigma(z / T) $$

    with the logistic function $\sigma$. The factor $T^2$ keeps gradient magnitudes independent of the temperature.

    Args:
        temperature: $T > 0$, dimensionless.

    Shape: as `LogitLoss`; returns a scalar, in nats per image and class.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Source: Yang et al. (2023), section 3, https://arxiv.org/abs/2308.06453 (multi-label logit distillation, at T = 1)
    """

    temperature: float = bounded(1.0, *POSITIVE)

    formula = "T² mean over b, c of KL(σ(v_bc / T) || σ(z_bc / T)); σ: logistic function"
    source = "Yang et al. 2023, section 3"
    is_multilabel = True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002 (shared signature)
        """Return the divergence."""
        z, v = student / self.temperature, teacher / self.temperature
        target = v.sigmoid()
        positive = F.logsigmoid(v) - F.logsigmoid(z)
        negative = F.logsigmoid(-v) - F.logsigmoid(-z)
        return self.temperature**2 * (target * positive + (1 - target) * negative).mean()
