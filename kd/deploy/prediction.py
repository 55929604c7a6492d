"""``kd predict``: class probabilities of images. With an ONNX file it needs only onnxruntime, numpy and Pillow."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kd.deploy.loading import Student, open_student
from kd.errors import UserError
from kd.pixels import IMAGE_SUFFIXES, decode, square

_TOP = 3


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd predict") -> int:
    """Run the command; return the exit status: 1 if some images can't be read, 2 for a user's mistake."""
    options = _parser(prog).parse_args(arguments)
    unreadable: list[str] = []
    try:
        student = open_student(options.student, model=options.model)
        files = find_images(options.images)
        rows = predict(student, files, batch_size=options.batch_size, top=options.top, unreadable=unreadable)
        if options.json:
            json.dump(list(rows), sys.stdout, indent=1)
            print()  # noqa: T201
        elif options.csv:
            _write_csv(rows, min(options.top, len(student.metadata["classes"])), sys.stdout)
        else:
            _print_table(rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for message in unreadable:
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 1 if unreadable else 0


def find_images(paths: Sequence[str]) -> list[Path]:
    """List image files: the given files, and all images in the given folders and their subfolders."""
    files: list[Path] = []
    for path in (Path(text).expanduser() for text in paths):
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
            files += sorted(found)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    if not files:
        raise UserError(f"{' '.join(paths)}: no images found; image files end in {' '.join(IMAGE_SUFFIXES)}")
    return files


def predict(
    student: Student, files: Sequence[Path], *, batch_size: int, top: int, unreadable: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield the ``image``, ``class``, ``probability`` and ``top`` (probabilities by class name) of each image file.

    Images that can't be decoded are skipped; ``unreadable`` receives their error messages.
    """
    classes = student.metadata["classes"]
    size, resize = int(student.metadata["image_size"]), student.metadata["resize"]
    for start in range(0, len(files), batch_size):
        decoded, views = [], []
        for file in files[start : start + batch_size]:
            try:
                views.append(square(decode(file), size, resize))
                decoded.append(file)
            except UserError as error:
                unreadable.append(str(error))
        if not views:
            continue
        for file, probabilities in zip(decoded, _softmax(student.logits(np.stack(views))), strict=True):
            ranking = np.argsort(-probabilities, kind="stable")[:top]
            ranked = {classes[index]: round(float(probabilities[index]), 6) for index in ranking}
            best = classes[ranking[0]]
            yield {"image": str(file), "class": best, "probability": ranked[best], "top": ranked}


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exact = logits.astype(np.float64)
    exponentials = np.exp(exact - exact.max(axis=1, keepdims=True))
    probabilities: np.ndarray[Any, Any] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def _write_csv(rows: Iterator[dict[str, Any]], top: int, stream: TextIO) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["image", *(f"{word}_{rank + 1}" for rank in range(top) for word in ("class", "probability"))])
    for row in rows:
        writer.writerow([row["image"], *(cell for pair in row["top"].items() for cell in pair)])


def _print_table(rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        ranked = "  ".join(f"{name} {probability:.1%}" for name, probability in row["top"].items())
        print(f"{row['image']}  {ranked}")  # noqa: T201


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
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="write JSON")
    output.add_argument("--csv", action="store_true", help="write comma-separated values")
    parser.add_argument("--top", type=_at_least_one, default=_TOP, help="classes shown per image (default: 3)")
    parser.add_argument("--batch_size", type=_at_least_one, default=32, help="images per batch (default: 32)")
    parser.add_argument("--model", help="architecture, if the checkpoint names a Python file; its code then runs")
    return parser
