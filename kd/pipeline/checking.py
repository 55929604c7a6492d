"""Before the first step: the findings of an experiment that is about to run."""

from collections.abc import Sequence

from kd import preflight
from kd.losses import Objective
from kd.models import Classifier, Ensemble
from kd.pipeline.ingredients import Ingredients
from kd.preflight import Finding


def findings_of(
    made: Ingredients,
    *,
    student: Classifier | None,
    teacher: Classifier | Ensemble | None,
    objectives: Sequence[Objective],
    trains_teacher: bool,
) -> list[Finding]:
    """Look at the parts of an experiment, apart from its image files, which were looked at when they were found.

    Args:
        made: The parts.
        student: The student, if one is trained.
        teacher: Who teaches, or is trained; several as one.
        objectives: Of the students that are distilled.
        trains_teacher: Whether the teacher is trained.
    """
    settings = made.settings
    wanted, models, phases = settings.optimization, settings.models, settings.phases
    found = preflight.check_splits(made.splits, batch_size=made.batch_size)
    found += preflight.check_temperature(objectives, settings.objective.temperature)
    if student is not None and teacher is not None and objectives:
        found += preflight.check_sizes(student, teacher)
    teachers = [] if teacher is None else list(teacher.members if isinstance(teacher, Ensemble) else [teacher])
    published = [
        ("--teacher_pretrained", models.teacher_pretrained and trains_teacher, teachers),
        (
            "--student_pretrained",
            models.student_pretrained and student is not None,
            [] if student is None else [student],
        ),
    ]
    found += preflight.check_published(
        made.splits,
        flags=[flag for flag, is_on, _ in published if is_on],
        networks=[network for _, is_on, networks in published if is_on for network in networks],
    )
    if settings.machine.fast_dev_run:
        return found
    found += preflight.check_schedule(
        batches=len(made.student_data(phases.seed).train_dataloader()),
        accumulate=wanted.accumulate,
        epochs=wanted.max_epochs,
        max_steps=wanted.max_steps,
        warmup=wanted.warmup_epochs,
    )
    students = phases.seeds * (len(objectives) + int(phases.baseline)) or 1
    return found + preflight.check_room(
        student,
        teachers,
        folder=made.folder,
        batch_size=made.batch_size,
        trains_teacher=trains_teacher,
        trainings=students,
        on_cpu=made.hardware.accelerator == "cpu",
    )
