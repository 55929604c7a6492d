"""The losses by name, as pure functions of tensors, and the objective, their weighted sum.

A new loss is a registered dataclass, a subclass of `LogitLoss` or `FeatureLoss`, whose fields are its hyperparameters.
"""

# The order of these imports is the order in which the losses are listed.
# isort: off
from kd.losses.logits import (
    BinaryCrossEntropy,
    BinaryKL,
    CosineDistance,
    CrossEntropy,
    Focal,
    HardDistillation,
    JensenShannon,
    LogitMSE,
    SoftCrossEntropy,
    SoftenedKL,
    TransformedTeacherMatching,
    balanced_weights,
)
from kd.losses.relations import Correlation, DecoupledKD, MultiLevel, NormalizedKD
from kd.losses.features import AttentionTransfer, FeatureLoss, Hint, VariationalInformation
from kd.losses.embeddings import Embedding, ReusedClassifier
from kd.losses.similarities import ContrastiveRepresentation, ProbabilisticTransfer, RelationalKD, SimilarityPreserving
from kd.losses.derivatives import JacobianMatching

# isort: on
from kd.losses.base import LOSSES, BaseLoss, LogitLoss, Outputs, hyperparameters_of
from kd.losses.objective import Objective, Pair, Term
from kd.losses.parsing import build_objective
