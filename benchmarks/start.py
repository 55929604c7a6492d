"""Time from the command to the first training step, compared with importing torch and Lightning."""

import subprocess
import sys
import time

_FIRST_STEP = """
import os
from kd.training import ClassifierModule
step = ClassifierModule.training_step
def step_and_exit(*arguments):
    step(*arguments)
    os._exit(0)
ClassifierModule.training_step = step_and_exit
from kd.cli import experiment
experiment(["--baseline", "--dataset", "digits", "--image_size", "16", "--student_model", "linear", "--fast_dev_run"])
"""

COMMANDS = {
    "imports": ["-c", "import torch, torchvision, pytorch_lightning"],
    "first step": ["-c", _FIRST_STEP],
    "help": ["experiment.py", "--help"],
}


def seconds(command: str) -> float:
    """Return the run time of a command in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *COMMANDS[command]], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 (own command)
    return time.perf_counter() - start
