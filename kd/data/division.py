"""Dividing the images of one folder into training, validation and test images, and recording how."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kd.data.images import UNLABELED, LabeledImages, Splits
from kd.data.tables import SEPARATOR, TEST, TRAIN, VAL
from kd.errors import UserError
from kd.files import write_text
from kd.randomness import derive_seed

SPLIT_FILE = "split.csv"
"""The file in an experiment's folder that records the division; it is a table as of :mod:`kd.data.tables`."""


def divide(
    images: LabeledImages,
    *,
    val_fraction: float | None,
    test_fraction: float | None,
    seed: int,
    known: Mapping[str, str] | None = None,
) -> list[str]:
    """Assign each image to a split: the fractions hold within each class, and equal contents stay together.

    Args:
        images: The images; without the hashes of their contents, each counts as different.
        val_fraction: Fraction of the validation images, in (0, 1); ``None``: there are none.
        test_fraction: That of the test images.
        seed: Random seed.
        known: The split of each image by key, as recorded; an image that isn't in it is a training image, unless its
            content is in another split.

    Returns:
        ``train``, ``val`` or ``test`` for each image.

    Raises:
        UserError: If the fractions leave no training images, or a class has too few images.
    """
    contents = images.keys if images.digests is None else [digest.tobytes() for digest in images.digests]
    assigned: dict[object, str] = {}
    if known:
        for key, content in zip(images.keys, contents, strict=True):
            if known.get(key, TRAIN) != TRAIN or content not in assigned:
                assigned[content] = known.get(key, assigned.get(content, TRAIN))
        return [known.get(key, assigned[content]) for key, content in zip(images.keys, contents, strict=True)]
    fractions = {TEST: test_fraction or 0.0, VAL: val_fraction or 0.0}
    if sum(fractions.values()) >= 1:
        flags = " ".join(f"--{split}_fraction {fraction:g}" for split, fraction in fractions.items() if fraction)
        raise UserError(f"{flags}: no training images are left; the sum must be below 1")
    # Images with several labels may also have none.
    names = [(UNLABELED, "")] if images.multilabel else []
    for label, name in [*names, *enumerate(images.classes)]:
        members = [index for index, each in enumerate(images.strata) if each == label]
        generator = torch.Generator().manual_seed(derive_seed(seed, "split", name))
        order = [members[position] for position in torch.randperm(len(members), generator=generator).tolist()]
        sizes = Counter(contents[index] for index in order)
        # Contents that another class has assigned count, too.
        counts = Counter(assigned[contents[index]] for index in order if contents[index] in assigned)
        wanted = {split: max(1, round(fraction * len(members))) for split, fraction in fractions.items() if fraction}
        for content in dict.fromkeys(contents[index] for index in order):
            if content not in assigned:
                split = next((split for split, number in wanted.items() if counts[split] < number), TRAIN)
                assigned[content] = split
                counts[split] += sizes[content]
        if not images.multilabel and members and any(not counts[split] for split in (TRAIN, *wanted)):
            raise UserError(
                f"class {name!r}: {len(sizes)} different images are too few to divide them into "
                f"{' and '.join((TRAIN, *wanted))}"
            )
    return [assigned[content] for content in contents]


def apply_division(splits: Splits, assigned: Sequence[str]) -> Splits:
    """Return the splits that the training images were assigned to."""
    parts = {
        split: splits.train.subset([index for index, each in enumerate(assigned) if each == split])
        for split in (TRAIN, VAL, TEST)
    }
    return replace(
        splits,
        train=parts[TRAIN],
        val=parts[VAL] if len(parts[VAL]) else splits.val,
        test=parts[TEST] if len(parts[TEST]) else splits.test,
    )


def read_division(path: Path) -> dict[str, str]:
    """Read the split of each image by key; empty if there is no such file.

    Raises:
        UserError: If it can't be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["path"]: row["split"] for row in csv.DictReader(file)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as the division of an experiment's images: {error}") from None


def write_division(path: Path, images: LabeledImages, assigned: Sequence[str]) -> None:
    """Write path, label and split of each image, unless the file holds just that."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    names = [
        SEPARATOR.join(images.classes[each] for each in (label if isinstance(label, tuple) else (label,)))
        for label in images.labels
    ]
    writer.writerows(zip(images.keys, names, assigned, strict=True))
    if not path.is_file() or path.read_text(encoding="utf-8") != text.getvalue():
        write_text(path, text.getvalue())
