"""The phases in order, and the measuring of what they leave; the only reader of the settings besides the commands."""

from kd.pipeline.evaluation import evaluate_checkpoint
from kd.pipeline.experiment import check_experiment, find_teachers, run_experiment
from kd.pipeline.journal import Experiment
from kd.pipeline.prices import measure_prices

__all__ = [
    "Experiment",
    "check_experiment",
    "evaluate_checkpoint",
    "find_teachers",
    "measure_prices",
    "run_experiment",
]
