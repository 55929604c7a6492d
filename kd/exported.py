"""Files that ``kd export`` wrote, or other ONNX files: their metadata, and running them with onnxruntime."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.errors import UserError

METADATA_KEY = "kd"
"""Key under which an exported file holds its metadata as JSON: ``Description.plain()``, accuracy and data set."""


def open_session(path: Path) -> Any:  # noqa: ANN401 (onnxruntime is an optional dependency)
    """Return an ``onnxruntime.InferenceSession`` of a file, on the CPU.

    Raises:
        UserError: If it can't be read, or onnxruntime isn't installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading an ONNX file needs onnxruntime: pip install onnxruntime") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (onnxruntime raises a class of its own for each kind of failure)
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{path}: onnxruntime can't read it: {reason}") from None


def parse_metadata(text: str | None) -> dict[str, Any] | None:
    """Read the metadata that ``kd export`` wrote; ``None`` if class names, image size or resize are missing."""
    try:
        metadata: dict[str, Any] = {"resize": "crop", **json.loads(text or "")}
        size, classes = metadata["image_size"], metadata["classes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    has_classes = isinstance(classes, list) and len(classes) > 1 and all(isinstance(name, str) for name in classes)
    if not has_classes or type(size) is not int or size < 1 or metadata["resize"] not in ("crop", "squash"):
        return None
    return metadata


def require_metadata(text: str | None, path: Path) -> Mapping[str, Any]:
    """Read the metadata that ``kd export`` wrote into a file; a ``UserError`` if it isn't there."""
    metadata = parse_metadata(text)
    if metadata is None:
        raise UserError(f"{path}: not a file of `kd export`: its metadata lacks class names, image size or resize")
    return metadata


def refuse_program(path: Path) -> None:
    """Refuse a file of ``torch.export``."""
    if path.suffix == ".pt2":
        raise UserError(
            f"{path}: torch.export files are not read, as loading one can run code hidden in it; use the ONNX file or "
            "the checkpoint, or call torch.export.load in your own code if you trust the file"
        )
