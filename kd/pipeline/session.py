"""One training of a session: started, resumed or found finished, and recorded."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from kd.models import Classifier
from kd.pipeline import run_store
from kd.pipeline.components import SKIPPED_FILE, Components
from kd.pipeline.phases import RunOptions, Teacher
from kd.pipeline.run_store import Recipe, Record, slug
from kd.settings import Settings
from kd.training import Interruption, ResumeOptions, Run, RunTensorBoard, newest_checkpoint

OnEpoch = Callable[[int, float], object]


@dataclass
class Experiment:
    """The results of an experiment.

    Args:
        folder: Where its files are.
        data: Name of the data set.
        runs: The records of the runs by phase, those of comparable earlier runs included.
        kept: Whether files were written.
        is_global_zero: Whether this process, of several, is the one that prints and writes.
    """

    folder: Path
    data: str
    runs: dict[str, list[Record]] = field(default_factory=dict)
    kept: bool = True
    is_global_zero: bool = True


@dataclass
class Session:
    """What the phases of one call share."""

    components: Components
    console: Console
    interruption: Interruption
    on_epoch: OnEpoch | None
    printed: set[str] = field(default_factory=set)
    experiment: Experiment = field(init=False)

    def __post_init__(self) -> None:
        parts = self.components
        self.experiment = Experiment(parts.folder, parts.splits.name, kept=parts.is_saved)

    def print_once(self, text: str) -> None:
        """Print a line unless it was printed before."""
        if text not in self.printed:
            self.printed.add(text)
            self.console.print(text)


def run_phase(
    session: Session,
    phase: str,
    network: Classifier,
    *,
    seed: int,
    train: Callable[[RunOptions], Run],
    image_size: int | None = None,
    teacher: Teacher | None = None,
    text: str | None = None,
) -> Run:
    """Train a network, unless ``--resume`` finds its finished run, and write its record.

    Args:
        session: What the phases share.
        phase: Its name in the summary, and its folder: ``teacher``, ``teacher/NAME``, ``assistant/NUMBER-NAME``,
            ``baseline``, ``distilled`` or ``compared``.
        network: The network.
        seed: Its seed.
        train: Trains it with the given options.
        image_size: Side of its images, in pixels; ``None``: the student's.
        teacher: What it is distilled from.
        text: How its objective is written, if it is one of several to compare.
    """
    components, settings = session.components, session.components.settings
    compute = components.hardware.compute_for(network, trains=True)
    session.print_once(f"{network.description.architecture} · training precision: {compute}")
    recipe = dict(recipe_for(components, phase, network, () if teacher is None else teacher.checkpoints))
    subfolder = phase
    if text is not None:
        recipe["loss"], subfolder = [text], f"{phase}/{slug(text)}"
    title = _title(settings, phase, network, seed, text)
    parent, interrupted = components.folder / subfolder, None
    if settings.phases.resume is not None and components.is_saved:
        finished = run_store.finished_runs(parent, recipe, [seed])
        if finished:
            session.console.print(f"{title} · already finished: {finished[0]['folder']}")
            session.experiment.runs.setdefault(phase, []).append(finished[0])
            return _as_run(finished[0])
        interrupted = run_store.find_interrupted(parent, recipe, seed=seed)
        if interrupted is not None:
            session.console.print(f"{title} · resuming {interrupted}")
    folder = interrupted or run_store.next_version(parent)
    if components.is_saved:
        rank_zero_only(run_store.write_started)(folder, seed=seed, recipe=recipe)
    run = train(_run_options(session, subfolder, folder, title, recipe, is_resumed=interrupted is not None))
    record = dataclasses.asdict(run) | {
        "history": list(run.history),
        "data": components.splits.name,
        "image_size": image_size or settings.data.image_size,
        "recipe": recipe,
        "objective": text,
        "teacher_predictions": None if teacher is None else teacher.predictions,
    }
    session.experiment.runs.setdefault(phase, []).append(record)
    if run.folder is not None:
        rank_zero_only(run_store.write_record)(Path(run.folder), record, settings)
    _print_skipped(session)
    if session.interruption.received is not None:
        session.interruption.stop(run.folder)
    return run


def _run_options(
    session: Session, phase: str, folder: Path, title: str, recipe: Recipe, *, is_resumed: bool
) -> RunOptions:
    components, settings = session.components, session.components.settings
    optimization = settings.optimization
    is_teacher = run_store.kind_of(phase) == "teacher"
    resume = ResumeOptions(
        checkpoint=newest_checkpoint(folder) if is_resumed else None,
        save_every=settings.machine.checkpoint_every,
        interruption=session.interruption,
    )
    return {
        "phase": phase,
        "folder": folder if components.is_saved else None,
        "hardware": components.hardware,
        "max_epochs": (optimization.teacher_epochs if is_teacher else None) or optimization.max_epochs,
        "max_steps": optimization.teacher_steps if is_teacher else optimization.max_steps,
        "gradient_clip": optimization.gradient_clip,
        "accumulate": optimization.accumulate,
        "loggers": [RunTensorBoard(folder, purge_step=resume.first_step)] if components.is_saved else [],
        "hyperparameters": recipe,
        "title": title,
        "console": session.console,
        "resume": resume,
        "on_epoch": session.on_epoch if phase == "distilled" else None,
    }


def recipe_for(components: Components, phase: str, network: Classifier, teachers: Sequence[str]) -> Recipe:
    """Return the settings that a phase's result depends on, with what ``auto`` resolved to for its network."""
    return run_store.recipe_of(
        components.settings,
        phase,
        devices=components.hardware.devices,
        batch_size=components.batch_size,
        compute=components.hardware.compute_for(network, trains=True),
        cached_side=components.splits.train.cached_side,
        teachers=teachers,
    )


def _title(settings: Settings, phase: str, network: Classifier, seed: int, text: str | None) -> str:
    """Return the name of a run in log lines: its phase, its network, and what tells it from others."""
    kind = phase.partition("/")[0]
    title = f"{'distilled' if kind == 'compared' else kind} {network.description.architecture}"
    parts = [] if text is None else [text]
    if settings.phases.seeds > 1 and kind in ("baseline", "distilled", "compared"):
        parts.append(f"seed {seed}")
    return " · ".join([title, *parts])


def _as_run(record: Record) -> Run:
    known: dict[str, Any] = {each.name: record[each.name] for each in dataclasses.fields(Run) if each.name in record}
    return Run(**known | {"history": tuple(record.get("history", ()))})


def _print_skipped(session: Session) -> None:
    """Count the images that couldn't be decoded during training."""
    path = session.components.folder / SKIPPED_FILE
    if session.components.settings.data.on_bad_image == "skip" and path.is_file():
        images = sorted(set(path.read_text(encoding="utf-8").splitlines()))
        plural = "image" if len(images) == 1 else "images"
        session.print_once(f"warning: {len(images):,} undecodable {plural} skipped, listed in {path}: {images[0]}")
