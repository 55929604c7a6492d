"""Finding the teacher to distil, and refusing a wrong one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binom

from kd.data import Splits
from kd.errors import UserError
from kd.models import Classifier, load_classifier
from kd.pipeline.records import METRICS_FILE, Facts, read_facts

_SHOWN = 5
_OFTEN = 1e-3
BEST_CHECKPOINT = Path("checkpoints") / "best.ckpt"


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher that an earlier call left.

    Args:
        checkpoint: Its best checkpoint.
        metrics: What its training came to, as its ``metrics.json`` says; empty where there is none.
    """

    checkpoint: Path
    metrics: Facts

    def facts(self, teacher: Classifier, accuracy: float) -> Facts:
        """Return what is known of it: its accuracy as it was measured now, and what else its training came to.

        Args:
            teacher: The classifier that its checkpoint holds.
            accuracy: Its accuracy on the validation images, a fraction of 1.
        """
        return (
            {"seed": None}
            | self.metrics
            | {
                "model": teacher.description.architecture,
                "parameters": teacher.count_parameters(),
                "val_acc": accuracy,
                "best_val_acc": accuracy,
                "checkpoint": str(self.checkpoint),
            }
        )


def find_teacher(root: Path, folder: Path, *, data: str, model: str, image_size: int) -> FoundTeacher:
    """Find the newest finished teacher for the same data, network and image size.

    Args:
        root: Folder of all experiments.
        folder: This experiment's folder, which is looked at first.
        data: Name of the data set.
        model: The teacher's network.
        image_size: Side of the images, in pixels.

    Raises:
        UserError: If there is none; the message names those that there are.
    """
    places = [path for path in root.glob(f"*/teacher/version_*/{METRICS_FILE}") if folder not in path.parents]
    own = list(folder.glob(f"teacher/version_*/{METRICS_FILE}"))
    others: list[str] = []
    for candidates in (own, places):
        for path in sorted(candidates, key=lambda one: one.stat().st_mtime, reverse=True):
            metrics = read_facts(path)
            if metrics is None:
                continue
            found = tuple(metrics.get(key) for key in ("data", "model", "image_size"))
            checkpoint = path.parent / BEST_CHECKPOINT
            if found == (data, model, image_size) and checkpoint.is_file():
                return FoundTeacher(checkpoint, metrics)
            others.append(f"{found[1]} for {found[0]} at {found[2]} px ({path.parent})")
    there_are = f"\n  There are: {'; '.join(others)}." if others else ""
    raise UserError(
        f"--distill: there is no teacher: under {root} no finished {model} was trained for {data} at {image_size} px."
        f"\n  --train_teacher trains one, --teacher_checkpoint names one.{there_are}"
    )


def given_teacher(checkpoint: str) -> FoundTeacher:
    """Return the teacher that ``--teacher_checkpoint`` names, with its metrics where they lie beside it."""
    path = Path(checkpoint).expanduser()
    return FoundTeacher(path, read_facts(path.parent.parent / METRICS_FILE) or {})


def load_teacher(path: Path, *, model: str, splits: Splits) -> Classifier:
    """Load a teacher's checkpoint and compare its classes with the data's.

    Raises:
        UserError: If it can't be read, holds another network, or its classes differ in number, names or order.
    """
    classifier = load_classifier(path, architecture=model, flag="--teacher_model")
    check_classes(classifier.description.classes, splits.classes, whose=f"the teacher {path}", data=splits.name)
    return classifier


def check_classes(have: tuple[str, ...], want: tuple[str, ...], *, whose: str, data: str) -> None:
    """Refuse a network whose classes differ from the data's in number, names or order.

    Raises:
        UserError: If they differ; the message says how.
    """
    if have == want:
        return
    if len(have) != len(want):
        how = f"it has {len(have)} classes ({_some(have)}), {data} has {len(want)} ({_some(want)})"
    elif set(have) == set(want):
        first = next(index for index, (one, other) in enumerate(zip(have, want, strict=True)) if one != other)
        how = f"they are in another order: class {first} is {have[first]!r} to it, and {want[first]!r} in {data}"
    else:
        only_it, only_data = (_some(sorted(names)) for names in (set(have) - set(want), set(want) - set(have)))
        how = f"only it has {only_it}; only {data} has {only_data}"
    raise UserError(f"{whose} was trained for other classes: {how}")


def chance(labels: Sequence[int]) -> float:
    """Return the accuracy of a classifier that always says the most frequent class."""
    return max(Counter(labels).values()) / len(labels)


def is_no_better_than_chance(accuracy: float, labels: Sequence[int]) -> bool:
    """Say whether a classifier that always says the most frequent class would often do as well.

    "Often" is more than once in a thousand data sets of this size, by the binomial distribution. A classifier that is
    right on every image is never refused, however few they are.

    Args:
        accuracy: The accuracy measured, a fraction of 1.
        labels: The labels that it was measured on.
    """
    right = round(accuracy * len(labels))
    return right < len(labels) and bool(binom.sf(right - 1, len(labels), chance(labels)) > _OFTEN)


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
