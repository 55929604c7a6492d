"""Experiments from Python: the phases of the command line as functions, with its settings as keywords."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from kd.data import ImageData, Layout, read_splits
from kd.deploy.card import write_card
from kd.deploy.export import export_student, load_checkpoint_splits
from kd.deploy.loading import open_student
from kd.deploy.prediction import find_images
from kd.deploy.prediction import predict as predict_images
from kd.errors import UserError
from kd.pipeline import Experiment, measure_costs, run_experiment
from kd.report import PICTURES, best_score_of, gain_sentence, summarize, write_report, write_summary
from kd.settings import Settings, resolve, with_origin
from kd.teachers import Foreign, FrozenTeacher
from kd.teachers import load_teacher as load_any_teacher
from kd.training import log_report


@dataclass(frozen=True)
class Result:
    """A trained network, and the experiment that it comes from.

    Args:
        experiment: The records of all runs.
        summary: The content of ``summary.json``.
        phase: The phase that this is the result of: ``teacher``, ``baseline``, ``distilled`` or ``compared``.
    """

    experiment: Experiment
    summary: dict[str, Any]
    phase: str

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return self.experiment.folder

    @property
    def accuracy(self) -> float:
        """Validation accuracy after the last epoch, in [0, 1]: the mean over the seeds, or the best objective's."""
        if self.phase == "compared":
            return float(self.summary["compared"][0]["val_acc_mean"])
        return float(self.summary["phases"][self.phase]["val_acc_mean"])

    @property
    def accuracies(self) -> dict[str, float]:
        """The same for each phase, and each compared objective by how it is written."""
        phases = {name: float(facts["val_acc_mean"]) for name, facts in self.summary["phases"].items()}
        return phases | {row["objective"]: float(row["val_acc_mean"]) for row in self.summary["compared"]}

    @property
    def verdict(self) -> str:
        """What distillation gained over the labels alone, in one sentence."""
        return gain_sentence(self.summary)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the most accurate run, at its best epoch."""
        runs = self.experiment.runs[self.phase]
        if self.phase == "compared":
            runs = [run for run in runs if run["objective"] == self.summary["compared"][0]["objective"]]
        return Path(max(runs, key=best_score_of)["checkpoint"])

    def report(self) -> Path:
        """Write the report, and return its page, ``report.html``."""
        return write_report([self.folder])

    def export(
        self,
        output: str | Path,
        *,
        format: Literal["onnx", "torch", "safetensors"] = "onnx",  # noqa: A002 (as the flag)
        quantize: bool = False,
    ) -> Path:
        """Export the network with a model card, verified against its checkpoint on the validation images.

        Args:
            output: The file, ending in ``.onnx``, ``.pt2`` or ``.safetensors``.
            format: Its format.
            quantize: Whether to also write an int8 ONNX file.

        Returns:
            The file; the int8 one if there is one.
        """
        splits = load_checkpoint_splits(self.checkpoint, dataset=None, data_dir=None, val_data=None)
        exported = export_student(self.checkpoint, output, file_format=format, splits=splits, quantize=quantize)
        write_card(exported, self.checkpoint)
        return exported[-1].path

    def predict(self, images: str | Path | Sequence[str | Path], *, top: int = 3) -> list[dict[str, Any]]:
        """Predict the classes of images.

        Args:
            images: A file, a folder, or several of them.
            top: Number of classes to return for each image.

        Returns:
            For each image ``image``, ``class``, ``probability``, and ``top``: probabilities by class name.

        Raises:
            UserError: If an image can't be decoded.
        """
        paths = [images] if isinstance(images, str | Path) else images
        unreadable = list[str]()
        files, _ = find_images([str(path) for path in paths])
        rows = list(predict_images(open_student(self.checkpoint), files, batch_size=32, top=top, unreadable=unreadable))
        if unreadable:
            raise UserError("; ".join(unreadable))
        return rows


def train_teacher(data_dir: str | Path | None = None, *, model: str = "densenet121", **settings: Any) -> Result:
    """Train a teacher on the labels.

    Args:
        data_dir: Folder of the images; ``None`` with ``dataset="digits"`` and other data sets by name.
        model: The network, as of :func:`kd.build_classifier`.
        settings: Other settings, named as the flags of ``experiment.py``: ``max_epochs=20``,
            ``teacher_pretrained=True``, ...

    Raises:
        UserError: For a user's mistake, before the first batch.
    """
    return _run({"train_teacher": True, "teacher_model": [model]}, data_dir, settings, phase="teacher")


def distill(
    data_dir: str | Path | None = None,
    *,
    teacher: Result | str | Path | None = None,
    student: str = "simple",
    baseline: bool = True,
    **settings: Any,
) -> Result:
    """Distill a teacher into a student.

    Args:
        data_dir: Folder of the images, as of :func:`train_teacher`.
        teacher: What :func:`train_teacher` returned, or a file as of ``--teacher_checkpoint``; ``None``: the one that
            an earlier experiment trained.
        student: The network.
        baseline: Whether to also train the student on the labels alone, for :attr:`Result.verdict`.
        settings: Other settings, named as the flags of ``experiment.py``: ``loss=["ce=0.1", "kl=0.9"]``, ``seeds=3``.

    Raises:
        UserError: For a user's mistake, before the first batch.
    """
    values = {"distill": True, "baseline": baseline, "student_model": student} | _of_teacher(teacher)
    return _run(values, data_dir, settings, phase="distilled")


def compare(
    data_dir: str | Path | None = None,
    *,
    losses: Sequence[str],
    teacher: Result | str | Path | None = None,
    student: str = "simple",
    baseline: bool = True,
    **settings: Any,
) -> Result:
    """Distill one student with each of several objectives; the result is that of the most accurate one.

    Args:
        data_dir: Folder of the images, as of :func:`train_teacher`.
        losses: The objectives, such as ``["ce=0.1 kl=0.9", "mse"]``.
        teacher: The teacher, as of :func:`distill`.
        student: The network.
        baseline: Whether to also train the student on the labels alone.
        settings: Other settings, named as the flags of ``experiment.py``.

    Raises:
        UserError: For a user's mistake, before the first batch.
    """
    values = {"compare_losses": list(losses), "baseline": baseline, "student_model": student} | _of_teacher(teacher)
    return _run(values, data_dir, settings, phase="compared")


def load_images(
    data_dir: str | Path | None, *, train_data: str = "train", val_data: str = "val", **options: Any
) -> ImageData:
    """Return the images of a folder as a LightningDataModule; its class names are ``.splits.classes``.

    Args:
        data_dir: Folder that holds ``train_data`` and ``val_data``, each with a folder for each class; ``None`` for
            tables elsewhere.
        train_data: Folder of the training images, or a table of paths, classes and perhaps splits.
        val_data: That of the validation images.
        options: Of :class:`kd.data.ImageData`: ``image_size``, ``batch_size``, ``augment``, ``num_workers``, ...

    Raises:
        UserError: If there are no images.
    """
    return ImageData(read_splits(data_dir, Layout(train_data=train_data, val_data=val_data)), **options)


def load_teacher(
    path: str | Path,
    data: ImageData,
    *,
    model: str | None = None,
    image_size: int | None = None,
    class_names: str | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> FrozenTeacher:
    """Load a teacher of any origin for some images, its classes matched to theirs by name.

    Args:
        path: Its file, as of ``--teacher_checkpoint``.
        data: The images.
        model: The network; needed where the file doesn't name it.
        image_size: Side of its images, in pixels; ``None``: that of ``data``.
        class_names: A file of class names in the order of its logits, or ``imagenet``; ``None``: the file's.
        mean: Mean of the pixels in [0, 1] by channel that it expects; empty: the file's, or the architecture's.
        std: Standard deviation, likewise.

    Raises:
        UserError: If it can't be loaded, or lacks a class.
    """
    foreign = Foreign(class_names, tuple(mean), tuple(std))
    teacher, _ = load_any_teacher(
        Path(path).expanduser(),
        model=model,
        classes=data.splits.classes,
        data=data.splits.name,
        image_size=image_size or data.image_size,
        foreign=foreign,
    )
    return FrozenTeacher(teacher)


def run(settings: Settings, console: Console) -> tuple[Experiment, dict[str, Any]]:
    """Run an experiment, measure its networks, and write summary and report; return the runs and the summary."""
    done = run_experiment(settings, console=console)
    if not done.is_global_zero:
        return done, {}
    summary = summarize(done.runs, data=done.data, folder=done.folder, costs=measure_costs(done) if done.kept else {})
    if done.kept:
        write_summary(summary, done.folder)
        page, figures = write_report([done.folder]), sorted((done.folder / PICTURES).glob("*.png"))
        log_report(settings.machine.logger, folder=done.folder, root=done.folder.parent, page=page, figures=figures)
    return done, summary


def _of_teacher(teacher: Result | str | Path | None) -> dict[str, Any]:
    if teacher is None:
        return {}
    if isinstance(teacher, Result):
        model = teacher.experiment.runs[teacher.phase][0]["model"]
        return {"teacher_model": [model], "teacher_checkpoint": [str(teacher.checkpoint)]}
    return {"teacher_checkpoint": [str(teacher)]}


def _run(fixed: dict[str, Any], data_dir: str | Path | None, given: dict[str, Any], *, phase: str) -> Result:
    values = fixed | ({} if data_dir is None else {"data_dir": str(data_dir)}) | given
    resume = values.pop("resume", None)
    arguments = [] if resume is None else ["--resume", str(resume)]
    # The file of flags in the working directory belongs to the command line.
    resolved = resolve(arguments, prog="kd", values={"keywords": values}, reads_flags_file=False)
    try:
        done, summary = run(resolved.settings, Console())
    except UserError as error:
        raise type(error)(with_origin(str(error), resolved.origins)) from error
    if not done.kept:
        raise UserError("fast_dev_run: writes no files; there is no result to return")
    return Result(done, summary, phase)
