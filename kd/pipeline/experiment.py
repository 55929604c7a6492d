"""The phases in order: the teacher, then for each seed the student alone and the student distilled."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from kd.data import ImageData
from kd.errors import UserError
from kd.losses import Objective, build_objective
from kd.models import Classifier, load_classifier
from kd.pipeline.ingredients import Ingredients
from kd.pipeline.records import Facts, earlier_runs, relevant_settings, write_facts
from kd.pipeline.teacher import (
    FoundTeacher,
    chance,
    find_teacher,
    given_teacher,
    is_no_better_than_chance,
    load_teacher,
)
from kd.settings import Settings
from kd.sources import write_config
from kd.training import ClassifierModule, DistillationModule, FrozenTeacher, Run, build_trainer, evaluate, train

_TITLES = {"teacher": "Teacher", "baseline": "Student alone", "distilled": "Student distilled"}


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


def run_experiment(settings: Settings, *, console: Console | None = None) -> Experiment:
    """Run the phases that the settings name.

    Args:
        settings: All settings; with no phase named, the student is trained on the labels.
        console: Where to say what happens.

    Raises:
        UserError: For a person's mistake, before the first batch.
    """
    return _Pipeline(settings, console or Console()).run()


class _Pipeline:
    """One call: what can be wrong is looked at in the constructor, before the first batch."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        phases = settings.phases
        self.compares = bool(settings.objective.compare_losses)
        # Either needs a teacher.
        self.distills = phases.distill or self.compares
        self.baseline = phases.baseline or not (phases.train_teacher or self.distills)
        self.made = Ingredients.prepare(settings)
        self.experiment = Experiment(self.made.folder, self.made.splits.name, kept=not settings.machine.fast_dev_run)
        if phases.distill and not self.made.objective.needs_teacher:
            raise UserError(
                f"--distill --loss {' '.join(settings.objective.loss)}: there is nothing to distil, as no term looks "
                "at the teacher; add one such as kl=0.9, or use --baseline"
            )
        if phases.train_teacher and settings.models.teacher_checkpoint is not None:
            raise UserError("--train_teacher trains a teacher and --teacher_checkpoint names one: which one is meant?")
        for remark in self.made.remarks:
            self._say(remark)
        # What Lightning can't run on is refused here, too.
        build_trainer(self.made.hardware, logger=False, enable_checkpointing=False)
        if self.baseline or self.distills:
            self.made.student(phases.seed)
        self.untrained = self.made.teacher(phases.seed) if phases.train_teacher else None
        self.found = self._find_teacher() if self.distills and not phases.train_teacher else None

    def run(self) -> Experiment:
        phases = self.settings.phases
        if self.experiment.kept:
            try:
                rank_zero_only(write_config)(self.settings, self.made.folder / "config.yaml")
            except OSError as error:
                raise UserError(f"--default_root_dir {self.made.root}: nothing can be written there: {error}") from None
        teacher = self.found[1] if self.found is not None else None
        if self.untrained is not None:
            teacher = self._train_teacher(self.untrained)
        teacher_acc = self._measure(teacher) if self.distills and teacher is not None else None
        for seed in range(phases.seed, phases.seed + phases.seeds):
            if self.baseline:
                self._train_student("baseline", self._baseline(seed))
            if phases.distill and teacher is not None:
                self._train_student("distilled", self._distillation(seed, teacher, teacher_acc, self.made.objective))
            for written, objective in self.made.compared.items():
                if teacher is not None:
                    module = self._distillation(seed, teacher, teacher_acc, objective)
                    self._train_student("compared", module, written=written)
        self._add_earlier_runs()
        self.experiment.is_global_zero = getattr(rank_zero_only, "rank", 0) in (0, None)
        return self.experiment

    @rank_zero_only
    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _find_teacher(self) -> tuple[FoundTeacher, Classifier]:
        models, made = self.settings.models, self.made
        size = self.settings.data.image_size
        if models.teacher_checkpoint is not None:
            found = given_teacher(models.teacher_checkpoint)
        else:
            name = made.splits.name
            found = find_teacher(made.root, made.folder, data=name, model=models.teacher_model, image_size=size)
        self._say(f"Teacher: {found.checkpoint}")
        teacher = load_teacher(found.checkpoint, model=models.teacher_model, splits=made.splits)
        made_for = teacher.description.image_size
        if made_for != size:
            raise UserError(
                f"the teacher {found.checkpoint} was trained on images of {made_for} px, and --image_size is {size}; "
                "teacher and student see the same view"
            )
        return found, teacher

    def _train_teacher(self, untrained: Classifier) -> Classifier:
        wanted, seed = self.settings.optimization, self.settings.phases.seed
        module = ClassifierModule(
            untrained,
            objective=build_objective("ce", label_smoothing=self.settings.objective.teacher_label_smoothing),
            recipe=self.made.recipe(wanted.teacher_learning_rate),
            seed=seed,
        )
        data = self.made.data(seed, train_fraction=self.settings.data.teacher_train_fraction)
        epochs = wanted.teacher_epochs or wanted.max_epochs
        run = self._train("teacher", module, data, max_epochs=epochs, max_steps=wanted.teacher_steps)
        return load_classifier(run.checkpoint, architecture=run.model) if run.checkpoint else module.model

    def _measure(self, teacher: Classifier) -> float:
        """Measure the teacher on the student's validation images, and refuse one that has learnt nothing."""
        # On all of them, whatever --limit_val_batches says: the first batches hold the first classes alone.
        hardware = dataclasses.replace(self.made.hardware, limit_val_batches=1.0)
        accuracy = evaluate(teacher, self.made.data(self.settings.phases.seed), hardware=hardware)["val/acc"]
        labels = self.made.splits.val.labels
        name = teacher.description.architecture
        self._say(f"The teacher, {name}, is right on {accuracy:.1%} of the validation images.")
        if is_no_better_than_chance(accuracy, labels):
            words = (
                f"the teacher's accuracy, {accuracy:.1%}, is no better than chance: always to say the most frequent "
                f"class would be right on {chance(labels):.1%}"
            )
            if not (self.settings.machine.fast_dev_run or self.settings.phases.allow_weak_teacher):
                raise UserError(f"{words}; train it longer, or distil it all the same with --allow_weak_teacher")
            self._say(f"Warning: {words}.")
        if self.found is not None:
            self.experiment.runs["teacher"] = [self.found[0].facts(teacher, accuracy)]
        return accuracy

    def _baseline(self, seed: int) -> ClassifierModule:
        return ClassifierModule(
            self.made.student(seed),
            objective=build_objective("ce", label_smoothing=self.settings.objective.label_smoothing),
            recipe=self.made.recipe(),
            seed=seed,
        )

    def _distillation(
        self, seed: int, teacher: Classifier, teacher_acc: float | None, objective: Objective
    ) -> ClassifierModule:
        return DistillationModule(
            teacher=FrozenTeacher(teacher),
            student=self.made.student(seed),
            objective=objective,
            recipe=self.made.recipe(),
            seed=seed,
            teacher_acc=teacher_acc,
        )

    def _train_student(self, phase: str, module: ClassifierModule, *, written: str | None = None) -> None:
        wanted = self.settings.optimization
        data = self.made.data(module.seed, train_fraction=self.settings.data.train_fraction)
        self._train(phase, module, data, max_epochs=wanted.max_epochs, max_steps=wanted.max_steps, written=written)

    def _train(
        self,
        phase: str,
        module: ClassifierModule,
        data: ImageData,
        *,
        max_epochs: int,
        max_steps: int | None,
        written: str | None = None,
    ) -> Run:
        wanted = self.settings.optimization
        title = _TITLES[phase] if written is None else f"Student distilled with {written}"
        relevant = self._relevant(phase) if written is None else self._relevant(phase) | {"loss": [written]}
        run = train(
            module,
            data,
            phase=phase if written is None else f"{phase}/{re.sub(r'[^0-9A-Za-z.]+', '_', written).strip('_')}",
            folder=self.made.folder,
            hardware=self.made.hardware,
            max_epochs=max_epochs,
            max_steps=max_steps,
            gradient_clip=wanted.gradient_clip,
            accumulate=wanted.accumulate,
            hyperparameters=relevant,
            title=title if self.settings.phases.seeds == 1 or phase == "teacher" else f"{title}, seed {data.seed}",
            console=self.console,
        )
        facts = dataclasses.asdict(run) | {
            "data": self.made.splits.name,
            "image_size": self.settings.data.image_size,
            "recipe": relevant,
            "objective": written,
        }
        self.experiment.runs.setdefault(phase, []).append(facts)
        if run.folder is not None:
            rank_zero_only(write_facts)(Path(run.folder), facts, self.settings)
        return run

    def _relevant(self, phase: str) -> Facts:
        teachers = self.experiment.runs.get("teacher")
        return relevant_settings(
            self.settings,
            phase,
            devices=self.made.hardware.devices,
            precision=self.made.hardware.precision,
            teacher=teachers[0]["checkpoint"] if teachers else None,
        )

    def _add_earlier_runs(self) -> None:
        """Add what earlier calls trained alike, so that teacher, baseline and distilled meet in one table."""
        phases, runs = self.settings.phases, self.experiment.runs
        if not self.experiment.kept:
            return
        seeds = range(phases.seed, phases.seed + phases.seeds)
        for phase in ("baseline", "distilled"):
            if phase not in runs:
                earlier = earlier_runs(self.made.folder / phase, self._relevant(phase), seeds)
                runs |= {phase: earlier} if earlier else {}
        if "teacher" not in runs and "distilled" in runs:
            teacher = given_teacher(runs["distilled"][0]["recipe"]["teacher"])
            runs |= {"teacher": [teacher.metrics]} if teacher.metrics else {}
