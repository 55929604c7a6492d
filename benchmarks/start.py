"""From the command to the first step: what is added to importing torch and Lightning."""

import subprocess
import sys
import time

_FIRST_STEP = """
import os, sys
from kd.training import ClassifierModule
step = ClassifierModule.training_step
def first(*given):
    step(*given)
    os._exit(0)
ClassifierModule.training_step = first
from kd.cli import experiment
experiment(["--baseline", "--dataset", "digits", "--image_size", "16", "--student_model", "linear", "--fast_dev_run"])
"""

COMMANDS = {
    "imports": ["-c", "import torch, torchvision, pytorch_lightning"],
    "first step": ["-c", _FIRST_STEP],
    "help": ["experiment.py", "--help"],
}


def seconds(command: str) -> float:
    """Return how long one of the commands takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *COMMANDS[command]], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 (its own)
    return time.perf_counter() - start
