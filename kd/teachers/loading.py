"""Loading a teacher, and checking its classes and its accuracy."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import binom

from kd.errors import UserError
from kd.models import Classifier, load_classifier

_SHOWN = 5
_SIGNIFICANCE = 1e-3


def load_teacher(path: Path, *, model: str, classes: tuple[str, ...], data: str, image_size: int) -> Classifier:
    """Load a teacher's checkpoint; refuse another network, other classes or another image size in pixels."""
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
    """Refuse a teacher whose classes differ from the data's in number, names or order."""
    if classes == expected:
        return
    if len(classes) != len(expected):
        names = _shorten(classes), _shorten(expected)
        difference = f"it has {len(classes)} classes ({names[0]}), {data} has {len(expected)} ({names[1]})"
    elif set(classes) == set(expected):
        index = next(index for index, name in enumerate(classes) if name != expected[index])
        names = classes[index], expected[index]
        difference = f"the order differs: class {index} is {names[0]!r} for the teacher and {names[1]!r} in {data}"
    else:
        extra, missing = (sorted(names) for names in (set(classes) - set(expected), set(expected) - set(classes)))
        difference = f"only the teacher has {_shorten(extra)}; only {data} has {_shorten(missing)}"
    raise UserError(f"{teacher} was trained on other classes: {difference}")


def majority_share(labels: Sequence[int]) -> float:
    """Return the accuracy of a classifier that always predicts the most frequent class."""
    return max(Counter(labels).values()) / len(labels)


def is_no_better_than_chance(accuracy: float, labels: Sequence[int], *, images: int) -> bool:
    """Return whether an accuracy could be that of always predicting the most frequent class.

    One-sided binomial test at a significance level of 0.001; ``labels`` are those of all validation images, ``images``
    the number that was measured. A classifier without errors always passes.
    """
    correct = round(accuracy * images)
    return correct < images and bool(binom.sf(correct - 1, images, majority_share(labels)) > _SIGNIFICANCE)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
