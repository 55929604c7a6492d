"""Losses on logits: formulas, properties, and numerical stability."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import special
from scipy.spatial import distance
from torch import Tensor

from kd.losses import (
    LOSSES,
    BinaryKL,
    Correlation,
    CosineDistance,
    CrossEntropy,
    DecoupledKD,
    Focal,
    HardDistillation,
    JensenShannon,
    LogitLoss,
    LogitMSE,
    MultiLevel,
    NormalizedKD,
    SoftCrossEntropy,
    SoftenedKL,
    TransformedTeacherMatching,
)

Array = NDArray[np.float64]

EXAMPLES: dict[str, LogitLoss] = {
    "ce": CrossEntropy(label_smoothing=0.1),
    "focal": Focal(gamma=1.5),
    "mse": LogitMSE(),
    "kl": SoftenedKL(temperature=3.0),
    "hard": HardDistillation(),
    "soft_ce": SoftCrossEntropy(temperature=3.0),
    "ttm": TransformedTeacherMatching(temperature=3.0, weighted=True),
    "jsd": JensenShannon(temperature=3.0),
    "cosine": CosineDistance(),
    "binary_kl": BinaryKL(temperature=3.0),
    "dist": Correlation(beta=2.0, gamma=0.5, temperature=3.0),
    "mlkd": MultiLevel(batch=2.0, classes=0.5, temperature=3.0),
    "dkd": DecoupledKD(alpha=2.0, beta=0.5, temperature=3.0),
    "nkd": NormalizedKD(gamma=0.5, temperature=3.0),
}


def batch(classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (6,), generator=generator)


def test_every_logit_loss_has_an_example() -> None:
    # Those of several labels an image are tested with their training.
    assert list(EXAMPLES) == [name for name, loss in LOSSES.items() if callable(loss()) and loss.is_single_label]


def kl(q: Array, p: Array) -> Array:
    result: Array = special.rel_entr(q, p).sum(axis=-1)
    return result


@dataclass(frozen=True)
class Batch:
    """A batch as numpy arrays, with quantities common to the formulas, at T = 3."""

    z: Array
    v: Array
    y: NDArray[np.int64]

    @property
    def log_prediction(self) -> Array:
        return np.asarray(special.log_softmax(self.z, axis=1))

    @property
    def p(self) -> Array:
        return np.asarray(special.softmax(self.z / 3, axis=1))

    @property
    def q(self) -> Array:
        return np.asarray(special.softmax(self.v / 3, axis=1))

    def target(self, matrix: Array) -> Array:
        return matrix[np.arange(len(self.y)), self.y]

    def non_target(self, matrix: Array) -> Array:
        others = matrix[np.arange(matrix.shape[1]) != self.y[:, None]].reshape(len(self.y), -1)
        return np.asarray(others / others.sum(axis=1, keepdims=True))

    def target_and_rest(self, matrix: Array) -> Array:
        return np.stack([self.target(matrix), 1 - self.target(matrix)], axis=1)


def correlation_distance(p: Array, q: Array) -> float:
    return float(np.mean([distance.correlation(a, b) for a, b in zip(p, q, strict=True)]))


def binary_kl(n: Batch) -> float:
    p, q = special.expit(n.z / 3), special.expit(n.v / 3)
    return float(9 * (special.rel_entr(q, p) + special.rel_entr(1 - q, 1 - p)).mean())


FORMULAS: dict[str, Callable[[Batch], float]] = {
    "binary_kl": binary_kl,
    "ce": lambda n: -(0.9 * n.target(n.log_prediction) + 0.1 * n.log_prediction.mean(axis=1)).mean(),
    "focal": lambda n: -((1 - np.exp(n.target(n.log_prediction))) ** 1.5 * n.target(n.log_prediction)).mean(),
    "mse": lambda n: ((n.z - n.v) ** 2).mean(),
    "kl": lambda n: 9 * kl(n.q, n.p).mean(),
    "hard": lambda n: -n.log_prediction[np.arange(len(n.y)), n.v.argmax(axis=1)].mean(),
    "soft_ce": lambda n: -9 * (n.q * np.log(n.p)).sum(axis=1).mean(),
    "ttm": lambda n: ((special.softmax(n.v, axis=1) ** (1 / 3)).sum(axis=1) * kl(n.q, np.exp(n.log_prediction))).mean(),
    "jsd": lambda n: 9 * (distance.jensenshannon(n.p, n.q, axis=1) ** 2).mean(),
    "cosine": lambda n: float(np.mean([distance.cosine(a, b) for a, b in zip(n.z, n.v, strict=True)])),
    "dist": lambda n: 9 * (2 * correlation_distance(n.p, n.q) + 0.5 * correlation_distance(n.p.T, n.q.T)),
    "mlkd": lambda n: (
        2 * np.linalg.norm(n.p @ n.p.T - n.q @ n.q.T) ** 2 / len(n.y)
        + 0.5 * np.linalg.norm(n.p.T @ n.p - n.q.T @ n.q) ** 2 / n.z.shape[1]
    ),
    "dkd": lambda n: (
        9
        * (
            2 * kl(n.target_and_rest(n.q), n.target_and_rest(n.p)) + 0.5 * kl(n.non_target(n.q), n.non_target(n.p))
        ).mean()
    ),
    "nkd": lambda n: (
        -n.target(special.softmax(n.v, axis=1)) * n.target(n.log_prediction)
        - 0.5 * 9 * (n.non_target(n.q) * np.log(n.non_target(n.p))).sum(axis=1)
    ).mean(),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_equals_its_formula(name: str) -> None:
    student, teacher, labels = batch()
    expected = float(FORMULAS[name](Batch(student.numpy(), teacher.numpy(), labels.numpy())))
    assert EXAMPLES[name](student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_depends_on_teacher_and_labels_as_declared(name: str) -> None:
    student, teacher, labels = batch()
    loss = EXAMPLES[name]
    value = loss(student, teacher, labels)
    other_teacher = loss(student, teacher.flip(1) * 2, labels)
    other_labels = loss(student, teacher, (labels + 1) % 7)
    assert bool(value != other_teacher) is loss.needs_teacher
    assert bool(value != other_labels) is loss.needs_labels


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_and_its_gradient_are_finite_at_extreme_logits(name: str) -> None:
    student = (1e4 * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]])).requires_grad_()
    value = EXAMPLES[name](student, -student.detach(), torch.tensor([1, 0]))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradient_descent_decreases_a_loss(name: str) -> None:
    student, teacher, labels = batch()
    student.requires_grad_()
    optimizer = torch.optim.SGD([student], lr=0.1)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        value = EXAMPLES[name](student, teacher, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


@pytest.mark.parametrize("name", ["mse", "kl", "jsd", "cosine", "dist", "mlkd", "dkd"])
def test_a_distance_is_zero_at_equality_and_positive_elsewhere(name: str) -> None:
    student, teacher, labels = batch()
    assert EXAMPLES[name](teacher, teacher, labels).item() == pytest.approx(0, abs=1e-12)
    assert EXAMPLES[name](student, teacher, labels).item() > 1e-3


def test_soft_cross_entropy_has_the_gradient_of_kl() -> None:
    student, teacher, labels = batch()
    gradients: list[Tensor | None] = []
    for loss in (SoftCrossEntropy(temperature=2), SoftenedKL(temperature=2)):
        student.grad = None
        loss(student.requires_grad_(), teacher, labels).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_decomposes_into_target_and_weighted_non_target_divergence(temperature: float) -> None:
    student, teacher, labels = batch()
    target, non_target = DecoupledKD(temperature=temperature).parts(student, teacher, labels)
    uncertainty = 1 - F.softmax(teacher / temperature, dim=1).gather(1, labels[:, None]).squeeze(1)
    by_image = F.kl_div(
        F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="none"
    ).sum(1)
    torch.testing.assert_close(target + uncertainty * non_target, by_image)


@pytest.mark.parametrize("name", ["dist", "kl", "mlkd", "jsd"])
def test_a_loss_is_invariant_to_a_constant_added_to_an_images_logits(name: str) -> None:
    student, teacher, labels = batch()
    constants = torch.arange(6.0, dtype=torch.float64)[:, None]
    value = EXAMPLES[name](student, teacher, labels)
    torch.testing.assert_close(EXAMPLES[name](student + constants, teacher - 2 * constants, labels), value)
    assert EXAMPLES[name](teacher + constants, teacher, labels).item() == pytest.approx(0, abs=1e-12)


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    student, teacher, labels = batch()
    loss = JensenShannon(temperature=2)
    torch.testing.assert_close(loss(student, teacher, labels), loss(teacher, student, labels))
    assert loss(1e4 * student, -1e4 * student, labels).item() <= 4 * np.log(2) + 1e-9


def test_transformed_teacher_matching_at_temperature_one_is_kl() -> None:
    student, teacher, labels = batch()
    ttm = TransformedTeacherMatching(temperature=1)(student, teacher, labels)
    torch.testing.assert_close(ttm, SoftenedKL(temperature=1)(student, teacher, labels))
    weighted = TransformedTeacherMatching(temperature=1, weighted=True)(student, teacher, labels)
    torch.testing.assert_close(weighted, ttm)


def test_cosine_distance_is_invariant_to_the_norm_of_the_logits() -> None:
    student, teacher, labels = batch()
    torch.testing.assert_close(
        CosineDistance()(3 * student, teacher, labels), CosineDistance()(student, teacher, labels)
    )
    assert CosineDistance()(-teacher, teacher, labels).item() == pytest.approx(2)


def test_kl_at_high_temperature_is_half_the_mse_of_centered_logits() -> None:
    student, teacher, labels = batch()
    centered = [logits - logits.mean(dim=1, keepdim=True) for logits in (student, teacher)]
    # Hinton et al. (2015), section 2.1; the MSE divides by C, as the softened divergence does in the limit.
    kl = SoftenedKL(temperature=1e4)(student, teacher, labels)
    torch.testing.assert_close(kl, LogitMSE()(centered[0], centered[1], labels) / 2, rtol=1e-3, atol=0)


def test_the_gradient_norm_of_kl_is_nearly_constant_at_high_temperatures() -> None:
    _, teacher, labels = batch()
    norms = []
    for temperature in (10.0, 100.0):
        student = torch.zeros_like(teacher, requires_grad=True)
        SoftenedKL(temperature=temperature)(student, teacher, labels).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_hard_distillation_is_cross_entropy_with_the_teachers_predictions() -> None:
    student, teacher, labels = batch()
    torch.testing.assert_close(
        HardDistillation()(student, teacher, labels), CrossEntropy()(student, teacher, teacher.argmax(1))
    )


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
@pytest.mark.parametrize("name", [name for name, loss in EXAMPLES.items() if hasattr(loss, "temperature")])
def test_a_temperature_must_be_positive(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be a number above 0"):
        LOSSES[name](temperature=temperature)  # type: ignore[call-arg]


def test_label_smoothing_must_be_a_fraction() -> None:
    with pytest.raises(ValueError, match="label_smoothing must be a number from 0 to 1"):
        CrossEntropy(label_smoothing=1.5)
