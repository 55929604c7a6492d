"""Tables of image files and their classes: CSV, TSV, JSON Lines and Parquet."""

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from kd.data.folders import Listing
from kd.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of files that are read as tables."""

TRAIN, VAL, TEST = "train", "val", "test"

_SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
_NAMES = {
    "path_column": ("path", "file", "file_name", "filename", "filepath", "image", "image_path", "img"),
    "label_column": ("label", "class", "class_name", "category", "target", "y"),
    "split_column": ("split", "subset", "set", "partition"),
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
    rows = list(_read_rows(path))
    if not rows:
        raise UserError(f"{path}: this table has no rows")
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    path_column, label_column, split_column = (
        _find_column(path, flag, (columns or {}).get(flag), known) or "" for flag in _NAMES
    )
    problems, found = dict[int, str](), dict[str | None, list[tuple[Path, str, str]]]()
    seen: dict[str, tuple[int, str]] = {}
    for line, row in rows:
        key, label = (_text(row.get(name)) for name in (path_column, label_column))
        split = _text(row.get(split_column)).lower() if split_column else None
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


def _text(value: object) -> str:
    """Return a cell as text; whole numbers that a package reads as floating-point ones without their point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()  # noqa: PLR0124 (NaN, an empty cell)


def _find_column(path: Path, flag: str, given: str | None, known: list[str]) -> str | None:
    """Return the name of a column; ``None`` for that of the splits if it is missing and not asked for."""
    usual = (given,) if given is not None else _NAMES[flag]
    by_name = {name.strip().lower(): name for name in known}
    found = next((by_name[name.lower()] for name in usual if name.lower() in by_name), None)
    if found is None and (given is not None or flag != "split_column"):
        expected = (
            f"--{flag} {given}: {path} has no such column" if given else f"{path}: no column {' or '.join(usual)}"
        )
        raise UserError(f"{expected}; its columns: {', '.join(known)}; name it with --{flag}")
    return found


def _read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows with their numbers: lines of a text file, from 1."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix.lower() == ".parquet":
        yield from enumerate(_read_parquet(path), 1)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                yield from _read_csv(file, "\t" if path.suffix.lower() == ".tsv" else None)
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}: line {line}: not a JSON object")
                    yield line, row
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {line}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as a table: {error}") from None


def _read_csv(file: Any, delimiter: str | None) -> Iterator[tuple[int, Mapping[str, Any]]]:  # noqa: ANN401 (a text file)
    if delimiter is None:
        header = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(file, delimiter=delimiter, restkey="")
    for row in reader:
        yield reader.line_num, {name: value for name, value in row.items() if name}


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise UserError(f"{path}: can't be read as a Parquet file: {error}") from None
    return rows
