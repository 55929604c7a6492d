"""Deployment: exporting a student, verifying the exported file, and predicting with it."""

from kd.deploy.formats import FORMATS, open_student
