"""Rows of tables in CSV, TSV, JSON Lines and Parquet files, and the columns that name images."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of files that are read as tables."""

COLUMNS = {
    "path_column": ("path", "file", "file_name", "filename", "filepath", "image", "image_path", "img"),
    "label_column": ("label", "labels", "class", "classes", "class_name", "category", "target", "y"),
    "split_column": ("split", "subset", "set", "partition"),
}
"""Usual names of columns, by the flag that names another one."""


def as_text(value: object) -> str:
    """Return a cell as text; whole numbers that a package reads as floating-point ones without their point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()  # noqa: PLR0124 (NaN, an empty cell)


def find_column(path: Path, flag: str, given: str | None, known: Sequence[str]) -> str | None:
    """Return the name of a column; ``None`` for that of the splits if it is missing and not asked for."""
    usual = (given,) if given is not None else COLUMNS[flag]
    by_name = {name.strip().lower(): name for name in known}
    found = next((by_name[name.lower()] for name in usual if name.lower() in by_name), None)
    if found is None and (given is not None or flag != "split_column"):
        expected = (
            f"--{flag} {given}: {path} has no such column" if given else f"{path}: no column {' or '.join(usual)}"
        )
        raise UserError(f"{expected}; its columns: {', '.join(known)}; name it with --{flag}")
    return found


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
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
