"""The two LightningModules, optimizers and schedules, the training loop, resume, callbacks and hardware."""

from kd.training.callbacks import Throughput
from kd.training.distillation import DistillationModule
from kd.training.loggers import RunTensorBoard, draw_views
from kd.training.modules import ClassifierModule
from kd.training.optimization import Recipe
from kd.training.predictions import TEST_FILE, PredictionRecorder
from kd.training.resume import Interruption, ResumeOptions, newest_checkpoint
from kd.training.run import Run, evaluate, train
from kd.training.tracking import build_loggers, check_loggers, log_report
from kd.training.trainer import Hardware, build_trainer, quiet_lightning
