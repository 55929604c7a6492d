"""Building the parts of an experiment from its settings: images, networks, objectives, loaders, hardware."""

import copy
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kd.data import (
    BROKEN,
    Batches,
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
from kd.models import Classifier, build_classifier, largest_batch, why_not_compiled
from kd.pipeline.caches import store_images, store_splits
from kd.pipeline.run_store import slug
from kd.preflight import Finding, check_files, refuse
from kd.randomness import seeded
from kd.settings import Settings, unsupported_by_streams
from kd.training import Hardware, Recipe

SKIPPED_FILE = "skipped-images.txt"

_LARGEST_BATCH = 512
_LONGEST_NAME = 150


@dataclass(frozen=True)
class Images:
    """The images of an experiment.

    Args:
        splits: Training and validation images by the side of their views in pixels, cached where there is room.
        unlabeled: Images without labels to distill on as well, or ``None``.
        mean: Mean of the training images by channel, in [0, 1], for networks without their own.
        std: Standard deviation likewise.
        findings: What is unusual about the image files.
    """

    splits: Mapping[int, Splits]
    unlabeled: LabeledImages | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Components:
    """The parts of an experiment.

    Args:
        settings: All settings.
        folder: The experiment's folder.
        hardware: Where it runs.
        images: The images.
        objective: What the distilled student minimizes.
        compared: The objectives to compare, by how they are written.
        mixing: Mixes the images of a student's batches, or ``None``.
        batch_size: Images in a batch, on each device.
        num_workers: Data loader processes.
        notes: What was chosen automatically, and why.
    """

    settings: Settings
    folder: Path
    hardware: Hardware
    images: Images
    objective: Objective
    compared: Mapping[str, Objective]
    mixing: Mixing | None
    batch_size: int
    num_workers: int
    notes: tuple[str, ...]

    @property
    def splits(self) -> Splits:
        """The images at the student's size."""
        return self.images.splits[self.settings.data.image_size]

    @property
    def is_saved(self) -> bool:
        """Whether the experiment writes files."""
        return not self.settings.machine.fast_dev_run


def build_components(settings: Settings, console: Console) -> Components:
    """Read the images and build everything that no network is needed for.

    Args:
        settings: All settings.
        console: Where the progress of decoding is shown.

    Raises:
        UserError: If images, objectives or hardware are not as the settings say.
    """
    data = settings.data
    name = settings.phases.name
    if name is not None and (Path(name).name != name or name == ".." or len(name) > _LONGEST_NAME):
        raise UserError(f"--name {name}: not a valid folder name; use letters, digits, '-', '_' and '.'")
    hardware, notes = build_hardware(settings)
    images = load_images(settings, console)
    splits = images.splits[data.image_size]
    num_classes = len(splits.classes)
    if data.num_classes not in (None, num_classes):
        raise UserError(
            f"--num_classes {data.num_classes}: {splits.name} has {num_classes} classes; leave the flag out"
        )
    if data.unlabeled_rest and data.train_fraction == 1:
        raise UserError("--unlabeled_rest: all training images are labeled; set --train_fraction below 1")
    objective, compared = build_objectives(settings, num_classes)
    root = Path(settings.machine.default_root_dir).expanduser()
    components = Components(
        settings=settings,
        folder=root / (name or _default_name(settings, splits.name)),
        hardware=hardware,
        images=images,
        objective=objective,
        compared=compared,
        mixing=Mixing(mixup=data.mixup, cutmix=data.cutmix, num_classes=num_classes)
        if data.mixup or data.cutmix
        else None,
        batch_size=2 if data.batch_size == "auto" else data.batch_size,
        num_workers=default_workers(hardware.accelerator) if data.num_workers is None else data.num_workers,
        notes=tuple(notes),
    )
    return components if data.batch_size != "auto" else _with_largest_batch(components)


def build_hardware(settings: Settings) -> tuple[Hardware, list[str]]:
    """Resolve where the experiment runs; without a working compiler, ``--compile`` is dropped.

    Returns:
        The hardware, and notes on what was chosen.
    """
    names = {field.name for field in dataclasses.fields(Hardware)}
    machine = {name: value for name, value in dataclasses.asdict(settings.machine).items() if name in names}
    hardware, notes = Hardware(**machine).resolved()
    on_gpu = hardware.accelerator in ("gpu", "cuda")
    if on_gpu and hardware.precision == "auto":
        torch.set_float32_matmul_precision("high")
    if hardware.compile:
        reason = why_not_compiled("cuda" if on_gpu else hardware.accelerator)
        if reason is not None:
            hardware, notes = (
                replace(hardware, compile=False),
                [*notes, f"--compile: not used, it fails here: {reason}"],
            )
    return hardware, notes


def load_images(settings: Settings, console: Console) -> Images:
    """Find the images, check their files, and read them through the decode cache.

    Raises:
        UserError: If there are none, or files are broken and ``--on_bad_image skip`` isn't set.
    """
    data = settings.data
    splits = load_splits(
        data.dataset, data.data_dir, train_data=data.train_data, val_data=data.val_data, download=data.download
    )
    if isinstance(splits, ShardedSplits):
        for flag, reason in unsupported_by_streams(settings):
            raise UserError(f"{flag}: not available with --dataset webdataset: {reason}")
    unlabeled = None if data.unlabeled_data is None else read_unlabeled(data.unlabeled_data)
    skip_broken = data.on_bad_image == "skip"
    files = [
        finding
        for images in (splits.train, splits.val, unlabeled)
        if images
        for finding in check_images(images, cache=cache_dir() / "examined")
    ]
    findings = check_files(files, skips_broken=skip_broken)
    if skip_broken:
        broken = [finding for finding in files if finding.kind == BROKEN]
        splits = replace(splits, train=drop_broken(splits.train, broken), val=drop_broken(splits.val, broken))
        unlabeled = unlabeled and drop_broken(unlabeled, broken)
    # Before they are decoded into a cache.
    refuse(findings, strict=False)
    cache = functools.partial(store_images, augment=data.augment, where=data.image_cache, console=console)
    by_size = {
        size: store_splits(splits, image_size=size, augment=data.augment, where=data.image_cache, console=console)
        for size in {data.image_size, *settings.models.teacher_image_size}
    }
    mean, std = channel_statistics(by_size[data.image_size].train, plain_view(data.image_size, data.resize))
    return Images(
        splits=by_size,
        unlabeled=None if unlabeled is None else cache(unlabeled, image_size=data.image_size),
        mean=mean,
        std=std,
        findings=tuple(findings),
    )


def build_objectives(settings: Settings, num_classes: int) -> tuple[Objective, dict[str, Objective]]:
    """Build the student's objective, and those to compare by how they are written.

    Raises:
        UserError: If one makes no sense, or is listed twice.
    """
    build = functools.partial(
        build_objective,
        num_classes=num_classes,
        temperature=settings.objective.temperature,
        label_smoothing=settings.objective.label_smoothing,
        soft_labels=bool(settings.data.mixup or settings.data.cutmix),
    )
    texts = settings.objective.compare_losses
    if len(set(texts)) < len(texts):
        raise UserError(f"--compare_losses: {max(texts, key=texts.count)!r} is listed twice; remove one")
    return build(list(settings.objective.loss)), {text: _build_compared(build, text) for text in texts}


def build_student(components: Components, seed: int) -> Classifier:
    """Build the student; its initial weights depend on the seed alone, and are those of the baseline too."""
    models = components.settings.models
    return _build_network(
        components,
        models.student_model,
        seed,
        role="student",
        flag="--student_model",
        pretrained=models.student_pretrained,
    )


def build_assistant(components: Components, architecture: str, seed: int) -> Classifier:
    """Build an assistant."""
    pretrained = components.settings.models.assistant_pretrained
    return _build_network(components, architecture, seed, role="assistant", flag="--assistants", pretrained=pretrained)


def build_teacher(components: Components, architecture: str, seed: int, image_size: int) -> Classifier:
    """Build a teacher to be trained on images of a side of ``image_size`` pixels."""
    return _build_network(
        components,
        architecture,
        seed,
        role="teacher",
        flag="--teacher_model",
        pretrained=components.settings.models.teacher_pretrained,
        image_size=image_size,
    )


def build_recipe(settings: Settings, *, learning_rate: float | None = None) -> Recipe:
    """Build the recipe of optimization, with the student's learning rate or another."""
    optimization = settings.optimization
    return Recipe(
        optimizer=optimization.optimizer,
        learning_rate=learning_rate or optimization.learning_rate,
        momentum=optimization.momentum,
        weight_decay=optimization.weight_decay,
        schedule=optimization.schedule,
        warmup_epochs=optimization.warmup_epochs,
    )


def teacher_data(components: Components, seed: int, image_size: int) -> Batches:
    """Build a teacher's batches: its views are new in each epoch whatever ``--views`` says."""
    return _build_data(components, seed, image_size, train_fraction=components.settings.data.teacher_train_fraction)


def student_data(components: Components, seed: int, objective: Objective | None = None) -> Batches:
    """Build a student's batches; views, order and fraction depend on the seed.

    Args:
        components: The parts of the experiment.
        seed: The seed.
        objective: What a distilled student minimizes: then unlabeled images are added, and if no term needs labels,
            those of the training images are hidden. ``None`` for the baseline.
    """
    data = components.settings.data
    more: dict[str, Any] = {"period": data.views, "train_fraction": data.train_fraction}
    if objective is not None:
        more |= {
            "unlabeled": components.images.unlabeled,
            "unlabeled_rest": data.unlabeled_rest,
            "reads_labels": objective.needs_labels,
        }
    return _build_data(components, seed, data.image_size, **more)


def default_workers(accelerator: str) -> int:
    """Return the number of data loader processes for the cores that this process may use.

    A GPU leaves the cores to the loaders. On a CPU, training needs them, and loaders pay off only if there are many.

    Args:
        accelerator: Lightning's name of it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // 4) if accelerator == "cpu" else min(8, cores)


def note_skipped(folder: Path, text: str) -> None:
    """Note an image that couldn't be decoded; data loader processes append to one file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SKIPPED_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def _build_compared(build: Callable[[str], Objective], text: str) -> Objective:
    try:
        return build(text)
    except UserError as error:
        raise UserError(f"--compare_losses {text!r}: {str(error).removeprefix('--loss: ')}") from error.__cause__


def _build_network(
    components: Components,
    architecture: str,
    seed: int,
    *,
    role: str,
    flag: str,
    pretrained: bool,
    image_size: int | None = None,
) -> Classifier:
    pretrained_flag = f"--{role}_pretrained"
    try:
        with seeded(seed, "weights"):
            classifier = build_classifier(
                architecture,
                classes=components.splits.classes,
                image_size=image_size or components.settings.data.image_size,
                resize=components.settings.data.resize,
                mean=components.images.mean,
                std=components.images.std,
                pretrained=pretrained,
                pretrained_flag=pretrained_flag,
            )
    except UserError as error:
        if str(error).startswith(pretrained_flag):
            raise
        raise UserError(f"{flag} {architecture}: {error}") from error.__cause__
    if components.batch_size == 1:
        _check_single_image(classifier)
    return classifier


def _check_single_image(classifier: Classifier) -> None:
    """Refuse a network whose batch normalization would see a single value per channel."""
    size = classifier.description.image_size
    try:
        copy.deepcopy(classifier).train()(torch.zeros(1, 3, size, size))
    except ValueError as error:
        name = classifier.description.architecture
        raise UserError(f"--batch_size 1: {name} can't be trained on single images: {error}") from None


def _build_data(
    components: Components,
    seed: int,
    image_size: int,
    *,
    reads_labels: bool = True,
    period: int | None = None,
    **more: Any,
) -> Batches:
    data, splits = components.settings.data, components.images.splits[image_size]
    common: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": components.batch_size,
        "num_workers": components.num_workers,
        "augment": data.augment,
        "resize": data.resize,
        "seed": seed,
        "reads_labels": reads_labels,
        "period": period,
        "left_out": functools.partial(note_skipped, components.folder) if data.on_bad_image == "skip" else None,
    }
    if isinstance(splits, ShardedSplits):
        return ShardData(splits, **common)
    on_gpu = components.hardware.accelerator in ("gpu", "cuda")
    on_device = data.augment_on == "device" or (data.augment_on == "auto" and on_gpu)
    return ImageData(splits, on_device=on_device, **common, **more)


def _with_largest_batch(components: Components) -> Components:
    """Choose the batch size by the memory that each network to be trained takes."""
    phases, models = components.settings.phases, components.settings.models
    networks = [build_student(components, phases.seed)]
    if phases.train_teacher:
        sizes = models.teacher_image_size or (components.settings.data.image_size,)
        pairs = zip(models.teacher_model, itertools.cycle(sizes), strict=False)
        networks += [build_teacher(components, name, phases.seed, size) for name, size in pairs]
    device = torch.device("cuda" if components.hardware.accelerator in ("gpu", "cuda") else "cpu")
    # At most half of a small data set, so that an epoch has more than one step.
    most = min(_LARGEST_BATCH, max(2, len(components.splits.train) // 2))
    batch_size = largest_batch(networks, device=device, most=most)
    return replace(components, batch_size=batch_size, notes=(*components.notes, f"--batch_size auto: {batch_size}"))


def _default_name(settings: Settings, data: str) -> str:
    models = settings.models
    parts = (data, "+".join(map(slug, models.teacher_model)), models.student_model)
    return "-".join(map(slug, parts))[:_LONGEST_NAME]
