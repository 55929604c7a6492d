"""The teachers of an experiment: found among earlier runs or given, combined, and measured before they teach."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from kd.errors import UserError
from kd.models import Classifier, Ensemble, accuracy_in
from kd.pipeline.components import Components, build_teacher, student_data
from kd.pipeline.phases import Teacher
from kd.pipeline.run_store import FoundTeacher, find_teacher, given_teacher, short_digest, slug
from kd.preflight import Finding, check_accuracy, refuse
from kd.settings import Settings
from kd.teachers import is_no_better_than_chance, load_teacher, majority_share
from kd.training import PredictionRecorder, evaluate

_CHECKED_IMAGES = 512


def teacher_sizes(settings: Settings) -> list[int]:
    """Return the image size of each teacher in pixels, after refusing flags that contradict each other.

    Raises:
        UserError: If the numbers of networks, checkpoints, weights and sizes don't fit.
    """
    phases, models = settings.phases, settings.models
    if phases.train_teacher and models.teacher_checkpoint:
        raise UserError("--train_teacher --teacher_checkpoint: the teacher is either trained or loaded; drop one flag")
    count = len(models.teacher_model)
    if not count:
        raise UserError("--teacher_model: name at least one network")
    for flag, values, may_be_single in (
        ("--teacher_checkpoint", models.teacher_checkpoint, False),
        ("--teacher_weights", models.teacher_weights, False),
        ("--teacher_image_size", models.teacher_image_size, True),
    ):
        if len(values) not in ({0, 1, count} if may_be_single else {0, count}):
            text = " ".join(map(str, values))
            raise UserError(f"{flag} {text}: {len(values)} given, but --teacher_model names {count}; give one for each")
    if models.teacher_weights and not sum(models.teacher_weights) > 0:
        raise UserError("--teacher_weights: at least one weight must be positive")
    sizes = list(models.teacher_image_size or [settings.data.image_size])
    return sizes * count if len(sizes) == 1 else sizes


def teacher_seeds(settings: Settings) -> list[int]:
    """Return the seed of each teacher: if a network is named again, its seed is the next one."""
    names = settings.models.teacher_model
    return [settings.phases.seed + names[:index].count(name) for index, name in enumerate(names)]


def untrained_teachers(components: Components) -> list[Classifier]:
    """Build the teachers that ``--train_teacher`` trains."""
    settings = components.settings
    triples = zip(settings.models.teacher_model, teacher_seeds(settings), teacher_sizes(settings), strict=True)
    return [build_teacher(components, name, seed, size) for name, seed, size in triples]


def trained_teachers(components: Components) -> list[tuple[FoundTeacher, Classifier]]:
    """Load the teachers that were trained before: those that ``--teacher_checkpoint`` names, or the newest that fit.

    Raises:
        UserError: If one isn't found, or doesn't fit the data.
    """
    settings, splits = components.settings, components.splits
    models = settings.models
    kinds = list(zip(models.teacher_model, teacher_sizes(settings), strict=True))
    found: list[FoundTeacher] = [given_teacher(path) for path in models.teacher_checkpoint]
    for name, size in kinds[len(found) :]:
        root = components.folder.parent
        found.append(
            find_teacher(root, components.folder, data=splits.name, model=name, image_size=size, besides=found)
        )
    if not models.teacher_checkpoint:
        # Networks that are named several times keep the order of their seeds, so that each keeps its weight.
        for kind in set(kinds):
            places = [index for index, other in enumerate(kinds) if other == kind]
            by_seed = sorted((found[index] for index in places), key=lambda teacher: teacher.seed)
            for index, teacher in zip(places, by_seed, strict=True):
                found[index] = teacher
    loaded = [
        load_teacher(teacher.checkpoint, model=name, classes=splits.classes, data=splits.name, image_size=size)
        for teacher, (name, size) in zip(found, kinds, strict=True)
    ]
    return list(zip(found, loaded, strict=True))


def combine(teachers: Sequence[Classifier], settings: Settings) -> Classifier | Ensemble:
    """Return the single teacher, or several as an ensemble."""
    if len(teachers) == 1:
        return teachers[0]
    models = settings.models
    return Ensemble(list(teachers), weights=models.teacher_weights, average=models.teacher_average)


def teacher_phase(components: Components, teacher: Classifier) -> str:
    """Return the phase that trains a teacher: ``teacher``, or ``teacher/NAME`` if there are several."""
    several = len(components.settings.models.teacher_model) > 1
    return f"teacher/{slug(teacher.description.architecture)}" if several else "teacher"


def measure_teacher(
    components: Components,
    console: Console,
    role: str,
    network: Classifier | Ensemble,
    *,
    phase: str,
    checkpoints: Sequence[str],
) -> Teacher:
    """Measure a teacher on the student's validation images, and refuse it if it is no better than chance.

    Args:
        components: The parts of the experiment.
        console: Where the accuracy is printed.
        role: ``teacher``, ``assistant`` or ``ensemble``.
        network: The network.
        phase: The phase that trained it.
        checkpoints: The files that its weights come from.

    Raises:
        UserError: If it is no better than chance, and ``--allow_weak_teacher`` isn't set.
    """
    # On all images, whatever --limit_val_batches: the first batches hold the first classes only.
    hardware = replace(components.hardware, limit_val_batches=1.0)
    # As it will teach: an ensemble resizes the images for each member.
    ensemble = network if isinstance(network, Ensemble) else Ensemble([network])
    path = components.folder / "predictions" / f"{slug(phase)}-{short_digest(chr(0).join(checkpoints))}.npz"
    recorder = PredictionRecorder(path if components.is_saved else None)
    data = student_data(components, components.settings.phases.seed)
    accuracy = evaluate(ensemble, data, hardware=hardware, predictions=recorder)["val/acc"]
    console.print(f"{role} {network.description.architecture} · validation accuracy {accuracy:.1%}")
    findings = []
    if len(checkpoints) == 1 and components.is_saved:
        findings = check_accuracy(
            said=accuracy_in(Path(checkpoints[0])),
            measured=accuracy,
            images=len(components.splits.val),
            whose=f"the {role}",
        )
    _judge(components, console, role, accuracy, findings)
    predictions = None if recorder.path is None else str(recorder.path)
    return Teacher(network, tuple(checkpoints), accuracy, predictions, recorder.decisions)


def check_teachers(
    components: Components, console: Console, teachers: Sequence[tuple[FoundTeacher, Classifier]]
) -> list[Finding]:
    """Measure trained teachers on the first validation images, and compare with what their checkpoints record.

    Raises:
        UserError: If one is no better than chance, and ``--allow_weak_teacher`` isn't set.
    """
    findings: list[Finding] = []
    batches = -(-_CHECKED_IMAGES // components.batch_size)
    hardware = replace(components.hardware, limit_val_batches=batches)
    images = min(len(components.splits.val), batches * components.batch_size)
    for found, teacher in teachers:
        data = student_data(components, components.settings.phases.seed)
        accuracy = evaluate(Ensemble([teacher]), data, hardware=hardware)["val/acc"]
        name = f"the teacher {teacher.description.architecture}"
        console.print(
            f"teacher {teacher.description.architecture} · accuracy {accuracy:.1%} on {images:,} validation images"
        )
        recorded = accuracy_in(found.checkpoint)
        accuracy_findings = check_accuracy(said=recorded, measured=accuracy, images=images, whose=name)
        findings += _judge(components, console, "teacher", accuracy, accuracy_findings)
    return findings


def _judge(
    components: Components, console: Console, role: str, accuracy: float, findings: Sequence[Finding]
) -> list[Finding]:
    """Print findings about a teacher, refuse one that is no better than chance, and return all findings."""
    settings, labels = components.settings, components.splits.val.labels
    for finding in findings:
        console.print(str(finding))
    refuse(findings, strict=settings.phases.strict)
    if not is_no_better_than_chance(accuracy, labels):
        return [*findings]
    text = (
        f"the {role}'s accuracy of {accuracy:.1%} is no better than chance: always predicting the most frequent class "
        f"gives {majority_share(labels):.1%}"
    )
    if not (settings.machine.fast_dev_run or settings.phases.allow_weak_teacher):
        raise UserError(f"{text}; train it longer, or distill it nevertheless with --allow_weak_teacher")
    weak = Finding("warning", f"{text}.")
    console.print(str(weak))
    return [*findings, weak]
