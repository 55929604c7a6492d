"""Finding the images of each split: folders, tables, or fractions of one folder."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kd.data.folders import Listing, check_classes, has_class_folders, list_folder
from kd.data.images import Splits
from kd.data.tables import TEST, TRAIN, VAL, read_table
from kd.errors import UserError
from kd.tables import SUFFIXES

_SHOWN = 5


@dataclass(frozen=True)
class Layout:
    """Where the images of each split are.

    Args:
        train_data: Folder of the training images within the data set's, or a table of them, see
            :func:`kd.data.tables.read_table`.
        val_data: That of the validation images, likewise.
        test_data: That of the test images; ``None``: there are none, unless a table has them.
        val_fraction: Fraction of each class's training images to use for validation instead; ``None``: ``val_data``.
        test_fraction: Fraction to use as test images, likewise.
        allow_missing_classes: Whether a split may lack a class.
        pixel_range: The gray values that become black and white, see :func:`kd.pixels.decode`.
        path_column: Name of a table's column of paths, see :func:`kd.data.tables.read_table`.
        label_column: That of classes; several are classes of their own.
        split_column: That of splits.
        multilabel: Whether the images of tables may have several labels.
        needs_train: Whether there must be training images; without any, the classes are those of the validation images.
    """

    train_data: str = "train"
    val_data: str = "val"
    test_data: str | None = None
    val_fraction: float | None = None
    test_fraction: float | None = None
    allow_missing_classes: bool = False
    pixel_range: tuple[float, ...] = ()
    path_column: str | None = None
    label_column: tuple[str, ...] = ()
    split_column: str | None = None
    multilabel: bool = False
    needs_train: bool = True

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Layout":
        """Return the layout in settings by name; those of earlier versions lack some, which have their defaults."""
        given = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        lists = {name: tuple(given.get(name) or ()) for name in ("pixel_range", "label_column")}
        return cls(**given | lists)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The names of a table's columns, as far as they are given."""
        single = {"path_column": self.path_column, "split_column": self.split_column}
        given = {name: () if column is None else (column,) for name, column in single.items()}
        return given | {"label_column": self.label_column}

    @property
    def has_several_labels(self) -> bool:
        """Whether an image may have several labels."""
        return self.multilabel or len(self.label_column) > 1

    @property
    def divides(self) -> bool:
        """Whether the training images are still to be divided, see :func:`kd.data.division.divide`."""
        return self.val_fraction is not None or self.test_fraction is not None


def read_splits(data_dir: str | Path | None, layout: Layout | None = None) -> Splits:
    """Read the images of each split of a data set.

    Args:
        data_dir: Its folder; ``None``: ``train_data`` is the path of a table.
        layout: Where the images are. If they are to be divided, all are returned as training images.

    Raises:
        UserError: If they are missing, or the classes of the splits differ.
    """
    layout = layout or Layout()
    root = None if data_dir is None else Path(data_dir).expanduser()
    if root is not None and not root.is_dir():
        problem = "this is a file, not a folder" if root.is_file() else "there is no such folder"
        raise UserError(f"--data_dir {data_dir}: {problem}")
    has_train = layout.needs_train or root is None or (root / layout.train_data).exists()
    parts = _list_train(root, layout) if has_train else {}
    for split, place, fraction in (
        (VAL, layout.val_data, layout.val_fraction),
        (TEST, layout.test_data, layout.test_fraction),
    ):
        is_default = place == getattr(Layout(), f"{split}_data")
        if fraction is not None and (split in parts or not is_default or (root and place and (root / place).is_dir())):
            where = parts[split].origin if split in parts else place
            raise UserError(f"--{split}_fraction {fraction:g}: there are {split} images already, in {where}")
        if fraction is not None or (split in parts and is_default) or place is None:
            continue
        found = _list_part(root, place, f"--{split}_data", layout)
        # A table may hold all splits, or this one alone.
        parts[split] = found.get(split) or found.get(None) or next(iter(found.values()))
    classes = _common_classes(parts, layout)
    images = {split: listing.images(classes, layout.pixel_range) for split, listing in parts.items()}
    train = images.get(TRAIN, next(iter(images.values())).subset([]))
    name = root.resolve().name if root is not None else Path(layout.train_data).stem
    return Splits(name, train, images.get(VAL, train.subset([])), test=images.get(TEST))


def _list_train(root: Path | None, layout: Layout) -> dict[str, Listing]:
    """List the training images, and others that the same table holds."""
    place = layout.train_data
    if root is not None and place == Layout().train_data and not (root / place).is_dir() and has_class_folders(root):
        if layout.val_fraction is None:
            raise UserError(
                f"{root / place}: there is no such folder (set by --train_data), but class folders right in {root}; to "
                "use a part of the images of each class for validation, add --val_fraction 0.2"
            )
        return {TRAIN: list_folder(root)}
    found = _list_part(root, place, "--train_data", layout)
    parts = {TRAIN if split is None else split: listing for split, listing in found.items()}
    if TRAIN not in parts:
        raise UserError(f"--train_data {place}: has no training images, only {' and '.join(parts)}")
    return parts


def _list_part(root: Path | None, place: str, flag: str, layout: Layout) -> Mapping[str | None, Listing]:
    """List the images of a folder or a table, by split."""
    path = Path(place).expanduser() if root is None else root / Path(place).expanduser()
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        # A table may lie elsewhere than the images.
        outside = Path(place).expanduser()
        table = outside if not path.is_file() and outside.is_file() else path
        return read_table(table, layout.columns, root=root, multilabel=layout.has_several_labels)
    if layout.has_several_labels:
        raise UserError(f"{flag} {place}: --multilabel needs a table of images and their labels ({' '.join(SUFFIXES)})")
    if path.is_dir() and root is not None:
        return {None: list_folder(path)}
    if root is None:
        raise UserError(
            f"{flag} {place}: set --data_dir to the folder of the images, or name a table ({' '.join(SUFFIXES)})"
        )
    children = sorted(child for child in root.iterdir() if child.is_dir())
    found = ", ".join(child.name for child in children) or "none"
    # Archives are often unpacked into a folder of their own.
    hint = next((f"; did you mean --data_dir {child}?" for child in children if (child / place).is_dir()), "")
    if flag == "--val_data" and not hint:
        hint = "; to use a part of the training images, add --val_fraction 0.2"
    raise UserError(f"{path}: there is no such folder (set by {flag}; folders in {root}: {found}){hint}")


def _common_classes(parts: Mapping[str, Listing], layout: Layout) -> tuple[str, ...]:
    """Return the classes of all splits, in lexicographic order.

    Raises:
        UserError: If a split lacks one, and that isn't allowed; or if there is only one.
    """
    classes = tuple(sorted({name for listing in parts.values() for name in listing.classes}))
    first = next(iter(parts.values()))
    check_classes(classes if layout.allow_missing_classes else first.classes, first.origin)
    if layout.allow_missing_classes:
        if empty := [split for split, listing in parts.items() if not listing.names]:
            raise UserError(f"{parts[empty[0]].origin}: there are no images")
        return classes
    remedy = "add --allow_missing_classes if that is intended"
    for listing in parts.values():
        if without := sorted(set(listing.classes) - listing.present()):
            raise UserError(f"{Path(listing.origin) / without[0]}: this class has no images; {remedy}")
    common = set(classes).intersection(*(each.classes for each in parts.values()))
    differing = [
        f"only in {listing.origin}: {_shorten(only)}"
        for listing in parts.values()
        if (only := sorted(set(listing.classes) - common))
    ]
    if differing:
        texts = [{alike(name) for name in listing.classes} for listing in parts.values()]
        hint = (
            "; the names differ only in case, spaces or Unicode form" if all(each == texts[0] for each in texts) else ""
        )
        kinds = " and ".join({TRAIN: "training", VAL: "validation", TEST: "test"}[split] for split in parts)
        raise UserError(f"{kinds} images have different classes; {'; '.join(differing)}{hint or f'; {remedy}'}")
    return classes


def alike(name: str) -> str:
    """Return a class name without what is easily overlooked: case, spaces around it, and its Unicode form."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
