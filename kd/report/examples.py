"""Validation images with what teacher and student said of them: soft targets, and where they differ most."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kd.data import load_splits, plain_view
from kd.errors import UserError
from kd.report.figures import Picture, soft_targets
from kd.report.measures import Predictions

TEMPERATURES = (1, 2, 5, 10)
_SHOWN = 4
_LARGEST = 160

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Examples:
    """What teacher and student said of the validation images.

    Args:
        classes: Names of the classes.
        teacher: The teacher's predictions, or ``None``.
        student: The distilled student's of the first seed, or of whoever there is.
        pixels: The view of the image of a key, ``None`` where the images can't be read.
    """

    classes: tuple[str, ...]
    teacher: Predictions | None
    student: Predictions
    pixels: Callable[[str], Pixels] | None

    def draw(self) -> Picture | None:
        """Draw a few images of different classes with the teacher's soft targets, by temperature."""
        if self.pixels is None or self.teacher is None:
            return None
        places = _of_different_classes(self.student.labels)
        # Those whose second class has some probability show what a soft target is.
        rows = []
        for place in places:
            softened = {
                f"teacher, T = {temperature}": self.teacher.probabilities(temperature)[place]
                for temperature in TEMPERATURES
            }
            rows.append(softened | {"student distilled": self.student.probabilities()[place]})
        title = "What the teacher tells: soft targets by temperature"
        return self._drawn(places, rows, name="soft-targets", title=title)

    def draw_disagreements(self) -> Picture | None:
        """Draw the images on which student and teacher disagree most, by the divergence of their probabilities."""
        if self.pixels is None or self.teacher is None:
            return None
        theirs, ours = self.teacher.probabilities(), self.student.probabilities()
        divergence = (theirs * (np.log(theirs + 1e-12) - np.log(ours + 1e-12))).sum(axis=1)
        places = np.argsort(-divergence, kind="stable")[:_SHOWN].tolist()
        rows = [{"teacher, T = 1": theirs[place], "student distilled": ours[place]} for place in places]
        return self._drawn(places, rows, name="disagreements", title="Where student and teacher disagree most")

    def _drawn(
        self, places: Sequence[int], rows: Sequence[Mapping[str, Any]], *, name: str, title: str
    ) -> Picture | None:
        if self.pixels is None:
            return None
        try:
            images = [self.pixels(str(self.student.keys[place])) for place in places]
        except (UserError, KeyError):
            return None
        names = [self.classes[self.student.labels[place]] for place in places]
        return soft_targets(images, names, rows, self.classes, name=name, title=title)


def soft_target_examples(folder: Path, summary: Mapping[str, Any]) -> Examples | None:
    """Gather what was said of the validation images; ``None`` where no predictions are kept.

    Args:
        folder: The experiment's folder.
        summary: Its summary.
    """
    phases = summary["phases"]
    for phase in ("distilled", "baseline", "teacher"):
        runs = phases.get(phase, {}).get("runs", [])
        student = _read(folder, runs[0].get("validation")) if runs else None
        if student is None:
            continue
        teacher = _read(folder, runs[0].get("teacher_predictions"))
        if teacher is not None and not np.array_equal(teacher.keys, student.keys):
            teacher = None
        return Examples(student.classes, teacher, student, _pixels_of(folder))
    return None


def _read(folder: Path, path: str | None) -> Predictions | None:
    return None if path is None else Predictions.read(folder / path)


def _pixels_of(folder: Path) -> Callable[[str], Pixels] | None:
    """Return what shows a validation image, where the settings that were written down still lead to the images."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        splits = load_splits(
            settings["dataset"],
            settings["data_dir"],
            train_data=settings["train_data"],
            val_data=settings["val_data"],
        )
        view = plain_view(min(int(settings["image_size"]), _LARGEST), settings["resize"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, UserError):
        return None
    places = {key: index for index, key in enumerate(splits.val.keys)}

    def pixels(key: str) -> Pixels:
        seen: Pixels = view(splits.val.load(places[key])).permute(1, 2, 0).numpy()
        return seen

    return pixels


def _of_different_classes(labels: NDArray[np.int64]) -> list[int]:
    """Choose the first image of each of a few classes, spread over all of them."""
    known = np.unique(labels)
    chosen = known[np.linspace(0, len(known) - 1, min(_SHOWN, len(known))).round().astype(int)]
    return [int(np.flatnonzero(labels == label)[0]) for label in chosen]
