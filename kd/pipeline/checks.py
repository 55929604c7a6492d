"""The checks of an experiment before its first step, apart from those of its image files."""

from collections.abc import Sequence

from kd import preflight
from kd.losses import Objective
from kd.models import Classifier, Ensemble
from kd.pipeline.components import Components, student_data
from kd.preflight import Finding


def find_problems(
    components: Components,
    *,
    student: Classifier | None,
    teacher: Classifier | Ensemble | None,
    objectives: Sequence[Objective],
    trains_teacher: bool,
) -> list[Finding]:
    """Check splits, objectives, networks, schedule, memory and disk.

    Args:
        components: The parts of the experiment.
        student: The student, if one is trained.
        teacher: The teacher, or several as one, if there is one.
        objectives: Of the students that are distilled.
        trains_teacher: Whether the teacher is trained.
    """
    settings, splits = components.settings, components.splits
    optimization, models, phases = settings.optimization, settings.models, settings.phases
    findings = preflight.check_splits(splits, batch_size=components.batch_size)
    findings += preflight.check_temperature(objectives, settings.objective.temperature)
    if student is not None and teacher is not None and objectives:
        findings += preflight.check_sizes(student, teacher)
    teachers = [] if teacher is None else list(teacher.members if isinstance(teacher, Ensemble) else [teacher])
    pretrained: dict[str, list[Classifier]] = {}
    if models.teacher_pretrained and trains_teacher:
        pretrained["--teacher_pretrained"] = teachers
    if models.student_pretrained and student is not None:
        pretrained["--student_pretrained"] = [student]
    findings += preflight.check_published(
        splits, flags=list(pretrained), networks=[network for networks in pretrained.values() for network in networks]
    )
    if settings.machine.fast_dev_run:
        return findings
    findings += preflight.check_schedule(
        batches=len(student_data(components, phases.seed).train_dataloader()),
        accumulate=optimization.accumulate,
        epochs=optimization.max_epochs,
        max_steps=optimization.max_steps,
        warmup=optimization.warmup_epochs,
    )
    return findings + preflight.check_room(
        student,
        teachers,
        folder=components.folder,
        batch_size=components.batch_size,
        trains_teacher=trains_teacher,
        trainings=phases.seeds * (len(objectives) + int(phases.baseline)) or 1,
        on_cpu=components.hardware.accelerator == "cpu",
    )
