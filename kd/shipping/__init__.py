"""What ships: a student in a file that runs elsewhere, and what it says of images there."""

from kd.shipping.formats import FORMATS, Student, open_student, read_network
from kd.shipping.prediction import images_in, predictions

__all__ = ["FORMATS", "Student", "images_in", "open_student", "predictions", "read_network"]
