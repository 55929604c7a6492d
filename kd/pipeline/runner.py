"""Running the trainings of an experiment: started, resumed or found finished, and recorded."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers import Logger
from rich.console import Console

from kd.data import Batches
from kd.files import write_json
from kd.metrics import best_thresholds
from kd.models import Classifier, load_classifier, write_thresholds
from kd.pipeline import run_store
from kd.pipeline.components import SKIPPED_FILE, Components, provenance_of, test_data
from kd.pipeline.run_store import Record, slug
from kd.pipeline.teachers import Teacher, measure_on_test
from kd.training import (
    TEST_FILE,
    ClassifierModule,
    Interruption,
    PredictionRecorder,
    ResumeOptions,
    Run,
    build_loggers,
    evaluate,
    newest_checkpoint,
    train,
)

OnEpoch = Callable[[int, float], object]


@dataclass
class Experiment:
    """The results of an experiment.

    Args:
        folder: Where its files are.
        data: Name of the data set.
        runs: The records of the runs by phase, those of comparable earlier runs included.
        teachers: The teachers that were not trained here, by phase.
        kept: Whether files were written.
        is_global_zero: Whether this process, of several, is the one that prints and writes.
    """

    folder: Path
    data: str
    runs: dict[str, list[Record]] = field(default_factory=dict)
    teachers: dict[str, Classifier] = field(default_factory=dict)
    kept: bool = True
    is_global_zero: bool = True


class Runner:
    """Runs the trainings of an experiment, and collects their records.

    Args:
        components: The parts of the experiment.
        console: Where progress is printed.
        interruption: Whether to stop after a training.
        on_epoch: Called after each epoch of the distilled student.
    """

    def __init__(
        self, components: Components, console: Console, interruption: Interruption, on_epoch: OnEpoch | None
    ) -> None:
        self.components = components
        self.console = console
        self.experiment = Experiment(components.folder, components.splits.name, kept=components.writes_files)
        self._interruption = interruption
        self._on_epoch = on_epoch
        self._printed = set[str]()

    def print_once(self, text: str) -> None:
        """Print a line unless it was printed before."""
        if text not in self._printed:
            self._printed.add(text)
            self.console.print(text)

    def run(
        self,
        phase: str,
        module: ClassifierModule,
        data: Batches,
        *,
        teacher: Teacher | None = None,
        objective: str | None = None,
    ) -> Record:
        """Train a network, unless ``--resume`` finds its finished run, and write its record.

        Args:
            phase: Its name in the summary, and its folder: ``teacher``, ``teacher/NAME``, ``assistant/NUMBER-NAME``,
                ``baseline``, ``distilled`` or ``compared``.
            module: The network and how it is optimized.
            data: The images.
            teacher: What it is distilled from.
            objective: How its objective is written, if it is one of several to compare.
        """
        components, network, seed = self.components, module.model, data.seed
        compute = components.hardware.compute_for(network, trains=True)
        self.print_once(f"{network.description.architecture} · training precision: {compute}")
        taught_by = None if teacher is None else teacher.network
        provenance = provenance_of(components, phase, network, objective=objective, teacher=taught_by)
        title = self._title(phase, network.description.architecture, seed, objective)
        subfolder = phase if objective is None else f"{phase}/{slug(objective)}"
        parent, interrupted = components.folder / subfolder, None
        if components.settings.phases.resume is not None and components.writes_files:
            for record in run_store.finished_runs(parent, provenance, [seed]):
                self.console.print(f"{title} · already finished: {record['folder']}")
                self.experiment.runs.setdefault(phase, []).append(self.with_test(record))
                return record
            interrupted = run_store.find_interrupted(parent, provenance, seed=seed, console=self.console)
            if interrupted is not None:
                shorter = run_store.read_record(interrupted / run_store.METRICS_FILE)
                self.console.print(f"{title} · {'resuming' if shorter is None else 'extending'} {interrupted}")
                if shorter is not None:
                    self._note_extension(shorter, provenance["settings"], module)
        folder = interrupted or run_store.next_version(parent)
        checkpoint = None if interrupted is None else newest_checkpoint(interrupted, self.console)
        if components.writes_files:
            rank_zero_only(run_store.write_started)(folder, seed=seed, provenance=provenance)
            rank_zero_only(run_store.reopen)(folder)
        run = self._train(
            subfolder, module, data, folder=folder, title=title, values=provenance["settings"], checkpoint=checkpoint
        )
        record = asdict(run) | {
            "history": list(run.history),
            "data": components.splits.name,
            "image_size": network.description.image_size,
            "provenance": provenance,
            "objective": objective,
            "teacher_checkpoints": [] if teacher is None else list(teacher.checkpoints),
            "teacher_predictions": None if teacher is None else teacher.predictions,
        }
        if run.folder is not None:
            rank_zero_only(run_store.write_record)(Path(run.folder), record, components.settings)
        if self._interruption.received is None:
            if components.splits.multilabel and record["checkpoint"]:
                self._choose_thresholds(record, data)
            self.with_test(record)
        self.experiment.runs.setdefault(phase, []).append(record)
        self._print_skipped()
        if self._interruption.received is not None:
            self._interruption.stop(run.folder)
        return record

    def _note_extension(self, record: Record, settings: Mapping[str, Any], module: ClassifierModule) -> None:
        """Print what more epochs mean for the schedules of a finished run."""
        epochs, schedule = settings["max_epochs"], settings["schedule"]
        is_prefix = schedule in ("constant", "step", "multistep") and not module.objective.is_scheduled
        effect = f"the result is that of {epochs} epochs at once"
        if not is_prefix:
            effect = (
                f"the schedules of {record['epochs']} epochs have ended, and go on as those of {epochs}: the learning "
                f"rate rises again, and the result differs from {epochs} epochs at once"
            )
        self.console.print(f"note: from {record['epochs']} to {epochs} epochs: {effect}")

    def _choose_thresholds(self, record: Record, data: Batches) -> None:
        """Write into a run's best checkpoint the probability from which on each class is predicted."""
        path, recorder = Path(record["checkpoint"]), PredictionRecorder()
        network = load_classifier(path, architecture=record["model"])
        evaluate(network, data, hardware=replace(self.components.hardware, limit_val_batches=1.0), predictions=recorder)
        targets, logits = recorder.validated
        rank_zero_only(write_thresholds)(path, best_thresholds(logits, targets))

    def with_test(self, record: Record) -> Record:
        """Measure a run's best checkpoint on the test images, unless it was; return its record with the results."""
        components, checkpoint = self.components, record["checkpoint"]
        data = test_data(components, record["image_size"])
        images = None if data is None else data.splits.val.describe()
        if data is None or checkpoint is None or not Path(checkpoint).is_file() or record.get("test_images") == images:
            return record
        network = load_classifier(checkpoint, architecture=record["model"])
        record |= measure_on_test(components, network, data, Path(record["folder"]) / TEST_FILE)
        record["test_images"] = images
        rank_zero_only(write_json)(Path(record["folder"]) / run_store.METRICS_FILE, record)
        return record

    def _train(
        self,
        phase: str,
        module: ClassifierModule,
        data: Batches,
        *,
        folder: Path,
        title: str,
        values: Mapping[str, Any],
        checkpoint: Path | None,
    ) -> Run:
        components, settings = self.components, self.components.settings
        optimization, is_teacher = settings.optimization, run_store.kind_of(phase) == "teacher"
        resume = ResumeOptions(checkpoint, settings.machine.checkpoint_every, self._interruption)
        return train(
            module,
            data,
            phase=phase,
            folder=folder if components.writes_files else None,
            hardware=components.hardware,
            max_epochs=(is_teacher and optimization.teacher_epochs) or optimization.max_epochs,
            max_steps=optimization.teacher_steps if is_teacher else optimization.max_steps,
            gradient_clip=optimization.gradient_clip,
            accumulate=optimization.accumulate,
            early_stopping=optimization.early_stopping,
            loggers=self._loggers(folder, first_step=resume.first_step) if components.writes_files else [],
            hyperparameters=values,
            title=title,
            console=self.console,
            resume=resume,
            on_epoch=self._on_epoch if phase == "distilled" else None,
        )

    def _loggers(self, folder: Path, *, first_step: int) -> list[Logger]:
        """Build the loggers of a run; on the server of a logger it is called as its folder within the experiment."""
        place = self.components.folder
        return build_loggers(
            self.components.settings.machine.logger,
            folder=folder,
            root=place.parent,
            experiment=place.absolute().name,
            run=folder.relative_to(place).as_posix(),
            first_step=first_step,
        )

    def _title(self, phase: str, architecture: str, seed: int, objective: str | None) -> str:
        """Return the name of a run in log lines: its phase, its network, and what tells it from others."""
        kind = phase.partition("/")[0]
        parts = [f"{'distilled' if kind == 'compared' else kind} {architecture}", *([objective] if objective else [])]
        if len(self.components.seeds) > 1 and kind in ("baseline", "distilled", "compared"):
            parts.append(f"seed {seed}")
        return " · ".join(parts)

    def _print_skipped(self) -> None:
        """Print the number of images that couldn't be decoded during training."""
        path = self.components.folder / SKIPPED_FILE
        if self.components.settings.data.on_bad_image == "skip" and path.is_file():
            images = sorted(set(path.read_text(encoding="utf-8").splitlines()))
            plural = "image" if len(images) == 1 else "images"
            self.print_once(f"warning: {len(images):,} undecodable {plural} skipped, listed in {path}: {images[0]}")
