"""The phases in order: teachers, assistants, then for each seed the student alone and the student distilled."""

from collections.abc import Callable

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console

from kd.data import Batches, ImageData
from kd.errors import UserError
from kd.losses import Objective, build_objective
from kd.models import Classifier, Compute, Ensemble, load_classifier
from kd.pipeline.checking import findings_of
from kd.pipeline.ingredients import Ingredients, forget_left_out, slug
from kd.pipeline.journal import Experiment, Journal, OnEpoch
from kd.pipeline.stores import logit_store
from kd.pipeline.teaching import Teacher, Teachers, measured
from kd.preflight import Finding, refuse
from kd.randomness import seeded
from kd.settings import CONFIG_FILE, Settings, write_config
from kd.teachers import FrozenTeacher, LogitStore
from kd.training import ClassifierModule, DistillationModule, Run, build_trainer


def run_experiment(
    settings: Settings, *, console: Console | None = None, on_epoch: OnEpoch | None = None
) -> Experiment:
    """Run the phases that the settings name.

    Args:
        settings: All settings; with no phase named, the student is trained on the labels.
        console: Where to say what happens.
        on_epoch: Told the accuracy of the distilled student on the validation images, a fraction of 1, after each
            epoch, which is counted from 0 for each seed; what it raises ends the experiment.

    Raises:
        UserError: For a person's mistake, before the first batch.
        Interrupted: If it was asked to stop.
    """
    pipeline = Pipeline(settings, console or Console(), on_epoch=on_epoch)
    with pipeline.journal.interruption.listening():
        done = pipeline.run()
    # A process that ends with its threads still talking to the others is torn down, as if it had failed.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return done


def check_experiment(settings: Settings, *, console: Console | None = None) -> list[Finding]:
    """Look at all that can be wrong, and train nothing.

    Args:
        settings: As of :func:`run_experiment`.
        console: Where to say what was found.

    Returns:
        What was found.

    Raises:
        UserError: If something is wrong, or, where that is asked for, a warning was found.
    """
    pipeline = Pipeline(settings, console or Console())
    return [*pipeline.findings, *pipeline.teachers.checked()]


def find_teachers(settings: Settings, *, console: Console | None = None) -> tuple[str, ...]:
    """Look at what can be wrong before the first batch, and name the teachers that would be distilled.

    Args:
        settings: As of :func:`run_experiment`.
        console: Where to say what was found.

    Returns:
        Their checkpoints; none where they are yet to be trained.

    Raises:
        UserError: If something is wrong.
    """
    return tuple(str(one.checkpoint) for one, _ in Pipeline(settings, console or Console()).teachers.found)


class Pipeline:
    """One call: what can be wrong is looked at in the constructor, before the first batch."""

    def __init__(self, settings: Settings, console: Console, *, on_epoch: OnEpoch | None = None) -> None:
        self.settings = settings
        phases, models = settings.phases, settings.models
        # To compare objectives needs a teacher, too.
        self.distills = phases.distill or bool(settings.objective.compare_losses)
        self.baseline = phases.baseline or not (phases.train_teacher or self.distills)
        self.made = Ingredients.prepare(settings, console)
        self.journal = Journal(self.made, console, on_epoch)
        # The objective of the assistants is that of the student.
        uses_objective = phases.distill or bool(self.distills and models.assistants)
        if uses_objective and not self.made.objective.needs_teacher:
            raise UserError(
                f"--distill --loss {' '.join(settings.objective.loss)}: there is nothing to distill, as no term looks "
                "at the teacher; add one such as kl=0.9, or use --baseline"
            )
        if settings.optimization.ema is not None and settings.machine.precision in ("bf16-true", "16-true"):
            raise UserError(
                f"--ema --precision {settings.machine.precision}: in half precision an average of weights does not "
                "move; use bf16-mixed"
            )
        self.objectives = [*([self.made.objective] if uses_objective else []), *self.made.compared.values()]
        for remark in self.made.remarks:
            self.journal.say(remark)
        # What Lightning can't run on is refused here, too.
        build_trainer(self.made.hardware, logger=False, enable_checkpointing=False)
        student = self.made.student(phases.seed) if self.baseline or self.distills else None
        assistants = [self.made.assistant(name, phases.seed) for name in models.assistants] if self.distills else []
        self.teachers = Teachers(self.made, self.journal, trains=phases.train_teacher, teaches=self.distills)
        teaches = self.distills or phases.train_teacher
        self.findings = [
            *self.made.findings,
            *findings_of(
                self.made,
                student=student,
                teacher=self.teachers.as_one() if teaches else None,
                objectives=self.objectives if self.distills else [],
                trains_teacher=phases.train_teacher,
            ),
        ]
        for finding in self.findings:
            self.journal.say(str(finding))
        refuse(self.findings, strict=phases.strict)
        if self.distills and student is not None:
            self._rehearse(self.teachers.as_one(), [*assistants, student])

    def run(self) -> Experiment:
        """Train, phase by phase."""
        phases, made = self.settings.phases, self.made
        self._prepare_folder()
        teacher = self.teachers.teach(measured=self.distills)
        if teacher is not None and self.distills:
            for number, name in enumerate(self.settings.models.assistants, start=1):
                teacher = self._assist(teacher, number, name)
        for seed in range(phases.seed, phases.seed + phases.seeds):
            if self.baseline:
                self._train_baseline(seed)
            if teacher is not None and phases.distill:
                self._distill("distilled", made.student(seed), teacher, made.objective, seed=seed)
            for written, objective in made.compared.items():
                if teacher is not None:
                    self._distill("compared", made.student(seed), teacher, objective, seed=seed, written=written)
        self.journal.add_earlier_runs(teacher.checkpoints if teacher is not None else self.teachers.trained)
        experiment = self.journal.experiment
        experiment.is_global_zero = getattr(rank_zero_only, "rank", 0) in (0, None)
        return experiment

    def _prepare_folder(self) -> None:
        made = self.made
        if self.journal.experiment.kept:
            try:
                rank_zero_only(write_config)(self.settings, made.folder / CONFIG_FILE)
                if self.settings.phases.resume is None:
                    rank_zero_only(forget_left_out)(made.folder)
            except OSError as error:
                raise UserError(f"--default_root_dir {made.root}: nothing can be written there: {error}") from None

    def _rehearse(self, teacher: Classifier | Ensemble, students: list[Classifier]) -> None:
        """Take the chain's steps once on two random images, where features or gradients are compared."""
        headless = [" ".join(term.name for term in one.terms) for one in self.objectives if not one.trains_head]
        if headless:
            self.journal.say(
                f"Note: without a term that looks at the student's logits, such as ce, its last layer learns nothing; "
                f"none is in {', '.join(headless)}."
            )
        steps = list(zip([teacher, *students], students, strict=False))
        # What is compared is compared in the student alone, the last of the chain.
        uses = [(self.made.objective, one) for one in (steps if self.settings.phases.distill else steps[:-1])]
        uses += [(objective, steps[-1]) for objective in self.made.compared.values()]
        for objective, (one, student) in uses:
            if objective.feature_terms or objective.needs_gradients:
                with seeded("rehearsal"):
                    module = DistillationModule(teacher=FrozenTeacher(one), student=student, objective=objective)
                    module.rehearse()

    def _assist(self, teacher: Teacher, number: int, name: str) -> Teacher:
        """Distill an assistant, which then teaches."""
        seed = self.settings.phases.seed
        untrained = self.made.assistant(name, seed)
        run = self._distill(f"assistant/{number}-{slug(name)}", untrained, teacher, self.made.objective, seed=seed)
        assistant = load_classifier(run.checkpoint, architecture=run.model) if run.checkpoint else untrained
        checkpoints = (run.checkpoint,) if run.checkpoint else ()
        return measured(self.made, self.journal, "assistant", assistant, phase=run.phase, checkpoints=checkpoints)

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

    def _distill(
        self,
        phase: str,
        student: Classifier,
        teacher: Teacher,
        objective: Objective,
        *,
        seed: int,
        written: str | None = None,
    ) -> Run:
        data = self.made.student_data(seed, objective)
        compute = self.made.teacher_compute(teacher.network)
        self.journal.say_once(f"{teacher.network.description.architecture} predictions in {compute}.")
        module = DistillationModule(
            teacher=FrozenTeacher(teacher.network, compute=compute, compiled=self.made.hardware.compile),
            student=student,
            objective=objective,
            recipe=self.made.recipe(),
            seed=seed,
            teacher_acc=teacher.accuracy,
            teacher_decisions=teacher.decisions,
            mixing=self.made.mixing,
            ema=self.settings.optimization.ema,
            has_unlabeled=data.has_unlabeled,
            open_store=self._store_of(teacher.network, data, compute),
        )
        run = self.journal.train(phase, module, data, teacher=teacher, written=written)
        if module.store is not None and module.store.read_batches:
            asked = module.store.written_batches
            self.journal.say(
                f"The teacher's logits of {module.store.read_batches:,} batches were read from the store"
                + (f", those of {asked:,} computed." if asked else ".")
            )
        if module.store is not None and module.store.top is not None and module.store.written_batches:
            self.journal.say(
                f"Of the teacher's {module.store.classes:,} logits the largest {module.store.top:,} were kept: at a "
                f"temperature of 4 its soft targets moved by {module.store.lost:.2g} nats."
            )
        return run

    def _store_of(
        self, network: Classifier | Ensemble, data: Batches, compute: Compute
    ) -> Callable[[int, int], LogitStore | None] | None:
        # Of streams too long to be kept nothing is kept.
        if self.settings.machine.fast_dev_run or not isinstance(data, ImageData):
            return None
        hardware, wanted = self.made.hardware, self.settings.data
        return logit_store(
            network,
            data,
            compute=compute,
            where=wanted.teacher_cache,
            devices=hardware.accelerator,
            compiled=hardware.compile,
            top=wanted.teacher_top,
        )
