"""Building a network by name, and reading one from a checkpoint."""

from kd.models.catalog import build_classifier, parameters_by_name, torchvision_names, usual_size
from kd.models.checkpoint import (
    CLASSIFIER_KEY,
    STATE_PREFIX,
    accuracy_in,
    build_from_state,
    load_classifier,
    read_description,
    read_plain,
)
from kd.models.classifier import Classifier, Description, Normalization
from kd.models.compute import Compute, fastest, keep_large_blocks, why_not_compiled
from kd.models.cost import CLASSIC, is_depthwise, measure_cost, measure_cost_by_name, multiply_adds
from kd.models.ensemble import Ensemble
from kd.models.features import FeatureReader, Survey, as_map, survey
from kd.models.memory import can_step, free_memory, largest_batch, training_bytes
