"""Train a teacher, train a student alone, distill the teacher into the student, and compare; ``--help`` says more."""

import sys

from kd.cli import experiment

if __name__ == "__main__":
    sys.exit(experiment())
