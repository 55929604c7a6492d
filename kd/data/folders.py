"""Image folders with one subfolder per class, as in torchvision's ImageFolder."""

import os
import unicodedata
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from kd.data.images import UNLABELED, LabeledImages, Splits, apply_at
from kd.errors import UserError
from kd.pixels import decode

# Left behind by file managers. Any other file that isn't an image is an error.
_IGNORED_FILES = {"thumbs.db", "desktop.ini"}
_IGNORED_FOLDERS = {"__MACOSX"}
_LFS_POINTER = b"version https://git-lfs"
# Control characters, and surrogates, which represent bytes that aren't valid UTF-8.
_UNPRINTABLE = {"Cc", "Cs"}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\x00", b"MM\x00*", b"RIFF", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")


def read_splits(data_dir: str | Path, *, train_data: str = "train", val_data: str = "val") -> Splits:
    """Read the folder of training images and the folder of validation images within the folder of a data set."""
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        problem = "this is a file, not a folder" if root.is_file() else "there is no such folder"
        raise UserError(f"--data_dir {data_dir}: {problem}")
    for flag, name in (("--train_data", train_data), ("--val_data", val_data)):
        if not (root / name).is_dir():
            children = sorted(child for child in root.iterdir() if child.is_dir())
            found = ", ".join(child.name for child in children) or "none"
            # Archives are often unpacked into a folder of their own.
            hint = next((f"; did you mean --data_dir {child}?" for child in children if (child / name).is_dir()), "")
            raise UserError(f"{root / name}: there is no such folder (set by {flag}; folders in {root}: {found}){hint}")
    train, val = read_folder(root / train_data), read_folder(root / val_data)
    if train.classes != val.classes:
        only = {train_data: set(train.classes) - set(val.classes), val_data: set(val.classes) - set(train.classes)}
        differences = [f"only in {root / name}: {', '.join(sorted(only[name]))}" for name in only if only[name]]
        same = {name.casefold() for name in train.classes} == {name.casefold() for name in val.classes}
        hint = "; the names differ only in case" if same else ""
        raise UserError(f"training and validation images have different classes; {'; '.join(differences)}{hint}")
    return Splits(name=root.resolve().name, train=train, val=val)


def read_folder(folder: Path) -> LabeledImages:
    """Read a folder of class folders with images at any depth; the classes are in lexicographic order."""
    class_folders = sorted(child for child in folder.iterdir() if _is_class_folder(child))
    if not class_folders:
        raise UserError(f"{folder}: this folder has no class folders; images belong in {folder}/CLASS/IMAGE.jpg")
    if len(class_folders) == 1:
        raise UserError(f"{folder}: there is only one class, {class_folders[0].name!r}; a classifier needs two")
    paths, labels = list[Path](), list[int]()
    for label, class_folder in enumerate(class_folders):
        found = _find_images(class_folder)
        if not found:
            raise UserError(f"{class_folder}: this class has no images")
        paths += found
        labels += [label] * len(found)
    keys = [path.relative_to(folder).as_posix() for path in paths]
    return _images(paths, keys, labels, classes=tuple(child.name for child in class_folders))


def read_unlabeled(folder: str | Path) -> LabeledImages:
    """Read a folder of unlabeled images, at any depth."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--unlabeled_data {folder}: there is no such folder")
    try:
        paths = _find_images(root)
    except UserError as error:
        raise UserError(f"--unlabeled_data {folder}: {error}") from None
    if not paths:
        raise UserError(f"--unlabeled_data {folder}: this folder has no images")
    # The prefix keeps the keys, and so the random views, apart from those of the labeled images.
    keys = [f"unlabeled/{path.relative_to(root).as_posix()}" for path in paths]
    return _images(paths, keys, [UNLABELED] * len(paths), classes=())


def load_image(file: Path | BinaryIO, name: str = "") -> Tensor:
    """Decode an image file, called ``name`` in messages, to ``(3, H, W)``, uint8, RGB, upright."""
    return torch.from_numpy(np.array(decode(file, name))).permute(2, 0, 1)


def _images(paths: list[Path], keys: list[str], labels: list[int], *, classes: tuple[str, ...]) -> LabeledImages:
    return LabeledImages(classes, labels, keys, partial(apply_at, load_image, paths), paths)


def _find_images(folder: Path) -> list[Path]:
    """Return the images in a folder at any depth, also in linked folders, each of which is followed once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: this folder can't be read: {error.strerror}")

    found, followed = list[Path](), set[Path]()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(place).resolve()
        if real in followed:
            folders.clear()
            continue
        followed.add(real)
        found += [path for path in (Path(place, name) for name in files) if _is_image(path)]
    return sorted(found)


def _is_class_folder(path: Path) -> bool:
    """Return whether a path is a class folder; raise an error for a folder that can't be used."""
    if path.name.startswith(".") or path.name in _IGNORED_FOLDERS:
        return False
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: this link is broken; fix or remove it")
    if not path.is_dir():
        return False
    _check_name(path)
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path}: this folder can't be read: Permission denied")
    return True


def _check_name(path: Path) -> None:
    """Refuse a name that would break a line of a table, change a terminal's colors, or can't be encoded."""
    if any(unicodedata.category(letter) in _UNPRINTABLE for letter in path.name):
        escaped = [ascii(each)[1:-1] if unicodedata.category(each) in _UNPRINTABLE else each for each in str(path)]
        problem = "this name has unprintable characters, such as a line break, or is not valid UTF-8"
        raise UserError(f"{''.join(escaped)}: {problem}; rename it")


def _is_image(path: Path) -> bool:
    """Return whether a path is an image; raise an error for a file that is neither an image nor ignored."""
    if path.is_dir() or path.name.startswith(".") or path.name.lower() in _IGNORED_FILES:
        return False
    _check_name(path)
    if path.suffix.lower() not in IMG_EXTENSIONS:
        raise UserError(f"{path}: this file is not an image (known: {' '.join(IMG_EXTENSIONS)}); move it elsewhere")
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise UserError(f"{path}: this file can't be read: {error.strerror}") from None
    if head == _LFS_POINTER:
        raise UserError(f"{path}: this file is a Git LFS pointer; run `git lfs pull` to fetch the image")
    if not head.startswith(_MAGIC):
        raise UserError(f"{path}: this file is {'empty' if not head else 'not an image, despite its name'}")
    return True
