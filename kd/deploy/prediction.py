"""``kd predict``: class probabilities of images. With an ONNX file it needs only onnxruntime, numpy and Pillow."""

import argparse
import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kd.deploy.loading import Array, Student, as_student, find_checkpoint, open_student
from kd.errors import UserError
from kd.files import content_digest, write_atomically
from kd.pixels import IMAGE_SUFFIXES, decode, is_image, square
from kd.tables import SUFFIXES, as_text, find_column, read_rows

UNSURE = "unsure"
"""The class of an image whose largest probability is below the threshold."""

SEPARATOR = "|"
_TOP, _SHOWN, _EVEN = 3, 5, 0.5
# How a formula begins in spreadsheets; https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd predict") -> int:
    """Run the command; return the exit status: 1 if some images can't be read, 2 for a user's mistake."""
    options = _parser(prog).parse_args(arguments)
    unreadable: list[str] = []
    # Class names and paths may hold what the output can't encode.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        student, (files, skipped) = _open(options), find_images(options.images, column=options.path_column)
        if skipped:
            _report_skipped(skipped)
        if options.logits is not None:
            count = _write_logits(student, files, options, unreadable)
            print(f"logits of {count:,} images: {options.logits}")  # noqa: T201
        else:
            rows = predict(
                student,
                files,
                batch_size=options.batch_size,
                top=options.top,
                threshold=options.threshold,
                unreadable=unreadable,
            )
            decides = options.threshold > 0 or bool(student.metadata.get("multilabel"))
            _print_rows(rows, options, classes=len(student.metadata["classes"]), decides=decides)
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except BrokenPipeError:
        # The reader, such as head, has seen enough; the interpreter would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for message in unreadable:
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 1 if unreadable else 0


def find_images(paths: Sequence[str], *, column: str | None = None) -> tuple[list[Path], list[Path]]:
    """List image files.

    Args:
        paths: Files; folders, of which all images at any depth are taken; patterns such as ``photos/*.jpg``; or tables
            with a column of paths, relative to the table's folder.
        column: Name of the column of paths; ``None``: ``path``, ``file_name``, ``image``, ...

    Returns:
        The images, and the files of folders that are skipped, as they are no images.

    Raises:
        UserError: If there is no such file or folder, or no image.
    """
    files, skipped = list[Path](), list[Path]()
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
            for file in inside:
                is_taken = file.suffix.lower() in IMAGE_SUFFIXES or is_image(file)
                (files if is_taken else skipped).append(file)
        elif path.is_file():
            files += _read_paths(path, column) if path.suffix.lower() in SUFFIXES else [path]
        elif found := sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207 (also of an absolute path)
            files += [Path(file) for file in found if Path(file).is_file()]
        else:
            raise UserError(f"{path}: no such image or folder")
    if not files:
        raise UserError(f"{' '.join(paths)}: no images found")
    return files, skipped


def _read_paths(table: Path, column: str | None) -> list[Path]:
    rows = list(read_rows(table))
    name = find_column(table, "path_column", column, list(dict.fromkeys(key for _, row in rows for key in row))) or ""
    return [table.parent / Path(as_text(row.get(name))).expanduser() for _, row in rows]


def _report_skipped(files: Sequence[Path]) -> None:
    shown = ", ".join(map(str, files[:_SHOWN])) + (f", and {len(files) - _SHOWN:,} more" if len(files) > _SHOWN else "")
    plural = "file that is no image" if len(files) == 1 else "files that are no images"
    print(f"note: skipped {len(files):,} {plural}: {shown}", file=sys.stderr)  # noqa: T201


def predict(
    student: Student, files: Sequence[Path], *, batch_size: int, top: int, threshold: float = 0.0, unreadable: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the ``image``, ``class``, ``probability`` and ``top`` (probabilities by class name) of each image file.

    Where the largest probability is below the threshold, the class is ``unsure``. With several labels an image,
    ``classes`` lists those whose probability reaches the threshold, by default the student's own for each class, and
    ``class`` joins them. Images that can't be decoded are
    skipped; ``unreadable`` receives their error messages.
    """
    classes, multilabel = student.metadata["classes"], bool(student.metadata.get("multilabel"))
    chosen = student.metadata.get("thresholds") or [_EVEN] * len(classes)
    thresholds = np.array([threshold] * len(classes) if threshold else chosen)
    for decoded, views in _batches(student, files, batch_size, unreadable):
        logits = student.logits(views)
        for file, probabilities in zip(decoded, _sigmoid(logits) if multilabel else _softmax(logits), strict=True):
            ranking = np.argsort(-probabilities, kind="stable")[:top]
            ranked = {classes[index]: round(float(probabilities[index]), 6) for index in ranking}
            best = classes[ranking[0]]
            decision = best if probabilities[ranking[0]] >= threshold else UNSURE
            row = {"image": str(file), "class": decision, "probability": ranked[best], "top": ranked}
            if multilabel:
                found = [
                    name for name, is_likely in zip(classes, probabilities >= thresholds, strict=True) if is_likely
                ]
                row |= {"class": SEPARATOR.join(found), "classes": found}
            yield row


def _batches(
    student: Student, files: Sequence[Path], batch_size: int, unreadable: list[str]
) -> Iterator[tuple[list[Path], Array]]:
    """Yield the decodable files in batches, with their views ``(B, 3, S, S)``."""
    size, resize = int(student.metadata["image_size"]), student.metadata["resize"]
    pixel_range = tuple(student.metadata.get("pixel_range", ()))
    for start in range(0, len(files), batch_size):
        decoded, views = [], []
        for file in files[start : start + batch_size]:
            try:
                views.append(square(decode(file, pixel_range=pixel_range), size, resize))
                decoded.append(file)
            except UserError as error:
                unreadable.append(str(error))
        if views:
            yield decoded, np.stack(views)


def _open(options: argparse.Namespace) -> Student:
    """Open a file or a folder of kd, or one of another project, which the flags of that group describe."""
    is_foreign = options.classes or options.mean or options.std or options.image_size
    student = find_checkpoint(Path(options.student).expanduser())
    if not is_foreign and student.suffix in (".onnx", ".ckpt", ".safetensors"):
        return open_student(student, model=options.model)
    from kd.teachers import NONE, Foreign, load_network

    path = None if options.student == NONE else Path(options.student).expanduser()
    network, notes = load_network(
        path,
        model=options.model,
        data_classes=(),
        image_size=options.image_size or 224,
        foreign=Foreign(options.classes, tuple(options.mean), tuple(options.std), prefix=""),
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)  # noqa: T201
    return as_student(network, network.description.plain())


def _write_logits(student: Student, files: Sequence[Path], options: argparse.Namespace, unreadable: list[str]) -> int:
    """Write the logits of images with the hashes of their files, for ``--teacher_checkpoint``; return their number."""
    folders = [Path(text).expanduser() for text in options.images]
    root = folders[0] if len(folders) == 1 and folders[0].is_dir() else Path()
    keys, digests, logits, flipped = [], [], [], []
    for decoded, views in _batches(student, files, options.batch_size, unreadable):
        keys += [file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file) for file in decoded]
        digests += [np.frombuffer(content_digest(file.read_bytes()), dtype=np.uint8) for file in decoded]
        logits.append(student.logits(views))
        if options.flip:
            flipped.append(student.logits(np.ascontiguousarray(views[:, :, :, ::-1])))
    if not keys:
        raise UserError(f"{' '.join(options.images)}: none of these images can be decoded")
    arrays = {"keys": np.array(keys), "digests": np.stack(digests), "logits": np.concatenate(logits)}
    arrays |= {"flipped": np.concatenate(flipped)} if options.flip else {}
    with write_atomically(Path(options.logits).expanduser()) as file:
        np.savez(file, classes=np.array(student.metadata["classes"]), **arrays)  # type: ignore[arg-type]  # its stub
    return len(keys)


def _sigmoid(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    probabilities: np.ndarray[Any, Any] = 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return probabilities


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exact = logits.astype(np.float64)
    exponentials = np.exp(exact - exact.max(axis=1, keepdims=True))
    probabilities: np.ndarray[Any, Any] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def _print_rows(rows: Iterator[dict[str, Any]], options: argparse.Namespace, *, classes: int, decides: bool) -> None:
    if options.json:
        json.dump(list(rows), sys.stdout, indent=1)
        print()  # noqa: T201
    elif options.csv:
        _write_csv(rows, min(options.top, classes), sys.stdout, decides=decides)
    else:
        _print_table(rows)


def _write_csv(rows: Iterator[dict[str, Any]], top: int, stream: TextIO, *, decides: bool) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    ranks = [f"{word}_{rank + 1}" for rank in range(top) for word in ("class", "probability")]
    writer.writerow(["image", *(["decision"] if decides else []), *ranks])
    for row in rows:
        decision = [_as_cell(row["class"])] if decides else []
        ranked = [cell for name, probability in row["top"].items() for cell in (_as_cell(name), probability)]
        writer.writerow([_as_cell(row["image"]), *decision, *ranked])


def _as_cell(text: str) -> str:
    """Return a text that spreadsheets don't take for a formula, which could run commands."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _print_table(rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        unsure = f"{UNSURE}  " if row["class"] == UNSURE else ""
        if "classes" in row:
            unsure = f"{', '.join(row['classes']) or '(none)'}  "
        ranked = "  ".join(f"{name} {probability:.1%}" for name, probability in row["top"].items())
        print(f"{row['image']}  {unsure}{ranked}")  # noqa: T201


def _probability(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {number}")
    return number


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Predict the classes of images: the most probable ones, with their probabilities. Images that "
        "can't be read are reported on standard error, and the exit status is 1.",
    )
    parser.add_argument("student", help="exported file (.onnx, .safetensors) or checkpoint (.ckpt)")
    parser.add_argument(
        "images",
        nargs="+",
        help="image files, folders of them, patterns in quotes ('photos/*.jpg'), or tables (.csv, .tsv, .jsonl, "
        ".parquet) with a column of paths",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="write JSON")
    output.add_argument("--csv", action="store_true", help="write comma-separated values")
    parser.add_argument("--top", type=_at_least_one, default=_TOP, help="classes shown per image (default: 3)")
    parser.add_argument(
        "--threshold",
        type=_probability,
        default=0.0,
        help=f"probability below which the class is {UNSURE!r} (default: 0)",
    )
    parser.add_argument("--path_column", help="column of the paths in tables (default: path, file_name, image, ...)")
    parser.add_argument("--batch_size", type=_at_least_one, default=32, help="images per batch (default: 32)")
    parser.add_argument("--model", help="architecture, if the file doesn't name it, or names a Python file")
    output.add_argument("--logits", metavar="FILE.npz", help="write the logits, for experiment.py --teacher_checkpoint")
    parser.add_argument("--flip", action="store_true", help="with --logits: those of the mirrored images, too")
    foreign = parser.add_argument_group("weights of other projects")
    foreign.add_argument("--classes", help="class names in the order of the outputs: a file, or imagenet")
    foreign.add_argument("--mean", type=float, nargs="+", default=(), help="mean of the pixels in [0, 1] by channel")
    foreign.add_argument("--std", type=float, nargs="+", default=(), help="standard deviation, likewise")
    foreign.add_argument("--image_size", type=_at_least_one, help="side of the images in pixels (default: 224)")
    return parser
