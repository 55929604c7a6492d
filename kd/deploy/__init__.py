"""Deployment: exporting a student, verifying the exported file, and predicting with it."""

from kd.deploy.formats import FORMATS, Student, open_student, read_network

__all__ = ["FORMATS", "Student", "open_student", "read_network"]
