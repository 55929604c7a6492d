"""Folders of labeled images: one folder a class, as torchvision's ImageFolder has them."""

import functools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from kd.data.images import UNLABELED, LabeledImages, Splits, fingerprint_of_files
from kd.errors import UserError
from kd.pixels import decode

# What file managers leave behind; anything else that is no image is a person's to decide about.
_LITTER = {"thumbs.db", "desktop.ini"}
_LITTER_FOLDERS = {"__MACOSX"}
_LFS_POINTER = b"version https://git-lfs"

# Control characters, and what stands for bytes that are no UTF-8.
_UNPRINTABLE = {"Cc", "Cs"}

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*", b"RIFF", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")


def read_splits(data_dir: str | Path, *, train_data: str = "train", val_data: str = "val") -> Splits:
    """Read a folder that holds a folder of training and one of validation images.

    Args:
        data_dir: The folder.
        train_data: Name of the training folder within it.
        val_data: Name of the validation folder within it.

    Raises:
        UserError: If a folder is missing, empty, holds one class only or files that are no images, or if the two
            differ in their classes.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        is_file = root.is_file()
        raise UserError(
            f"--data_dir {data_dir}: {'this is a file, not a folder' if is_file else 'there is no such folder'}"
        )
    for flag, name in (("--train_data", train_data), ("--val_data", val_data)):
        if not (root / name).is_dir():
            children = sorted(child for child in root.iterdir() if child.is_dir())
            found = ", ".join(child.name for child in children) or "none"
            # An archive is often unpacked into a folder of its own.
            meant = next((f"; is --data_dir {child} meant?" for child in children if (child / name).is_dir()), "")
            raise UserError(
                f"{root / name}: there is no such folder ({flag} names it; folders in {root}: {found}){meant}"
            )
    train, val = read_folder(root / train_data), read_folder(root / val_data)
    if train.classes != val.classes:
        only = [
            f"only in {folder}: {', '.join(sorted(missing))}"
            for folder, missing in (
                (root / train_data, set(train.classes) - set(val.classes)),
                (root / val_data, set(val.classes) - set(train.classes)),
            )
            if missing
        ]
        same = {one.casefold() for one in train.classes} == {one.casefold() for one in val.classes}
        how = "; the names differ in upper and lower case alone" if same else ""
        raise UserError(f"training and validation images differ in their classes; {'; '.join(only)}{how}")
    return Splits(name=root.resolve().name, train=train, val=val)


def read_folder(folder: Path) -> LabeledImages:
    """Read a folder of class folders; the classes are their names, sorted as text.

    Args:
        folder: The folder; within a class folder images may lie at any depth.

    Raises:
        UserError: If there are fewer than two classes, a class without images, or a file that is no image.
    """
    class_folders = sorted(child for child in folder.iterdir() if _is_class(child))
    if not class_folders:
        raise UserError(f"{folder}: this folder has no class folders; images belong in {folder}/CLASS/IMAGE.jpg")
    if len(class_folders) == 1:
        raise UserError(f"{folder}: there is one class only, {class_folders[0].name!r}; a classifier needs two")
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found = [path for path in sorted(class_folder.rglob("*")) if _is_image(path)]
        if not found:
            raise UserError(f"{class_folder}: this class has no images")
        paths += found
        labels += [label] * len(found)
    keys = [path.relative_to(folder).as_posix() for path in paths]
    return LabeledImages(
        classes=tuple(child.name for child in class_folders),
        labels=labels,
        keys=keys,
        load=functools.partial(_load_at, paths),
        files=paths,
        fingerprint=fingerprint_of_files(paths, keys),
    )


def read_unlabeled(folder: str | Path) -> LabeledImages:
    """Read a folder of images without classes, at any depth.

    Args:
        folder: The folder.

    Raises:
        UserError: If there is no such folder, it holds no image, or a file that is none.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--unlabeled_data {folder}: there is no such folder")
    try:
        paths = [path for path in sorted(root.rglob("*")) if _is_image(path)]
    except UserError as error:
        raise UserError(
            f"--unlabeled_data {folder}: {str(error).partition('; move it')[0]}; it holds images alone"
        ) from None
    if not paths:
        raise UserError(f"--unlabeled_data {folder}: this folder holds no images")
    # Apart from the keys of the labeled images, whose views would be the same.
    keys = [f"unlabeled/{path.relative_to(root).as_posix()}" for path in paths]
    return LabeledImages(
        classes=(),
        labels=[UNLABELED] * len(paths),
        keys=keys,
        load=functools.partial(_load_at, paths),
        files=paths,
        fingerprint=fingerprint_of_files(paths, keys),
    )


def load_image(path: Path) -> Tensor:
    """Decode an image file to ``(3, H, W)``, uint8, RGB, upright; gray images get three equal channels.

    Raises:
        UserError: If the file can't be decoded.
    """
    return torch.from_numpy(np.array(decode(path))).permute(2, 0, 1)


def _load_at(paths: Sequence[Path], index: int) -> Tensor:
    return load_image(paths[index])


def _is_class(path: Path) -> bool:
    """Say whether something beside the class folders is one; refuse one that can't be used."""
    if path.name.startswith(".") or path.name in _LITTER_FOLDERS:
        return False
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: this link leads nowhere; mend or remove it")
    if not path.is_dir():
        return False
    _check_name(path)
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path}: this folder can't be read: Permission denied")
    return True


def _check_name(path: Path) -> None:
    """Refuse a name that would break a line of a table, change a terminal's colors, or can't be written down."""
    if any(unicodedata.category(one) in _UNPRINTABLE for one in path.name):
        shown = "".join(ascii(one)[1:-1] if unicodedata.category(one) in _UNPRINTABLE else one for one in str(path))
        raise UserError(
            f"{shown}: this name holds characters that can't be shown, such as a line break, or is no UTF-8; rename it"
        )


def _is_image(path: Path) -> bool:
    """Say whether a path is an image; refuse a file that looks like one and isn't, or that does not belong here."""
    if path.is_dir() or path.name.startswith(".") or path.name.lower() in _LITTER:
        return False
    _check_name(path)
    if path.suffix.lower() not in IMG_EXTENSIONS:
        known = " ".join(IMG_EXTENSIONS)
        raise UserError(f"{path}: this file is no image (images end in {known}); move it out of the class folder")
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise UserError(f"{path}: this file can't be read: {error.strerror}") from None
    if head == _LFS_POINTER:
        raise UserError(f"{path}: this file stands for an image that Git LFS keeps; `git lfs pull` fetches the image")
    if not head.startswith(_MAGIC):
        raise UserError(f"{path}: this file is {'empty' if not head else 'no image, whatever its name says'}")
    return True
