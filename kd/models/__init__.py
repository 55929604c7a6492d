"""Building a network by name, and reading one from a checkpoint."""

from kd.models.catalogue import SMALL, build_classifier, parameters_by_name, torchvision_names
from kd.models.checkpoint import CLASSIFIER_KEY, STATE_PREFIX, load_classifier, read_description
from kd.models.classifier import Classifier, Description, Normalization

__all__ = [
    "CLASSIFIER_KEY",
    "SMALL",
    "STATE_PREFIX",
    "Classifier",
    "Description",
    "Normalization",
    "build_classifier",
    "load_classifier",
    "parameters_by_name",
    "read_description",
    "torchvision_names",
]
