"""Finding the teacher to distill, and refusing a wrong one."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binom

from kd.data import Splits
from kd.errors import UserError
from kd.models import Classifier, load_classifier
from kd.pipeline.records import METRICS_FILE, Facts, read_facts

_SHOWN = 5
# One teacher, or one of several.
_PLACES = ("teacher/version_*", "teacher/*/version_*")
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

    @property
    def seed(self) -> int:
        """The seed that it was trained with; -1 where nobody wrote it down."""
        seed = self.metrics.get("seed")
        return -1 if seed is None else int(seed)

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


def find_teacher(
    root: Path, folder: Path, *, data: str, model: str, image_size: int, besides: Collection[FoundTeacher] = ()
) -> FoundTeacher:
    """Find the newest finished teacher for the same data, network and image size.

    Args:
        root: Folder of all experiments.
        folder: This experiment's folder, which is looked at first.
        data: Name of the data set.
        model: The teacher's network.
        image_size: Side of the images, in pixels.
        besides: Teachers that are taken already; another one of the same network has another seed.

    Raises:
        UserError: If there is none; the message names those that there are.
    """
    taken = [(one.metrics.get("model"), one.metrics.get("seed")) for one in besides]
    files = [path for pattern in _PLACES for path in root.glob(f"*/{pattern}/{METRICS_FILE}")]
    others: list[str] = []
    # This experiment's first, then the newest.
    for path in sorted(files, key=lambda one: (folder not in one.parents, -one.stat().st_mtime)):
        metrics = read_facts(path)
        if metrics is None:
            continue
        found = tuple(metrics.get(key) for key in ("data", "model", "image_size"))
        checkpoint = path.parent / BEST_CHECKPOINT
        is_new = (metrics.get("model"), metrics.get("seed")) not in taken
        if found == (data, model, image_size) and checkpoint.is_file() and is_new:
            return FoundTeacher(checkpoint, metrics)
        others.append(f"{found[1]} for {found[0]} at {found[2]} px ({path.parent})")
    there_are = f"\n  There are: {'; '.join(others)}." if others else ""
    a_second = " with another seed" if any(model == name for name, _ in taken) else ""
    raise UserError(
        f"--distill: there is no teacher: under {root} no finished {model}{a_second} was trained for {data} at "
        f"{image_size} px.\n  --train_teacher trains one, --teacher_checkpoint names one.{there_are}"
    )


def given_teacher(checkpoint: str) -> FoundTeacher:
    """Return the teacher that ``--teacher_checkpoint`` names, with its metrics where they lie beside it."""
    path = Path(checkpoint).expanduser()
    return FoundTeacher(path, read_facts(path.parent.parent / METRICS_FILE) or {})


def load_teacher(path: Path, *, model: str, splits: Splits, image_size: int) -> Classifier:
    """Load a teacher's checkpoint and compare its classes and its image size with what they should be.

    Raises:
        UserError: If it can't be read, holds another network, its classes differ in number, names or order, or it was
            made for images of another size.
    """
    classifier = load_classifier(path, architecture=model, flag="--teacher_model")
    check_classes(classifier.description.classes, splits.classes, whose=f"the teacher {path}", data=splits.name)
    made_for = classifier.description.image_size
    if made_for != image_size:
        raise UserError(
            f"the teacher {path} was trained on images of {made_for} px, and it would be shown {image_size} px; with "
            f"--teacher_image_size {made_for} it sees what the student sees, resized for it"
        )
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
