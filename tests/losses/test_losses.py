"""Each loss against an independent computation, by its properties, in low precision and at extreme logits."""

import inspect

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor

from kd.losses import LOSSES, CrossEntropy, HardDistillation, LogitMSE, Loss, SoftenedKL

EXAMPLES: dict[str, Loss] = {
    "ce": CrossEntropy(label_smoothing=0.1),
    "mse": LogitMSE(),
    "kl": SoftenedKL(temperature=3.0),
    "hard": HardDistillation(),
}


def batch(classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (6,), generator=generator)


def test_there_is_an_example_of_every_loss() -> None:
    assert list(EXAMPLES) == list(LOSSES)


def in_numpy(name: str, z: np.ndarray, v: np.ndarray, y: np.ndarray) -> float:
    """Compute the examples' values by their formulas."""
    rows = np.arange(len(y))
    log_p = special.log_softmax(z, axis=1)
    if name == "ce":
        return float(-(0.9 * log_p[rows, y] + 0.1 * log_p.mean(axis=1)).mean())
    if name == "mse":
        return float(((z - v) ** 2).mean())
    if name == "kl":
        q, p = special.softmax(v / 3, axis=1), special.softmax(z / 3, axis=1)
        return float(9 * special.rel_entr(q, p).sum(axis=1).mean())
    return float(-log_p[rows, v.argmax(axis=1)].mean())


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_is_its_formula(name: str) -> None:
    student, teacher, labels = batch()
    expected = in_numpy(name, student.numpy(), teacher.numpy(), labels.numpy())
    assert EXAMPLES[name](student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_says_truly_what_it_looks_at(name: str) -> None:
    student, teacher, labels = batch()
    loss = EXAMPLES[name]
    value = loss(student, teacher, labels)
    other_teacher = loss(student, teacher.flip(1) * 2, labels)
    other_labels = loss(student, teacher, (labels + 1) % 7)
    assert bool(value != other_teacher) is loss.needs_teacher
    assert bool(value != other_labels) is loss.needs_labels


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_is_documented(name: str) -> None:
    kind = LOSSES[name]
    assert kind.formula
    assert kind.source
    text = inspect.getdoc(kind) or ""
    assert ".. math::" in text
    assert "Shape:" in text
    assert "Source:" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_loss_and_its_gradient_are_finite_at_extreme_logits(name: str) -> None:
    student = (1e4 * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]])).requires_grad_()
    value = EXAMPLES[name](student, -student.detach(), torch.tensor([1, 0]))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_five_steps_lower_a_loss(name: str) -> None:
    student, teacher, labels = batch()
    student.requires_grad_()
    optimizer = torch.optim.SGD([student], lr=0.5)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        value = EXAMPLES[name](student, teacher, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_mse_and_kl_are_zero_at_equality_and_positive_elsewhere() -> None:
    student, teacher, labels = batch()
    for loss in (LogitMSE(), SoftenedKL()):
        assert loss(teacher, teacher, labels).item() == 0
        assert loss(student, teacher, labels).item() > 0


def test_kl_at_high_temperature_is_half_the_mse_of_centred_logits() -> None:
    student, teacher, labels = batch()
    centred = [logits - logits.mean(dim=1, keepdim=True) for logits in (student, teacher)]
    # Hinton et al. (2015), section 2.1; the MSE divides by C, as the softened divergence does in the limit.
    kl = SoftenedKL(temperature=1e4)(student, teacher, labels)
    torch.testing.assert_close(kl, LogitMSE()(centred[0], centred[1], labels) / 2, rtol=1e-3, atol=0)


def test_kl_does_not_see_a_constant_added_to_all_logits() -> None:
    student, teacher, labels = batch()
    loss = SoftenedKL(temperature=2)
    torch.testing.assert_close(loss(student + 5, teacher - 3, labels), loss(student, teacher, labels))


def test_the_gradient_of_kl_hardly_depends_on_the_temperature() -> None:
    _, teacher, labels = batch()
    norms = []
    for temperature in (10.0, 100.0):
        student = torch.zeros_like(teacher, requires_grad=True)
        SoftenedKL(temperature=temperature)(student, teacher, labels).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_hard_is_cross_entropy_with_the_teachers_decision() -> None:
    student, teacher, labels = batch()
    torch.testing.assert_close(
        HardDistillation()(student, teacher, labels), CrossEntropy()(student, teacher, teacher.argmax(1))
    )


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        SoftenedKL(temperature=temperature)


def test_label_smoothing_is_a_part() -> None:
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1"):
        CrossEntropy(label_smoothing=1.5)
