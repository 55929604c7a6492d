"""Training one network after another, and keeping account of it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from kd.data import Batches
from kd.models import Compute
from kd.pipeline.ingredients import LEFT_OUT_FILE, Ingredients, slug
from kd.pipeline.records import (
    Facts,
    earlier_runs,
    find_begun,
    is_teacher,
    relevant_settings,
    write_begun,
    write_facts,
)
from kd.pipeline.teacher import given_teacher
from kd.training import (
    ClassifierModule,
    Interruption,
    ResumeOptions,
    Run,
    RunTensorBoard,
    newest_checkpoint,
    train,
)

_TITLES = {
    "teacher": "Teacher",
    "assistant": "Assistant",
    "baseline": "Student alone",
    "distilled": "Student distilled",
}


OnEpoch = Callable[[int, float], object]


class Taught(Protocol):
    """Who a student learns from."""

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Where the weights come from."""

    @property
    def predictions(self) -> str | None:
        """The file of what was said of the validation images."""


@dataclass
class Experiment:
    """What a call did.

    Args:
        folder: Where its files are.
        data: Name of the data set.
        runs: What each training came to, by phase; with those of earlier calls that were trained alike.
        kept: Whether there are files.
        is_global_zero: Whether this process, of several, is the one that speaks and writes.
    """

    folder: Path
    data: str
    runs: dict[str, list[Facts]] = field(default_factory=dict)
    kept: bool = True
    is_global_zero: bool = True


class Journal:
    """Trains what it is given, and writes down what it came to.

    Args:
        made: The parts of the experiment.
        console: Where to say what happens.
        on_epoch: As of :func:`run_experiment`.
    """

    def __init__(self, made: Ingredients, console: Console, on_epoch: OnEpoch | None = None) -> None:
        self.made = made
        self.console = console
        self.on_epoch = on_epoch
        self.interruption = Interruption()
        self._said: set[str] = set()
        self.experiment = Experiment(made.folder, made.splits.name, kept=not made.settings.machine.fast_dev_run)

    def say_once(self, text: str) -> None:
        """Say something that has not been said yet."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    @rank_zero_only
    def say(self, text: str) -> None:
        """Say something to the person."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def train(
        self,
        phase: str,
        module: ClassifierModule,
        data: Batches,
        *,
        teacher: "Taught | None" = None,
        written: str | None = None,
    ) -> Run:
        """Train a network.

        Args:
            phase: ``teacher``, ``teacher/NAME``, ``assistant/NUMBER-NAME``, ``baseline``, ``distilled`` or
                ``compared``: its folder in the experiment's, and its name in the summary.
            module: The network and its objective.
            data: The images.
            teacher: Who it learns from: the checkpoints, and the file of what they said of the validation images.
            written: The objective as it is written, of those that are compared.
        """
        settings = self.made.settings
        wanted = settings.optimization
        compute = self.made.hardware.compute_for(module.model, trains=True)
        relevant = self._relevant(phase, compute, () if teacher is None else teacher.checkpoints)
        self.say_once(f"{module.model.description.architecture} trains in {compute}.")
        if written is not None:
            relevant["loss"] = [written]
        title = self._title(phase, data.seed, written)
        folder = self.made.folder / (phase if written is None else f"{phase}/{slug(written)}")
        begun = None
        if settings.phases.resume is not None and not settings.machine.fast_dev_run:
            finished = earlier_runs(folder, relevant, [data.seed])
            if finished:
                self.say(f"{title}: was finished before, in {finished[0]['folder']}")
                self.experiment.runs.setdefault(phase, []).append(finished[0])
                return _as_run(finished[0])
            begun = find_begun(folder, relevant, seed=data.seed)
            if begun is not None:
                self.say(f"{title}: goes on in {begun}")
        version = begun or _next_version(folder)
        resume = ResumeOptions(
            checkpoint=None if begun is None else newest_checkpoint(begun),
            save_every=settings.machine.checkpoint_every,
            interruption=self.interruption,
        )
        if self.experiment.kept:
            rank_zero_only(write_begun)(version, seed=data.seed, relevant=relevant)
        run = train(
            module,
            data,
            phase=phase if written is None else f"{phase}/{slug(written)}",
            folder=version if self.experiment.kept else None,
            hardware=self.made.hardware,
            max_epochs=(wanted.teacher_epochs or wanted.max_epochs) if is_teacher(phase) else wanted.max_epochs,
            max_steps=wanted.teacher_steps if is_teacher(phase) else wanted.max_steps,
            gradient_clip=wanted.gradient_clip,
            accumulate=wanted.accumulate,
            hyperparameters=relevant,
            title=title,
            console=self.console,
            loggers=[RunTensorBoard(version, purge_step=resume.first_step)] if self.experiment.kept else [],
            resume=resume,
            on_epoch=self.on_epoch if phase == "distilled" else None,
        )
        facts = dataclasses.asdict(run) | {
            "history": list(run.history),
            "data": self.made.splits.name,
            "image_size": data.image_size,
            "recipe": relevant,
            "objective": written,
            "teacher_predictions": None if teacher is None else teacher.predictions,
        }
        self.experiment.runs.setdefault(phase, []).append(facts)
        if run.folder is not None:
            rank_zero_only(write_facts)(Path(run.folder), facts, settings)
        self._say_what_was_left_out()
        if self.interruption.received is not None:
            self.interruption.stop(run.folder)
        return run

    def _say_what_was_left_out(self) -> None:
        """Count the images that could not be decoded while training."""
        noted = self.made.folder / LEFT_OUT_FILE
        if self.made.settings.data.on_bad_image != "skip" or not noted.is_file():
            return
        images = sorted(set(noted.read_text(encoding="utf-8").splitlines()))
        count = "one image" if len(images) == 1 else f"{len(images):,} images"
        self.say_once(
            f"Warning: {count} could not be decoded and went missing from their batches ({noted}): {images[0]}"
        )

    def _relevant(self, phase: str, compute: Compute, teachers: tuple[str, ...]) -> Facts:
        return relevant_settings(
            self.made.settings,
            phase,
            devices=self.made.hardware.devices,
            batch_size=self.made.batch_size,
            compute=compute,
            decoded=self.made.splits.train.cached_side,
            teachers=teachers,
        )

    def add_earlier_runs(self, teachers: tuple[str, ...]) -> None:
        """Add what earlier calls trained alike, so that teacher, baseline and distilled meet in one table.

        Args:
            teachers: The checkpoints that the student learns from, where they are known.
        """
        phases, runs = self.made.settings.phases, self.experiment.runs
        if not self.experiment.kept:
            return
        seeds = range(phases.seed, phases.seed + phases.seeds)
        missing = [phase for phase in ("baseline", "distilled") if phase not in runs]
        compute = self.made.hardware.compute_for(self.made.student(phases.seed), trains=True) if missing else None
        for phase in missing:
            if compute is not None:
                earlier = earlier_runs(self.made.folder / phase, self._relevant(phase, compute, teachers), seeds)
                runs |= {phase: earlier} if earlier else {}
        if "teacher" not in runs and "distilled" in runs:
            teacher = runs["distilled"][0]["recipe"]["teacher"]
            metrics = given_teacher(teacher).metrics if isinstance(teacher, str) else {}
            # The assistant that taught a student stands in the table under its own name.
            runs |= {metrics.get("phase", "teacher"): [metrics]} if metrics else {}

    def _title(self, phase: str, seed: int, written: str | None) -> str:
        kind, _, which = phase.partition("/")
        title = f"Student distilled with {written}" if written is not None else _TITLES[kind]
        if which:
            title = f"{title} {which}"
        several = self.made.settings.phases.seeds > 1 and kind in ("baseline", "distilled", "compared")
        return f"{title}, seed {seed}" if several else title


def _next_version(folder: Path) -> Path:
    """Return the folder of a new run of a phase: ``version_`` with the next number."""
    numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return folder / f"version_{max((int(number) for number in numbers if number.isdigit()), default=-1) + 1}"


def _as_run(facts: Facts) -> Run:
    """Return what a training came to, from what was written of it."""
    known = {field.name: facts[field.name] for field in dataclasses.fields(Run) if field.name in facts}
    return Run(**known | {"history": tuple(facts.get("history", ()))})
