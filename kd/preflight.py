"""Checks before training. Each takes plain values and returns findings; :func:`refuse` raises."""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Literal

from kd.data import BROKEN, UNEVEN, FileFinding, LabeledImages, Splits, alike, find_duplicates
from kd.errors import UserError
from kd.losses import Objective
from kd.models import Classifier, Ensemble, free_memory, training_bytes, usual_size

Level = Literal["error", "warning", "note"]

_SHOWN = 3
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Linux keeps it)
_FEW_IMAGES = 10
_FEW_STEPS = 20
_STANDARD_ERRORS = 4.0

_ODDITIES: dict[str, tuple[Level, str]] = {
    "cmyk": ("warning", "in printing colors (CMYK)"),
    "16-bit": ("note", "16-bit"),
    "float": ("note", "floating-point"),
    "transparent": ("note", "partly transparent"),
    "animated": ("warning", "animated"),
    "turned": ("note", "rotated by the camera"),
    "large": ("warning", "very large and slow to decode"),
    "tiny": ("note", "tiny"),
    "long": ("warning", "very long and narrow"),
}


@dataclass(frozen=True)
class Finding:
    """A problem: an ``error`` (it can't work, or would mislead), a ``warning`` (probably unintended) or a ``note``."""

    level: Level
    text: str

    def __str__(self) -> str:
        """Return the finding as a line."""
        return f"{self.level.capitalize()}: {self.text}"


def check_files(oddities: Sequence[FileFinding], *, skips_broken: bool) -> list[Finding]:
    """Report broken and unusual image files, as found by :func:`kd.data.image_check.check_images`."""
    findings: list[Finding] = []
    broken = [file for file in oddities if file.kind == BROKEN]
    if broken:
        text, them = f"{broken[0].path}: this image can't be decoded: {broken[0].detail}", "it"
        if len(broken) > 1:
            listed = _shorten([f"{file.path} ({file.detail})" for file in broken])
            text, them = f"{len(broken):,} images can't be decoded: {listed}", "them"
        remedy = "left out" if skips_broken else f"repair or remove {them}, or add --on_bad_image skip"
        findings.append(Finding("warning" if skips_broken else "error", f"{text}; {remedy}"))
    for kind, (level, description) in _ODDITIES.items():
        if files := [f"{file.path}: {file.detail}" for file in oddities if file.kind == kind]:
            findings.append(Finding(level, f"images that are {description}: {len(files):,} ({_shorten(files)})"))
    return findings


def check_splits(splits: Splits, *, unlabeled: LabeledImages | None = None, batch_size: int) -> list[Finding]:
    """Find images in two splits or classes, classes with few or uneven numbers of images, and epochs of one step."""
    others = {"validation": splits.val, "test": splits.test}
    measured = {kind: images for kind, images in others.items() if images is not None}
    findings = [
        finding
        for kind, images in measured.items()
        for finding in (
            _check_duplicates(splits.train, images, f"{kind} images are also training images"),
            _check_duplicates(unlabeled, images, f"{kind} images are also unlabeled images"),
        )
    ]
    if splits.test is not None:
        findings.append(_check_duplicates(splits.val, splits.test, "test images are also validation images"))
    findings += [_check_two_classes(images) for images in (splits.train, *measured.values())]
    counts = {"training": splits.train_counts} | {kind: images.class_counts() for kind, images in measured.items()}
    for kind, of_class in counts.items():
        # Streams may not count the images of each class.
        if any(of_class or ()):
            findings += _check_counts(dict(zip(splits.classes, of_class or (), strict=False)), kind)
    findings.append(_check_names(splits.classes))
    if 0 < splits.train_size < batch_size:
        text = f"--batch_size {batch_size}: an epoch is a single step, as there are {splits.train_size} training images"
        findings.append(Finding("note", text))
    return [finding for finding in findings if finding is not None]


def _check_duplicates(first: LabeledImages | None, second: LabeledImages, problem: str) -> Finding | None:
    pairs = [] if first is None else find_duplicates(first, second)
    if not pairs:
        return None
    listed = _shorten([f"{other} is {one}" for one, other in pairs])
    return Finding("warning", f"{len(pairs):,} of {len(second):,} {problem}, which inflates accuracy: {listed}")


def check_near_duplicates(pairs: Sequence[tuple[str, str]] | None, *, kind: str, count: int) -> list[Finding]:
    """Report images of two splits that look alike, as found by :func:`kd.data.find_near_duplicates`."""
    if pairs is None:
        text = "looking for similar images in different splits needs the package imagehash: pip install imagehash"
        return [Finding("note", text)] if kind == "validation" else []
    if not pairs:
        return []
    listed = _shorten([f"{other} looks like {one}" for one, other in pairs])
    text = f"{len(pairs):,} of {count:,} {kind} images look like training images, which may inflate accuracy: {listed}"
    return [Finding("note", text)]


def _check_two_classes(images: LabeledImages) -> Finding | None:
    """Warn about one image in two classes."""
    if images.digests is None or images.multilabel:
        return None
    first: dict[bytes, int] = {}
    pairs = []
    for index, (digest, label) in enumerate(zip(images.digests, images.labels, strict=True)):
        earlier = first.setdefault(digest.tobytes(), index)
        if images.labels[earlier] != label:
            pairs.append(f"{images.name_of(index)} is {images.name_of(earlier)}")
    if not pairs:
        return None
    return Finding("warning", f"images in two classes: {len(pairs):,} ({_shorten(pairs)})")


def _check_counts(of_class: Mapping[str, int], kind: str) -> list[Finding]:
    """Warn about classes with few or no images, and about uneven numbers of training images."""
    findings = []
    few = [f"{name} ({count})" for name, count in of_class.items() if 0 < count < _FEW_IMAGES]
    if few:
        findings.append(Finding("warning", f"classes with fewer than {_FEW_IMAGES} {kind} images: {_shorten(few)}"))
    if missing := [name for name, count in of_class.items() if not count]:
        effect = "the network can't learn them" if kind == "training" else "metrics are over the others"
        findings.append(Finding("warning", f"classes without {kind} images: {_shorten(missing)}; {effect}"))
    present = {name: count for name, count in of_class.items() if count}
    if kind == "training" and present and max(present.values()) >= UNEVEN * sum(present.values()) / len(present):
        (least, few_images), (most, many_images) = (choose(present.items(), key=itemgetter(1)) for choose in (min, max))
        text = f"training images by class are uneven: from {few_images:,} ({least}) to {many_images:,} ({most})"
        remedy = "--class_weights balanced or --sampler balanced gives rare classes more weight"
        findings.append(Finding("note", f"{text}; {remedy}"))
    return findings


def _check_names(classes: Sequence[str]) -> Finding | None:
    """Warn about class names that are easily mistaken for each other."""
    by_form: dict[str, list[str]] = {}
    for name in classes:
        by_form.setdefault(alike(name), []).append(name)
    same = [" and ".join(map(repr, names)) for names in by_form.values() if len(names) > 1]
    if not same:
        return None
    return Finding("warning", f"classes whose names differ in case, spaces or Unicode form alone: {_shorten(same)}")


def check_schedule(
    *, batches: int, accumulate: int, epochs: int, max_steps: int | None, warmup: float
) -> list[Finding]:
    """Check that the training has enough steps, and more than the warm-up of ``warmup`` epochs of ``batches`` each."""
    steps_per_epoch = max(1, math.ceil(batches / accumulate))
    steps = min(steps_per_epoch * epochs, max_steps or math.inf)
    warmup_steps = warmup * steps_per_epoch
    if warmup_steps >= steps:
        text = f"--warmup_epochs {warmup:g}: {warmup_steps:.0f} warm-up steps, but the training has {steps:.0f} steps"
        return [Finding("warning", f"{text}; the learning rate doesn't reach its maximum")]
    return [Finding("warning", f"the training has only {steps:.0f} steps")] if steps < _FEW_STEPS else []


def check_temperature(objectives: Sequence[Objective], temperature: float | None) -> list[Finding]:
    """Warn about a temperature that no term uses."""
    terms = [term for objective in objectives for term in objective.terms]
    if temperature is None or not objectives or any(hasattr(term.loss, "temperature") for term in terms):
        return []
    names = " ".join(dict.fromkeys(term.name for term in terms))
    return [Finding("warning", f"--temperature {temperature:g}: no term of the objective has a temperature ({names})")]


def check_sizes(student: Classifier, teacher: Classifier | Ensemble) -> list[Finding]:
    """Note a student that is larger than its teacher."""
    sizes = student.count_parameters(), teacher.count_parameters()
    # Stored logits have no parameters.
    if sizes[0] <= sizes[1] or not sizes[1]:
        return []
    names = student.description.architecture, teacher.description.architecture
    text = f"the student {names[0]} has more parameters than the teacher {names[1]}: {sizes[0]:,} and {sizes[1]:,}"
    return [Finding("note", text)]


def check_published(splits: Splits, *, flags: Sequence[str], networks: Sequence[Classifier]) -> list[Finding]:
    """Check whether published weights were trained on the validation images, and at another image size.

    Args:
        splits: The images.
        flags: The flags that select published weights.
        networks: The networks with published weights.
    """
    findings: list[Finding] = []
    # ImageNet and its subsets name classes by WordNet identifiers.
    if flags and all(re.fullmatch(r"n\d{8}", name) for name in splits.classes):
        text = "weights trained on ImageNet have seen images of these classes, including most validation images of"
        findings.append(Finding("warning", f"{' '.join(flags)}: {text} Imagenette, which inflates accuracy"))
    for network in networks:
        name, size = network.description.architecture, network.description.image_size
        usual = usual_size(name)
        if usual not in (None, size):
            text = f"--image_size {size}: the published weights of {name} were trained at {usual} px"
            findings.append(Finding("warning", text))
    return findings


def check_accuracy(recorded: float | None, measured: float, *, images: int, teacher: str) -> list[Finding]:
    """Warn about a teacher less accurate on these validation images than its checkpoint records, beyond chance.

    Args:
        recorded: The accuracy in the checkpoint, in [0, 1], or ``None``.
        measured: The accuracy on the validation images.
        images: Number of these images.
        teacher: The teacher's name in the message.
    """
    if recorded is None:
        return []
    standard_error = math.sqrt(max(recorded * (1 - recorded), 0.01) / images)
    if measured >= recorded - _STANDARD_ERRORS * standard_error:
        return []
    text = (
        f"{teacher} has an accuracy of {measured:.1%} on these {images:,} validation images, but its checkpoint records"
    )
    return [Finding("warning", f"{text} {recorded:.1%}; are images or preprocessing different?")]


def check_resources(
    student: Classifier | None,
    teachers: Sequence[Classifier],
    *,
    folder: Path,
    batch_size: int,
    trains_teacher: bool,
    trainings: int,
    on_cpu: bool,
) -> list[Finding]:
    """Compare the estimated disk space and memory with what is free.

    Args:
        student: The student, if one is trained.
        teachers: The teachers.
        folder: Folder of the checkpoints.
        batch_size: Images per batch.
        trains_teacher: Whether the teachers are trained.
        trainings: Number of trainings of students.
        on_cpu: Whether the networks are in main memory.
    """
    findings: list[Finding] = []
    teachers_bytes = sum(4 * teacher.count_parameters() for teacher in teachers)
    student_bytes = 0 if student is None else 4 * student.count_parameters()
    # Each training leaves the best weights, and the last ones with the two moments of the optimizer.
    disk = 4 * (teachers_bytes * trains_teacher + student_bytes * trainings)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if disk > free:
        text = f"the checkpoints need {disk / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {existing}"
        findings.append(Finding("error", f"{text}; choose another folder with --default_root_dir"))
    memory = free_memory()
    trained = [*(teachers if trains_teacher else ()), *([] if student is None else [student])]
    if on_cpu and memory is not None and trained:
        needed, name = max(
            (training_bytes(network, batch_size), network.description.architecture) for network in trained
        )
        needed += teachers_bytes
        if needed > memory:
            text = f"--batch_size {batch_size}: training {name} needs about {needed / 1e9:.1f} GB of memory, but only"
            remedy = "use --batch_size auto"
            findings.append(Finding("warning", f"{text} {memory / 1e9:.1f} GB are free; {remedy}"))
    return findings


def check_shared_memory(needed: int, *, num_workers: int) -> list[Finding]:
    """Compare the shared memory that batches in flight take, in bytes, with what is free; too little hangs workers."""
    if not needed or not _SHARED_MEMORY.is_dir():
        return []
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if needed <= free:
        return []
    text = f"--num_workers {num_workers}: batches take {needed / 1e6:,.1f} MB of shared memory, but {_SHARED_MEMORY}"
    remedy = "start the container with --shm-size=1g or --ipc=host, or use --num_workers 0 or smaller batches"
    return [Finding("error", f"{text} has {free / 1e6:,.1f} MB free; {remedy}")]


def refuse(findings: Sequence[Finding], *, strict: bool) -> None:
    """Raise a ``UserError`` if there are errors or, with ``--strict``, warnings."""
    if errors := [finding.text for finding in findings if finding.level == "error"]:
        raise UserError("\n  ".join(errors))
    warnings = [finding.text for finding in findings if finding.level == "warning"]
    if warnings and strict:
        raise UserError("\n  ".join(["--strict: nothing was started because of warnings:", *warnings]))


def _shorten(items: Sequence[str]) -> str:
    more = f", and {len(items) - _SHOWN:,} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
