"""The two LightningModules, optimizers and schedules, callbacks, and a training run."""

from kd.training.callbacks import Throughput, TrainingImages, draw_views
from kd.training.checkpoints import Persistence
from kd.training.distillation import DistillationModule
from kd.training.hardware import Hardware, build_trainer, quiet_lightning
from kd.training.interruption import Interruption
from kd.training.modules import ClassifierModule
from kd.training.optimization import Recipe
from kd.training.predictions import PredictionRecorder
from kd.training.progress import PhaseProgress
from kd.training.run import Run, evaluate, train

__all__ = [
    "ClassifierModule",
    "DistillationModule",
    "Hardware",
    "Interruption",
    "Persistence",
    "PhaseProgress",
    "PredictionRecorder",
    "Recipe",
    "Run",
    "Throughput",
    "TrainingImages",
    "build_trainer",
    "draw_views",
    "evaluate",
    "quiet_lightning",
    "train",
]
