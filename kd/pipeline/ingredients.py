"""What the settings ask for, made of them; here they are taken apart, and go no further."""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kd.data import ImageData, Splits, channel_statistics, load_splits, plain_view
from kd.errors import UserError
from kd.losses import Objective, build_objective
from kd.models import Classifier, build_classifier
from kd.pipeline.workers import default_workers
from kd.randomness import seeded
from kd.settings import Settings
from kd.training import Hardware, Recipe

_LONGEST_NAME = 150


@dataclass(frozen=True)
class Ingredients:
    """The parts that an experiment is put together from.

    Args:
        settings: The settings.
        root: Folder of all experiments.
        folder: This experiment's folder.
        hardware: Where it runs.
        remarks: What was chosen for the person, and why.
        splits: The images.
        statistics: Mean and standard deviation of the training images' channels, for networks without their own.
        objective: What the distilled student minimises.
        compared: The objectives to compare, as they are written.
        workers: Processes that load images.
    """

    settings: Settings
    root: Path
    folder: Path
    hardware: Hardware
    remarks: tuple[str, ...]
    splits: Splits
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    objective: Objective
    compared: dict[str, Objective]
    workers: int

    @classmethod
    def prepare(cls, settings: Settings) -> "Ingredients":
        """Read the images and build the objective.

        Raises:
            UserError: If the images or the objective are not as they should be.
        """
        wanted, name = settings.data, settings.phases.name
        if name is not None and (Path(name).name != name or len(name) > _LONGEST_NAME):
            raise UserError(f"--name {name}: this is no name for a folder")
        fields = dataclasses.asdict(settings.machine)
        root = Path(fields.pop("default_root_dir")).expanduser()
        hardware, remarks = Hardware(**fields).resolved()
        splits = load_splits(
            wanted.dataset,
            wanted.data_dir,
            train_data=wanted.train_data,
            val_data=wanted.val_data,
            download=wanted.download,
        )
        classes = len(splits.classes)
        if wanted.num_classes not in (None, classes):
            raise UserError(f"--num_classes {wanted.num_classes}: {splits.name} has {classes}")
        build = functools.partial(
            build_objective,
            num_classes=classes,
            temperature=settings.objective.temperature,
            label_smoothing=settings.objective.label_smoothing,
        )
        workers = default_workers(hardware.accelerator) if wanted.num_workers is None else wanted.num_workers
        written = settings.objective.compare_losses
        if len(set(written)) < len(written):
            raise UserError(f"--compare_losses: {max(written, key=written.count)!r} stands there twice")
        return cls(
            settings=settings,
            root=root,
            folder=root / (name or _default_name(settings, splits.name)),
            hardware=hardware,
            remarks=tuple(remarks),
            splits=splits,
            statistics=channel_statistics(splits.train, plain_view(wanted.image_size, wanted.resize)),
            objective=build(list(settings.objective.loss)),
            compared={one: _named(build, one) for one in written},
            workers=workers,
        )

    def data(self, seed: int, *, train_fraction: float = 1.0) -> ImageData:
        """Make the batches; views, order and fraction hang on the seed."""
        wanted = self.settings.data
        return ImageData(
            self.splits,
            image_size=wanted.image_size,
            batch_size=wanted.batch_size,
            num_workers=self.workers,
            augment=wanted.augment,
            resize=wanted.resize,
            train_fraction=train_fraction,
            seed=seed,
        )

    def recipe(self, learning_rate: float | None = None) -> Recipe:
        """Say how to optimise, with the student's learning rate or another."""
        wanted = self.settings.optimization
        return Recipe(
            optimizer=wanted.optimizer,
            learning_rate=learning_rate or wanted.learning_rate,
            momentum=wanted.momentum,
            weight_decay=wanted.weight_decay,
            schedule=wanted.schedule,
            warmup_epochs=wanted.warmup_epochs,
        )

    def student(self, seed: int) -> Classifier:
        """Build the student; its first weights hang on the seed alone, and are the same for baseline and distilled."""
        models = self.settings.models
        return self._network(
            models.student_model, seed, pretrained=models.student_pretrained, flag="--student_pretrained"
        )

    def teacher(self, seed: int) -> Classifier:
        """Build a teacher that is yet to be trained."""
        models = self.settings.models
        return self._network(
            models.teacher_model, seed, pretrained=models.teacher_pretrained, flag="--teacher_pretrained"
        )

    def _network(self, architecture: str, seed: int, *, pretrained: bool, flag: str) -> Classifier:
        mean, std = self.statistics
        try:
            with seeded(seed, "weights"):
                classifier = build_classifier(
                    architecture,
                    classes=self.splits.classes,
                    image_size=self.settings.data.image_size,
                    resize=self.settings.data.resize,
                    mean=mean,
                    std=std,
                    pretrained=pretrained,
                    pretrained_flag=flag,
                )
        except UserError as error:
            if str(error).startswith(flag):
                raise
            raise UserError(f"{flag.replace('pretrained', 'model')} {architecture}: {error}") from error.__cause__
        if self.settings.data.batch_size == 1:
            self._try_one_image(classifier)
        return classifier

    def _try_one_image(self, classifier: Classifier) -> None:
        """Refuse a network whose batch normalisation would see a single number of each channel."""
        size = self.settings.data.image_size
        try:
            copy.deepcopy(classifier).train()(torch.zeros(1, 3, size, size))
        except ValueError as error:
            name = classifier.description.architecture
            raise UserError(f"--batch_size 1: {name} can't learn from one image at a time: {error}") from None


def _named(build: Callable[[str], Objective], written: str) -> Objective:
    """Build an objective to compare, and name its flag where it makes no sense."""
    try:
        return build(written)
    except UserError as error:
        raise UserError(f"--compare_losses {written!r}: {str(error).removeprefix('--loss: ')}") from error.__cause__


def _default_name(settings: Settings, data: str) -> str:
    parts = (data, settings.models.teacher_model, settings.models.student_model)
    return "-".join(re.sub(r"[^\w.]+", "_", part).strip("_.") for part in parts)[:_LONGEST_NAME]
