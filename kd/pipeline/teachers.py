"""The teachers of an experiment: to be trained, found among earlier runs or given; combined and measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from kd.data import FIXED, ImageData, ShardedSplits, plain_view
from kd.errors import UserError
from kd.files import sha256_of
from kd.metrics import logged_as
from kd.models import Classifier, Embedder, Ensemble, read_accuracy, timm_folder
from kd.pipeline.components import Components, build_network, describe_pretrained, student_data, test_data
from kd.pipeline.run_store import FoundTeacher, find_teacher, given_teacher, short_digest, slug
from kd.preflight import Finding, check_accuracy, refuse
from kd.registry import is_own_code, parse_choice
from kd.settings import PUBLISHED, Settings
from kd.teachers import (
    NONE,
    Foreign,
    StoredLogits,
    depends_on_class,
    has_stored_logits,
    is_no_better_than_chance,
    load_teacher,
    majority_share,
    ranks_by_class,
)
from kd.training import PredictionRecorder, evaluate

_CHECKED_IMAGES = 512
_TRIED_IMAGES = 256
_POOR = 0.9
"""Accuracy below which other normalizations of a given teacher are tried."""

# ImageNet's, that to [-1, 1], and none.
_NORMALIZATIONS = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
)


@dataclass(frozen=True)
class Teacher:
    """A network that is distilled: a teacher, an ensemble of teachers, or an assistant.

    Args:
        network: The network.
        checkpoints: The files that its weights come from; none with ``--fast_dev_run``.
        accuracy: Its accuracy on the student's validation images, in [0, 1]; ``None`` for features alone.
        predictions: The file of its logits for each validation image, or ``None``.
        decisions: Its predicted classes, ``(N,)``, in the order of the validation images, or ``None``.
        score: The metric that chooses the best epoch, likewise.
        tested: ``test_acc``, ``test_score`` and ``test``, the file of its logits, if there are test images.
    """

    network: Classifier | Ensemble
    checkpoints: tuple[str, ...]
    accuracy: float | None
    predictions: str | None
    decisions: Tensor | None
    score: float | None = None
    tested: Mapping[str, Any] = field(default_factory=dict)


def check_teacher_flags(settings: Settings) -> None:
    """Refuse numbers of networks, checkpoints, weights and image sizes that don't agree.

    Raises:
        UserError: If they don't.
    """
    models = settings.models
    if settings.phases.train_teacher and models.teacher_checkpoint:
        raise UserError("--train_teacher --teacher_checkpoint: the teacher is either trained or loaded; drop one flag")
    count = len(models.teacher_model)
    if not count:
        raise UserError("--teacher_model: name at least one network")
    for name, counts in (
        ("teacher_checkpoint", {0, count}),
        ("ensemble_weights", {0, count}),
        ("teacher_image_size", {0, 1, count}),
    ):
        values = getattr(models, name)
        if len(values) not in counts:
            text = " ".join(map(str, values))
            raise UserError(
                f"--{name} {text}: {len(values)} given, but --teacher_model names {count}; give one for each"
            )
    for name, values in (("teacher_mean", models.teacher_mean), ("teacher_std", models.teacher_std)):
        if len(values) not in (0, 1, 3):
            raise UserError(
                f"--{name} {' '.join(map(str, values))}: give three numbers, one for each color channel, or one for all"
            )
    if models.student_checkpoint and models.student_pretrained:
        raise UserError("--student_checkpoint --student_pretrained: the student starts from one of them; drop one flag")
    if models.teacher_features and count > 1:
        raise UserError("--teacher_features: several teachers are averaged by their predictions; name one")
    if models.ensemble_weights and not sum(models.ensemble_weights) > 0:
        raise UserError("--ensemble_weights: at least one weight must be positive")


def untrained_teachers(components: Components) -> list[tuple[int, Classifier]]:
    """Build the teachers that ``--train_teacher`` trains, with their seeds: a network named again has the next one."""
    settings, names = components.settings, components.settings.models.teacher_model
    seeds = [settings.phases.seed + names[:index].count(name) for index, name in enumerate(names)]
    return [
        (seed, build_network(components, "teacher", name, seed, image_size=size))
        for seed, (name, size) in zip(seeds, _names_and_sizes(settings), strict=True)
    ]


def trained_teachers(components: Components, console: Console) -> list[tuple[FoundTeacher, Classifier]]:
    """Load the teachers that were trained before: those that ``--teacher_checkpoint`` names, or the newest that fit.

    Raises:
        UserError: If one isn't found, or doesn't fit the data.
    """
    splits, kinds = components.splits, _names_and_sizes(components.settings)
    models = components.settings.models
    found = [given_teacher(path) for path in models.teacher_checkpoint]
    if not found:
        root, folder, pretrained = components.folder.parent, components.folder, models.teacher_pretrained
        # Without a teacher that was fine-tuned from these weights, they teach as they are.
        untuned = None if pretrained is None else given_teacher(NONE if pretrained == PUBLISHED else pretrained)
        for name, size in kinds:
            found.append(
                find_teacher(
                    root,
                    folder,
                    data=splits.name,
                    contents=components.images.contents_for("teacher"),
                    model=name,
                    image_size=size,
                    besides=found,
                    pretrained=None if pretrained is None else describe_pretrained(pretrained),
                    fallback=untuned,
                )
            )
        # Networks that are named several times keep the order of their seeds, so that each keeps its weight.
        for kind in set(kinds):
            places = [index for index, other in enumerate(kinds) if other == kind]
            by_seed = sorted((found[index] for index in places), key=lambda teacher: int(teacher.record.get("seed", 0)))
            for index, teacher in zip(places, by_seed, strict=True):
                found[index] = teacher
    is_published = models.teacher_pretrained == PUBLISHED
    foreign = Foreign(
        models.teacher_classes,
        models.teacher_mean,
        models.teacher_std,
        published=is_published,
        features_only=models.teacher_features,
    )
    loaded = []
    for teacher, (name, size) in zip(found, kinds, strict=True):
        network, notes = load_teacher(
            teacher.checkpoint, model=name, classes=splits.classes, data=splits.name, image_size=size, foreign=foreign
        )
        for note in notes:
            console.print(f"note: {note}")
        network.description = replace(network.description, multilabel=splits.multilabel)
        if isinstance(network.network, StoredLogits):
            _index_views(components, network.network, flag=f"--teacher_checkpoint {teacher.name}", image_size=size)
        loaded.append((teacher, network))
    return loaded


def _index_views(components: Components, stored: StoredLogits, *, flag: str, image_size: int) -> None:
    """Prepare the lookup of stored logits by the pixels of the student's views.

    Raises:
        UserError: If the views vary, or are others than those whose logits are stored.
    """
    data, splits = components.settings.data, components.splits
    if isinstance(splits, ShardedSplits):
        raise UserError(f"{flag}: stored logits can't be matched to the images of a stream; use an image folder")
    if data.augment not in FIXED or components.mixing is not None or data.erasing:
        given = "--mixup or --cutmix" if components.mixing is not None else f"--erasing {data.erasing:g}"
        given = f"--augment {data.augment}" if data.augment not in FIXED else given
        raise UserError(
            f"{flag}: stored logits are those of fixed views, but {given} makes new ones; use --augment none or flip, "
            "without mixing"
        )
    if data.augment == "flip" and not stored.has_flipped:
        raise UserError(
            f"{flag}: has no logits of mirrored images for --augment flip; add kd predict --flip, or use none"
        )
    if image_size != data.image_size:
        raise UserError(f"{flag} --teacher_image_size {image_size}: stored logits need none; leave it out")
    view, root = (
        plain_view(image_size, data.resize),
        None if data.data_dir is None else Path(data.data_dir).expanduser(),
    )
    unlabeled = components.images.unlabeled
    for kind, images in (("training", splits.train), ("validation", splits.val), ("unlabeled", unlabeled)):
        if images is not None:
            stored.index(images, view, kind=kind, root=root)


def combine(teachers: Sequence[Classifier], settings: Settings) -> Classifier | Ensemble:
    """Return the single teacher, or several as an ensemble."""
    if len(teachers) == 1:
        return teachers[0]
    models = settings.models
    return Ensemble(list(teachers), weights=models.ensemble_weights, average=models.teacher_average)


def teacher_phase(components: Components, teacher: Classifier) -> str:
    """Return the phase that trains a teacher: ``teacher``, or ``teacher/NAME`` if there are several."""
    several = len(components.settings.models.teacher_model) > 1
    return f"teacher/{slug(teacher.description.architecture)}" if several else "teacher"


def measure_teacher(
    components: Components,
    console: Console,
    role: str,
    network: Classifier | Ensemble,
    *,
    phase: str,
    checkpoints: Sequence[str],
) -> Teacher:
    """Measure a teacher on the student's validation images, and refuse it if it is no better than chance.

    Args:
        components: The parts of the experiment.
        console: Where accuracy and findings are printed.
        role: ``teacher``, ``assistant`` or ``ensemble``.
        network: The network.
        phase: The phase that trained it.
        checkpoints: The files that its weights come from.

    Raises:
        UserError: If it is no better than chance, and ``--allow_weak_teacher`` isn't set.
    """
    if isinstance(network, Embedder):
        console.print(f"{role} {network.description.architecture} · features only: it has no accuracy")
        return Teacher(network, tuple(checkpoints), None, None, None)
    path = components.folder / "predictions" / f"{slug(phase)}-{short_digest(chr(0).join(checkpoints))}.npz"
    recorder = PredictionRecorder(path if components.writes_files else None)
    measured, _ = _measure(components, console, role, network, checkpoints, recorder=recorder)
    predictions, score = None if recorder.path is None else str(recorder.path), logged_as(components.metric)
    tested, data = dict[str, Any](), test_data(components, components.settings.data.image_size)
    if data is not None and recorder.path is not None and not has_stored_logits(network):
        at = recorder.path.with_name(f"{recorder.path.stem}-test.npz")
        tested = measure_on_test(
            components, network if isinstance(network, Ensemble) else Ensemble([network]), data, at
        )
    accuracy = measured["val/acc"]
    return Teacher(network, tuple(checkpoints), accuracy, predictions, recorder.decisions, measured[score], tested)


def measure_on_test(
    components: Components, network: Classifier | Ensemble, data: ImageData, path: Path
) -> dict[str, Any]:
    """Measure a network on all test images.

    Returns:
        ``test_acc``, ``test_score``, the metric that chooses the best epoch, and ``test``, the file of the logits.
    """
    hardware, recorder = replace(components.hardware, limit_val_batches=1.0), PredictionRecorder(path)
    measured = evaluate(network, data, hardware=hardware, predictions=recorder, metric=components.metric)
    return {"test_acc": measured["val/acc"], "test_score": measured[logged_as(components.metric)], "test": str(path)}


def check_teachers(
    components: Components, console: Console, teachers: Sequence[tuple[FoundTeacher, Classifier]]
) -> list[Finding]:
    """Measure trained teachers on some validation images, and compare with the accuracy that their checkpoints record.

    Raises:
        UserError: If one is no better than chance, and ``--allow_weak_teacher`` isn't set.
    """
    batches, findings = math.ceil(_CHECKED_IMAGES / components.batch_size), list[Finding]()
    for found, network in teachers:
        checkpoints = [] if found.checkpoint is None else [str(found.checkpoint)]
        if not isinstance(network, Embedder):
            findings += _measure(components, console, "teacher", network, checkpoints, batches=batches)[1]
    return findings


def _measure(
    components: Components,
    console: Console,
    role: str,
    network: Classifier | Ensemble,
    checkpoints: Sequence[str],
    *,
    batches: int | None = None,
    recorder: PredictionRecorder | None = None,
) -> tuple[dict[str, float], list[Finding]]:
    """Return a teacher's metrics on the student's views, on all of them unless ``batches`` is set, and findings."""
    settings, name = components.settings, network.description.architecture
    multilabel, count = components.splits.multilabel, len(components.splits.val)
    # Whatever --limit_val_batches is.
    hardware = replace(components.hardware, limit_val_batches=batches or 1.0)
    # An ensemble resizes the views for each member.
    ensemble = network if isinstance(network, Ensemble) else Ensemble([network])
    data, recorder = student_data(components, settings.phases.seed), recorder or PredictionRecorder()
    measured = evaluate(ensemble, data, hardware=hardware, predictions=recorder, metric=components.metric)
    accuracy = measured["val/acc"]
    images = count if batches is None else min(count, batches * components.batch_size)
    what, value = ("mAP", measured["val/map"]) if "val/map" in measured else ("accuracy", accuracy)
    console.print(f"{role} {name} · validation {what} {value:.1%}{'' if batches is None else f' on {images:,} images'}")
    findings: list[Finding] = []
    if len(checkpoints) == 1 and components.writes_files:
        recorded = read_accuracy(Path(checkpoints[0]))
        findings = check_accuracy(recorded, accuracy, images=images, teacher=f"the {role} {name}")
    for finding in findings:
        console.print(str(finding))
    is_given = bool(settings.models.teacher_checkpoint) and not has_stored_logits(network) and not multilabel
    if accuracy < _POOR and is_given and isinstance(network, Classifier):
        _print_better_normalization(components, console, network, accuracy)
    refuse(findings, strict=settings.phases.strict)
    if (problem := _find_chance(components, recorder, accuracy, images=images)) is not None:
        text = f"the {role}'s {problem}"
        if not (settings.machine.fast_dev_run or settings.phases.allow_weak_teacher):
            raise UserError(f"{text}; train it longer, or distill it nevertheless with --allow_weak_teacher")
        findings.append(Finding("warning", text))
        console.print(str(findings[-1]))
    return measured, findings


def _find_chance(components: Components, recorder: PredictionRecorder, accuracy: float, *, images: int) -> str | None:
    """Return in words that a teacher is no better than chance; ``None`` if it is."""
    targets, logits = (values.numpy() for values in recorder.validated)
    if components.splits.multilabel:
        is_useful = ranks_by_class(targets, logits)
        return None if is_useful else "logits of no class are larger for the images that have it: no better than chance"
    labels = components.splits.val.strata
    if not is_no_better_than_chance(accuracy, labels, images=images):
        return None
    if depends_on_class(targets.tolist(), logits.argmax(axis=1).tolist()):
        return None
    return (
        f"accuracy of {accuracy:.1%} is no better than chance: always predicting the most frequent class gives "
        f"{majority_share(labels):.1%}"
    )


def file_facts(checkpoint: Path | None, architecture: str) -> dict[str, str]:
    """Return the path and the SHA-256 of a teacher's file, or of its code, for the report."""
    name, _ = parse_choice(architecture)
    path = checkpoint or timm_folder(architecture)
    if path is None and not is_own_code(name):
        return {"teacher weights": f"published weights of {architecture}"}
    path = path or Path(name.rpartition(":")[0]).expanduser()
    return {"teacher file": str(path), "SHA-256": sha256_of(path)}


def _print_better_normalization(components: Components, console: Console, network: Classifier, accuracy: float) -> None:
    """Try the usual normalizations on some validation images, and print the flags of one that is clearly better."""
    images, found = min(_TRIED_IMAGES, len(components.splits.val)), dict[str, float]()
    hardware = replace(components.hardware, limit_val_batches=math.ceil(images / components.batch_size))
    for mean, std in _NORMALIZATIONS:
        other = network.with_normalization(mean, std)
        data = student_data(components, components.settings.phases.seed)
        flags = f"--teacher_mean {' '.join(map(str, mean))} --teacher_std {' '.join(map(str, std))}"
        found[flags] = evaluate(Ensemble([other]), data, hardware=hardware)["val/acc"]
    flags, best = max(found.items(), key=itemgetter(1))
    # Three standard errors of the accuracy of so many images.
    if best - accuracy > 3 * math.sqrt(0.25 / images):
        console.print(
            f"warning: the teacher's normalization may be wrong: with {flags} its accuracy is {best:.1%} on {images:,} "
            "images"
        )


def _names_and_sizes(settings: Settings) -> list[tuple[str, int]]:
    """Return the network and the image size in pixels of each teacher."""
    names = settings.models.teacher_model
    sizes = list(settings.models.teacher_image_size or [settings.data.image_size])
    return list(zip(names, sizes * len(names) if len(sizes) == 1 else sizes, strict=True))
