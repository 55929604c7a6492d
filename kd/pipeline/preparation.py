"""Everything about an experiment that can be checked before its first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.console import Console

from kd import preflight
from kd.errors import UserError
from kd.models import Classifier, Embedder, Ensemble
from kd.pipeline.components import (
    Components,
    build_baseline_objective,
    build_components,
    build_network,
    build_recipe,
    build_student,
    losses_of,
    student_data,
    with_teachers_head,
)
from kd.pipeline.run_store import FoundTeacher
from kd.pipeline.teachers import check_teacher_flags, combine, trained_teachers, untrained_teachers
from kd.preflight import Finding
from kd.provenance import differences
from kd.randomness import seeded
from kd.settings import ObjectiveSettings, Settings
from kd.teachers import FrozenTeacher, has_stored_logits
from kd.training import DistillationModule, check_loggers


@dataclass(frozen=True)
class Prepared:
    """An experiment that was checked.

    Args:
        components: Its parts.
        untrained: The teachers to train, each with its seed.
        found: The teachers that were trained before.
        findings: Warnings and notes.
    """

    components: Components
    untrained: list[tuple[int, Classifier]]
    found: list[tuple[FoundTeacher, Classifier]]
    findings: list[Finding]


def prepare(settings: Settings, console: Console) -> Prepared:
    """Build the parts of an experiment, print what will be trained, and find what is wrong before the first batch.

    Raises:
        UserError: For a user's mistake, or with ``--strict`` for a warning.
    """
    components = build_components(settings, console)
    _check_flags(components)
    _note_unused_loss(components, console)
    for note in components.notes:
        console.print(note)
    seed, distills, trains_teacher = settings.phases.seed, components.distills, settings.phases.train_teacher
    student = build_student(components, seed) if components.trains_baseline or distills else None
    names = settings.models.assistants if distills else ()
    assistants = [build_network(components, "assistant", name, seed) for name in names]
    untrained = untrained_teachers(components) if trains_teacher else []
    found = trained_teachers(components, console) if distills and not trains_teacher else []
    teachers = [network for _, network in (*untrained, *found)]
    teacher = combine(teachers, settings) if teachers else None
    _print_networks(components, console, student=student, teacher=teacher)
    for each, _ in found:
        origin = "own or published weights" if each.checkpoint is None else str(each.checkpoint)
        console.print(f"teacher checkpoint: {origin}")
        contents = components.images.contents_for("teacher")
        if each.record and (changed := differences(each.record["provenance"], {"data": contents})):
            console.print(f"note: this teacher was trained with other images: {'; '.join(map(str, changed))}")
    findings = [*components.images.findings, *_find_problems(components, student, teacher, teachers)]
    for finding in findings:
        console.print(str(finding))
    preflight.refuse(findings, strict=settings.phases.strict)
    if student is not None and teacher is not None and distills:
        _try_objectives(components, console, [teacher, *assistants, student])
    return Prepared(components, untrained, found, findings)


def _check_flags(components: Components) -> None:
    """Refuse flags that contradict each other."""
    settings = components.settings
    check_teacher_flags(settings)
    check_loggers(settings.machine.logger)
    if components.trains_baseline:
        build_baseline_objective(components)
    if any(objective is components.objective and not objective.needs_teacher for objective in components.objectives):
        raise UserError(
            f"--distill --loss {' '.join(settings.objective.loss)}: there is nothing to distill, as no term uses the "
            "teacher; add one such as kl=0.9, or train with --baseline"
        )
    if components.trains_baseline and not len(components.splits.train):
        raise UserError("--baseline: there are no labeled training images; only --distill can use unlabeled ones")
    _check_optimization(settings)
    if settings.optimization.ema is not None and settings.machine.precision in ("bf16-true", "16-true"):
        raise UserError(
            f"--ema --precision {settings.machine.precision}: half precision is too coarse for an average of weights; "
            "use bf16-mixed"
        )


def _check_optimization(settings: Settings) -> None:
    """Refuse settings of the optimization that have no effect or contradict each other."""
    optimization = settings.optimization
    # Unknown optimizers and options are refused here.
    build_recipe(settings).build_optimizer(torch.nn.Linear(2, 2))
    if optimization.nesterov and (optimization.optimizer != "sgd" or not optimization.momentum):
        raise UserError("--nesterov: is a kind of momentum of sgd; add --optimizer sgd and a --momentum above 0")
    _check_lr_schedule(settings)
    if optimization.swa is not None:
        if optimization.ema is not None:
            raise UserError("--swa --ema: both average the weights; drop one of them")
        if optimization.swa > optimization.max_epochs:
            raise UserError(f"--swa {optimization.swa}: never reached, as --max_epochs is {optimization.max_epochs}")
    for name, given in (("freeze", None), ("teacher_freeze", optimization.teacher_epochs)):
        value, epochs = getattr(optimization, name), given or optimization.max_epochs
        if isinstance(value, int) and value >= epochs:
            raise UserError(f"--{name} {value}: all {epochs} epochs; write --{name} backbone for a linear probe")
        if value is not None and optimization.update_bn:
            raise UserError(f"--{name} --update_bn: the statistics of frozen layers are kept; drop one of them")


def _check_lr_schedule(settings: Settings) -> None:
    """Refuse settings of another schedule, and milestones that are never reached."""
    optimization, defaults = settings.optimization, Settings().optimization
    if optimization.schedule == "multistep" and not optimization.milestones:
        raise UserError("--schedule multistep: needs --milestones, such as 150 180 210 of 240 epochs")
    for name, schedules in (
        ("milestones", "multistep"),
        ("step_epochs", "step"),
        ("poly_power", "poly"),
        ("gamma", "step or multistep"),
    ):
        value = getattr(optimization, name)
        if value != getattr(defaults, name) and optimization.schedule not in schedules.split(" or "):
            text = " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
            raise UserError(f"--{name} {text}: only used by --schedule {schedules}, not {optimization.schedule}")
    epochs = max(optimization.max_epochs, optimization.teacher_epochs or 0)
    if late := [milestone for milestone in optimization.milestones if milestone >= epochs]:
        raise UserError(f"--milestones {late[0]:g}: never reached in {epochs} epochs")


def _note_unused_loss(components: Components, console: Console) -> None:
    """Note that no phase minimizes the objective that was given."""
    loss = components.settings.objective.loss
    if loss != ObjectiveSettings().loss and components.objective not in components.objectives:
        console.print(
            f"note: --loss {' '.join(loss)}: not used, as no student is distilled with it (--distill); the "
            f"baseline minimizes --baseline_loss {' '.join(components.settings.objective.baseline_loss)}"
        )


def _print_networks(
    components: Components, console: Console, *, student: Classifier | None, teacher: Classifier | Ensemble | None
) -> None:
    """Print the data, and how teacher and student are trained."""
    settings, splits = components.settings, components.splits
    sizes = f"{len(splits.train):,} training and {len(splits.val):,} validation images, {len(splits.classes)} classes"
    console.print(f"data      {splits.name}: {sizes}")
    if teacher is not None:
        source = "trained on the labels" if settings.phases.train_teacher else "trained before"
        console.print(f"teacher   {_described(teacher)}: {source}")
    if student is not None:
        trainings = ["trained on labels only"] if components.trains_baseline else []
        if settings.phases.distill:
            trainings.append(f"distilled with {' '.join(losses_of(settings, splits.multilabel, 'loss'))}")
        if components.compared:
            trainings.append(f"distilled with each of {len(components.compared)} objectives")
        seeds = f" ({settings.phases.seeds} seeds)" if settings.phases.seeds > 1 else ""
        console.print(f"student   {_described(student)}: {', and '.join(trainings)}{seeds}")


def _described(network: Classifier | Ensemble) -> str:
    return f"{network.description.architecture}, {network.count_parameters():,} parameters"


def _find_problems(
    components: Components,
    student: Classifier | None,
    teacher: Classifier | Ensemble | None,
    teachers: Sequence[Classifier],
) -> list[Finding]:
    """Check splits, objectives, networks, schedule, memory and disk."""
    settings, splits = components.settings, components.splits
    optimization, models, phases = settings.optimization, settings.models, settings.phases
    findings = preflight.check_splits(splits, unlabeled=components.images.unlabeled, batch_size=components.batch_size)
    findings += preflight.check_temperature(components.objectives, settings.objective.temperature)
    if student is not None and teacher is not None and components.distills:
        findings += preflight.check_sizes(student, teacher)
    pretrained: dict[str, Sequence[Classifier]] = {}
    if models.teacher_pretrained and phases.train_teacher:
        pretrained["--teacher_pretrained"] = teachers
    if models.student_pretrained and student is not None:
        pretrained["--student_pretrained"] = [student]
    findings += preflight.check_published(
        splits, flags=list(pretrained), networks=[network for networks in pretrained.values() for network in networks]
    )
    if settings.machine.fast_dev_run:
        return findings
    data = student_data(components, phases.seed)
    findings += preflight.check_shared_memory(data.shared_memory(), num_workers=components.num_workers)
    findings += preflight.check_schedule(
        batches=len(data.train_dataloader()),
        accumulate=optimization.accumulate,
        epochs=optimization.max_epochs,
        max_steps=optimization.max_steps,
        warmup=optimization.warmup_epochs,
    )
    return findings + preflight.check_resources(
        student,
        teachers,
        folder=components.folder,
        batch_size=components.batch_size,
        trains_teacher=phases.train_teacher,
        trainings=phases.seeds * (len(components.objectives) + int(phases.baseline)) or 1,
        on_cpu=components.hardware.accelerator == "cpu",
    )


def _try_objectives(components: Components, console: Console, chain: Sequence[Classifier | Ensemble]) -> None:
    """Compute each objective that compares features or gradients once on random images, before any training.

    Raises:
        UserError: If one can't be computed or differentiated.
    """
    headless = [objective for objective in components.objectives if not objective.trains_head]
    if headless:
        terms = ", ".join(" ".join(term.name for term in objective.terms) for objective in headless)
        console.print(
            f"note: {terms}: no term uses the student's logits, so its last layer isn't trained; add one such as ce"
        )
    pairs = list(pairwise(chain))
    # The objectives that are compared are the student's only, at the end of the chain.
    trials = [(components.objective, *pair) for pair in (pairs if components.settings.phases.distill else pairs[:-1])]
    trials += [(objective, *pairs[-1]) for objective in components.compared.values()]
    for objective, teacher, student in trials:
        assert isinstance(student, Classifier)  # noqa: S101 (for the type checker: only the first may be an ensemble)
        if isinstance(teacher, Embedder) and (refused := objective.terms_on_predictions):
            raise UserError(
                f"--loss {refused[0].name}: compares predictions, but --teacher_features leaves the teacher "
                f"{teacher.description.architecture} its features only; use ce and embedding, or other feature losses"
            )
        if has_stored_logits(teacher) and (objective.feature_terms or objective.needs_gradients):
            terms = " ".join(term.name for term in objective.terms)
            raise UserError(
                f"--loss {terms}: compares features or input gradients, but stored logits serve losses on logits "
                "alone, such as ce=0.1 kl=0.9"
            )
        if objective.reuses_head:
            student = with_teachers_head(student, teacher, components.settings.phases.seed)  # noqa: PLW2901
        if objective.feature_terms or objective.needs_gradients:
            with seeded("dry run"):
                DistillationModule(teacher=FrozenTeacher(teacher), student=student, objective=objective).dry_run()
