"""Loading a teacher from wherever it comes, matching its classes to the data's, and judging its accuracy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom, chi2_contingency, mannwhitneyu

from kd.errors import UserError
from kd.exported import METADATA_KEY, parse_metadata, refuse_program
from kd.models import (
    IMAGENET,
    Classifier,
    Description,
    Embedder,
    Weights,
    build_classifier,
    build_embedder,
    build_from_state,
    build_from_weights,
    checked,
    imagenet_names,
    is_own_checkpoint,
    load_classifier,
    name_outputs,
    published_state,
    read_class_names,
    read_plain,
    read_safetensors,
    read_weights,
    timm_folder,
    usual_size,
)
from kd.registry import is_own_code, parse_choice
from kd.teachers.onnx import OnnxNetwork
from kd.teachers.stored_logits import TABLES, LogitTable, StoredLogits, read_table

NONE = "none"
"""Name of no file, for networks whose code loads their weights."""

_SHOWN = 5
_SIGNIFICANCE = 1e-3


@dataclass(frozen=True)
class Foreign:
    """What the user says about a network that was trained elsewhere, where its file doesn't.

    Args:
        classes: Its class names in the order of its logits: a file, or ``imagenet``; ``None``: the file's, or the
            data's.
        mean: Mean of the pixels in [0, 1] by channel that it expects; empty: the file's, or the architecture's.
        std: Standard deviation, likewise.
        prefix: Of the flags that set these, for messages: ``teacher_`` of ``--teacher_classes``.
        published: Whether to load published weights where no file is named.
        features_only: Whether to leave out its classifier layer.
    """

    classes: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    prefix: str = "teacher_"
    published: bool = False
    features_only: bool = False

    def read_classes(self, data_classes: tuple[str, ...]) -> tuple[str, ...] | None:
        """Read the class names, if they are given."""
        if self.classes is None:
            return None
        return read_class_names(self.classes, flag=f"--{self.prefix}classes", data_classes=data_classes)

    @property
    def naming(self) -> str:
        """How to name the classes, for messages."""
        if self.prefix == "student_":
            return "--student_pretrained FILE replaces its classifier layer"
        return (
            "list them in the order of the outputs in a file and name it with "
            f"--{self.prefix}classes FILE (one name per line); ImageNet's are known as --{self.prefix}classes imagenet"
        )


def load_network(
    path: Path | None, *, model: str | None, data_classes: tuple[str, ...], image_size: int, foreign: Foreign
) -> tuple[Classifier, list[str]]:
    """Load a classifier, in evaluation mode, with all classes that it knows.

    Args:
        path: A checkpoint of kd; a file that ``kd export`` wrote; a state dict or a training checkpoint of another
            project (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.safetensors``); an ONNX file; or a folder of timm or
            transformers with ``config.json``. ``None``: the user's code loads the weights, or they are published.
        model: The network; needed where the file doesn't name it, or names a Python file.
        data_classes: The classes of the data.
        image_size: Side of the images, in pixels, for files that don't record it.
        foreign: What the user says about a network of another project.

    Returns:
        The classifier, and notes on what was assumed.

    Raises:
        UserError: If the file can't be read without running code, or doesn't fit the network or the class names.
    """
    flag = f"--{foreign.prefix}model"
    if path is None:
        if model is None:
            raise UserError(f"{NONE}: without a file, add {flag} NAME")
        if is_own_code(parse_choice(model)[0]):
            return _load_own(model, data_classes=data_classes, image_size=image_size, foreign=foreign)
        weights, source = _published(model, data_classes, foreign), f"published weights of {model}"
    else:
        refuse_program(path)
        if path.suffix == ".onnx":
            return _load_onnx(path, data_classes=data_classes, image_size=image_size, foreign=foreign)
        if path.suffix in TABLES and (table := read_table(path)) is not None:
            return _load_table(table, path, data_classes=data_classes, image_size=image_size, foreign=foreign)
        own = _load_own_file(path, model=model, flag=flag)
        if own is not None and not foreign.features_only:
            return own, []
        weights, source = read_weights(path) if own is None else _weights_of(own), str(path)
    architecture = weights.architecture or model
    if architecture is None:
        raise UserError(f"{source}: doesn't name its network; add {flag} NAME")
    build = partial(
        build_from_weights,
        weights,
        source,
        architecture=architecture,
        data_classes=data_classes,
        classes=foreign.read_classes(data_classes),
        mean=foreign.mean or None,
        std=foreign.std or None,
        features_only=foreign.features_only,
        flag=flag,
        naming=foreign.naming,
    )
    usual = usual_size(architecture)
    try:
        return build(image_size=image_size)
    except UserError as error:
        if usual in (None, image_size) or "change --image_size" not in str(error):
            raise
    classifier, notes = build(image_size=usual)
    return classifier, [*notes, f"{architecture} takes images of {usual} px only: views are resized for it"]


def load_teacher(
    path: Path | None,
    *,
    model: str | None,
    classes: tuple[str, ...],
    data: str,
    image_size: int,
    foreign: Foreign | None = None,
) -> tuple[Classifier, list[str]]:
    """Load a teacher whose logits are those of the data's classes, matched by name.

    Args:
        path: Its file, as of :func:`load_network`.
        model: The network.
        classes: The classes of the data; those that only the teacher knows are left out.
        data: Name of the data set.
        image_size: Side of the teacher's images, in pixels.
        foreign: What the user says about a network of another project.

    Returns:
        The teacher, and notes on what was assumed.

    Raises:
        UserError: If it can't be loaded, lacks a class, or was trained by kd on images of another size.
    """
    foreign = foreign or Foreign()
    teacher, notes = load_network(path, model=model, data_classes=classes, image_size=image_size, foreign=foreign)
    if isinstance(teacher, Embedder):
        return teacher, notes
    role = foreign.prefix.strip("_")
    teacher, matched = match_teacher(teacher, classes, teacher_name=f"the {role} {path or model}", data=data)
    trained_size = teacher.description.image_size
    if trained_size != image_size and not notes:
        raise UserError(
            f"--teacher_checkpoint {path}: trained on images of {trained_size} px, but --image_size is {image_size}; "
            f"add --teacher_image_size {trained_size} to resize the student's views for the teacher"
        )
    return teacher, [*notes, *matched]


def _load_own_file(path: Path, *, model: str | None, flag: str) -> Classifier | None:
    """Load a checkpoint of kd, or weights that ``kd export`` wrote; ``None`` for files of other projects."""
    if path.suffix == ".safetensors":
        texts, state = read_safetensors(path)
        metadata = parse_metadata(texts.get(METADATA_KEY))
        return None if metadata is None else build_from_state(metadata, state, path=path, architecture=model, flag=flag)
    if not path.is_dir() and is_own_checkpoint(read_plain(path)):
        return load_classifier(path, architecture=model, flag=flag)
    return None


def _weights_of(classifier: Classifier) -> Weights:
    description = classifier.description
    state = classifier.network.state_dict()
    return Weights(state, description.architecture, description.classes, description.mean, description.std)


def _published(model: str, data_classes: tuple[str, ...], foreign: Foreign) -> Weights:
    """Return the published weights of a network, with ImageNet's class names if it has a thousand."""
    flag = f"--{foreign.prefix}pretrained"
    if not foreign.published:
        raise UserError(
            f"--{foreign.prefix}checkpoint {NONE}: {model} has no trained weights; add {flag} for its published ones, "
            "or name a file"
        )
    if (folder := timm_folder(model)) is not None:
        return replace(read_weights(folder), architecture=model)
    state, number = published_state(model, flag)
    is_imagenet = foreign.classes is None and number == len(imagenet_names())
    names = read_class_names("imagenet", flag=flag, data_classes=data_classes) if is_imagenet else None
    return Weights(state, classes=names)


def _load_own(
    model: str, *, data_classes: tuple[str, ...], image_size: int, foreign: Foreign
) -> tuple[Classifier, list[str]]:
    """Build a network by the user's code, which loads its weights."""
    names, notes = foreign.read_classes(data_classes), list[str]()
    mean, std = foreign.mean or IMAGENET[0], foreign.std or IMAGENET[1]
    if not (foreign.mean and foreign.std):
        notes.append(f"{model}: normalization of ImageNet assumed; --{foreign.prefix}mean and std change it")
    build = build_embedder if foreign.features_only else build_classifier
    try:
        network = build(model, classes=names or data_classes, image_size=image_size, mean=mean, std=std)
    except UserError as error:
        hint = f"; {foreign.naming}" if "expected logits" in str(error) and names is None else ""
        raise UserError(f"{error}{hint}") from error.__cause__
    if names is None and not foreign.features_only:
        notes.append(f"{model} doesn't name its classes: assumed to be the data's, in alphabetical order")
    return network.eval(), notes


def match_teacher(
    teacher: Classifier, classes: tuple[str, ...], *, teacher_name: str, data: str
) -> tuple[Classifier, list[str]]:
    """Return a teacher with the logits of the data's classes, in their order, and a note on what was left out.

    Raises:
        UserError: If it lacks one.
    """
    own = teacher.description.classes
    if own == classes:
        return teacher, []
    if missing := sorted(set(classes) - set(own)):
        extra = sorted(set(own) - set(classes))
        only = f"only the teacher has {_shorten(extra)}; " if extra else ""
        raise UserError(f"{teacher_name} was trained on other classes: {only}only {data} has {_shorten(missing)}")
    if len(own) == len(classes):
        return teacher.restricted_to(classes), ["the teacher's classes are in another order: matched by name"]
    return teacher.restricted_to(classes), [
        f"the teacher knows {len(own):,} classes: its predictions are restricted to the {len(classes):,} of {data}"
    ]


def _load_onnx(
    path: Path, *, data_classes: tuple[str, ...], image_size: int, foreign: Foreign
) -> tuple[Classifier, list[str]]:
    network, notes = OnnxNetwork(path), list[str]()
    size = network.image_size or image_size
    if network.metadata is not None:
        # An exported file normalizes by itself.
        description = Description.from_plain(network.metadata | {"mean": (0.0,) * 3, "std": (1.0,) * 3, "channels": 3})
        return Classifier(network, description).eval(), []
    mean, std = foreign.mean or IMAGENET[0], foreign.std or IMAGENET[1]
    with torch.no_grad():
        try:
            number = network(torch.zeros(1, 3, size, size)).shape[1]
        except Exception as error:  # noqa: BLE001 (onnxruntime raises a class of its own for each kind of failure)
            raise UserError(f"{path}: can't process images of {size} px: {str(error).splitlines()[0]}") from None
    if not foreign.mean or not foreign.std:
        notes.append(f"{path.name}: normalization of ImageNet assumed; --{foreign.prefix}mean and std change it")
    if size != image_size:
        notes.append(f"{path.name} takes images of {size} px only: views are resized for it")
    description = Description(path.name, data_classes, size, "crop", mean, std)
    if foreign.features_only:
        return Embedder(network, description).eval(), notes
    names, assumed = name_outputs(
        number, foreign.read_classes(data_classes), data_classes=data_classes, source=str(path), naming=foreign.naming
    )
    return checked(Classifier(network, replace(description, classes=names))).eval(), [*notes, *assumed]


def _load_table(
    table: LogitTable, path: Path, *, data_classes: tuple[str, ...], image_size: int, foreign: Foreign
) -> tuple[Classifier, list[str]]:
    names, assumed = name_outputs(
        table.logits.shape[1],
        foreign.read_classes(data_classes) or table.classes,
        data_classes=data_classes,
        source=str(path),
        naming=foreign.naming,
    )
    # Pixels are compared as they are.
    description = Description(path.name, names, image_size, "crop", (0.0,) * 3, (1.0,) * 3)
    note = f"{path.name}: stored logits of {len(table.logits):,} images, of the views that their teacher saw"
    return Classifier(StoredLogits(table, path), description).eval(), [note, *assumed]


def majority_share(labels: Sequence[int]) -> float:
    """Return the accuracy of a classifier that always predicts the most frequent class."""
    return max(Counter(labels).values()) / len(labels)


def is_no_better_than_chance(accuracy: float, labels: Sequence[int], *, images: int) -> bool:
    """Return whether an accuracy could be that of always predicting the most frequent class.

    One-sided binomial test at a significance level of 0.001; ``labels`` are those of all validation images, ``images``
    the number that was measured. A classifier without errors always passes.
    """
    correct = round(accuracy * images)
    return correct < images and bool(binom.sf(correct - 1, images, majority_share(labels)) > _SIGNIFICANCE)


def depends_on_class(labels: Sequence[int], decisions: Sequence[int]) -> bool:
    """Return whether predictions agree with the labels more often than if they were independent of them.

    Chi-squared test of the confusion matrix at a significance level of 0.001, where the agreement, Cohen's kappa, is
    positive. A classifier may be useful though it is less accurate than always predicting a very frequent class.

    Args:
        labels: Classes of the images, ``(N,)``.
        decisions: The predicted ones, ``(N,)``.
    """
    counts = np.zeros((max(*labels, *decisions) + 1,) * 2)
    np.add.at(counts, (np.asarray(labels), np.asarray(decisions)), 1)
    shares = counts / counts.sum()
    agreement = float(np.trace(shares) - (shares.sum(axis=0) * shares.sum(axis=1)).sum())
    observed = counts[counts.any(axis=1)][:, counts.any(axis=0)]
    if agreement <= 0 or min(observed.shape) == 1:
        return False
    return bool(chi2_contingency(observed).pvalue < _SIGNIFICANCE)


def ranks_by_class(targets: NDArray[np.floating[Any]], logits: NDArray[np.floating[Any]]) -> bool:
    """Return whether some class's logits are larger for the images that have it, with several labels an image.

    One-sided Mann-Whitney test of each class at a significance level of 0.001 over all classes (Bonferroni).

    Args:
        targets: ``(N, C)``, 0 or 1.
        logits: ``(N, C)``.
    """
    tested = [column for column in range(targets.shape[1]) if 0 < targets[:, column].sum() < len(targets)]
    smallest = min(
        (
            float(mannwhitneyu(scores[has], scores[~has], alternative="greater").pvalue)
            for has, scores in ((targets[:, column] > 0, logits[:, column]) for column in tested)
        ),
        default=1.0,
    )
    return smallest < _SIGNIFICANCE / max(1, len(tested))


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
