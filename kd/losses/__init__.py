"""Pure functions of tensors: the losses by name, and the objective that weighs them.

A new loss is a class in a file of its family: registered under its name, its parameters are its hyperparameters, and
``(student logits, teacher logits, labels)`` go in; or a pair of feature maps, or of gradients to the images.
"""

# The order of the lists: each family registers its losses.
# isort: off
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
from kd.losses.relations import Correlation, MultiLevel
from kd.losses.targets import DecoupledKD, NormalizedKD
from kd.losses.features import AttentionTransfer, FeatureLoss, Hint, VariationalInformation
from kd.losses.similarities import (
    ContrastiveRepresentation,
    ProbabilisticTransfer,
    RelationalKD,
    SimilarityPreserving,
)
from kd.losses.derivatives import JacobianMatching

# isort: on
from kd.losses.objective import Objective, Pair, Term, standardized
from kd.losses.parsing import build_objective, try_loss
from kd.losses.schedules import SCHEDULES, Schedule
from kd.losses.terms import LOSSES, Loss, LossInfo, Outputs, hyperparameters_of, markdown_table

__all__ = [
    "LOSSES",
    "SCHEDULES",
    "AttentionTransfer",
    "ContrastiveRepresentation",
    "Correlation",
    "CosineDistance",
    "CrossEntropy",
    "DecoupledKD",
    "FeatureLoss",
    "HardDistillation",
    "Hint",
    "JacobianMatching",
    "JensenShannon",
    "LogitMSE",
    "Loss",
    "LossInfo",
    "MultiLevel",
    "NormalizedKD",
    "Objective",
    "Outputs",
    "Pair",
    "ProbabilisticTransfer",
    "RelationalKD",
    "Schedule",
    "SimilarityPreserving",
    "SoftCrossEntropy",
    "SoftenedKL",
    "Term",
    "TransformedTeacherMatching",
    "VariationalInformation",
    "build_objective",
    "hyperparameters_of",
    "markdown_table",
    "standardized",
    "try_loss",
]
