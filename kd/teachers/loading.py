"""Loading a teacher from wherever it comes, matching its classes to the data's, and judging its accuracy."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from scipy.stats import binom

from kd.errors import UserError
from kd.exported import METADATA_KEY, parse_metadata, refuse_program
from kd.models import (
    Classifier,
    Description,
    build_from_state,
    build_from_weights,
    is_own_checkpoint,
    load_classifier,
    read_class_names,
    read_plain,
    read_safetensors,
    read_weights,
    usual_size,
    usual_statistics,
)
from kd.teachers.onnx import OnnxNetwork

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
    """

    classes: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    prefix: str = "teacher_"


def load_network(
    path: Path, *, model: str | None, data_classes: tuple[str, ...], image_size: int, foreign: Foreign
) -> tuple[Classifier, list[str]]:
    """Load a classifier, in evaluation mode, with all classes that it knows.

    Args:
        path: A checkpoint of kd; a file that ``kd export`` wrote; a state dict or a training checkpoint of another
            project (``.pth``, ``.pt``, ``.bin``, ``.ckpt``, ``.safetensors``); an ONNX file; or a folder with
            ``config.json`` and ``model.safetensors``.
        model: The network; needed where the file doesn't name it, or names a Python file.
        data_classes: The classes of the data.
        image_size: Side of the images, in pixels, for files that don't record it.
        foreign: What the user says about a network of another project.

    Returns:
        The classifier, and notes on what was assumed.

    Raises:
        UserError: If the file can't be read without running code, or doesn't fit the network or the class names.
    """
    refuse_program(path)
    flag = f"--{foreign.prefix}model"
    names = None
    if foreign.classes is not None:
        names = read_class_names(foreign.classes, flag=f"--{foreign.prefix}classes", data_classes=data_classes)
    if path.suffix == ".onnx":
        return _load_onnx(path, names=names, data_classes=data_classes, image_size=image_size, foreign=foreign)
    if path.suffix == ".safetensors":
        texts, state = read_safetensors(path)
        if (metadata := parse_metadata(texts.get(METADATA_KEY))) is not None:
            return build_from_state(metadata, state, path=path, architecture=model, flag=flag), []
    elif not path.is_dir() and is_own_checkpoint(read_plain(path)):
        return load_classifier(path, architecture=model, flag=flag), []
    weights = read_weights(path)
    architecture = weights.architecture or model
    if architecture is None:
        raise UserError(f"{path}: doesn't name its network; add {flag} NAME")
    build = partial(
        build_from_weights,
        weights,
        path,
        architecture=architecture,
        data_classes=data_classes,
        classes=names,
        mean=foreign.mean or None,
        std=foreign.std or None,
        flag=flag,
        classes_flag=f"--{foreign.prefix}classes",
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
    path: Path, *, model: str, classes: tuple[str, ...], data: str, image_size: int, foreign: Foreign | None = None
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
    teacher, notes = load_network(
        path, model=model, data_classes=classes, image_size=image_size, foreign=foreign or Foreign()
    )
    teacher, matched = match_teacher(teacher, classes, teacher_name=f"the teacher {path}", data=data)
    trained_size = teacher.description.image_size
    if trained_size != image_size and not notes:
        raise UserError(
            f"--teacher_checkpoint {path}: trained on images of {trained_size} px, but --image_size is {image_size}; "
            f"add --teacher_image_size {trained_size} to resize the student's views for the teacher"
        )
    return teacher, [*notes, *matched]


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
    path: Path, *, names: tuple[str, ...] | None, data_classes: tuple[str, ...], image_size: int, foreign: Foreign
) -> tuple[Classifier, list[str]]:
    network = OnnxNetwork(path)
    size = network.image_size or image_size
    if network.metadata is not None:
        # An exported file normalizes by itself.
        description = Description.from_plain(network.metadata | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
        return Classifier(network, description).eval(), []
    mean, std = usual_statistics("resnet18") or ((), ())
    mean, std = foreign.mean or mean, foreign.std or std
    with torch.no_grad():
        try:
            number = network(torch.zeros(1, 3, size, size)).shape[1]
        except Exception as error:  # noqa: BLE001 (onnxruntime raises a class of its own for each kind of failure)
            raise UserError(f"{path}: can't process images of {size} px: {str(error).splitlines()[0]}") from None
    notes = []
    if not foreign.mean or not foreign.std:
        notes.append(f"{path.name}: normalization of ImageNet assumed; --{foreign.prefix}mean and std change it")
    if names is None and number == len(data_classes):
        notes.append(f"{path.name} doesn't name its classes: assumed to be the data's, in alphabetical order")
        names = data_classes
    if names is None or len(names) != number:
        raise UserError(
            f"{path}: has {number:,} outputs; name their classes, in this order, with --{foreign.prefix}classes FILE"
        )
    if size != image_size:
        notes.append(f"{path.name} takes images of {size} px only: views are resized for it")
    return Classifier(network, Description(path.name, names, size, "crop", mean, std)).eval(), notes


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


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
