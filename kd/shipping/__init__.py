"""What ships: a student in a file that runs elsewhere, and what it says of images there."""

from kd.shipping.formats import FORMATS, Student, open_student, read_network

__all__ = ["FORMATS", "Student", "open_student", "read_network"]
