"""An experiment: checked before anything is trained, then its phases in order."""

from contextlib import nullcontext

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import Progress

from kd.console import make_console
from kd.data import SPLIT_FILE, LabeledImages, find_near_duplicates, write_division
from kd.models import load_classifier
from kd.pipeline import phases, run_store
from kd.pipeline.components import SKIPPED_FILE, Components, build_student, provenance_of
from kd.pipeline.lock import locked
from kd.pipeline.preparation import Prepared, prepare
from kd.pipeline.runner import Experiment, OnEpoch, Runner
from kd.pipeline.teachers import Teacher, check_teachers
from kd.preflight import Finding, check_near_duplicates, refuse
from kd.provenance import differences
from kd.settings import CONFIG_FILE, Settings, write_config
from kd.training import Interruption


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
    console, interruption = console or make_console(), Interruption()
    with interruption.listening():
        prepared = prepare(settings, console)
        runner = Runner(prepared.components, console, interruption, on_epoch)
        # One process of several writes.
        is_writer = prepared.components.writes_files and _rank() == 0
        with locked(prepared.components.folder) if is_writer else nullcontext():
            if is_writer:
                _prepare_folder(prepared.components)
            _run_phases(runner, prepared)
    # A process that ended while others still communicate would look like a failure.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    runner.experiment.is_global_zero = _rank() == 0
    return runner.experiment


def check_experiment(settings: Settings, *, console: Console | None = None) -> list[Finding]:
    """Check everything that can be checked before training, and return and print the findings.

    Raises:
        UserError: For a user's mistake, or with ``--strict`` for a warning.
    """
    console = console or make_console()
    prepared = prepare(settings, console)
    similar = _check_similar(prepared.components, console)
    for finding in similar:
        console.print(str(finding))
    refuse(similar, strict=settings.phases.strict)
    return [*prepared.findings, *similar, *check_teachers(prepared.components, console, prepared.found)]


def _check_similar(components: Components, console: Console) -> list[Finding]:
    """Find validation and test images that look like training images."""
    splits, findings = components.splits, list[Finding]()
    for kind, images in (("validation", splits.val), ("test", splits.test)):
        if images is None or not (images.files and splits.train.files):
            continue
        pairs = _find_similar(splits.train, images, f"comparing {kind} and training images", console)
        findings += check_near_duplicates(pairs, kind=kind, count=len(images))
    return findings


def _find_similar(
    first: LabeledImages, second: LabeledImages, description: str, console: Console
) -> list[tuple[str, str]] | None:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        return find_near_duplicates(
            first, second, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )


def find_teachers(settings: Settings, *, console: Console | None = None) -> tuple[str, ...]:
    """Check an experiment, and return the checkpoints that it would distill; none if they are yet to be trained.

    Raises:
        UserError: For a user's mistake, or with ``--strict`` for a warning.
    """
    return tuple(found.name for found, _ in prepare(settings, console or make_console()).found)


def _run_phases(runner: Runner, prepared: Prepared) -> None:
    """Train teachers, assistants, and for each seed the baseline and the distilled students."""
    components, settings = runner.components, runner.components.settings
    teacher = phases.provide_teacher(runner, prepared)
    if teacher is not None and components.distills:
        for number, name in enumerate(settings.models.assistants, start=1):
            teacher = phases.train_assistant(runner, teacher, number, name)
    for seed in components.seeds:
        if components.trains_baseline:
            phases.train_baseline(runner, seed)
        if teacher is not None and settings.phases.distill:
            student = build_student(components, seed)
            phases.distill(runner, "distilled", student, teacher, components.objective, seed)
        if teacher is not None:
            for text, objective in components.compared.items():
                student = build_student(components, seed)
                phases.distill(runner, "compared", student, teacher, objective, seed, text=text)
    if components.writes_files:
        _add_earlier_runs(runner, teacher)


def _rank() -> int:
    """Return the number of this process among those that train one network."""
    return getattr(rank_zero_only, "rank", None) or 0


def _prepare_folder(components: Components) -> None:
    write_config(components.settings, components.folder / CONFIG_FILE)
    if components.images.division is not None:
        write_division(components.folder / SPLIT_FILE, *components.images.division)
    if components.settings.phases.resume is None:
        (components.folder / SKIPPED_FILE).unlink(missing_ok=True)


def _add_earlier_runs(runner: Runner, teacher: Teacher | None) -> None:
    """Add comparable runs of earlier calls, so that teacher, baseline and distilled student are shown in one table."""
    components, runs = runner.components, runner.experiment.runs
    network = None if teacher is None else teacher.network
    for phase in ("baseline", "distilled"):
        if phase in runs or not (components.folder / phase).is_dir():
            continue
        if phase == "distilled" and network is None and runs.get("teacher") and runs["teacher"][0]["checkpoint"]:
            network = load_classifier(runs["teacher"][0]["checkpoint"], architecture=runs["teacher"][0]["model"])
        student = build_student(components, components.settings.phases.seed)
        provenance = provenance_of(components, phase, student, teacher=network if phase == "distilled" else None)
        found = run_store.finished_runs(components.folder / phase, provenance, components.seeds)
        earlier = [runner.with_test(record) for record in found]
        runs |= {phase: earlier} if earlier else {}
    if "teacher" not in runs and "distilled" in runs:
        paths = runs["distilled"][0]["teacher_checkpoints"]
        record = run_store.given_teacher(paths[0]).record if len(paths) == 1 else {}
        contents = components.images.contents_for(run_store.kind_of(record.get("phase", "teacher")))
        if record and not differences(record["provenance"], {"data": contents}):
            # An assistant that taught the student is shown under its own name.
            runs |= {record["phase"]: [record]}
