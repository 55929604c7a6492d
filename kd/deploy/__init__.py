"""What ships: a student in a file that runs elsewhere, and what it says of images there."""

from kd.deploy.formats import FORMATS, Student, open_student, read_network

__all__ = ["FORMATS", "Student", "open_student", "read_network"]
