"""The phases in order: teachers, assistants, then for each seed the student alone and the student distilled."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from kd.errors import UserError
from kd.losses import Objective, build_objective
from kd.models import Classifier, Ensemble, load_classifier
from kd.pipeline.ingredients import Ingredients, slug
from kd.pipeline.journal import Experiment, Journal
from kd.pipeline.teacher import (
    FoundTeacher,
    chance,
    find_teacher,
    given_teacher,
    is_no_better_than_chance,
    load_teacher,
)
from kd.randomness import seeded
from kd.settings import Settings
from kd.sources import write_config
from kd.training import ClassifierModule, DistillationModule, FrozenTeacher, Run, build_trainer, evaluate


@dataclass(frozen=True)
class _Teacher:
    """A network that teaches: a teacher, several as one, or an assistant.

    Args:
        network: The network.
        checkpoints: Where its weights come from; none in a trial run.
        accuracy: On the student's validation images, a fraction of 1.
    """

    network: Classifier | Ensemble
    checkpoints: tuple[str, ...]
    accuracy: float


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
        phases, models = settings.phases, settings.models
        # To compare objectives needs a teacher, too.
        self.distills = phases.distill or bool(settings.objective.compare_losses)
        self.baseline = phases.baseline or not (phases.train_teacher or self.distills)
        self.made = Ingredients.prepare(settings)
        self.journal = Journal(self.made, console)
        self.objectives = ([self.made.objective] if phases.distill or models.assistants else []) + list(
            self.made.compared.values()
        )
        self.sizes = self._check_flags()
        for remark in self.made.remarks:
            self.journal.say(remark)
        # What Lightning can't run on is refused here, too.
        build_trainer(self.made.hardware, logger=False, enable_checkpointing=False)
        student = self.made.student(phases.seed) if self.baseline or self.distills else None
        assistants = [self.made.assistant(name, phases.seed) for name in models.assistants] if self.distills else []
        self.untrained = self._untrained_teachers() if phases.train_teacher else []
        self.found = self._find_teachers() if self.distills and not phases.train_teacher else []
        if self.distills and student is not None:
            teachers = self.untrained or [classifier for _, classifier in self.found]
            self._rehearse([self._as_one(teachers), *assistants, student])

    def run(self) -> Experiment:
        phases, made = self.settings.phases, self.made
        if self.journal.experiment.kept:
            try:
                rank_zero_only(write_config)(self.settings, made.folder / "config.yaml")
            except OSError as error:
                raise UserError(f"--default_root_dir {made.root}: nothing can be written there: {error}") from None
        teacher = self._teach()
        if teacher is not None and self.distills:
            for number, name in enumerate(self.settings.models.assistants, start=1):
                teacher = self._assist(teacher, number, name)
        for seed in range(phases.seed, phases.seed + phases.seeds):
            if self.baseline:
                self._train_baseline(seed)
            if teacher is not None and phases.distill:
                self._distil("distilled", made.student(seed), teacher, made.objective, seed=seed)
            for written, objective in made.compared.items():
                if teacher is not None:
                    self._distil("compared", made.student(seed), teacher, objective, seed=seed, written=written)
        self.journal.add_earlier_runs(teacher.checkpoints if teacher is not None and self.distills else ())
        experiment = self.journal.experiment
        experiment.is_global_zero = getattr(rank_zero_only, "rank", 0) in (0, None)
        return experiment

    def _check_flags(self) -> list[int]:
        """Refuse flags that contradict one another; return the image size of each teacher."""
        phases, models = self.settings.phases, self.settings.models
        if phases.distill and not self.made.objective.needs_teacher:
            raise UserError(
                f"--distill --loss {' '.join(self.settings.objective.loss)}: there is nothing to distil, as no term "
                "looks at the teacher; add one such as kl=0.9, or use --baseline"
            )
        if phases.train_teacher and models.teacher_checkpoint:
            raise UserError("--train_teacher trains a teacher and --teacher_checkpoint names one: which one is meant?")
        count = len(models.teacher_model)
        if not count:
            raise UserError("--teacher_model: a teacher has a name")
        for flag, given in (
            ("--teacher_checkpoint", models.teacher_checkpoint),
            ("--teacher_weights", models.teacher_weights),
            ("--teacher_image_size", models.teacher_image_size),
        ):
            may_be_one = flag == "--teacher_image_size"
            if len(given) not in ({0, 1, count} if may_be_one else {0, count}):
                raise UserError(
                    f"{flag} {' '.join(map(str, given))}: these are {len(given)}, and --teacher_model names {count}"
                )
        if models.teacher_weights and not sum(models.teacher_weights) > 0:
            raise UserError("--teacher_weights: one of them must be above 0")
        sizes = list(models.teacher_image_size or [self.settings.data.image_size])
        return sizes * count if len(sizes) == 1 else sizes

    def _as_one(self, teachers: list[Classifier]) -> Classifier | Ensemble:
        models = self.settings.models
        if len(teachers) == 1:
            return teachers[0]
        return Ensemble(teachers, weights=models.teacher_weights, average=models.teacher_average)

    def _rehearse(self, networks: list[Classifier | Ensemble]) -> None:
        """Take the chain's steps once on two random images, where features or gradients are compared."""
        headless = [" ".join(term.name for term in one.terms) for one in self.objectives if not one.trains_head]
        if headless:
            self.journal.say(
                f"Note: without a term that looks at the student's logits, such as ce, its last layer learns nothing; "
                f"none is in {', '.join(headless)}."
            )
        for objective in self.objectives:
            if not (objective.feature_terms or objective.needs_gradients):
                continue
            for teacher, student in pairwise(networks):
                assert isinstance(student, Classifier)  # noqa: S101 (for the type checker: teachers come first)
                with seeded("rehearsal"):
                    module = DistillationModule(teacher=FrozenTeacher(teacher), student=student, objective=objective)
                    module.rehearse()

    def _untrained_teachers(self) -> list[Classifier]:
        names = self.settings.models.teacher_model
        return [
            self.made.teacher(name, self._seed_of(index), size)
            for index, (name, size) in enumerate(zip(names, self.sizes, strict=True))
        ]

    def _seed_of(self, index: int) -> int:
        """Return a teacher's seed: the same network once more is trained with the next one."""
        names = self.settings.models.teacher_model
        return self.settings.phases.seed + names[:index].count(names[index])

    def _find_teachers(self) -> list[tuple[FoundTeacher, Classifier]]:
        models, made = self.settings.models, self.made
        found: list[tuple[FoundTeacher, Classifier]] = []
        for index, (name, size) in enumerate(zip(models.teacher_model, self.sizes, strict=True)):
            if models.teacher_checkpoint:
                one = given_teacher(models.teacher_checkpoint[index])
            else:
                taken = [earlier for earlier, _ in found]
                data = made.splits.name
                one = find_teacher(made.root, made.folder, data=data, model=name, image_size=size, besides=taken)
            self.journal.say(f"Teacher: {one.checkpoint}")
            found.append((one, load_teacher(one.checkpoint, model=name, splits=made.splits, image_size=size)))
        return found

    def _teach(self) -> _Teacher | None:
        """Train the teachers, or take those that were found, and measure them where they are to teach."""
        runs = self.journal.experiment.runs
        several = len(self.settings.models.teacher_model) > 1
        teachers = [classifier for _, classifier in self.found]
        checkpoints = [str(one.checkpoint) for one, _ in self.found]
        for index, untrained in enumerate(self.untrained):
            run, teacher = self._train_teacher(untrained, seed=self._seed_of(index), several=several)
            teachers.append(teacher)
            checkpoints += [run.checkpoint] if run.checkpoint else []
        if not teachers or not (self.distills or several):
            return None
        accuracies = [self._measure("teacher", teacher) for teacher in teachers]
        for (one, teacher), accuracy in zip(self.found, accuracies, strict=False):
            phase = _phase_of(teacher, several=several)
            runs.setdefault(phase, []).append(one.facts(teacher, accuracy) | {"phase": phase})
        network = self._as_one(teachers)
        if not several:
            return _Teacher(network, tuple(checkpoints), accuracies[0])
        accuracy = self._measure(f"ensemble of {len(teachers)} teachers", network)
        runs["teacher"] = [
            {
                "phase": "teacher",
                "seed": None,
                "model": network.description.architecture,
                "parameters": network.count_parameters(),
                "val_acc": accuracy,
                "best_val_acc": accuracy,
                "checkpoint": None,
            }
        ]
        return _Teacher(network, tuple(checkpoints), accuracy)

    def _train_teacher(self, untrained: Classifier, *, seed: int, several: bool) -> tuple[Run, Classifier]:
        smoothing = self.settings.objective.teacher_label_smoothing
        module = ClassifierModule(
            untrained,
            objective=build_objective("ce", label_smoothing=smoothing),
            recipe=self.made.recipe(self.settings.optimization.teacher_learning_rate),
            seed=seed,
        )
        data = self.made.teacher_data(seed, untrained.description.image_size)
        run = self.journal.train(_phase_of(untrained, several=several), module, data)
        return run, load_classifier(run.checkpoint, architecture=run.model) if run.checkpoint else untrained

    def _assist(self, teacher: _Teacher, number: int, name: str) -> _Teacher:
        """Distil an assistant, which then teaches."""
        seed = self.settings.phases.seed
        untrained = self.made.assistant(name, seed)
        run = self._distil(f"assistant/{number}-{slug(name)}", untrained, teacher, self.made.objective, seed=seed)
        assistant = load_classifier(run.checkpoint, architecture=run.model) if run.checkpoint else untrained
        accuracy = self._measure("assistant", assistant)
        return _Teacher(assistant, (run.checkpoint,) if run.checkpoint else (), accuracy)

    def _measure(self, what: str, network: Classifier | Ensemble) -> float:
        """Measure who teaches on the student's validation images, and refuse one that has learnt nothing."""
        # On all of them, whatever --limit_val_batches says: the first batches hold the first classes alone.
        hardware = dataclasses.replace(self.made.hardware, limit_val_batches=1.0)
        # As it will be asked: an ensemble shows each member the images at its own size.
        answering = network if isinstance(network, Ensemble) else Ensemble([network])
        data = self.made.student_data(self.settings.phases.seed)
        accuracy = evaluate(answering, data, hardware=hardware)["val/acc"]
        labels = self.made.splits.val.labels
        name = network.description.architecture
        self.journal.say(f"The {what}, {name}, is right on {accuracy:.1%} of the validation images.")
        if is_no_better_than_chance(accuracy, labels):
            words = (
                f"the {what.split(maxsplit=1)[0]}'s accuracy, {accuracy:.1%}, is no better than chance: always to say "
                f"the most frequent class would be right on {chance(labels):.1%}"
            )
            if not (self.settings.machine.fast_dev_run or self.settings.phases.allow_weak_teacher):
                raise UserError(f"{words}; train it longer, or distil it all the same with --allow_weak_teacher")
            self.journal.say(f"Warning: {words}.")
        return accuracy

    def _train_baseline(self, seed: int) -> None:
        module = ClassifierModule(
            self.made.student(seed),
            objective=build_objective("ce", label_smoothing=self.settings.objective.label_smoothing),
            recipe=self.made.recipe(),
            seed=seed,
            mixing=self.made.mixing,
            ema=self.settings.optimization.ema,
        )
        self.journal.train("baseline", module, self.made.student_data(seed))

    def _distil(
        self,
        phase: str,
        student: Classifier,
        teacher: _Teacher,
        objective: Objective,
        *,
        seed: int,
        written: str | None = None,
    ) -> Run:
        data = self.made.student_data(seed, objective)
        module = DistillationModule(
            teacher=FrozenTeacher(teacher.network),
            student=student,
            objective=objective,
            recipe=self.made.recipe(),
            seed=seed,
            teacher_acc=teacher.accuracy,
            mixing=self.made.mixing,
            ema=self.settings.optimization.ema,
            has_unlabelled=data.has_unlabelled,
        )
        return self.journal.train(phase, module, data, teachers=teacher.checkpoints, written=written)


def _phase_of(teacher: Classifier, *, several: bool) -> str:
    return f"teacher/{slug(teacher.description.architecture)}" if several else "teacher"
