"""The phases in order; here the settings are taken apart, and go no further."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from kd.data import ImageData, channel_statistics, load_splits, plain_view
from kd.errors import UserError
from kd.losses import Objective, build_objective
from kd.models import Classifier, build_classifier, load_classifier
from kd.pipeline.teacher import METRICS_FILE, FoundTeacher, chance_limit, find_teacher, given_teacher, load_teacher
from kd.pipeline.workers import default_workers
from kd.randomness import seeded
from kd.settings import Settings
from kd.sources import write_config
from kd.training import ClassifierModule, DistillationModule, FrozenTeacher, Hardware, Recipe, Run, evaluate, train

# What a phase's result does not depend on, so that it may be compared with one of another call.
_IRRELEVANT = frozenset(
    (
        *("train_teacher", "baseline", "distill", "name", "seed", "seeds", "allow_weak_teacher"),
        *("num_workers", "download", "num_classes"),
        *("accelerator", "devices", "num_nodes", "strategy", "default_root_dir", "fast_dev_run"),
    )
)


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
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    kept: bool = True
    is_global_zero: bool = True


def run_experiment(settings: Settings, *, console: Console | None = None) -> Experiment:
    """Run the phases that the settings name: teacher, then for each seed the baseline and the distilled student.

    Args:
        settings: All settings; with no phase named, the student is trained on the labels.
        console: Where to say what happens.

    Raises:
        UserError: For a person's mistake, before the first batch.
    """
    return _Pipeline(settings, console or Console()).run()


class _Pipeline:
    """One call: everything that can be wrong is looked at in the constructor, before the first batch."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        phases, data, machine = settings.phases, settings.data, settings.machine
        self.train_teacher, self.distill = phases.train_teacher, phases.distill
        self.baseline = phases.baseline or not (phases.train_teacher or phases.distill)
        fields = dataclasses.asdict(machine)
        root = Path(fields.pop("default_root_dir")).expanduser()
        self.hardware, remarks = Hardware(**fields).resolved()
        self.splits = load_splits(
            data.dataset,
            data.data_dir,
            train_data=data.train_data,
            val_data=data.val_data,
            download=data.download,
        )
        if data.num_classes not in (None, len(self.splits.classes)):
            raise UserError(f"--num_classes {data.num_classes}: {self.splits.name} has {len(self.splits.classes)}")
        self.objective = self._build_objective()
        self.statistics = channel_statistics(self.splits.train, plain_view(data.image_size, data.resize))
        self.folder = root / (phases.name or self._default_name())
        self.workers = default_workers(self.hardware.accelerator) if data.num_workers is None else data.num_workers
        for remark in remarks:
            self.say(remark)
        # Networks that can't be built, and teachers that can't be had, are found out before anything is trained.
        if self.baseline or self.distill:
            self.build_student(phases.seed)
        self.found = None if self.train_teacher or not self.distill else self._find_teacher(root)
        self.teacher = self._first_teacher()
        self.experiment = Experiment(self.folder, self.splits.name, kept=not machine.fast_dev_run)

    @rank_zero_only
    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def run(self) -> Experiment:
        phases = self.settings.phases
        if self.experiment.kept:
            rank_zero_only(write_config)(self.settings, self.folder / "config.yaml")
        if self.train_teacher:
            self.teacher = self._train_teacher()
        teacher_acc = self._measure_teacher() if self.distill else None
        for seed in range(phases.seed, phases.seed + phases.seeds):
            if self.baseline:
                self._train_student("baseline", seed, self._baseline_module(seed))
            if self.distill:
                self._train_student("distilled", seed, self._distillation_module(seed, teacher_acc))
        self._add_earlier_runs()
        self.experiment.is_global_zero = getattr(rank_zero_only, "rank", 0) in (0, None)
        return self.experiment

    def build_student(self, seed: int) -> Classifier:
        """Build the student; its first weights hang on the seed alone, and are the same for baseline and distilled."""
        models = self.settings.models
        return self._build(
            models.student_model, seed, pretrained=models.student_pretrained, flag="--student_pretrained"
        )

    def _build(self, model: str, seed: int, *, pretrained: bool, flag: str) -> Classifier:
        data = self.settings.data
        mean, std = self.statistics
        with seeded(seed, "weights"):
            return build_classifier(
                model,
                classes=self.splits.classes,
                image_size=data.image_size,
                resize=data.resize,
                mean=mean,
                std=std,
                pretrained=pretrained,
                pretrained_flag=flag,
            )

    def _build_objective(self) -> Objective:
        wanted = self.settings.objective
        objective = build_objective(
            list(wanted.loss),
            num_classes=len(self.splits.classes),
            temperature=wanted.temperature,
            label_smoothing=wanted.label_smoothing,
        )
        if self.distill and not objective.needs_teacher:
            raise UserError(
                f"--distill --loss {' '.join(wanted.loss)}: there is nothing to distil, as no term looks at the "
                "teacher; add one such as kl=0.9, or use --baseline"
            )
        return objective

    def _default_name(self) -> str:
        models = self.settings.models
        parts = (self.splits.name, models.teacher_model, models.student_model)
        return "-".join(re.sub(r"[^\w.]+", "_", part).strip("_.") for part in parts)

    def _find_teacher(self, root: Path) -> FoundTeacher:
        models = self.settings.models
        if models.teacher_checkpoint is not None:
            return given_teacher(models.teacher_checkpoint)
        size = self.settings.data.image_size
        return find_teacher(root, self.folder, data=self.splits.name, model=models.teacher_model, image_size=size)

    def _first_teacher(self) -> Classifier | None:
        models = self.settings.models
        if self.found is None:
            if not self.train_teacher:
                return None
            seed = self.settings.phases.seed
            return self._build(
                models.teacher_model, seed, pretrained=models.teacher_pretrained, flag="--teacher_pretrained"
            )
        self.say(f"Teacher: {self.found.checkpoint}")
        teacher = load_teacher(self.found.checkpoint, model=models.teacher_model, splits=self.splits)
        made_for, size = teacher.description.image_size, self.settings.data.image_size
        if made_for != size:
            raise UserError(
                f"the teacher {self.found.checkpoint} was trained on images of {made_for} px, and --image_size is "
                f"{size}; teacher and student see the same view"
            )
        return teacher

    def _data(self, seed: int, train_fraction: float) -> ImageData:
        data = self.settings.data
        return ImageData(
            self.splits,
            image_size=data.image_size,
            batch_size=data.batch_size,
            num_workers=self.workers,
            augment=data.augment,
            resize=data.resize,
            train_fraction=train_fraction,
            seed=seed,
        )

    def _recipe(self, learning_rate: float) -> Recipe:
        wanted = self.settings.optimization
        return Recipe(
            optimizer=wanted.optimizer,
            learning_rate=learning_rate,
            momentum=wanted.momentum,
            weight_decay=wanted.weight_decay,
            schedule=wanted.schedule,
            warmup_epochs=wanted.warmup_epochs,
        )

    def _train_teacher(self) -> Classifier:
        if self.teacher is None:
            raise RuntimeError("the teacher is built before it is trained")
        wanted, objective = self.settings.optimization, self.settings.objective
        seed = self.settings.phases.seed
        module = ClassifierModule(
            self.teacher,
            objective=build_objective("ce", label_smoothing=objective.teacher_label_smoothing),
            recipe=self._recipe(wanted.teacher_learning_rate or wanted.learning_rate),
            seed=seed,
        )
        run = self._train(
            "teacher",
            module,
            self._data(seed, self.settings.data.teacher_train_fraction),
            max_epochs=wanted.teacher_epochs or wanted.max_epochs,
            max_steps=wanted.teacher_steps,
        )
        return load_classifier(run.checkpoint, architecture=run.model) if run.checkpoint else module.model

    def _measure_teacher(self) -> float:
        """Measure the teacher on the student's validation images, and refuse one that has learnt nothing."""
        if self.teacher is None:
            raise RuntimeError("the teacher is found or trained before it is measured")
        data = self._data(self.settings.phases.seed, 1.0)
        accuracy = evaluate(self.teacher, data, hardware=self.hardware)["val/acc"]
        limit = chance_limit(list(self.splits.val.labels))
        name = self.teacher.description.architecture
        self.say(f"The teacher, {name}, is right on {accuracy:.1%} of the validation images.")
        if accuracy < limit:
            words = f"the teacher's accuracy, {accuracy:.1%}, is no better than chance (up to {limit:.1%})"
            if not (self.settings.machine.fast_dev_run or self.settings.phases.allow_weak_teacher):
                raise UserError(f"{words}; train it longer, or distil it all the same with --allow_weak_teacher")
            self.say(f"Warning: {words}.")
        if self.found is not None:
            self._keep_found_teacher(self.found, self.teacher, accuracy)
        return accuracy

    def _keep_found_teacher(self, found: FoundTeacher, teacher: Classifier, accuracy: float) -> None:
        measured = {
            "seed": None,
            "model": teacher.description.architecture,
            "parameters": teacher.count_parameters(),
            "val_acc": accuracy,
            "best_val_acc": accuracy,
            "checkpoint": str(found.checkpoint),
        }
        self.experiment.runs["teacher"] = [measured | found.metrics | {"measured_val_acc": accuracy}]

    def _baseline_module(self, seed: int) -> Callable[[], ClassifierModule]:
        wanted = self.settings.objective
        return lambda: ClassifierModule(
            self.build_student(seed),
            objective=build_objective("ce", label_smoothing=wanted.label_smoothing),
            recipe=self._recipe(self.settings.optimization.learning_rate),
            seed=seed,
        )

    def _distillation_module(self, seed: int, teacher_acc: float | None) -> Callable[[], ClassifierModule]:
        if self.teacher is None:
            raise RuntimeError("the teacher is found or trained before it is distilled")
        teacher = FrozenTeacher(self.teacher)
        return lambda: DistillationModule(
            teacher=teacher,
            student=self.build_student(seed),
            objective=self.objective,
            recipe=self._recipe(self.settings.optimization.learning_rate),
            seed=seed,
            teacher_acc=teacher_acc,
        )

    def _train_student(self, phase: str, seed: int, build: Callable[[], ClassifierModule]) -> None:
        wanted = self.settings.optimization
        data = self._data(seed, self.settings.data.train_fraction)
        self._train(phase, build(), data, max_epochs=wanted.max_epochs, max_steps=wanted.max_steps)

    def _train(
        self, phase: str, module: ClassifierModule, data: ImageData, *, max_epochs: int, max_steps: int | None
    ) -> Run:
        wanted, phases = self.settings.optimization, self.settings.phases
        title = {"teacher": "Teacher", "baseline": "Student alone", "distilled": "Student distilled"}[phase]
        run = train(
            module,
            data,
            phase=phase,
            folder=self.folder,
            hardware=self.hardware,
            max_epochs=max_epochs,
            max_steps=max_steps,
            gradient_clip=wanted.gradient_clip,
            accumulate=wanted.accumulate,
            hyperparameters=self._relevant(phase),
            title=title if phases.seeds == 1 or phase == "teacher" else f"{title}, seed {data.seed}",
            console=self.console,
        )
        facts = dataclasses.asdict(run) | {
            "data": self.splits.name,
            "image_size": self.settings.data.image_size,
            "recipe": self._relevant(phase),
        }
        self.experiment.runs.setdefault(phase, []).append(facts)
        if run.folder is not None:
            rank_zero_only(_write_facts)(Path(run.folder), facts, self.settings)
        return run

    def _relevant(self, phase: str) -> dict[str, Any]:
        """Return the settings that a phase's result depends on."""
        flat = {name: value for name, value in self.settings.flat().items() if name not in _IRRELEVANT}
        if phase == "teacher":
            return flat
        own = {name: value for name, value in flat.items() if not name.startswith("teacher_")}
        if phase == "baseline":
            return {name: value for name, value in own.items() if name not in ("loss", "temperature")}
        teacher = self.experiment.runs["teacher"][0]["checkpoint"]
        return own | {"teacher": None if teacher is None else str(Path(teacher).resolve())}

    def _add_earlier_runs(self) -> None:
        """Add what earlier calls trained alike, so that baseline and distilled meet in one table."""
        if not self.experiment.kept:
            return
        seeds = range(self.settings.phases.seed, self.settings.phases.seed + self.settings.phases.seeds)
        for phase in ("baseline", "distilled"):
            if phase in self.experiment.runs or (phase == "distilled" and "teacher" not in self.experiment.runs):
                continue
            earlier = _earlier_runs(self.folder / phase, self._relevant(phase), seeds)
            if earlier:
                self.experiment.runs[phase] = earlier


def _write_facts(folder: Path, facts: dict[str, Any], settings: Settings) -> None:
    write_config(settings, folder / "config.yaml")
    beside = folder / "metrics.part"
    beside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    beside.replace(folder / METRICS_FILE)


def _earlier_runs(folder: Path, relevant: dict[str, Any], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Read the newest run of each seed that was trained alike."""
    by_seed: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"version_*/{METRICS_FILE}"), key=lambda one: one.stat().st_mtime):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["recipe"] == relevant and facts["seed"] in seeds:
            by_seed[facts["seed"]] = facts
    return [by_seed[seed] for seed in sorted(by_seed)]
