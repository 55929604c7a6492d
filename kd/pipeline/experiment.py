"""An experiment: checked before anything is trained, then its phases in order."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from kd.console import make_console
from kd.data import Batches, ImageData
from kd.errors import UserError
from kd.losses import Objective
from kd.models import Classifier, Ensemble, load_classifier
from kd.pipeline import phases, run_store
from kd.pipeline.caches import logit_store
from kd.pipeline.checks import find_problems
from kd.pipeline.components import (
    SKIPPED_FILE,
    Components,
    build_assistant,
    build_components,
    build_recipe,
    build_student,
    student_data,
    teacher_data,
)
from kd.pipeline.phases import RunOptions, Teacher
from kd.pipeline.run_store import FoundTeacher, slug
from kd.pipeline.session import Experiment, OnEpoch, Session, recipe_for, run_phase
from kd.pipeline.teachers import (
    check_teachers,
    combine,
    measure_teacher,
    teacher_phase,
    teacher_seeds,
    teacher_sizes,
    trained_teachers,
    untrained_teachers,
)
from kd.preflight import Finding, refuse
from kd.settings import CONFIG_FILE, Settings, write_config
from kd.teachers import FrozenTeacher, LogitStore
from kd.training import Interruption, Run, build_trainer


def run_experiment(
    settings: Settings, *, console: Console | None = None, on_epoch: OnEpoch | None = None
) -> Experiment:
    """Run the phases that the settings name.

    Args:
        settings: All settings; if they name no phase, the student is trained on the labels.
        console: Where progress is printed.
        on_epoch: Called after each epoch of the distilled student with the epoch, from 0 for each seed, and the
            validation accuracy, in [0, 1]; an exception from it ends the experiment.

    Raises:
        UserError: For a user's mistake, before the first batch.
        Interrupted: After SIGTERM or SIGINT, once a checkpoint is saved.
    """
    interruption = Interruption()
    with interruption.listening():
        plan = _prepare(settings, console or make_console())
        session = Session(plan.components, plan.console, interruption, on_epoch)
        _run_phases(plan, session)
    # A process that ended while others still communicate would look like a failure.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    session.experiment.is_global_zero = getattr(rank_zero_only, "rank", 0) in (0, None)
    return session.experiment


def check_experiment(settings: Settings, *, console: Console | None = None) -> list[Finding]:
    """Check everything that can be checked before training.

    Args:
        settings: As for :func:`run_experiment`.
        console: Where findings are printed.

    Returns:
        The findings.

    Raises:
        UserError: For an error, or with ``--strict`` for a warning.
    """
    plan = _prepare(settings, console or make_console())
    return [*plan.findings, *check_teachers(plan.components, plan.console, plan.found)]


def find_teachers(settings: Settings, *, console: Console | None = None) -> tuple[str, ...]:
    """Check everything that can be checked before training, and return the checkpoints that would be distilled.

    Args:
        settings: As for :func:`run_experiment`.
        console: Where findings are printed.

    Returns:
        Their paths; none if they are yet to be trained.

    Raises:
        UserError: For a user's mistake.
    """
    return tuple(str(found.checkpoint) for found, _ in _prepare(settings, console or make_console()).found)


@dataclass(frozen=True)
class _Plan:
    """A checked experiment: its parts, and the teachers that are trained or were found."""

    components: Components
    console: Console
    untrained: list[Classifier]
    found: list[tuple[FoundTeacher, Classifier]]
    findings: list[Finding]
    trains_baseline: bool
    distills: bool


def _prepare(settings: Settings, console: Console) -> _Plan:
    """Build the parts of an experiment, and find what is wrong before the first batch.

    Raises:
        UserError: For a user's mistake.
    """
    components = build_components(settings, console)
    objectives = _objectives(components)
    distills = settings.phases.distill or bool(components.compared)
    trains_teacher = settings.phases.train_teacher
    trains_baseline = settings.phases.baseline or not (trains_teacher or distills)
    if settings.optimization.ema is not None and settings.machine.precision in ("bf16-true", "16-true"):
        raise UserError(
            f"--ema --precision {settings.machine.precision}: an average of weights doesn't move in half precision; "
            "use bf16-mixed"
        )
    for note in components.notes:
        console.print(note)
    # Hardware that Lightning doesn't support is refused here.
    build_trainer(components.hardware, logger=False, enable_checkpointing=False)
    student = build_student(components, settings.phases.seed) if trains_baseline or distills else None
    assistants = (
        [build_assistant(components, name, settings.phases.seed) for name in settings.models.assistants]
        if distills
        else []
    )
    teacher_sizes(settings)
    untrained = untrained_teachers(components) if trains_teacher else []
    found = trained_teachers(components) if distills and not trains_teacher else []
    teachers = untrained or [classifier for _, classifier in found]
    teacher = combine(teachers, settings) if teachers else None
    _print_plan(components, console, student=student, teacher=teacher, trains_baseline=trains_baseline)
    for each, _ in found:
        console.print(f"teacher checkpoint: {each.checkpoint}")
    findings = [
        *components.images.findings,
        *find_problems(
            components,
            student=student,
            teacher=teacher,
            objectives=objectives if distills else [],
            trains_teacher=trains_teacher,
        ),
    ]
    for finding in findings:
        console.print(str(finding))
    refuse(findings, strict=settings.phases.strict)
    if student is not None and teacher is not None and distills:
        _try_chain(components, console, [teacher, *assistants, student])
    return _Plan(components, console, untrained, found, findings, trains_baseline, distills)


def _objectives(components: Components) -> list[Objective]:
    """Return all objectives that are distilled with; the assistants have the student's."""
    settings = components.settings
    compared = list(components.compared.values())
    if not (settings.phases.distill or (compared and settings.models.assistants)):
        return compared
    if not components.objective.needs_teacher:
        raise UserError(
            f"--distill --loss {' '.join(settings.objective.loss)}: there is nothing to distill, as no term uses the "
            "teacher; add one such as kl=0.9, or train with --baseline"
        )
    return [components.objective, *compared]


def _print_plan(
    components: Components,
    console: Console,
    *,
    student: Classifier | None,
    teacher: Classifier | Ensemble | None,
    trains_baseline: bool,
) -> None:
    """Print what will be trained: data, teacher, student."""
    settings, splits = components.settings, components.splits
    sizes = f"{len(splits.train):,} training and {len(splits.val):,} validation images, {len(splits.classes)} classes"
    console.print(f"data      {splits.name}: {sizes}")
    if teacher is not None:
        source = "trained on the labels" if settings.phases.train_teacher else "trained before"
        console.print(f"teacher   {_described(teacher)}: {source}")
    if student is not None:
        ways = ["trained on labels only"] if trains_baseline else []
        if settings.phases.distill:
            ways.append(f"distilled with {' '.join(settings.objective.loss)}")
        if components.compared:
            ways.append(f"distilled with each of {len(components.compared)} objectives")
        seeds = f" ({settings.phases.seeds} seeds)" if settings.phases.seeds > 1 else ""
        console.print(f"student   {_described(student)}: {', and '.join(ways)}{seeds}")


def _described(network: Classifier | Ensemble) -> str:
    return f"{network.description.architecture}, {network.count_parameters():,} parameters"


def _try_chain(components: Components, console: Console, chain: Sequence[Classifier | Ensemble]) -> None:
    """Compute each objective once for the networks that it compares."""
    objectives = _objectives(components)
    headless = [" ".join(term.name for term in each.terms) for each in objectives if not each.trains_head]
    if headless:
        console.print(
            f"note: {', '.join(headless)}: no term uses the student's logits, so its last layer isn't trained; add one "
            "such as ce"
        )
    pairs = list(itertools.pairwise(chain))
    # The objectives that are compared are the student's only, at the end of the chain.
    trials = [(components.objective, *pair) for pair in (pairs if components.settings.phases.distill else pairs[:-1])]
    trials += [(objective, *pairs[-1]) for objective in components.compared.values()]
    for objective, teacher, student in trials:
        assert isinstance(student, Classifier)  # noqa: S101 (for the type checker: only the first may be an ensemble)
        phases.try_step(teacher, student, objective)


def _run_phases(plan: _Plan, session: Session) -> None:
    """Train teachers, assistants, and for each seed the baseline and the distilled students."""
    components, settings = plan.components, plan.components.settings
    _prepare_folder(components)
    teacher, checkpoints = _teach(plan, session)
    if teacher is not None and plan.distills:
        for number, name in enumerate(settings.models.assistants, start=1):
            teacher = _train_assistant(session, teacher, number, name)
    for seed in range(settings.phases.seed, settings.phases.seed + settings.phases.seeds):
        if plan.trains_baseline:
            _train_baseline(session, seed)
        if teacher is not None and settings.phases.distill:
            student = build_student(components, seed)
            _distill(session, "distilled", student, teacher, components.objective, seed=seed)
        if teacher is not None:
            for text, objective in components.compared.items():
                student = build_student(components, seed)
                _distill(session, "compared", student, teacher, objective, seed=seed, text=text)
    if components.is_saved:
        _add_earlier_runs(session, teacher.checkpoints if teacher is not None else checkpoints)


@rank_zero_only
def _prepare_folder(components: Components) -> None:
    if not components.is_saved:
        return
    try:
        write_config(components.settings, components.folder / CONFIG_FILE)
        if components.settings.phases.resume is None:
            (components.folder / SKIPPED_FILE).unlink(missing_ok=True)
    except OSError as error:
        root = components.folder.parent
        raise UserError(f"--default_root_dir {root}: can't write there: {error}; choose another folder") from None


def _teach(plan: _Plan, session: Session) -> tuple[Teacher | None, tuple[str, ...]]:
    """Train the teachers or take those that were found, measure them, and combine several.

    Returns:
        The teacher, ``None`` if it isn't needed by a student, and the checkpoints of the teachers just trained.

    Raises:
        UserError: If one is no better than chance.
    """
    components, settings = plan.components, plan.components.settings
    teachers = [classifier for _, classifier in plan.found]
    checkpoints = [str(found.checkpoint) for found, _ in plan.found]
    for network, seed in zip(plan.untrained, teacher_seeds(settings), strict=False):
        run, teacher = _train_teacher(session, network, seed)
        teachers.append(teacher)
        checkpoints += [run.checkpoint] if run.checkpoint else []
    trained = tuple(checkpoints) if plan.untrained else ()
    several = len(teachers) > 1
    if not teachers or not (plan.distills or several):
        return None, trained
    measure = partial(measure_teacher, components, session.console)
    measured = [
        measure(
            "teacher", network, phase=teacher_phase(components, network), checkpoints=checkpoints[index : index + 1]
        )
        for index, network in enumerate(teachers)
    ]
    _record_teachers(plan, session, measured)
    if not several:
        return measured[0], trained
    ensemble = measure("ensemble", combine(teachers, settings), phase="teacher", checkpoints=checkpoints)
    session.experiment.runs["teacher"] = [
        {
            "phase": "teacher",
            "seed": None,
            "model": ensemble.network.description.architecture,
            "parameters": ensemble.network.count_parameters(),
            "val_acc": ensemble.accuracy,
            "best_val_acc": ensemble.accuracy,
            "checkpoint": None,
            "validation": ensemble.predictions,
        }
    ]
    return ensemble, trained


def _record_teachers(plan: _Plan, session: Session, measured: Sequence[Teacher]) -> None:
    """Put the accuracy on the student's validation images into the teachers' records."""
    components, runs = plan.components, session.experiment.runs
    for network, teacher in zip(plan.untrained, measured, strict=False):
        if network.description.image_size != components.settings.data.image_size:
            phase, accuracy = teacher_phase(components, network), teacher.accuracy
            runs[phase] = [record | {"val_acc": accuracy, "best_val_acc": accuracy} for record in runs[phase]]
    for (found, network), teacher in zip(plan.found, measured, strict=False):
        phase = teacher_phase(components, network)
        record = found.record_here(network, teacher.accuracy) | {"phase": phase, "validation": teacher.predictions}
        runs.setdefault(phase, []).append(record)


def _train_teacher(session: Session, network: Classifier, seed: int) -> tuple[Run, Classifier]:
    components, settings = session.components, session.components.settings
    size = network.description.image_size
    train = partial(
        phases.train_teacher,
        network,
        teacher_data(components, seed, size),
        recipe=build_recipe(settings, learning_rate=settings.optimization.teacher_learning_rate),
        label_smoothing=settings.objective.teacher_label_smoothing,
        seed=seed,
    )
    phase = teacher_phase(components, network)
    run = run_phase(session, phase, network, seed=seed, image_size=size, train=lambda options: train(options=options))
    return run, load_classifier(run.checkpoint, architecture=run.model) if run.checkpoint else network


def _train_baseline(session: Session, seed: int) -> None:
    components, settings = session.components, session.components.settings
    student = build_student(components, seed)
    train = partial(
        phases.train_baseline,
        student,
        student_data(components, seed),
        recipe=build_recipe(settings),
        label_smoothing=settings.objective.label_smoothing,
        mixing=components.mixing,
        ema=settings.optimization.ema,
        seed=seed,
    )
    run_phase(session, "baseline", student, seed=seed, train=lambda options: train(options=options))


def _train_assistant(session: Session, teacher: Teacher, number: int, name: str) -> Teacher:
    """Distill an assistant, and return it as the next teacher."""
    components, seed = session.components, session.components.settings.phases.seed
    network = build_assistant(components, name, seed)
    run = _distill(session, f"assistant/{number}-{slug(name)}", network, teacher, components.objective, seed=seed)
    if run.checkpoint:
        network = load_classifier(run.checkpoint, architecture=run.model)
    checkpoints = [run.checkpoint] if run.checkpoint else []
    return measure_teacher(components, session.console, "assistant", network, phase=run.phase, checkpoints=checkpoints)


def _distill(
    session: Session,
    phase: str,
    student: Classifier,
    teacher: Teacher,
    objective: Objective,
    *,
    seed: int,
    text: str | None = None,
) -> Run:
    components, settings = session.components, session.components.settings
    data = student_data(components, seed, objective)
    compute = components.hardware.compute_for(teacher.network, trains=False)
    session.print_once(f"{teacher.network.description.architecture} · inference precision: {compute}")
    stores: list[LogitStore | None] = []

    def train(options: RunOptions) -> Run:
        run, store = phases.distill(
            student,
            data,
            teacher=teacher,
            frozen=FrozenTeacher(teacher.network, compute=compute, compiled=components.hardware.compile),
            objective=objective,
            recipe=build_recipe(settings),
            mixing=components.mixing,
            ema=settings.optimization.ema,
            open_store=_store_opener(components, teacher.network, data),
            seed=seed,
            options=options,
        )
        stores.append(store)
        return run

    run = run_phase(session, phase, student, seed=seed, train=train, teacher=teacher, text=text)
    for store in stores:
        if store is not None:
            _print_store(session.console, store)
    return run


def _store_opener(
    components: Components, network: Classifier | Ensemble, data: Batches
) -> Callable[[int, int], LogitStore | None] | None:
    # Streams may be too long to be stored.
    if not components.is_saved or not isinstance(data, ImageData):
        return None
    hardware = components.hardware
    return logit_store(
        network,
        data,
        compute=hardware.compute_for(network, trains=False),
        where=components.settings.data.teacher_cache,
        devices=hardware.accelerator,
        compiled=hardware.compile,
        top=components.settings.data.teacher_top,
    )


def _print_store(console: Console, store: LogitStore) -> None:
    if store.read_batches:
        computed = f", {store.written_batches:,} computed" if store.written_batches else ""
        console.print(f"teacher logits: {store.read_batches:,} batches read from the cache{computed}")
    if store.top is not None and store.written_batches:
        console.print(
            f"teacher logits: the largest {store.top:,} of {store.classes:,} kept; soft targets at temperature 4 "
            f"differ by {store.lost:.2g} nats"
        )


def _add_earlier_runs(session: Session, teachers: Sequence[str]) -> None:
    """Add comparable runs of earlier calls, so that teacher, baseline and distilled student meet in one table.

    Args:
        session: What the phases share.
        teachers: The checkpoints that the student learns from, if they are known.
    """
    components, runs = session.components, session.experiment.runs
    settings = components.settings
    seeds = range(settings.phases.seed, settings.phases.seed + settings.phases.seeds)
    missing = [phase for phase in ("baseline", "distilled") if phase not in runs]
    student = build_student(components, settings.phases.seed) if missing else None
    for phase in missing:
        if student is not None:
            recipe = recipe_for(components, phase, student, teachers)
            earlier = run_store.finished_runs(components.folder / phase, recipe, seeds)
            runs |= {phase: earlier} if earlier else {}
    if "teacher" not in runs and "distilled" in runs:
        teacher = runs["distilled"][0]["recipe"]["teacher"]
        record = run_store.given_teacher(teacher).record if isinstance(teacher, str) else {}
        # An assistant that taught the student stands in the table under its own name.
        runs |= {record.get("phase", "teacher"): [record]} if record else {}
