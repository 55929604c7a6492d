"""Figures of validation images: the teacher's soft targets, and the largest teacher-student disagreements."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.special import rel_entr

from kd.data import Layout, load_splits, plain_view
from kd.errors import UserError
from kd.report.figures import Picture, soft_targets
from kd.report.measures import Predictions

TEMPERATURES = (1, 2, 5, 10)
_SHOWN = 4
_MAX_SIZE = 160
"""Largest side of an image in the figures, in pixels."""


def example_pictures(folder: Path, summary: Mapping[str, Any]) -> list[Picture]:
    """Draw validation images with the probabilities that teacher and student assign.

    Returns:
        The figures; none if the predictions or the images are no longer in the experiment's folder.
    """
    phases = [*([summary["phases"]["distilled"]] if "distilled" in summary["phases"] else []), *summary["compared"]]
    run = phases[0]["runs"][0] if phases and phases[0]["runs"] else {}
    files = [run.get(key) for key in ("validation", "teacher_predictions")]
    student, teacher = (Predictions.read(folder / file) if file is not None else None for file in files)
    load = _image_loader(folder)
    # Of several labels an image, the softened probabilities don't compete.
    if (
        student is None
        or teacher is None
        or load is None
        or student.multilabel
        or not np.array_equal(teacher.keys, student.keys)
    ):
        return []

    def picture(name: str, title: str, indices: Sequence[int], temperatures: Sequence[int]) -> Picture:
        images = [load(str(student.keys[index])) for index in indices]
        labels = [student.classes[student.labels[index]] for index in indices]
        probabilities = [
            {f"teacher, T = {value}": teacher.probabilities(value)[index] for value in temperatures}
            | {"student, distilled": student.probabilities()[index]}
            for index in indices
        ]
        return soft_targets(name, title, images, labels, probabilities, student.classes)

    divergence = rel_entr(teacher.probabilities(), student.probabilities()).sum(axis=1)
    largest = np.argsort(-divergence, kind="stable")[:_SHOWN].tolist()
    # The first image of each of a few classes, spread over all of them.
    present, first = np.unique(student.labels, return_index=True)
    spread = first[np.linspace(0, len(present) - 1, min(_SHOWN, len(present))).round().astype(int)].tolist()
    try:
        return [
            picture("soft-targets", "Soft targets by temperature", spread, TEMPERATURES),
            picture("disagreements", "Largest teacher-student disagreements", largest, (1,)),
        ]
    except (UserError, KeyError):
        return []


def _image_loader(folder: Path) -> Callable[[str], NDArray[np.uint8]] | None:
    """Return a function that loads a validation image by key; ``None`` if the settings no longer lead to the images."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        splits = load_splits(settings["dataset"], settings["data_dir"], Layout.of(settings), recorded_in=folder)
        view = plain_view(min(int(settings["image_size"]), _MAX_SIZE), settings["resize"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, UserError):
        return None
    indices = {key: index for index, key in enumerate(splits.val.keys)}
    return lambda key: view(splits.val.load(indices[key])).permute(1, 2, 0).numpy()
