"""Losses at the edges of their range: constant, zero, tiny and huge logits, features and gradients."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.losses import LOSSES, FeatureLoss, JacobianMatching, Objective, Outputs, Pair, build_objective

WIDTHS = {"student": 16, "teacher": 24}
OBJECTIVES = [
    *(name for name in LOSSES if name != "rkd"),
    "rkd(distance=1, angle=1)",
    *(f"{name}(standardize=True)" for name in LOSSES if callable(LOSSES[name]()) and LOSSES[name].needs_teacher),
    "ttm(weighted=True)",
    "dist(temperature=4)",
    "kl(temperature=1)",
]

MULTILABEL = [name for name, loss in LOSSES.items() if not loss.is_single_label]
Values = Callable[[tuple[int, ...], torch.Generator], Tensor]

EDGES: dict[str, Values] = {
    "zero": lambda shape, _: torch.zeros(shape),
    "constant": lambda shape, generator: (
        torch.randn(shape[:1], generator=generator).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    ),
    "same for all images": lambda shape, generator: torch.randn(shape[1:], generator=generator).expand(shape),
    "one image zero": lambda shape, generator: torch.cat(
        [torch.zeros(1, *shape[1:]), torch.randn(shape, generator=generator)[1:]]
    ),
    "tiny": lambda shape, generator: 1e-7 * torch.randn(shape, generator=generator),
    "below the smallest square": lambda shape, generator: 1e-25 * torch.randn(shape, generator=generator),
    "huge": lambda shape, generator: 1e4 * torch.randn(shape, generator=generator).clamp(-3, 3),
}


def build(terms: str) -> Objective:
    return build_objective(terms, multilabel=terms.partition("=")[0] in MULTILABEL)


def outputs(terms: str, role: str, values: Values, generator: torch.Generator, dtype: torch.dtype) -> Outputs:
    """Build outputs for the first loss of an objective; the tensor that it compares requires a gradient."""
    loss = build(terms).terms[0].loss
    logits = torch.randn(8, 10, generator=generator)
    if isinstance(loss, FeatureLoss):
        # The student's features are projected to the teacher's width before.
        width = WIDTHS["teacher" if loss.reuses_head else role]
        maps = values((8, width, 4, 4), generator).to(dtype).requires_grad_(role == "student")
        return Outputs(logits, {"node": maps})
    if isinstance(loss, JacobianMatching):
        gradients = values((8, 3, 6, 6), generator).to(dtype).requires_grad_(role == "student")
        return Outputs(logits, gradients=gradients)
    return Outputs(values((8, 10), generator).to(dtype).requires_grad_(role == "student"))


def gradient(terms: str, student: Outputs, teacher: Outputs) -> Tensor:
    objective = build(f"{terms}=1")
    pair = Pair("node", "node", (WIDTHS["student"], 4, 4), (WIDTHS["teacher"], 4, 4))
    torch.manual_seed(0)
    objective = objective.bind({term.name: [pair] for term in objective.feature_terms})
    is_multilabel = terms in MULTILABEL
    total, _ = objective(student, teacher, torch.eye(8, 10) if is_multilabel else torch.arange(8))
    assert torch.isfinite(total)
    compared = [
        tensor for tensor in (student.logits, student.gradients, *student.features.values()) if tensor is not None
    ]
    (tensor,) = (tensor for tensor in compared if tensor.requires_grad)
    return torch.autograd.grad(total, tensor)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", OBJECTIVES)
def test_gradients_are_finite_and_small_at_the_edges(terms: str, dtype: torch.dtype) -> None:
    usual: Values = lambda shape, generator: 3 * torch.randn(shape, generator=generator)  # noqa: E731
    for (edge, values), role in itertools.product(EDGES.items(), ("student", "teacher", "both")):
        generator = torch.Generator().manual_seed(0)
        student = outputs(terms, "student", usual if role == "teacher" else values, generator, dtype)
        teacher = outputs(terms, "teacher", usual if role == "student" else values, generator, dtype)
        norm = gradient(terms, student, teacher).float().norm()
        assert torch.isfinite(norm), (edge, role)
        # Squared errors of unnormalized values grow with them.
        grows = edge == "huge" and terms in ("mse", "hint", "vid", "simkd")
        assert norm < (1e5 if grows else 50), (edge, role)


@pytest.mark.parametrize(
    "terms", ["kl(standardize=True)", "mse(standardize=True)", "dist", "dist(temperature=4)", "cosine", "mlkd", "crd"]
)
def test_a_student_with_a_zero_initialized_head_learns(terms: str) -> None:
    generator = torch.Generator().manual_seed(0)
    student = outputs(terms, "student", EDGES["zero"], generator, torch.float32)
    teacher = outputs(terms, "teacher", lambda shape, g: 3 * torch.randn(shape, generator=g), generator, torch.float32)
    assert gradient(terms, student, teacher).norm() > 0.005
