"""Building a network by name, and reading one from a checkpoint."""

from kd.models.catalog import (
    allow_checkpointing,
    build_classifier,
    build_embedder,
    checked,
    classifier_layer,
    parameters_by_name,
    published_state,
    usual_size,
    usual_statistics,
)
from kd.models.checkpoint import (
    CLASSIFIER_KEY,
    STATE_PREFIX,
    build_from_state,
    find_damage,
    is_own_checkpoint,
    load_classifier,
    read_accuracy,
    read_plain,
    write_thresholds,
)
from kd.models.classifier import Classifier, Description, Embedder, Ensemble
from kd.models.compute import Compute, fastest, keep_large_blocks, why_not_compiled
from kd.models.cost import CLASSIC, free_memory, largest_batch, measure_cost, measure_cost_by_name, training_bytes
from kd.models.features import FeatureReader, Survey, survey
from kd.models.fitting import build_from_weights, initialize_from, keep_classes, name_outputs
from kd.models.hub import IMAGENET, TIMM, import_timm, timm_folder
from kd.models.reused_head import PROJECTOR, reuse_head
from kd.models.weights import Weights, imagenet_names, read_class_names, read_safetensors, read_weights
