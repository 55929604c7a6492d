"""Pure functions of tensors: the losses by name, and the objective that weighs them.

A new loss is a class in a file of its family: registered under its name, its parameters are its hyperparameters, and
``(student logits, teacher logits, labels)`` go in.
"""

from kd.losses.labels import CrossEntropy
from kd.losses.logits import (
    CosineDistance,
    HardDistillation,
    JensenShannon,
    LogitMSE,
    SoftCrossEntropy,
    SoftenedKL,
    TransformedTeacherMatching,
)
from kd.losses.objective import Objective, Term, build_objective, standardized, try_loss
from kd.losses.relations import Correlation, MultiLevel
from kd.losses.schedules import SCHEDULES, Schedule
from kd.losses.targets import DecoupledKD, NormalizedKD
from kd.losses.terms import LOSSES, Loss, Outputs, hyperparameters_of, markdown_table

__all__ = [
    "LOSSES",
    "SCHEDULES",
    "Correlation",
    "CosineDistance",
    "CrossEntropy",
    "DecoupledKD",
    "HardDistillation",
    "JensenShannon",
    "LogitMSE",
    "Loss",
    "MultiLevel",
    "NormalizedKD",
    "Objective",
    "Outputs",
    "Schedule",
    "SoftCrossEntropy",
    "SoftenedKL",
    "Term",
    "TransformedTeacherMatching",
    "build_objective",
    "hyperparameters_of",
    "markdown_table",
    "standardized",
    "try_loss",
]
