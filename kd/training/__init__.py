"""The two LightningModules, the frozen teacher, optimizers and schedules, callbacks, and a training run."""

from kd.training.callbacks import Throughput, TrainingImages, draw_views
from kd.training.checkpoints import Persistence
from kd.training.compute import Compute, fastest, keep_large_blocks, why_not_compiled
from kd.training.distillation import DistillationModule
from kd.training.hardware import Hardware, build_trainer, quiet_lightning
from kd.training.interruption import Interruption
from kd.training.modules import ClassifierModule
from kd.training.optimization import Recipe
from kd.training.outputs import LogitStore, digest_of_weights
from kd.training.predictions import PredictionRecorder
from kd.training.progress import PhaseProgress
from kd.training.run import Run, evaluate, train
from kd.training.teacher import FrozenTeacher

__all__ = [
    "ClassifierModule",
    "Compute",
    "DistillationModule",
    "FrozenTeacher",
    "Hardware",
    "Interruption",
    "LogitStore",
    "Persistence",
    "PhaseProgress",
    "PredictionRecorder",
    "Recipe",
    "Run",
    "Throughput",
    "TrainingImages",
    "build_trainer",
    "digest_of_weights",
    "draw_views",
    "evaluate",
    "fastest",
    "keep_large_blocks",
    "quiet_lightning",
    "train",
    "why_not_compiled",
]
