"""One function per phase: each builds a module from the experiment's parts and trains it."""

from collections.abc import Callable

from rich.console import Console

from kd.data import Batches, ImageData
from kd.losses import Objective, build_objective
from kd.models import Classifier, Ensemble, load_classifier
from kd.pipeline.caches import logit_store
from kd.pipeline.components import (
    Components,
    build_baseline_objective,
    build_network,
    build_recipe,
    build_student,
    build_teacher_recipe,
    student_data,
    teacher_data,
    with_teachers_head,
)
from kd.pipeline.preparation import Prepared
from kd.pipeline.run_store import Record, slug
from kd.pipeline.runner import Runner
from kd.pipeline.teachers import Teacher, combine, file_facts, measure_teacher, teacher_phase
from kd.teachers import FrozenTeacher, LogitStore, has_stored_logits
from kd.training import ClassifierModule, DistillationModule

_MEASURED = ("val_acc", "best_val_acc", "score", "best_score", "test_acc", "test_score")
"""What is measured of a teacher on the student's views."""


def provide_teacher(runner: Runner, prepared: Prepared) -> Teacher | None:
    """Train the teachers or take those that were found, measure them, and combine several.

    Returns:
        The teacher, or ``None`` if no student needs it.

    Raises:
        UserError: If one is no better than chance.
    """
    components, runs = runner.components, runner.experiment.runs
    teachers = [train_teacher(runner, network, seed) for seed, network in prepared.untrained]
    teachers += [
        (None if found.checkpoint is None else str(found.checkpoint), network) for found, network in prepared.found
    ]
    if not teachers or not (components.distills or len(teachers) > 1):
        return None
    measured = []
    for index, (checkpoint, network) in enumerate(teachers):
        phase, checkpoints = teacher_phase(components, network), [checkpoint] if checkpoint else []
        teacher = measure_teacher(components, runner.console, "teacher", network, phase=phase, checkpoints=checkpoints)
        measured.append(teacher)
        if teacher.accuracy is None:
            # Without predictions, there is nothing to report.
            continue
        if prepared.found:
            found = prepared.found[index][0]
            facts = file_facts(found.checkpoint, network.description.architecture)
            provenance = found.record.get("provenance", {}) | {"teacher": facts}
            if not has_stored_logits(network):
                runner.experiment.teachers[phase] = network
            earlier = {"seed": None} | found.record | {"provenance": provenance}
            runs.setdefault(phase, []).append(earlier | _record_of(teacher, phase) | {"checkpoint": checkpoint})
        elif network.description.image_size != components.settings.data.image_size:
            # Its run measured it on its own views.
            record = next(record for record in runs[phase] if record["checkpoint"] == checkpoint)
            record |= {key: value for key, value in _record_of(teacher, phase).items() if key in _MEASURED}
    if len(teachers) == 1:
        return measured[0]
    ensemble = measure_teacher(
        components,
        runner.console,
        "ensemble",
        combine([network for _, network in teachers], components.settings),
        phase="teacher",
        checkpoints=[checkpoint for checkpoint, _ in teachers if checkpoint],
    )
    runs["teacher"] = [_record_of(ensemble, "teacher") | {"seed": None, "checkpoint": None}]
    return ensemble


def train_teacher(runner: Runner, network: Classifier, seed: int) -> tuple[str | None, Classifier]:
    """Train a teacher on the labels; return its best checkpoint and the network in it."""
    components, settings = runner.components, runner.components.settings
    module = ClassifierModule(
        network,
        objective=build_objective(
            "bce" if components.splits.multilabel else "ce",
            num_classes=len(components.splits.classes),
            multilabel=components.splits.multilabel,
            label_smoothing=settings.objective.teacher_label_smoothing,
            class_weights=components.class_weights,
        ),
        recipe=build_teacher_recipe(settings),
        seed=seed,
        metric=components.metric,
    )
    data = teacher_data(components, seed, network.description.image_size)
    record = runner.run(teacher_phase(components, network), module, data)
    return record["checkpoint"], _best_network(record, network)


def train_baseline(runner: Runner, seed: int) -> None:
    """Train the student on the labels alone."""
    components, settings = runner.components, runner.components.settings
    module = ClassifierModule(
        build_student(components, seed),
        objective=build_baseline_objective(components),
        recipe=build_recipe(settings),
        seed=seed,
        mixing=components.mixing,
        ema=settings.optimization.ema,
        metric=components.metric,
    )
    runner.run("baseline", module, student_data(components, seed))


def train_assistant(runner: Runner, teacher: Teacher, number: int, name: str) -> Teacher:
    """Distill an assistant, and return it as the next teacher."""
    components, seed = runner.components, runner.components.settings.phases.seed
    network, phase = build_network(components, "assistant", name, seed), f"assistant/{number}-{slug(name)}"
    record = distill(runner, phase, network, teacher, components.objective, seed)
    checkpoints = [record["checkpoint"]] if record["checkpoint"] else []
    network = _best_network(record, network)
    return measure_teacher(components, runner.console, "assistant", network, phase=phase, checkpoints=checkpoints)


def distill(
    runner: Runner,
    phase: str,
    student: Classifier,
    teacher: Teacher,
    objective: Objective,
    seed: int,
    *,
    text: str | None = None,
) -> Record:
    """Train a student, or an assistant, to match a teacher.

    Args:
        runner: Runs the training.
        phase: ``distilled``, ``compared`` or ``assistant/...``.
        student: The student.
        teacher: The teacher.
        objective: What the student minimizes.
        seed: Seed of the student and of its images.
        text: How the objective is written, if it is one of several to compare.
    """
    components, settings = runner.components, runner.components.settings
    if objective.reuses_head:
        student = with_teachers_head(student, teacher.network, seed)
    compute = components.hardware.compute_for(teacher.network, trains=False)
    runner.print_once(f"{teacher.network.description.architecture} · inference precision: {compute}")
    data = student_data(components, seed, objective)
    module = DistillationModule(
        teacher=FrozenTeacher(teacher.network, compute=compute, compiled=components.hardware.compile),
        student=student,
        objective=objective,
        recipe=build_recipe(settings),
        seed=seed,
        teacher_acc=teacher.accuracy,
        teacher_decisions=teacher.decisions,
        mixing=components.mixing,
        ema=settings.optimization.ema,
        has_unlabeled=data.has_unlabeled,
        metric=components.metric,
        open_store=_store_opener(components, teacher.network, data),
    )
    record = runner.run(phase, module, data, teacher=teacher, objective=text)
    if module.store is not None:
        _print_store(module.store, runner.console)
    return record


def _record_of(teacher: Teacher, phase: str) -> Record:
    """Return the record of a teacher as it was measured here."""
    return {
        "phase": phase,
        "model": teacher.network.description.architecture,
        "parameters": teacher.network.count_parameters(),
        "val_acc": teacher.accuracy,
        "best_val_acc": teacher.accuracy,
        "score": teacher.score,
        "best_score": teacher.score,
        "validation": teacher.predictions,
        **teacher.tested,
    }


def _best_network(record: Record, network: Classifier) -> Classifier:
    """Return the network in a run's best checkpoint; without one, the network as it was trained."""
    checkpoint = record["checkpoint"]
    return load_classifier(checkpoint, architecture=record["model"]) if checkpoint else network


def _store_opener(
    components: Components, network: Classifier | Ensemble, data: Batches
) -> Callable[[int, int], LogitStore | None] | None:
    # Streams may be too long to be stored.
    if has_stored_logits(network) or not components.writes_files or not isinstance(data, ImageData):
        return None
    hardware, settings = components.hardware, components.settings.data
    return logit_store(
        network,
        data,
        compute=hardware.compute_for(network, trains=False),
        where=settings.teacher_cache,
        limit=settings.cache_limit,
        devices=hardware.accelerator,
        compiled=hardware.compile,
        top=settings.teacher_top,
    )


def _print_store(store: LogitStore, console: Console) -> None:
    if store.read_batches:
        computed = f", {store.written_batches:,} computed" if store.written_batches else ""
        console.print(f"teacher logits: {store.read_batches:,} batches read from the cache{computed}")
    if store.problem is not None:
        console.print(f"note: not all of the teacher's logits are stored: {store.problem}")
    if store.top is not None and store.written_batches:
        console.print(
            f"teacher logits: the largest {store.top:,} of {store.classes:,} kept; soft targets at temperature 4 "
            f"differ by {store.divergence:.2g} nats"
        )
