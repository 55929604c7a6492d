"""What the settings ask for, made of them; here they are taken apart, and go no further."""

import copy
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kd.data import (
    BROKEN,
    Batches,
    FileFinding,
    ImageData,
    LabeledImages,
    Mixing,
    ShardData,
    ShardedSplits,
    Splits,
    cache_dir,
    channel_statistics,
    check_images,
    drop_broken,
    load_splits,
    plain_view,
    read_unlabeled,
)
from kd.errors import UserError
from kd.losses import Objective, build_objective
from kd.models import Classifier, Compute, Ensemble, build_classifier, largest_batch, why_not_compiled
from kd.pipeline.sharded import check_streaming
from kd.pipeline.stores import store_images, store_splits
from kd.pipeline.workers import default_workers
from kd.preflight import Finding, check_files, refuse
from kd.randomness import seeded
from kd.settings import Settings
from kd.training import Hardware, Recipe

LEFT_OUT_FILE = "left-out.txt"
_MOST_IMAGES = 512
_UNDECIDED = 2
_LONGEST_NAME = 150
_LONGEST_SLUG = 100


@dataclass(frozen=True)
class Ingredients:
    """The parts that an experiment is put together from.

    Args:
        settings: The settings.
        root: Folder of all experiments.
        folder: This experiment's folder.
        hardware: Where it runs.
        remarks: What was chosen for the person, and why.
        findings: What is odd about the image files.
        splits: The images.
        statistics: Mean and standard deviation of the training images' channels, for networks without their own.
        objective: What the distilled student minimizes.
        compared: The objectives to compare, as they are written.
        batch_size: Images in a batch, on each device.
        workers: Processes that load images.
        stored: The images by the size of their views, from the stores of decoded ones.
        unlabeled: Images without labels to distill on besides.
        mixing: Mixes the images of the student's batches, or ``None``.
    """

    settings: Settings
    root: Path
    folder: Path
    hardware: Hardware
    remarks: tuple[str, ...]
    findings: tuple[Finding, ...]
    splits: Splits
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    objective: Objective
    compared: dict[str, Objective]
    batch_size: int
    workers: int
    stored: dict[int, Splits]
    unlabeled: LabeledImages | None
    mixing: Mixing | None

    @classmethod
    def prepare(cls, settings: Settings, console: Console | None = None) -> "Ingredients":
        """Read the images and build the objective.

        Raises:
            UserError: If the images or the objective are not as they should be.
        """
        wanted, name = settings.data, settings.phases.name
        if name is not None and (Path(name).name != name or name == ".." or len(name) > _LONGEST_NAME):
            raise UserError(f"--name {name}: this is no name for a folder")
        fields = dataclasses.asdict(settings.machine)
        root = Path(fields.pop("default_root_dir")).expanduser()
        fields.pop("checkpoint_every")
        hardware, remarks = _tried(*Hardware(**fields).resolved())
        splits = load_splits(
            wanted.dataset,
            wanted.data_dir,
            train_data=wanted.train_data,
            val_data=wanted.val_data,
            download=wanted.download,
        )
        if isinstance(splits, ShardedSplits):
            check_streaming(wanted)
        console = console or Console()
        unlabeled = None if wanted.unlabeled_data is None else read_unlabeled(wanted.unlabeled_data)
        skips = wanted.on_bad_image == "skip"
        found = [oddity for one in (splits.train, splits.val, unlabeled) if one for oddity in _examined(one)]
        findings = check_files(found, skips_broken=skips)
        broken = [one for one in found if one.kind == BROKEN]
        if skips:
            train, val = (drop_broken(one, broken) for one in (splits.train, splits.val))
            splits = replace(splits, train=train, val=val)
            unlabeled = unlabeled and drop_broken(unlabeled, broken)
        # Before they are decoded into a store.
        refuse(findings, strict=False)
        sizes = {wanted.image_size, *settings.models.teacher_image_size}
        stored = {
            size: store_splits(
                splits, image_size=size, augment=wanted.augment, where=wanted.image_cache, console=console
            )
            for size in sizes
        }
        splits = stored[wanted.image_size]
        if unlabeled is not None:
            unlabeled = store_images(
                unlabeled,
                image_size=wanted.image_size,
                augment=wanted.augment,
                where=wanted.image_cache,
                console=console,
            )
        classes = len(splits.classes)
        if wanted.num_classes not in (None, classes):
            raise UserError(f"--num_classes {wanted.num_classes}: {splits.name} has {classes}")
        build = functools.partial(
            build_objective,
            num_classes=classes,
            temperature=settings.objective.temperature,
            label_smoothing=settings.objective.label_smoothing,
            soft_labels=bool(wanted.mixup or wanted.cutmix),
        )
        if wanted.unlabeled_rest and wanted.train_fraction == 1:
            raise UserError(
                "--unlabeled_rest: there is no rest; --train_fraction says how much of the images has labels"
            )
        workers = default_workers(hardware.accelerator) if wanted.num_workers is None else wanted.num_workers
        written = settings.objective.compare_losses
        if len(set(written)) < len(written):
            raise UserError(f"--compare_losses: {max(written, key=written.count)!r} stands there twice")
        made = cls(
            settings=settings,
            root=root,
            folder=root / (name or _default_name(settings, splits.name)),
            hardware=hardware,
            remarks=tuple(remarks),
            findings=tuple(findings),
            splits=splits,
            statistics=channel_statistics(splits.train, plain_view(wanted.image_size, wanted.resize)),
            objective=build(list(settings.objective.loss)),
            compared={one: _named(build, one) for one in written},
            # What fits is known when there are networks.
            batch_size=_UNDECIDED if wanted.batch_size == "auto" else wanted.batch_size,
            workers=workers,
            stored=stored,
            unlabeled=unlabeled,
            mixing=Mixing(mixup=wanted.mixup, cutmix=wanted.cutmix, num_classes=classes)
            if wanted.mixup or wanted.cutmix
            else None,
        )
        return made if wanted.batch_size != "auto" else made._with_what_fits()

    def _with_what_fits(self) -> "Ingredients":
        """Choose the batch size by what each network that may be trained takes of memory."""
        phases, models = self.settings.phases, self.settings.models
        sizes = models.teacher_image_size or (self.settings.data.image_size,)
        networks = [self.student(phases.seed)]
        if phases.train_teacher:
            pairs = zip(models.teacher_model, itertools.cycle(sizes), strict=False)
            networks += [self.teacher(name, phases.seed, size) for name, size in pairs]
        device = torch.device("cuda" if self.hardware.accelerator in ("gpu", "cuda") else "cpu")
        # Half of a small data set at the most, so that an epoch is more than a step.
        most = min(_MOST_IMAGES, max(2, len(self.splits.train) // 2))
        batch_size = largest_batch(networks, device=device, most=most)
        remarks = (*self.remarks, f"--batch_size auto: {batch_size}")
        return replace(self, batch_size=batch_size, remarks=remarks)

    def teacher_data(self, seed: int, image_size: int) -> Batches:
        """Make the batches that a teacher is trained on: new views in each epoch, as nothing of them is stored."""
        return self._data(seed, image_size, train_fraction=self.settings.data.teacher_train_fraction)

    def student_data(self, seed: int, objective: Objective | None = None) -> Batches:
        """Make a student's batches; views, order and fraction hang on the seed.

        Args:
            seed: The seed.
            objective: What it minimizes when it is distilled; then there are the images without labels, too. Without a
                term that looks at labels, those of the training images are hidden.
        """
        wanted = self.settings.data
        which: dict[str, Any] = {"period": wanted.views, "train_fraction": wanted.train_fraction}
        if objective is not None:
            which |= {
                "unlabeled": self.unlabeled,
                "unlabeled_rest": wanted.unlabeled_rest,
                "reads_labels": objective.needs_labels,
            }
        return self._data(seed, wanted.image_size, **which)

    def _data(
        self, seed: int, image_size: int, *, reads_labels: bool = True, period: int | None = None, **which: Any
    ) -> Batches:
        wanted, splits = self.settings.data, self.stored[image_size]
        alike: dict[str, Any] = {
            "image_size": image_size,
            "batch_size": self.batch_size,
            "num_workers": self.workers,
            "augment": wanted.augment,
            "resize": wanted.resize,
            "seed": seed,
            "reads_labels": reads_labels,
            "period": period,
            "left_out": functools.partial(note_left_out, self.folder) if wanted.on_bad_image == "skip" else None,
        }
        if isinstance(splits, ShardedSplits):
            return ShardData(splits, **alike)
        on_device = wanted.augment_on == "device" or (
            wanted.augment_on == "auto" and self.hardware.accelerator in ("gpu", "cuda")
        )
        return ImageData(splits, on_device=on_device, **alike, **which)

    def teacher_compute(self, network: Classifier | Ensemble) -> Compute:
        """Say how a teacher answers: at its own best, or as the run is told to compute."""
        return self.hardware.compute_for(network, trains=False)

    def recipe(self, learning_rate: float | None = None) -> Recipe:
        """Say how to optimize, with the student's learning rate or another."""
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

    def assistant(self, architecture: str, seed: int) -> Classifier:
        """Build an assistant that is yet to be trained."""
        pretrained = self.settings.models.assistant_pretrained
        return self._network(architecture, seed, pretrained=pretrained, flag="--assistant_pretrained")

    def teacher(self, architecture: str, seed: int, image_size: int) -> Classifier:
        """Build a teacher that is yet to be trained."""
        pretrained = self.settings.models.teacher_pretrained
        return self._network(
            architecture, seed, pretrained=pretrained, flag="--teacher_pretrained", image_size=image_size
        )

    def _network(
        self, architecture: str, seed: int, *, pretrained: bool, flag: str, image_size: int | None = None
    ) -> Classifier:
        mean, std = self.statistics
        size = image_size or self.settings.data.image_size
        try:
            with seeded(seed, "weights"):
                classifier = build_classifier(
                    architecture,
                    classes=self.splits.classes,
                    image_size=size,
                    resize=self.settings.data.resize,
                    mean=mean,
                    std=std,
                    pretrained=pretrained,
                    pretrained_flag=flag,
                )
        except UserError as error:
            if str(error).startswith(flag):
                raise
            named_by = "--assistants" if "assistant" in flag else flag.replace("pretrained", "model")
            raise UserError(f"{named_by} {architecture}: {error}") from error.__cause__
        if self.batch_size == 1:
            self._try_one_image(classifier)
        return classifier

    def _try_one_image(self, classifier: Classifier) -> None:
        """Refuse a network whose batch normalization would see a single number of each channel."""
        size = classifier.description.image_size
        try:
            copy.deepcopy(classifier).train()(torch.zeros(1, 3, size, size))
        except ValueError as error:
            name = classifier.description.architecture
            raise UserError(f"--batch_size 1: {name} can't learn from one image at a time: {error}") from None


def note_left_out(folder: Path, words: str) -> None:
    """Note an image that was left out of its batch; the processes that load images share the file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LEFT_OUT_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{words}\n")


def forget_left_out(folder: Path) -> None:
    """Forget which images an earlier call left out."""
    (folder / LEFT_OUT_FILE).unlink(missing_ok=True)


def _examined(images: LabeledImages) -> list[FileFinding]:
    return check_images(images, cache=cache_dir() / "examined")


def _named(build: Callable[[str], Objective], written: str) -> Objective:
    """Build an objective to compare, and name its flag where it makes no sense."""
    try:
        return build(written)
    except UserError as error:
        raise UserError(f"--compare_losses {written!r}: {str(error).removeprefix('--loss: ')}") from error.__cause__


def _tried(hardware: Hardware, remarks: list[str]) -> tuple[Hardware, list[str]]:
    """Go on without a compiler where there is none, and let a GPU multiply in its fast way where that may be chosen."""
    if hardware.accelerator in ("gpu", "cuda") and hardware.precision == "auto":
        torch.set_float32_matmul_precision("high")
    if not hardware.compile:
        return hardware, remarks
    reason = why_not_compiled("cuda" if hardware.accelerator == "gpu" else hardware.accelerator)
    if reason is not None:
        return replace(hardware, compile=False), [*remarks, f"--compile: going on without, as it fails here: {reason}"]
    return hardware, remarks


def _default_name(settings: Settings, data: str) -> str:
    models = settings.models
    parts = (data, "+".join(map(slug, models.teacher_model)), models.student_model)
    return "-".join(map(slug, parts))[:_LONGEST_NAME]


def slug(text: str) -> str:
    """Return a text as the name of a folder.

    Example:
        >>> slug("convnet(widths=[16, 32])")
        'convnet_widths_16_32'
    """
    name = re.sub(r"[^\w.+]+", "_", text).strip("_.")
    if len(name) <= _LONGEST_SLUG:
        return name
    return f"{name[:_LONGEST_SLUG]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
