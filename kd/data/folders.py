"""Image folders with one subfolder per class, as in torchvision's ImageFolder."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from kd.data.images import UNLABELED, Label, LabeledImages, apply_at
from kd.errors import UserError
from kd.pixels import decode

# Left behind by file managers.
_IGNORED_FILES = {"thumbs.db", "desktop.ini"}
_IGNORED_FOLDERS = {"__MACOSX"}
# Control characters, and surrogates, which represent bytes that aren't valid UTF-8.
_UNPRINTABLE = {"Cc", "Cs"}


@dataclass(frozen=True)
class Listing:
    """Image files and the names of their classes, before these are numbered.

    Args:
        origin: Where they were listed, for messages.
        paths: The files, ``(N,)``.
        keys: Their paths within the data set.
        names: The class of each; with several labels an image, all of its classes.
        classes: All classes, those without images included.
    """

    origin: str
    paths: Sequence[Path]
    keys: Sequence[str]
    names: Sequence[str | tuple[str, ...]]
    classes: tuple[str, ...]

    def images(self, classes: tuple[str, ...], pixel_range: tuple[float, ...] = ()) -> LabeledImages:
        """Return the images, their labels being positions in ``classes``; ``pixel_range`` as of `load_image`."""
        positions = {name: label for label, name in enumerate(classes)}
        labels: list[Label] = [
            positions[name] if isinstance(name, str) else tuple(sorted(positions[each] for each in name))
            for name in self.names
        ]
        images = _images(self.paths, self.keys, labels, classes, pixel_range)
        return replace(images, multilabel=any(isinstance(label, tuple) for label in labels))

    def present(self) -> set[str]:
        """Return the classes that have images."""
        return {each for name in self.names for each in ((name,) if isinstance(name, str) else name)}


def list_folder(folder: Path) -> Listing:
    """List a folder of class folders with images at any depth; the classes are in lexicographic order."""
    class_folders = sorted(child for child in folder.iterdir() if _is_class_folder(child))
    if not class_folders:
        raise UserError(f"{folder}: this folder has no class folders; images belong in {folder}/CLASS/IMAGE.jpg")
    paths, names = list[Path](), list[str]()
    for class_folder in class_folders:
        found = _find_images(class_folder)
        paths += found
        names += [class_folder.name] * len(found)
    keys = [path.relative_to(folder).as_posix() for path in paths]
    return Listing(str(folder), paths, keys, names, tuple(child.name for child in class_folders))


def has_class_folders(folder: Path) -> bool:
    """Return whether a folder holds class folders, with files right in them."""
    children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return any(each.is_file() for child in children for each in child.iterdir())


def read_folder(folder: Path, *, pixel_range: tuple[float, ...] = ()) -> LabeledImages:
    """Read a folder of class folders, all of which have images; ``pixel_range`` is as of `load_image`."""
    listing = list_folder(folder)
    check_classes(listing.classes, listing.origin)
    if empty := sorted(set(listing.classes) - listing.present()):
        raise UserError(f"{folder / empty[0]}: this class has no images")
    return listing.images(listing.classes, pixel_range)


def check_classes(classes: Sequence[str], origin: str) -> None:
    """Refuse a single class."""
    if len(classes) == 1:
        raise UserError(f"{origin}: there is only one class, {classes[0]!r}; a classifier needs two")


def read_unlabeled(folder: str | Path, *, pixel_range: tuple[float, ...] = ()) -> LabeledImages:
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
    return _images(paths, keys, [UNLABELED] * len(paths), (), pixel_range)


def load_image(file: Path | BinaryIO, name: str = "", *, pixel_range: tuple[float, ...] = ()) -> Tensor:
    """Decode an image file to ``(3, H, W)``, uint8, RGB, upright; the arguments are those of `kd.pixels.decode`."""
    return torch.from_numpy(np.array(decode(file, name, pixel_range))).permute(2, 0, 1)


def _images(
    paths: Sequence[Path],
    keys: Sequence[str],
    labels: Sequence[Label],
    classes: tuple[str, ...],
    pixel_range: tuple[float, ...],
) -> LabeledImages:
    load = partial(load_image, pixel_range=pixel_range) if pixel_range else load_image
    return LabeledImages(classes, labels, keys, partial(apply_at, load, paths), paths, pixel_range=pixel_range)


def _find_images(folder: Path) -> list[Path]:
    """Return the files in a folder at any depth, also in linked folders, each of which is followed once.

    Their contents are examined later: what isn't an image is reported as such.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: this folder can't be read: {error.strerror}")

    found, followed = list[Path](), set[Path]()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = Path(place).resolve()
        if Path(place).is_symlink() and Path(place).parent.resolve().is_relative_to(real):
            raise UserError(f"{place}: this link leads back to {real}, the folder that it lies in; remove it")
        if real in followed:
            folders.clear()
            continue
        followed.add(real)
        found += [path for path in (Path(place, name) for name in files) if _is_listed(path)]
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


def _is_listed(path: Path) -> bool:
    """Return whether a file is meant to be an image: neither hidden nor left behind by a file manager."""
    if path.name.startswith(".") or path.name.lower() in _IGNORED_FILES:
        return False
    _check_name(path)
    return True
