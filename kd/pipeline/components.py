"""Building the parts of an experiment from its settings: images, networks, objectives, loaders, hardware."""

import copy
import itertools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from kd.data import (
    BROKEN,
    SPLIT_FILE,
    Batches,
    FileFinding,
    ImageData,
    LabeledImages,
    Layout,
    Mixing,
    ShardData,
    ShardedSplits,
    Splits,
    apply_division,
    cache_dir,
    channel_statistics,
    divide,
    drop_broken,
    examine,
    is_uneven,
    load_splits,
    parts_of_step,
    plain_view,
    read_division,
    read_unlabeled,
    training_view,
)
from kd.errors import UserError
from kd.files import sha256_of
from kd.losses import BaseLoss, CrossEntropy, Objective, Outputs, Term, balanced_weights, build_objective
from kd.metrics import ACCURACY, MULTILABEL
from kd.models import (
    Classifier,
    Embedder,
    Ensemble,
    allow_checkpointing,
    build_classifier,
    initialize_from,
    keep_classes,
    largest_batch,
    reuse_head,
    usual_statistics,
    why_not_compiled,
)
from kd.pipeline.caches import cache_images
from kd.pipeline.run_store import kind_of, slug
from kd.preflight import Finding, check_files, refuse
from kd.provenance import Provenance, code_digests, environment, without_folders
from kd.randomness import seeded
from kd.settings import (
    PUBLISHED,
    ObjectiveSettings,
    Phase,
    Settings,
    read_yaml,
    settings_affecting,
    unsupported_by_streams,
)
from kd.teachers import Foreign, digest_of_weights, load_teacher
from kd.training import Hardware, Recipe, build_trainer

SKIPPED_FILE = "skipped-images.txt"

_UNLABELED = "unlabeled images"
_MULTILABEL_LOSSES = {"loss": ("bce=0.1", "binary_kl=0.9"), "baseline_loss": ("bce=1",)}
"""Default objectives with several labels an image."""

_LARGEST_BATCH = 512
_LONGEST_NAME = 150
_MODEL_FLAGS = {"teacher": "--teacher_model", "assistant": "--assistants", "student": "--student_model"}


@dataclass(frozen=True)
class Images:
    """The images of an experiment.

    Args:
        splits: Training and validation images by the side of their views in pixels, read through the cache.
        unlabeled: Images without labels to distill on as well, or ``None``.
        mean: Mean of the training images by channel, in [0, 1], for networks without their own.
        std: Standard deviation likewise.
        findings: What is unusual about the image files.
        contents: Number and content hash of the training, validation and unlabeled images, in words.
        division: The images of one folder that were divided, and the split of each; ``None`` if none were.
    """

    splits: Mapping[int, Splits]
    unlabeled: LabeledImages | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    findings: tuple[Finding, ...]
    contents: Mapping[str, str]
    division: tuple[LabeledImages, list[str]] | None = None

    def contents_for(self, kind: Phase) -> dict[str, str]:
        """Return the contents that a phase of some kind depends on; only students are distilled on unlabeled images."""
        return {name: text for name, text in self.contents.items() if kind == "distilled" or name != _UNLABELED}


@dataclass(frozen=True)
class Components:
    """The parts of an experiment.

    Args:
        settings: All settings.
        folder: The experiment's folder.
        hardware: Where it runs.
        world_size: Number of processes that train one network.
        images: The images.
        objective: What the distilled student minimizes.
        compared: The objectives to compare, by how they are written.
        mixing: Mixes the images of a student's batches, or ``None``.
        batch_size: Images in a batch, on each device.
        num_workers: Data loader processes.
        metric: The metric that chooses the best epoch.
        class_weights: Weights of the classes in the losses on the labels; empty: none.
        notes: What was chosen automatically, and why.
    """

    settings: Settings
    folder: Path
    hardware: Hardware
    world_size: int
    images: Images
    objective: Objective
    compared: Mapping[str, Objective]
    mixing: Mixing | None
    batch_size: int
    num_workers: int
    metric: str
    class_weights: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def splits(self) -> Splits:
        """The images at the student's size."""
        return self.images.splits[self.settings.data.image_size]

    @property
    def seeds(self) -> range:
        """The seeds of the students."""
        phases = self.settings.phases
        return range(phases.seed, phases.seed + phases.seeds)

    @property
    def distills(self) -> bool:
        """Whether a student is distilled."""
        return self.settings.phases.distill or bool(self.compared)

    @property
    def trains_baseline(self) -> bool:
        """Whether the student is trained on labels only, as if no phase is named."""
        return self.settings.phases.baseline or not (self.settings.phases.train_teacher or self.distills)

    @property
    def objectives(self) -> list[Objective]:
        """The objectives of all distillations; assistants have the student's."""
        uses_loss = self.settings.phases.distill or bool(self.compared and self.settings.models.assistants)
        return [*([self.objective] if uses_loss else []), *self.compared.values()]

    @property
    def writes_files(self) -> bool:
        """Whether the experiment writes files."""
        return not self.settings.machine.fast_dev_run


def build_components(settings: Settings, console: Console) -> Components:
    """Read the images and build everything but the networks.

    Raises:
        UserError: If images, objectives or hardware don't agree with the settings.
    """
    data, name = settings.data, settings.phases.name
    if name is not None and (Path(name).name != name or name == ".." or len(name) > _LONGEST_NAME):
        raise UserError(f"--name {name}: not a valid folder name; use letters, digits, '-', '_' and '.'")
    if data.pixel_range and (len(data.pixel_range) != 2 or data.pixel_range[0] >= data.pixel_range[1]):  # noqa: PLR2004
        text = " ".join(f"{value:g}" for value in data.pixel_range)
        raise UserError(f"--pixel_range {text}: two gray values, the smaller one first, such as 0 4095")
    # An unknown augmentation is refused before the images are read.
    training_view(data.augment, data.image_size)
    hardware, notes = _build_hardware(settings)
    phases = settings.phases
    needs_train = (
        data.unlabeled_data is None or phases.train_teacher or not (phases.distill or settings.objective.compare_losses)
    )
    layout = replace(Layout.of(settings.flat()), needs_train=needs_train)
    found = load_splits(data.dataset, data.data_dir, layout, download=data.download)
    folder = Path(settings.machine.default_root_dir).expanduser() / (name or _default_name(settings, found.name))
    images = _load_images(found, settings, folder, console)
    splits = images.splits[data.image_size]
    num_classes = len(splits.classes)
    if data.num_classes not in (None, num_classes):
        raise UserError(f"--num_classes {data.num_classes}: {splits.name} has {num_classes} classes; omit the flag")
    if data.unlabeled_rest and data.train_fraction == 1:
        raise UserError("--unlabeled_rest: all training images are labeled; set --train_fraction below 1")
    if splits.multilabel:
        _check_multilabel(settings)
        notes.append(
            f"several labels an image: {', '.join(f'--{name} {text}' for name, text in _describe_losses(settings))}"
        )
    class_weights = _read_class_weights(settings.objective.class_weights, splits)
    objective, compared = _build_objectives(settings, splits, class_weights)
    metric = _choose_metric(settings.phases.metric, splits)
    if settings.phases.metric == "auto" and metric == "balanced_accuracy":
        notes.append(f"--metric auto: {metric}, as the classes of the validation images are uneven")
    is_mixed = bool(data.mixup or data.cutmix)
    components = Components(
        settings=settings,
        folder=folder,
        hardware=hardware,
        # Hardware that Lightning doesn't support is refused here.
        world_size=build_trainer(hardware, logger=False, enable_checkpointing=False).world_size,
        images=images,
        objective=objective,
        compared=compared,
        mixing=Mixing(mixup=data.mixup, cutmix=data.cutmix, num_classes=num_classes) if is_mixed else None,
        batch_size=2 if data.batch_size == "auto" else data.batch_size,
        num_workers=default_workers(hardware.accelerator) if data.num_workers is None else data.num_workers,
        metric=metric,
        class_weights=class_weights,
        notes=tuple(notes),
    )
    return components if data.batch_size != "auto" else _with_largest_batch(components)


def build_network(
    components: Components,
    role: Literal["teacher", "assistant", "student"],
    architecture: str,
    seed: int,
    *,
    image_size: int | None = None,
) -> Classifier:
    """Build a network; its initial weights depend on the architecture and the seed alone.

    Args:
        components: The parts of the experiment.
        role: What it is for; published weights are set for each role.
        architecture: Its name.
        seed: Random seed of its weights.
        image_size: Side of its images, in pixels; ``None``: the student's.

    Raises:
        UserError: If it can't be built, or can't be trained with this batch size.
    """
    data, pretrained_flag = components.settings.data, f"--{role}_pretrained"
    pretrained = getattr(components.settings.models, f"{role}_pretrained")
    file = None if pretrained in (None, PUBLISHED) else Path(pretrained).expanduser()
    usual = None if file is None else usual_statistics(architecture)
    mean, std = usual or (components.images.mean, components.images.std)
    loaded = _load_student(components, architecture) if role == "student" else None
    if loaded is not None:
        mean, std = loaded.description.mean, loaded.description.std
    try:
        with seeded(seed, "weights"):
            classifier = build_classifier(
                architecture,
                classes=components.splits.classes,
                image_size=image_size or data.image_size,
                resize=data.resize,
                mean=mean,
                std=std,
                pretrained=pretrained == PUBLISHED,
                pretrained_flag=pretrained_flag,
            )
        if file is not None:
            initialize_from(classifier, file, flag=_MODEL_FLAGS[role])
        if loaded is not None:
            keep_classes(classifier, loaded)
    except UserError as error:
        if str(error).startswith(pretrained_flag):
            raise
        if file is not None and str(error).startswith(str(file)):
            raise UserError(f"{pretrained_flag} {error}") from error.__cause__
        raise UserError(f"{_MODEL_FLAGS[role]} {architecture}: {error}") from error.__cause__
    multilabel = components.splits.multilabel
    classifier.description = replace(classifier.description, pixel_range=data.pixel_range, multilabel=multilabel)
    _check_trainable(components, classifier, f"{_MODEL_FLAGS[role]} {architecture}")
    return classifier


def _check_trainable(components: Components, classifier: Classifier, flag: str) -> None:
    """Refuse a network without anything to train, or that can't be trained as asked for; ``flag`` is for messages."""
    if not any(parameter.requires_grad for parameter in classifier.parameters()):
        raise UserError(f"{flag}: all its weights are frozen (requires_grad is False): there is nothing to train")
    if components.settings.optimization.gradient_checkpointing:
        try:
            allow_checkpointing(classifier)
        except UserError as error:
            raise UserError(f"--gradient_checkpointing {flag}: {error}") from None
    if components.batch_size == 1:
        _check_single_image(classifier)


def _load_student(components: Components, architecture: str) -> Classifier | None:
    """Load the weights that the student starts from, by the loader of teachers, if ``--student_checkpoint`` is set."""
    checkpoint, splits = components.settings.models.student_checkpoint, components.splits
    if checkpoint is None:
        return None
    try:
        loaded, _ = load_teacher(
            Path(checkpoint).expanduser(),
            model=architecture,
            classes=splits.classes,
            data=splits.name,
            image_size=components.settings.data.image_size,
            foreign=Foreign(prefix="student_"),
        )
    except UserError as error:
        raise UserError(f"--student_checkpoint {error}") from error.__cause__
    return loaded


def build_student(components: Components, seed: int) -> Classifier:
    """Build the student, with the same initial weights for the baseline and for distillation."""
    return build_network(components, "student", components.settings.models.student_model, seed)


def with_teachers_head(student: Classifier, teacher: Classifier | Ensemble, seed: int) -> Classifier:
    """Return a student that ends in its teacher's classifier layer; the weights between them depend on the seed.

    Raises:
        UserError: If a network can't be split there, or there are several teachers.
    """
    if not isinstance(teacher, Classifier) or isinstance(teacher, Embedder):
        raise UserError("--loss simkd: the classifier layer of a single teacher is reused; name one that has it")
    with seeded(seed, "reused head"):
        return reuse_head(student, teacher)


def build_recipe(settings: Settings) -> Recipe:
    """Build the recipe of the student's optimization."""
    return Recipe(**{field.name: getattr(settings.optimization, field.name) for field in fields(Recipe)})


def build_teacher_recipe(settings: Settings) -> Recipe:
    """Build the recipe of the teacher's optimization; only students are averaged."""
    optimization, recipe = settings.optimization, build_recipe(settings)
    learning_rate = optimization.teacher_learning_rate or recipe.learning_rate
    return replace(recipe, learning_rate=learning_rate, freeze=optimization.teacher_freeze, swa=None)


def teacher_data(components: Components, seed: int, image_size: int) -> Batches:
    """Build a teacher's batches; its views are new in each epoch, whatever ``--views`` is."""
    return _build_data(components, seed, image_size, train_fraction=components.settings.data.teacher_train_fraction)


def student_data(components: Components, seed: int, objective: Objective | None = None) -> Batches:
    """Build a student's batches; views, order and fraction depend on the seed.

    Args:
        components: The parts of the experiment.
        seed: The seed.
        objective: What a distilled student minimizes: unlabeled images are then added, and if no term needs labels,
            those of the training images are hidden. ``None`` for the baseline.
    """
    data = components.settings.data
    more: dict[str, Any] = {"period": data.views, "train_fraction": data.train_fraction}
    if objective is not None:
        more |= {"unlabeled": components.images.unlabeled, "unlabeled_rest": data.unlabeled_rest}
        more["reads_labels"] = objective.needs_labels
    return _build_data(components, seed, data.image_size, **more)


def test_data(components: Components, image_size: int) -> ImageData | None:
    """Build the batches of the test images, as those of validation; ``None`` without test images."""
    test = components.images.splits[image_size].test
    if test is None:
        return None
    return ImageData(
        Splits(components.splits.name, train=test, val=test),
        image_size=image_size,
        batch_size=components.batch_size,
        num_workers=components.num_workers,
        resize=components.settings.data.resize,
    )


def provenance_of(
    components: Components,
    phase: str,
    network: Classifier | Ensemble,
    *,
    objective: str | None = None,
    teacher: Classifier | Ensemble | None = None,
) -> Provenance:
    """Return what a run's result depends on, with what ``auto`` resolved to.

    Args:
        components: The parts of the experiment.
        phase: The run's phase.
        network: The network that it trains.
        objective: How its objective is written, if it is one of several to compare.
        teacher: The network that is distilled; ``None`` if there is none, or if it isn't known.
    """
    kind, compute = kind_of(phase), components.hardware.compute_for(network, trains=True)
    values = components.settings.flat() | {
        "batch_size": components.batch_size,
        "precision": compute.precision,
        "channels_last": compute.channels_last,
        # Views of downscaled images differ from those of the original files.
        "image_cache": components.splits.train.cached_side,
        # Earlier versions chose the best epoch by accuracy.
        "class_weights": list(components.class_weights) or "none",
        "metric": components.metric if components.metric != ACCURACY else "auto",
    }
    settings = {name: values[name] for name in settings_affecting(kind)} | {"processes": components.world_size}
    for name in ("teacher_pretrained", "student_pretrained"):
        if name in settings:
            settings[name] = describe_pretrained(settings[name])
    if settings.get("student_checkpoint") is not None:
        settings["student_checkpoint"] = describe_pretrained(settings["student_checkpoint"])
    if kind == "teacher":
        settings["max_epochs"] = settings.pop("teacher_epochs") or settings["max_epochs"]
    if isinstance(components.splits, ShardedSplits):
        settings["stream_parts"] = parts_of_step(components.world_size)
    if objective is not None:
        settings["loss"] = [objective]
    elif components.splits.multilabel and "loss" in settings:
        settings["loss"] = losses_of(components.settings, multilabel=True, name="loss")
    texts = [
        network.description.architecture,
        settings["augment"],
        *settings.get("loss", ()),
        *settings.get("baseline_loss", ()),
    ]
    provenance: Provenance = {"settings": settings, "data": components.images.contents_for(kind)}
    if teacher is not None:
        texts.append(teacher.description.architecture)
        provenance["teacher"] = {
            "teacher weights": digest_of_weights(teacher),
            "teacher network": without_folders(teacher.description.architecture),
        }
    return provenance | {
        "code": code_digests(texts),
        "environment": environment(_describe_hardware(components.hardware, components.world_size)),
    }


def describe_pretrained(value: str | None) -> bool | str:
    """Return what a run's result depends on: whether weights are published, or a file's content, wherever it lies."""
    if value in (None, PUBLISHED):
        return value is not None
    return f"file with SHA-256 {sha256_of(Path(str(value)).expanduser())}"


def default_workers(accelerator: str) -> int:
    """Return the number of data loader processes for the cores that this process may use.

    A GPU leaves the cores to the loaders. On a CPU, training needs them, and loaders pay off only if there are many.

    Args:
        accelerator: Lightning's name of it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // 4) if accelerator == "cpu" else min(8, cores)


def _build_hardware(settings: Settings) -> tuple[Hardware, list[str]]:
    """Return where the experiment runs, without ``--compile`` if there is no compiler, and notes on what was chosen."""
    machine = settings.machine
    hardware, notes = Hardware(**{field.name: getattr(machine, field.name) for field in fields(Hardware)}).resolved()
    on_gpu = hardware.accelerator in ("gpu", "cuda")
    if on_gpu and hardware.precision == "auto":
        torch.set_float32_matmul_precision("high")
    reason = why_not_compiled("cuda" if on_gpu else hardware.accelerator) if hardware.compile else None
    if reason is not None:
        return replace(hardware, compile=False), [*notes, f"--compile: not used, it fails here: {reason}"]
    return hardware, notes


def _describe_hardware(hardware: Hardware, world_size: int) -> str:
    device = platform.machine()
    if hardware.accelerator in ("gpu", "cuda"):
        device = torch.cuda.get_device_name()
    return f"{world_size} × {device}, {torch.get_num_threads()} threads"


def _load_images(splits: Splits, settings: Settings, folder: Path, console: Console) -> Images:
    """Check the files of images, divide them if asked to, and read them through the cache of decoded images."""
    data = settings.data
    if isinstance(splits, ShardedSplits):
        for flag, reason in unsupported_by_streams(settings):
            raise UserError(f"{flag}: not available with --dataset webdataset: {reason}")
        for shards in (splits.train_shards, splits.val_shards):
            shards.verify(full=data.verify == "full")
    unlabeled = None
    if data.unlabeled_data is not None:
        unlabeled = read_unlabeled(data.unlabeled_data, pixel_range=data.pixel_range)
    skips_broken, files, parts = data.on_bad_image == "skip", list[FileFinding](), dict[str, LabeledImages]()
    for kind, images in (("train", splits.train), ("val", splits.val), ("test", splits.test), (_UNLABELED, unlabeled)):
        if images is not None:
            examined, found = _examine(images, settings, console)
            files += found
            broken = [finding for finding in found if finding.kind == BROKEN] if skips_broken else []
            parts[kind] = drop_broken(examined, broken)
    findings = check_files(files, skips_broken=skips_broken)
    # Before the images are decoded into the cache.
    refuse(findings, strict=False)
    splits = replace(splits, train=parts["train"], val=parts["val"], test=parts.get("test"))
    unlabeled, division = parts.get(_UNLABELED), None
    if Layout.of(settings.flat()).divides:
        known = read_division(folder / SPLIT_FILE)
        division = (
            splits.train,
            divide(
                splits.train,
                val_fraction=data.val_fraction,
                test_fraction=data.test_fraction,
                seed=settings.phases.seed,
                known=known,
            ),
        )
        if new := sum(key not in known for key in splits.train.keys) if known else 0:
            console.print(f"note: {new:,} images aren't in {folder / SPLIT_FILE}: used for training")
        splits = apply_division(splits, division[1])
    cache = partial(cache_images, where=data.image_cache, limit=data.cache_limit, console=console)
    by_size = {
        size: replace(
            splits,
            train=cache(splits.train, image_size=size, augment=data.augment),
            val=cache(splits.val, image_size=size, augment="none"),
            test=None if splits.test is None else cache(splits.test, image_size=size, augment="none"),
        )
        for size in {data.image_size, *settings.models.teacher_image_size}
    }
    if unlabeled is not None:
        unlabeled = cache(unlabeled, image_size=data.image_size, augment=data.augment)
    train = by_size[data.image_size].train
    some = unlabeled if unlabeled is not None and not len(train) else train
    mean, std = channel_statistics(some, plain_view(data.image_size, data.resize))
    contents = splits.describe() | ({} if unlabeled is None else {_UNLABELED: unlabeled.describe()})
    return Images(by_size, unlabeled, mean, std, tuple(findings), contents, division)


def _examine(images: LabeledImages, settings: Settings, console: Console) -> tuple[LabeledImages, list[FileFinding]]:
    """Hash and check image files; unchanged files are not read again."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading image files", total=None)
        return examine(
            images,
            cache=cache_dir() / "examined",
            verify=settings.data.verify,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _choose_metric(metric: str, splits: Splits) -> str:
    """Return the metric that chooses the best epoch; one for another number of labels an image is refused."""
    if metric == "auto":
        if splits.multilabel:
            return "map"
        return "balanced_accuracy" if is_uneven(splits.val.labels) else ACCURACY
    if (metric in MULTILABEL) != splits.multilabel and metric not in (ACCURACY, "macro_f1"):
        other = "several labels" if metric in MULTILABEL else "one label"
        raise UserError(f"--metric {metric}: is for {other} an image")
    return metric


def _read_class_weights(value: str, splits: Splits) -> tuple[float, ...]:
    """Return the weights of the classes; empty if there are none.

    Raises:
        UserError: If a file of weights doesn't list just the classes, or a stream doesn't count its images by class.
    """
    if value == "none":
        return ()
    flag = f"--class_weights {value}"
    if value == "balanced":
        if splits.train_counts is None:
            raise UserError(f"{flag}: the shards don't record the classes of their images; write them with kd shard")
        return balanced_weights(splits.train_counts)
    try:
        # A number as a class name is meant as it is written.
        weights = {str(getattr(name, "text", name)): weight for name, weight in read_yaml(Path(value)).items()}
    except UserError as error:
        raise UserError(f"--class_weights {error}") from None
    expected, given = set(splits.classes), set(weights)
    if expected != given:
        parts = [("lacks", expected - given), ("has unknown", given - expected)]
        text = "; ".join(f"{verb} {', '.join(sorted(names))}" for verb, names in parts if names)
        raise UserError(f"{flag}: {text}; it must give a weight for each class")
    try:
        return CrossEntropy(class_weights=tuple(float(weights[name]) for name in splits.classes)).class_weights
    except (TypeError, ValueError) as error:
        raise UserError(f"{flag}: {error}") from None


def losses_of(settings: Settings, multilabel: bool, name: str) -> list[str]:  # noqa: FBT001 (one of two kinds of labels)
    """Return the terms of ``loss`` or ``baseline_loss``; the defaults depend on the number of labels an image has."""
    given = getattr(settings.objective, name)
    is_default = given == getattr(ObjectiveSettings(), name)
    return list(_MULTILABEL_LOSSES[name] if multilabel and is_default else given)


def _describe_losses(settings: Settings) -> list[tuple[str, str]]:
    return [(name, " ".join(losses_of(settings, multilabel=True, name=name))) for name in _MULTILABEL_LOSSES]


def _check_multilabel(settings: Settings) -> None:
    """Refuse settings that are defined for one label an image only."""
    defaults = Settings()
    for section, name in (
        *(("data", name) for name in ("mixup", "cutmix", "sampler", "teacher_top")),
        *(("objective", name) for name in ("class_weights", "label_smoothing", "teacher_label_smoothing")),
    ):
        value = getattr(getattr(settings, section), name)
        if value != getattr(getattr(defaults, section), name):
            raise UserError(f"--{name} {value}: is for one label an image, not for --multilabel")


def _build_objectives(
    settings: Settings, splits: Splits, class_weights: tuple[float, ...]
) -> tuple[Objective, dict[str, Objective]]:
    """Build the student's objective, and those to compare by how they are written."""
    build = partial(
        build_objective,
        num_classes=len(splits.classes),
        multilabel=splits.multilabel,
        temperature=settings.objective.temperature,
        label_smoothing=settings.objective.label_smoothing,
        class_weights=class_weights,
        soft_labels=bool(settings.data.mixup or settings.data.cutmix),
    )
    texts, compared = settings.objective.compare_losses, dict[str, Objective]()
    for text in texts:
        if text in compared:
            raise UserError(f"--compare_losses: {text!r} is listed twice; remove one")
        try:
            compared[text] = build(text)
        except UserError as error:
            raise UserError(f"--compare_losses {text!r}: {str(error).removeprefix('--loss: ')}") from error.__cause__
    return build(losses_of(settings, splits.multilabel, "loss")), compared


def build_baseline_objective(components: Components) -> Objective:
    """Build what the student minimizes that is trained on the labels alone.

    Raises:
        UserError: If a term depends on a teacher.
    """
    settings, classes = components.settings, len(components.splits.classes)
    texts = losses_of(settings, components.splits.multilabel, "baseline_loss")
    try:
        objective = build_objective(
            texts,
            num_classes=classes,
            multilabel=components.splits.multilabel,
            label_smoothing=settings.objective.label_smoothing,
            class_weights=components.class_weights,
            soft_labels=bool(settings.data.mixup or settings.data.cutmix),
        )
    except UserError as error:
        raise UserError(f"--baseline_loss: {str(error).removeprefix('--loss: ')}") from error.__cause__
    terms = []
    for term in objective.terms:
        # A function of the user's may ignore the teacher, which is tried.
        is_own = not isinstance(term.loss, BaseLoss)
        if term.needs_teacher and not (is_own and _ignores_teacher(term, components.splits)):
            raise UserError(
                f"--baseline_loss {' '.join(texts)}: {term.name} depends on a teacher's logits; it belongs to --loss"
            )
        terms.append(replace(term, needs_teacher=False))
    return Objective(tuple(terms))


def _ignores_teacher(term: Term, splits: Splits) -> bool:
    """Return whether a term is finite for a teacher without any finite logit."""
    classes = len(splits.classes)
    labels = torch.arange(4) % classes
    if splits.multilabel:
        labels = torch.eye(classes)[labels]
    logits = torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    loss = term.at(0, 1)(Outputs(logits), Outputs(torch.full_like(logits, torch.nan)), labels)
    return bool(torch.isfinite(loss))


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
    """Build batches; ``more`` are options of :class:`kd.data.ImageData` that streams don't have."""
    data, splits = components.settings.data, components.images.splits[image_size]
    common: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": components.batch_size,
        "num_workers": components.num_workers,
        "augment": data.augment,
        "erasing": data.erasing,
        "resize": data.resize,
        "seed": seed,
        "reads_labels": reads_labels,
        "period": period,
        "left_out": partial(_note_skipped, components.folder) if data.on_bad_image == "skip" else None,
    }
    if isinstance(splits, ShardedSplits):
        return ShardData(splits, **common)
    on_gpu = components.hardware.accelerator in ("gpu", "cuda")
    on_device = data.augment_on == "device" or (data.augment_on == "auto" and on_gpu)
    return ImageData(splits, on_device=on_device, balanced=data.sampler == "balanced", **common, **more)


def _note_skipped(folder: Path, text: str) -> None:
    """Note an image that couldn't be decoded; data loader processes append to one file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SKIPPED_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def _with_largest_batch(components: Components) -> Components:
    """Choose the batch size by the memory that each network to be trained takes."""
    settings, models = components.settings, components.settings.models
    networks = [build_student(components, settings.phases.seed)]
    if settings.phases.train_teacher:
        sizes = models.teacher_image_size or (settings.data.image_size,)
        for name, size in zip(models.teacher_model, itertools.cycle(sizes), strict=False):
            networks.append(build_network(components, "teacher", name, settings.phases.seed, image_size=size))
    device = torch.device("cuda" if components.hardware.accelerator in ("gpu", "cuda") else "cpu")
    # At most half of a small data set, so that an epoch has more than one step.
    most = min(_LARGEST_BATCH, max(2, len(components.splits.train) // 2))
    batch_size = largest_batch(networks, device=device, most=most)
    return replace(components, batch_size=batch_size, notes=(*components.notes, f"--batch_size auto: {batch_size}"))


def _default_name(settings: Settings, data: str) -> str:
    models = settings.models
    parts = (data, "+".join(map(slug, models.teacher_model)), models.student_model)
    return "-".join(map(slug, parts))[:_LONGEST_NAME]
