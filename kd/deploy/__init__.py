"""Deployment: exporting a student, verifying the exported file, and predicting with it."""

from kd.deploy.loading import FORMATS, open_student
