"""Who teaches: teachers that are trained or found, several as one, and how good they are on the student's images."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kd.errors import UserError
from kd.losses import build_objective
from kd.models import Classifier, Ensemble, accuracy_in, load_classifier
from kd.pipeline.ingredients import Ingredients, slug
from kd.pipeline.journal import Journal
from kd.pipeline.teacher import (
    FoundTeacher,
    chance,
    find_teacher,
    given_teacher,
    is_no_better_than_chance,
    load_teacher,
)
from kd.preflight import Finding, check_accuracy, refuse
from kd.training import ClassifierModule, PredictionRecorder, Run, evaluate

_CHECKED_IMAGES = 512


@dataclass(frozen=True)
class Teacher:
    """A network that teaches: a teacher, several as one, or an assistant.

    Args:
        network: The network.
        checkpoints: Where its weights come from; none in a trial run.
        accuracy: On the student's validation images, a fraction of 1.
        predictions: The file of what it said of each of them, or ``None``.
        decisions: The classes that it decided for, ``(N,)`` in their order, or ``None``.
    """

    network: Classifier | Ensemble
    checkpoints: tuple[str, ...]
    accuracy: float
    predictions: str | None = None
    decisions: Tensor | None = None


class Teachers:
    """The teachers that the settings name: to be trained, or found.

    Args:
        made: The parts of the experiment.
        journal: What trains and keeps account.

    Raises:
        UserError: If flags about teachers contradict one another, or a teacher can't be built or found.
    """

    def __init__(self, made: Ingredients, journal: Journal, *, trains: bool, teaches: bool) -> None:
        self.made = made
        self.journal = journal
        self.names = made.settings.models.teacher_model
        self.sizes = self._check_flags()
        self.untrained = self._untrained() if trains else []
        self.trained: tuple[str, ...] = ()
        self.found = self._find() if teaches and not trains else []

    @property
    def several(self) -> bool:
        """Whether there are several."""
        return len(self.names) > 1

    def as_one(self, teachers: list[Classifier] | None = None) -> Classifier | Ensemble:
        """Return the teachers as one network: those given, or as they are before any training."""
        teachers = teachers or self.untrained or [classifier for _, classifier in self.found]
        if len(teachers) == 1:
            return teachers[0]
        models = self.made.settings.models
        return Ensemble(teachers, weights=models.teacher_weights, average=models.teacher_average)

    def _check_flags(self) -> list[int]:
        """Refuse flags that contradict one another; return the image size of each teacher."""
        phases, models = self.made.settings.phases, self.made.settings.models
        if phases.train_teacher and models.teacher_checkpoint:
            raise UserError("--train_teacher trains a teacher and --teacher_checkpoint names one: which one is meant?")
        count = len(self.names)
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
        sizes = list(models.teacher_image_size or [self.made.settings.data.image_size])
        return sizes * count if len(sizes) == 1 else sizes

    def _untrained(self) -> list[Classifier]:
        return [
            self.made.teacher(name, self._seed_of(index), size)
            for index, (name, size) in enumerate(zip(self.names, self.sizes, strict=True))
        ]

    def _seed_of(self, index: int) -> int:
        """Return a teacher's seed: the same network once more is trained with the next one."""
        return self.made.settings.phases.seed + self.names[:index].count(self.names[index])

    def _find(self) -> list[tuple[FoundTeacher, Classifier]]:
        models, made = self.made.settings.models, self.made
        found: list[tuple[FoundTeacher, Classifier]] = []
        for index, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            if models.teacher_checkpoint:
                one = given_teacher(models.teacher_checkpoint[index])
            else:
                taken = [earlier for earlier, _ in found]
                data = made.splits.name
                one = find_teacher(made.root, made.folder, data=data, model=name, image_size=size, besides=taken)
            found.append((one, load_teacher(one.checkpoint, model=name, splits=made.splits, image_size=size)))
        # The same network once more: by seed, as they are trained, so that each keeps its weight in the average.
        kinds = list(zip(self.names, self.sizes, strict=True))
        for kind in set(kinds):
            places = [index for index, other in enumerate(kinds) if other == kind]
            by_seed = sorted((found[index] for index in places), key=lambda one: one[0].seed)
            for index, pair in zip(places, by_seed, strict=True):
                found[index] = found[index] if models.teacher_checkpoint else pair
        for one, _ in found:
            self.journal.say(f"Teacher: {one.checkpoint}")
        return found

    def checked(self) -> list[Finding]:
        """Ask the teachers that were found about some validation images, and compare with what they are said to know.

        Raises:
            UserError: If one of them has learned nothing.
        """
        made, found = self.made, list[Finding]()
        batches = -(-_CHECKED_IMAGES // made.batch_size)
        hardware = dataclasses.replace(made.hardware, limit_val_batches=batches)
        for one, teacher in self.found:
            data = made.student_data(made.settings.phases.seed)
            accuracy = evaluate(Ensemble([teacher]), data, hardware=hardware)["val/acc"]
            images = min(len(made.splits.val), batches * made.batch_size)
            words = f"the teacher {teacher.description.architecture}"
            self.journal.say(f"Of {images:,} validation images {words} is right on {accuracy:.1%}.")
            known = check_accuracy(said=accuracy_in(one.checkpoint), measured=accuracy, images=images, whose=words)
            found += _heed(made, self.journal, "teacher", accuracy, known)
        return found

    def teach(self, *, measured: bool) -> Teacher | None:
        """Train the teachers, or take those that were found, and measure them.

        Args:
            measured: Whether a single one is measured, too: it has been already when it was trained.

        Returns:
            Who teaches, or ``None`` where nobody was measured.

        Raises:
            UserError: If one of them is no better than chance.
        """
        runs = self.journal.experiment.runs
        teachers = [classifier for _, classifier in self.found]
        checkpoints = [str(one.checkpoint) for one, _ in self.found]
        for index, untrained in enumerate(self.untrained):
            run, teacher = self._train(untrained, seed=self._seed_of(index))
            teachers.append(teacher)
            checkpoints += [run.checkpoint] if run.checkpoint else []
        self.trained = tuple(checkpoints) if self.untrained else ()
        if not teachers or not (measured or self.several):
            return None
        measured_ones = [
            self._measured("teacher", teacher, _phase_of(teacher, several=self.several), checkpoints[index : index + 1])
            for index, teacher in enumerate(teachers)
        ]
        accuracies = [one.accuracy for one in measured_ones]
        for untrained, accuracy in zip(self.untrained, accuracies, strict=False):
            if untrained.description.image_size != self.made.settings.data.image_size:
                # The table is about what the student is shown.
                phase = _phase_of(untrained, several=self.several)
                runs[phase] = [facts | {"val_acc": accuracy, "best_val_acc": accuracy} for facts in runs[phase]]
        for (one, teacher), known in zip(self.found, measured_ones, strict=False):
            phase = _phase_of(teacher, several=self.several)
            facts = one.facts(teacher, known.accuracy) | {"phase": phase, "validation": known.predictions}
            runs.setdefault(phase, []).append(facts)
        if not self.several:
            return measured_ones[0]
        together = self._measured(
            f"ensemble of {len(teachers)} teachers", self.as_one(teachers), "teacher", tuple(checkpoints)
        )
        network = together.network
        runs["teacher"] = [
            {
                "phase": "teacher",
                "seed": None,
                "model": network.description.architecture,
                "parameters": network.count_parameters(),
                "val_acc": together.accuracy,
                "best_val_acc": together.accuracy,
                "checkpoint": None,
                "validation": together.predictions,
            }
        ]
        return together

    def _measured(self, what: str, network: Classifier | Ensemble, phase: str, checkpoints: Sequence[str]) -> Teacher:
        return measured(self.made, self.journal, what, network, phase=phase, checkpoints=tuple(checkpoints))

    def _train(self, untrained: Classifier, *, seed: int) -> tuple[Run, Classifier]:
        smoothing = self.made.settings.objective.teacher_label_smoothing
        module = ClassifierModule(
            untrained,
            objective=build_objective("ce", label_smoothing=smoothing),
            recipe=self.made.recipe(self.made.settings.optimization.teacher_learning_rate),
            seed=seed,
        )
        data = self.made.teacher_data(seed, untrained.description.image_size)
        run = self.journal.train(_phase_of(untrained, several=self.several), module, data)
        return run, load_classifier(run.checkpoint, architecture=run.model) if run.checkpoint else untrained


def measured(
    made: Ingredients,
    journal: Journal,
    what: str,
    network: Classifier | Ensemble,
    *,
    phase: str,
    checkpoints: tuple[str, ...],
) -> Teacher:
    """Measure who teaches on the student's validation images, say it, and refuse one that has learned nothing.

    Args:
        made: The parts of the experiment.
        journal: Where to say it.
        what: What it is called, such as ``teacher``.
        network: The network.
        phase: What it was trained in.
        checkpoints: Where its weights come from.

    Returns:
        The network as one that teaches.

    Raises:
        UserError: If it is no better than chance.
    """
    # On all of them, whatever --limit_val_batches says: the first batches hold the first classes alone.
    hardware = dataclasses.replace(made.hardware, limit_val_batches=1.0)
    # As it will be asked: an ensemble shows each member the images at its own size.
    answering = network if isinstance(network, Ensemble) else Ensemble([network])
    data = made.student_data(made.settings.phases.seed)
    predictions = PredictionRecorder(_place_of_answers(made, phase, checkpoints) if journal.experiment.kept else None)
    accuracy = evaluate(answering, data, hardware=hardware, predictions=predictions)["val/acc"]
    name = network.description.architecture
    journal.say(f"The {what}, {name}, is right on {accuracy:.1%} of the validation images.")
    found = []
    if len(checkpoints) == 1 and journal.experiment.kept:
        said = accuracy_in(Path(checkpoints[0]))
        found = check_accuracy(said=said, measured=accuracy, images=len(made.splits.val), whose=f"the {what}")
    _heed(made, journal, what, accuracy, found)
    kept = None if predictions.path is None else str(predictions.path)
    return Teacher(network, checkpoints, accuracy, kept, predictions.decisions)


def _heed(made: Ingredients, journal: Journal, what: str, accuracy: float, found: Sequence[Finding]) -> list[Finding]:
    """Say what was found about who teaches, and refuse one that has learned nothing; return all that was found."""
    labels = made.splits.val.labels
    for finding in found:
        journal.say(str(finding))
    refuse(found, strict=made.settings.phases.strict)
    if not is_no_better_than_chance(accuracy, labels):
        return [*found]
    words = (
        f"the {what.split(maxsplit=1)[0]}'s accuracy, {accuracy:.1%}, is no better than chance: always to say "
        f"the most frequent class would be right on {chance(labels):.1%}"
    )
    if not (made.settings.machine.fast_dev_run or made.settings.phases.allow_weak_teacher):
        raise UserError(
            f"{words}; train it longer (its last layer may still be as it was drawn at random), or distill it all "
            "the same with --allow_weak_teacher"
        )
    weak = Finding("warning", f"{words}.")
    journal.say(str(weak))
    return [*found, weak]


def _place_of_answers(made: Ingredients, phase: str, checkpoints: tuple[str, ...]) -> Path:
    """Say where the predictions of a teacher are kept: another teacher's do not take their place."""
    digest = hashlib.blake2b("\0".join(checkpoints).encode(), digest_size=4).hexdigest()
    return made.folder / "predictions" / f"{slug(phase)}-{digest}.npz"


def _phase_of(teacher: Classifier, *, several: bool) -> str:
    return f"teacher/{slug(teacher.description.architecture)}" if several else "teacher"
