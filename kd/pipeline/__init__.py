"""The phases of an experiment in order, and measuring what they leave."""

from kd.pipeline.cache_folder import cache_entries
from kd.pipeline.evaluation import evaluate_checkpoint, measure_costs
from kd.pipeline.experiment import check_experiment, find_teachers, run_experiment
from kd.pipeline.run_store import read_provenance
from kd.pipeline.runner import Experiment
