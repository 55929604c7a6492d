"""What can be known to be wrong before the first step, in words for somebody who meets it for the first time.

Each check takes plain values and returns findings; it changes nothing, and it is :func:`refuse` that refuses.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.data import BROKEN, FileFinding, Splits, find_duplicates
from kd.errors import UserError
from kd.losses import Objective
from kd.models import Classifier, Ensemble, free_memory, training_bytes, usual_size

Level = Literal["error", "warning", "note"]

_SHOWN = 3
_FEW = 10
_FEW_STEPS = 20
_OFTEN = 4.0

# What each oddity is called where there are several, how bad that is, and what is done about it.
_ODDITIES: dict[str, tuple[Level, str]] = {
    "cmyk": ("warning", "in printing colors (CMYK)"),
    "16-bit": ("note", "of 16 bits a pixel"),
    "transparent": ("note", "partly transparent"),
    "animated": ("warning", "animated"),
    "turned": ("note", "turned by the camera"),
    "large": ("warning", "enormous, and slow to decode"),
    "tiny": ("note", "tiny"),
    "long": ("warning", "very long and thin"),
}


@dataclass(frozen=True)
class Finding:
    """Something that a person should know before the first step.

    Args:
        level: ``error`` (it can't work, or would mislead), ``warning`` (it will hardly be what was meant), ``note``.
        text: What it is, and what to do.
    """

    level: Level
    text: str

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.level.capitalize()}: {self.text}"


def check_files(oddities: Sequence[FileFinding], *, skips_broken: bool) -> list[Finding]:
    """Say what was found in the image files.

    Args:
        oddities: As :func:`kd.data.image_check.check_images` returned them.
        skips_broken: Whether broken files are left out.
    """
    found: list[Finding] = []
    broken = [one for one in oddities if one.kind == BROKEN]
    if broken:
        is_one = len(broken) == 1
        words = f"{broken[0].path}: this image can't be decoded: {broken[0].detail}"
        if not is_one:
            some = _some([f"{one.path} ({one.detail})" for one in broken])
            words = f"{len(broken):,} images can't be decoded: {some}"
        them = "it" if is_one else "them"
        remedy = "left out" if skips_broken else f"mend or remove {them}, or leave {them} out with --on_bad_image skip"
        found.append(Finding("warning" if skips_broken else "error", f"{words}; {remedy}"))
    for kind, (level, words) in _ODDITIES.items():
        of_kind = [one for one in oddities if one.kind == kind]
        if of_kind:
            some = _some([f"{one.path}: {one.detail}" for one in of_kind])
            found.append(Finding(level, f"{_images(len(of_kind))} {_are(len(of_kind))} {words} ({some})"))
    return found


def check_splits(splits: Splits, *, batch_size: int) -> list[Finding]:
    """Look for validation images that were trained on, and for classes with very few images."""
    found: list[Finding] = []
    pairs = find_duplicates(splits.train, splits.val)
    if pairs:
        some = _some([f"{val} is {train}" for train, val in pairs])
        stand = "stands" if len(pairs) == 1 else "stand"
        found.append(
            Finding(
                "warning",
                f"{len(pairs):,} of {len(splits.val):,} validation images {stand} in the training images, too, so that "
                f"accuracies will be too high: {some}",
            )
        )
    of_val = Counter(splits.val.labels)
    val_counts = [of_val[label] for label in range(len(splits.classes))]
    for name, counts in (("training", splits.train_counts), ("validation", val_counts)):
        # Where the images of each class are not counted, nothing is said of them.
        few = [f"{one} ({count})" for one, count in zip(splits.classes, counts or (), strict=False) if count < _FEW]
        if few:
            found.append(Finding("warning", f"classes with fewer than {_FEW} {name} images: {_some(few)}"))
    if splits.train_size < batch_size:
        found.append(
            Finding(
                "note",
                f"--batch_size {batch_size}: there are {splits.train_size} training images: an epoch is a single step",
            )
        )
    return found


def check_schedule(
    *, batches: int, accumulate: int, epochs: int, max_steps: int | None, warmup: float
) -> list[Finding]:
    """Look whether there are steps enough for the learning rate's way up and down.

    Args:
        batches: Batches of an epoch.
        accumulate: Batches of a step.
        epochs: Epochs.
        max_steps: The most steps, or ``None``.
        warmup: Epochs of warm-up.
    """
    in_epoch = max(1, math.ceil(batches / accumulate))
    steps = min(in_epoch * epochs, max_steps or math.inf)
    rising = warmup * in_epoch
    if rising >= steps:
        return [
            Finding(
                "warning",
                f"--warmup_epochs {warmup:g}: these are {rising:.0f} steps, and the training has {steps:.0f}: the "
                "learning rate never arrives",
            )
        ]
    if steps < _FEW_STEPS:
        return [Finding("warning", f"the training has {steps:.0f} steps, too few to learn much in")]
    return []


def check_temperature(objectives: Sequence[Objective], temperature: float | None) -> list[Finding]:
    """Look for a temperature that nothing asks for."""
    if temperature is None or not objectives:
        return []
    terms = [term for objective in objectives for term in objective.terms]
    if any(hasattr(term.loss, "temperature") for term in terms):
        return []
    names = " ".join(dict.fromkeys(term.name for term in terms))
    return [Finding("warning", f"--temperature {temperature:g}: no term of the objective has one ({names})")]


def check_sizes(student: Classifier, teacher: Classifier | Ensemble) -> list[Finding]:
    """Look for a student that is larger than its teacher."""
    ours, theirs = student.count_parameters(), teacher.count_parameters()
    if ours <= theirs:
        return []
    names = student.description.architecture, teacher.description.architecture
    return [
        Finding(
            "note", f"the student {names[0]} has more parameters than the teacher {names[1]}: {ours:,} and {theirs:,}"
        )
    ]


def check_published(splits: Splits, *, flags: Sequence[str], networks: Sequence[Classifier]) -> list[Finding]:
    """Look whether published weights have seen the validation images, and at which size they were made.

    Args:
        splits: The images.
        flags: The flags that start networks from published weights.
        networks: Those networks.
    """
    found: list[Finding] = []
    # ImageNet names its classes by WordNet's numbers, and so do its parts.
    of_imagenet = [name for name in splits.classes if re.fullmatch(r"n\d{8}", name)]
    if flags and len(of_imagenet) == len(splits.classes):
        found.append(
            Finding(
                "warning",
                f"{' '.join(flags)}: weights that were trained on ImageNet have seen images of these classes, and of "
                "Imagenette nearly all validation images, too: accuracies will be too high",
            )
        )
    for network in networks:
        usual, size = usual_size(network.description.architecture), network.description.image_size
        if usual is not None and usual != size:
            name = network.description.architecture
            found.append(
                Finding("warning", f"--image_size {size}: the published weights of {name} were made for {usual} px")
            )
    return found


def check_accuracy(*, said: float | None, measured: float, images: int, whose: str) -> list[Finding]:
    """Compare a teacher's accuracy with what its checkpoint says.

    Args:
        said: What the checkpoint says, a fraction of 1.
        measured: On the validation images here.
        images: How many these are.
        whose: Whose it is.
    """
    if said is None or measured >= said - _OFTEN * math.sqrt(max(said * (1 - said), 0.01) / images):
        return []
    return [
        Finding(
            "warning",
            f"{whose}'s checkpoint says {said:.1%}, and on these {images:,} validation images it is right on "
            f"{measured:.1%}: are they other images, or prepared in another way?",
        )
    ]


def check_room(
    student: Classifier | None,
    teachers: Sequence[Classifier],
    *,
    folder: Path,
    batch_size: int,
    trains_teacher: bool,
    trainings: int,
    on_cpu: bool,
) -> list[Finding]:
    """Estimate what the trainings need of disk and memory, and compare it with what is free.

    Args:
        student: The student.
        teachers: The teachers.
        folder: Where checkpoints are written.
        batch_size: Images in a batch.
        trains_teacher: Whether the teachers are trained, too.
        trainings: How many trainings of students there are.
        on_cpu: Whether the networks are in this machine's memory.
    """
    found: list[Finding] = []
    # Each leaves its weights, and the weights with two numbers each of the optimizer.
    bytes_of = {id(one): 4 * one.count_parameters() for one in (*teachers, *([student] if student else []))}
    disk = sum(4 * bytes_of[id(one)] for one in teachers) if trains_teacher else 0
    disk += 4 * trainings * bytes_of[id(student)] if student is not None else 0
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(there).free
    if disk > free:
        found.append(
            Finding(
                "error",
                f"the checkpoints will take {disk / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free; "
                "--default_root_dir names another place",
            )
        )
    if not on_cpu:
        return found
    memory = free_memory()
    learners = {training_bytes(one, batch_size): one for one in (*(teachers if trains_teacher else []), student) if one}
    if memory is None or not learners:
        return found
    needed = max(learners)
    learner = learners[needed]
    needed += sum(bytes_of[id(one)] for one in teachers)
    if needed > memory:
        found.append(
            Finding(
                "warning",
                f"--batch_size {batch_size}: to train {learner.description.architecture} takes about "
                f"{needed / 1e9:.1f} GB of memory, and {memory / 1e9:.1f} GB are free; --batch_size auto takes what "
                "fits",
            )
        )
    return found


def refuse(found: Sequence[Finding], *, strict: bool) -> None:
    """Refuse to go on with an error and, where that is asked for, with a warning.

    Raises:
        UserError: If there is one.
    """
    errors = [one.text for one in found if one.level == "error"]
    if errors:
        raise UserError("\n  ".join(errors))
    warnings = [one.text for one in found if one.level == "warning"]
    if warnings and strict:
        count = "a warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
        raise UserError("\n  ".join([f"--strict: {count}, and nothing was begun:", *warnings]))


def _some(words: Sequence[str]) -> str:
    more = f", and {len(words) - _SHOWN:,} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count:,} images"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
