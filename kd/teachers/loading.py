"""Loading a teacher, and refusing one that can't teach these classes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import binom

from kd.errors import UserError
from kd.models import Classifier, load_classifier

_SHOWN = 5
_SIGNIFICANCE = 1e-3


def load_teacher(path: Path, *, model: str, classes: tuple[str, ...], data: str, image_size: int) -> Classifier:
    """Load a teacher's checkpoint, and check its classes and its image size.

    Args:
        path: The checkpoint.
        model: The network that it should hold.
        classes: The class names of the data, in order.
        data: Name of the data set, for messages.
        image_size: Side of the images that the teacher will get, in pixels.

    Raises:
        UserError: If it can't be read, holds another network, its classes differ from the data's in number, names or
            order, or it was trained on images of another size.
    """
    classifier = load_classifier(path, architecture=model, flag="--teacher_model")
    check_classes(classifier.description.classes, classes, teacher=f"the teacher {path}", data=data)
    trained_size = classifier.description.image_size
    if trained_size != image_size:
        raise UserError(
            f"--teacher_checkpoint {path}: trained on images of {trained_size} px, but --image_size is {image_size}; "
            f"add --teacher_image_size {trained_size} to resize the student's views for the teacher"
        )
    return classifier


def check_classes(classes: tuple[str, ...], expected: tuple[str, ...], *, teacher: str, data: str) -> None:
    """Refuse a teacher whose classes differ from the data's in number, names or order.

    Args:
        classes: The teacher's class names, in order.
        expected: The data's class names, in order.
        teacher: What messages call the teacher.
        data: Name of the data set, for messages.

    Raises:
        UserError: If they differ; the message says how.
    """
    if classes == expected:
        return
    if len(classes) != len(expected):
        difference = (
            f"it has {len(classes)} classes ({_shorten(classes)}), {data} has {len(expected)} ({_shorten(expected)})"
        )
    elif set(classes) == set(expected):
        first = next(index for index, pair in enumerate(zip(classes, expected, strict=True)) if pair[0] != pair[1])
        difference = (
            f"the order differs: class {first} is {classes[first]!r} for the teacher and {expected[first]!r} in {data}"
        )
    else:
        extra, missing = (sorted(names) for names in (set(classes) - set(expected), set(expected) - set(classes)))
        difference = f"only the teacher has {_shorten(extra)}; only {data} has {_shorten(missing)}"
    raise UserError(f"{teacher} was trained on other classes: {difference}")


def majority_share(labels: Sequence[int]) -> float:
    """Return the accuracy of a classifier that always predicts the most frequent class."""
    return max(Counter(labels).values()) / len(labels)


def is_no_better_than_chance(accuracy: float, labels: Sequence[int]) -> bool:
    """Return whether an accuracy could be that of always predicting the most frequent class.

    One-sided binomial test at a significance level of 0.001. A classifier without errors always passes, however few
    the images are.

    Args:
        accuracy: Measured accuracy, in [0, 1].
        labels: The labels that it was measured on.
    """
    correct = round(accuracy * len(labels))
    if correct == len(labels):
        return False
    return bool(binom.sf(correct - 1, len(labels), majority_share(labels)) > _SIGNIFICANCE)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
