"""One function per phase. Each builds a module from plain values and trains it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kd.data import Batches, Mixing
from kd.losses import Objective, build_objective
from kd.models import Classifier, Ensemble
from kd.randomness import seeded
from kd.teachers import FrozenTeacher, LogitStore
from kd.training import ClassifierModule, DistillationModule, Recipe, Run, train


@dataclass(frozen=True)
class Teacher:
    """A network that teaches: a teacher, several as one, or an assistant.

    Args:
        network: The network.
        checkpoints: The files that its weights come from; none with ``--fast_dev_run``.
        accuracy: Its accuracy on the student's validation images, in [0, 1].
        predictions: The file of its logits for each validation image, or ``None``.
        decisions: Its predicted classes, ``(N,)``, in the order of the validation images, or ``None``.
    """

    network: Classifier | Ensemble
    checkpoints: tuple[str, ...]
    accuracy: float
    predictions: str | None = None
    decisions: Tensor | None = None


RunOptions = dict[str, Any]
"""Keyword arguments of :func:`kd.training.train`: folder, hardware, epochs, loggers, how to resume, ..."""


def train_teacher(
    network: Classifier, data: Batches, *, recipe: Recipe, label_smoothing: float, seed: int, options: RunOptions
) -> Run:
    """Train a teacher on the labels."""
    objective = build_objective("ce", label_smoothing=label_smoothing)
    return train(ClassifierModule(network, objective=objective, recipe=recipe, seed=seed), data, **options)


def train_baseline(
    student: Classifier,
    data: Batches,
    *,
    recipe: Recipe,
    label_smoothing: float,
    mixing: Mixing | None,
    ema: float | None,
    seed: int,
    options: RunOptions,
) -> Run:
    """Train the student on the labels only."""
    objective = build_objective("ce", label_smoothing=label_smoothing)
    module = ClassifierModule(student, objective=objective, recipe=recipe, seed=seed, mixing=mixing, ema=ema)
    return train(module, data, **options)


def distill(
    student: Classifier,
    data: Batches,
    *,
    teacher: Teacher,
    frozen: FrozenTeacher,
    objective: Objective,
    recipe: Recipe,
    mixing: Mixing | None,
    ema: float | None,
    open_store: Callable[[int, int], LogitStore | None] | None,
    seed: int,
    options: RunOptions,
) -> tuple[Run, LogitStore | None]:
    """Train a student, or an assistant, to match a teacher.

    Returns:
        The run, and the store that the teacher's logits were read from and written to, if there is one.
    """
    module = DistillationModule(
        teacher=frozen,
        student=student,
        objective=objective,
        recipe=recipe,
        seed=seed,
        teacher_acc=teacher.accuracy,
        teacher_decisions=teacher.decisions,
        mixing=mixing,
        ema=ema,
        has_unlabeled=data.has_unlabeled,
        open_store=open_store,
    )
    run = train(module, data, **options)
    return run, module.store


def try_step(teacher: Classifier | Ensemble, student: Classifier, objective: Objective) -> None:
    """Compute an objective that reads features or gradients once on two random images, before any training.

    Raises:
        UserError: If it can't be computed or differentiated.
    """
    if objective.feature_terms or objective.needs_gradients:
        with seeded("rehearsal"):
            DistillationModule(teacher=FrozenTeacher(teacher), student=student, objective=objective).rehearse()
