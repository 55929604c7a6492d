"""Train a teacher, train a student on the labels alone, distill the teacher into a student, and compare."""

import sys

from kd.cli import experiment

if __name__ == "__main__":
    sys.exit(experiment())
