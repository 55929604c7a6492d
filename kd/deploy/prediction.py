"""``kd predict``: what a student says of images. With an ONNX file it takes onnxruntime, numpy and Pillow alone."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kd.deploy.formats import Student, open_student
from kd.errors import UserError
from kd.pixels import IMAGE_SUFFIXES, decode, square

_SHOWN = 3


def main(arguments: Sequence[str] | None = None, *, prog: str = "kd predict") -> int:
    """Run the command; return the exit status: 1 where an image could not be read, 2 for a mistake."""
    given = _parser(prog).parse_args(arguments)
    broken: list[str] = []
    try:
        student = open_student(given.student, model=given.model)
        files = images_in(given.images)
        rows = predictions(student, files, batch_size=given.batch_size, top=given.top, broken=broken)
        shown = _with_progress(rows, len(files))
        if given.json:
            json.dump(list(shown), sys.stdout, indent=1)
            print()  # noqa: T201
        elif given.csv:
            _write_csv(shown, student.about["classes"], given.top, sys.stdout)
        else:
            _print_table(shown)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for message in broken:
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 1 if broken else 0


def images_in(places: Sequence[str]) -> list[Path]:
    """List image files: those that are named, and those in the folders that are, at any depth.

    Raises:
        UserError: If something is not there, or there is no image.
    """
    files: list[Path] = []
    for place in (Path(one).expanduser() for one in places):
        if place.is_dir():
            files += [one for one in sorted(place.rglob("*")) if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file()]
        elif place.is_file():
            files.append(place)
        else:
            raise UserError(f"{place}: there is no such image or folder")
    if not files:
        raise UserError(f"{' '.join(places)}: no image is there (images end in {' '.join(IMAGE_SUFFIXES)})")
    return files


def predictions(
    student: Student, files: Sequence[Path], *, batch_size: int = 32, top: int = _SHOWN, broken: list[str]
) -> Iterator[dict[str, Any]]:
    """Say what a student makes of images, in their order.

    Args:
        student: The student.
        files: The images.
        batch_size: Images that are asked about at once.
        top: How many classes to name, the likeliest first.
        broken: Takes a message for each image that can't be read, which is passed over.

    Returns:
        For each image ``image`` (its path), ``class``, ``probability``, and ``top``: classes with their probabilities.
    """
    about = student.about
    classes, size, resize = about["classes"], int(about["image_size"]), about["resize"]
    count = min(top, len(classes))
    waiting = iter(files)
    while some := list(islice(waiting, batch_size)):
        seen, views = [], []
        for file in some:
            try:
                views.append(square(decode(file), size, resize))
                seen.append(file)
            except UserError as error:
                broken.append(str(error))
        if not views:
            continue
        for file, probabilities in zip(seen, _softmax(student.logits(np.stack(views))), strict=True):
            likeliest = np.argsort(-probabilities, kind="stable")[:count]
            ranked = {classes[index]: round(float(probabilities[index]), 6) for index in likeliest}
            first = classes[likeliest[0]]
            yield {"image": str(file), "class": first, "probability": ranked[first], "top": ranked}


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    exact = logits.astype(np.float64)
    grown = np.exp(exact - exact.max(axis=1, keepdims=True))
    probabilities: np.ndarray[Any, Any] = grown / grown.sum(axis=1, keepdims=True)
    return probabilities


def _with_progress(rows: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """Show how far it is on a terminal, where rich is installed and there is something to wait for."""
    if not sys.stderr.isatty() or total < 2 * _SHOWN:
        yield from rows
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        yield from rows
        return
    # To the end before anything is printed: the bar and the table would be mixed.
    yield from list(track(rows, "Predicting", total=total, console=Console(stderr=True), transient=True))


def _write_csv(rows: Iterator[dict[str, Any]], classes: Sequence[str], top: int, stream: TextIO) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    heads = (f"{word}_{place + 1}" for place in range(min(top, len(classes))) for word in ("class", "probability"))
    writer.writerow(["image", *heads])
    for row in rows:
        writer.writerow([row["image"], *(part for pair in row["top"].items() for part in pair)])


def _print_table(rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        named = "  ".join(f"{name} {probability:.1%}" for name, probability in row["top"].items())
        print(f"{row['image']}  {named}")  # noqa: T201


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, and is {number}")
    return number


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Say what a student makes of images: classes, the likeliest first, and their probabilities. An "
        "image that can't be read is named on standard error, and the exit status is 1.",
    )
    parser.add_argument("student", help="an exported file (.onnx, .pt2, .safetensors) or a checkpoint (.ckpt)")
    parser.add_argument("images", nargs="+", help="images, or folders of them")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="write JSON")
    how.add_argument("--csv", action="store_true", help="write comma-separated values")
    parser.add_argument("--top", type=_at_least_one, default=_SHOWN, help="classes to name of each image (3)")
    parser.add_argument("--batch_size", type=_at_least_one, default=32, help="images that are asked about at once (32)")
    parser.add_argument("--model", help="the network, where a checkpoint names a Python file, whose code then runs")
    return parser
