"""Tables of image files and their classes: CSV, TSV, JSON Lines and Parquet."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from kd.data.folders import Listing
from kd.errors import UserError
from kd.tables import COLUMNS, as_text, find_column, read_rows

TRAIN, VAL, TEST = "train", "val", "test"

_SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
_SHOWN = 20


def read_table(
    path: Path, columns: Mapping[str, str | None] | None = None, *, root: Path | None = None
) -> dict[str | None, Listing]:
    """Read a table of image files.

    Args:
        path: The file; paths in it are relative to its folder, or else to ``root``.
        columns: Names of its columns: ``path_column``, ``label_column`` and ``split_column``; ``None``: the first of
            the usual names that it has.
        root: Folder of the images.

    Returns:
        The images by split: ``train``, ``val`` and ``test``, as far as it has them; ``None`` if it has no such column.

    Raises:
        UserError: If it can't be read, lacks a column, or has bad rows; all of these are named with their lines.
    """
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"{path}: this table has no rows")
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    path_column, label_column, split_column = (
        find_column(path, flag, (columns or {}).get(flag), known) or "" for flag in COLUMNS
    )
    problems, found = dict[int, str](), dict[str | None, list[tuple[Path, str, str]]]()
    seen: dict[str, tuple[int, str]] = {}
    for line, row in rows:
        key, label = (as_text(row.get(name)) for name in (path_column, label_column))
        split = as_text(row.get(split_column)).lower() if split_column else None
        file = _locate(key, path.parent, root)
        earlier, earlier_label = seen.setdefault(key, (line, label))
        if not key:
            problems[line] = "no path"
        elif file is None:
            problems[line] = f"there is no file {key}"
        elif not label:
            problems[line] = f"{key} has no label"
        elif split is not None and split not in _SPLITS:
            problems[line] = f"{key} has the split {split!r} (known: {', '.join(_SPLITS)})"
        elif earlier != line:
            other = "" if label == earlier_label else f", there as {earlier_label!r}, here as {label!r}"
            problems[line] = f"{key} was listed in line {earlier}{other}"
        else:
            found.setdefault(split and _SPLITS[split], []).append((file, key, label))
    if problems:
        raise UserError(_describe(path, problems))
    classes = tuple(sorted({label for images in found.values() for _, _, label in images}))
    return {
        split: Listing(
            str(path),
            paths=[file for file, _, _ in images],
            keys=[key for _, key, _ in images],
            names=[label for _, _, label in images],
            classes=classes,
        )
        for split, images in found.items()
    }


def _describe(path: Path, problems: Mapping[int, str]) -> str:
    """Name all bad rows, the first ones with what is wrong."""
    lines = [f"{path}: {len(problems):,} bad rows" if len(problems) > 1 else f"{path}: a bad row"]
    lines += [f"line {line}: {problem}" for line, problem in list(problems.items())[:_SHOWN]]
    if len(problems) > _SHOWN:
        rest = list(problems)[_SHOWN:]
        runs = [[line for _, line in run] for _, run in groupby(enumerate(rest), lambda pair: pair[1] - pair[0])]
        lines.append(f"also lines {', '.join(f'{r[0]}-{r[-1]}' if len(r) > 1 else str(r[0]) for r in runs)}")
    return "\n  ".join(lines)


def _locate(key: str, folder: Path, root: Path | None) -> Path | None:
    """Return the file at a path relative to one of the folders, or ``None``."""
    places = [folder / Path(key).expanduser(), *([] if root is None else [root / key])]
    return next((place for place in places if key and place.is_file()), None)
