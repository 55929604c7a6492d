"""Pure functions of tensors: the losses by name, and the objective that weighs them.

A new loss is a class in a file of its family: registered under its name, its parameters are its hyperparameters, and
``(student logits, teacher logits, labels)`` go in.
"""

from kd.losses.labels import CrossEntropy
from kd.losses.logits import HardDistillation, LogitMSE, SoftenedKL
from kd.losses.objective import Objective, Term, build_objective, try_loss
from kd.losses.terms import LOSSES, Loss, Outputs

__all__ = [
    "LOSSES",
    "CrossEntropy",
    "HardDistillation",
    "LogitMSE",
    "Loss",
    "Objective",
    "Outputs",
    "SoftenedKL",
    "Term",
    "build_objective",
    "try_loss",
]
