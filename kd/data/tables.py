"""Tables of image files and their classes: CSV, TSV, JSON Lines and Parquet."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

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
_NO_LABEL = "has no label"
SEPARATOR = "|"
_SEPARATORS = re.compile(r"[|;,]")
_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


def read_table(
    path: Path,
    columns: Mapping[str, Sequence[str]] | None = None,
    *,
    root: Path | None = None,
    multilabel: bool = False,
) -> dict[str | None, Listing]:
    """Read a table of image files.

    Args:
        path: The file; paths in it are relative to its folder, or else to ``root``.
        columns: Names of its columns: ``path_column``, ``label_column`` and ``split_column``; without one, the first of
            the usual names that it has. With several labels an image, several label columns of 0 and 1, each named
            like its class.
        root: Folder of the images.
        multilabel: Whether an image may have several labels: lists, or texts separated by ``|``, ``;`` or ``,``;
            rows of one image are combined.

    Returns:
        The images by split: ``train``, ``val`` and ``test``, as far as it has them; ``None`` if it has no such column.

    Raises:
        UserError: If it can't be read, lacks a column, or has bad rows; all of these are named with their lines.
    """
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"{path}: this table has no rows")
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    path_column, label_columns, split_column = (
        [column for given in _given(columns, flag) if (column := find_column(path, flag, given, known))]
        for flag in COLUMNS
    )
    problems, found = dict[int, str](), dict[str | None, dict[str, _Row]]()
    seen: dict[str, _Row] = {}
    for line, row in rows:
        entry = _Row(line, as_text(row.get(path_column[0])), *_read_labels(row, label_columns, multilabel=multilabel))
        entry.split = as_text(row.get(split_column[0])).lower() if split_column else None
        entry.file = _locate(entry.key, path.parent, root)
        earlier = seen.setdefault(entry.key, entry)
        if (problem := _find_problem(entry, earlier, multilabel=multilabel)) is not None:
            problems[line] = problem
        elif earlier is entry:
            found.setdefault(entry.split and _SPLITS[entry.split], {})[entry.key] = entry
        else:
            earlier.labels = tuple(sorted({*earlier.labels, *entry.labels}))
    if problems:
        raise UserError(_describe(path, problems))
    entries = [entry for of_split in found.values() for entry in of_split.values()]
    # A class of its own column may have no images.
    classes = tuple(
        sorted({label for entry in entries for label in entry.labels} | set(label_columns[1:] and label_columns))
    )
    return {
        split: Listing(
            str(path),
            paths=[entry.file for entry in of_split.values() if entry.file is not None],
            keys=list(of_split),
            names=[entry.labels if multilabel else entry.labels[0] for entry in of_split.values()],
            classes=classes,
        )
        for split, of_split in found.items()
    }


def _given(columns: Mapping[str, Sequence[str]] | None, flag: str) -> Sequence[str | None]:
    return (columns or {}).get(flag) or [None]


@dataclass
class _Row:
    """A row of a table; ``problem`` is what is wrong with its labels."""

    line: int
    key: str
    labels: tuple[str, ...]
    problem: str | None
    split: str | None = None
    file: Path | None = None


def _read_labels(
    row: Mapping[str, Any], columns: Sequence[str], *, multilabel: bool
) -> tuple[tuple[str, ...], str | None]:
    """Return the labels of a row, and what is wrong with them."""
    if len(columns) > 1:
        values = {column: as_text(row.get(column)).lower() for column in columns}
        if wrong := [f"{column} is {value!r}" for column, value in values.items() if value not in _TRUTH]:
            return (), f"{wrong[0]}, not 0 or 1"
        return tuple(sorted(column for column, value in values.items() if _TRUTH[value])), None
    value = row.get(columns[0])
    if not multilabel:
        text = as_text(value)
        return (text,), None if text else _NO_LABEL
    parts = value if isinstance(value, list | tuple) else _SEPARATORS.split(as_text(value))
    return tuple(sorted({as_text(part) for part in parts} - {""})), None


def _find_problem(entry: _Row, earlier: _Row, *, multilabel: bool) -> str | None:
    """Return what is wrong with a row."""
    if not entry.key:
        return "no path"
    if entry.file is None:
        return f"there is no file {entry.key}"
    if entry.problem is not None:
        return f"{entry.key} {entry.problem}"
    if entry.split is not None and entry.split not in _SPLITS:
        return f"{entry.key} has the split {entry.split!r} (known: {', '.join(_SPLITS)})"
    if earlier is not entry and not (multilabel and earlier.split == entry.split):
        different = f", there as {earlier.labels[0]!r}, here as {entry.labels[0]!r}" if not multilabel else ""
        different = "" if earlier.labels == entry.labels else different
        hint = "; with several labels an image, add --multilabel" if different else ""
        return f"{entry.key} was listed in line {earlier.line}{different}{hint}"
    return None


def _describe(path: Path, problems: Mapping[int, str]) -> str:
    """Name all bad rows, the first ones with what is wrong."""
    lines = [f"{path}: {len(problems):,} bad rows" if len(problems) > 1 else f"{path}: a bad row"]
    lines += [f"line {line}: {problem}" for line, problem in list(problems.items())[:_SHOWN]]
    if len(problems) > _SHOWN:
        rest = list(problems)[_SHOWN:]
        runs = [[line for _, line in run] for _, run in groupby(enumerate(rest), lambda pair: pair[1] - pair[0])]
        lines.append(f"also lines {', '.join(f'{r[0]}-{r[-1]}' if len(r) > 1 else str(r[0]) for r in runs)}")
    if any(problem.endswith(_NO_LABEL) for problem in problems.values()):
        lines.append("if an image may have several labels, or none, add --multilabel")
    return "\n  ".join(lines)


def _locate(key: str, folder: Path, root: Path | None) -> Path | None:
    """Return the file at a path relative to one of the folders, or ``None``."""
    places = [folder / Path(key).expanduser(), *([] if root is None else [root / key])]
    return next((place for place in places if key and place.is_file()), None)
