"""Loading students from ONNX files, safetensors files and checkpoints.

torch is imported only for files that need it: an ONNX file is run by onnxruntime and numpy alone.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kd.errors import UserError
from kd.exported import METADATA_KEY, open_session, refuse_program, require_metadata
from kd.pixels import decode, square

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
"""File suffix by format."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Student:
    """A trained classifier that is called with numpy arrays.

    Args:
        metadata: Architecture, class names in the order of the logits, image size, resize, mean, standard deviation
            and validation accuracy.
        logits: Function from images ``(B, 3, S, S)``, float32 in [0, 1], to logits ``(B, C)``.
    """

    metadata: Mapping[str, Any]
    logits: Callable[[Array], Array]


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint in a folder: a run's, or that of an experiment's most accurate distilled student.

    Without a distilled student it is the baseline's or the teacher's. A file is returned as it is.

    Raises:
        UserError: If there is none in the folder.
    """
    if not path.is_dir() or (path / "config.json").is_file():
        return path
    for pattern in ("", "version_*/", *(f"{kind}/**/" for kind in ("distilled", "compared", "baseline", "teacher"))):
        found = list[tuple[float, Path]]()
        for record in path.glob(f"{pattern}metrics.json"):
            best = record.parent / "checkpoints" / "best.ckpt"
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                values = json.loads(record.read_text(encoding="utf-8"))
                found.append((float(values.get("best_score") or values["best_val_acc"]), best))
        if found:
            return max(found)[1]
    raise UserError(f"{path}: no finished run in this folder; name an experiment (logs/NAME), a run or a checkpoint")


def open_student(path: str | Path, *, model: str | None = None) -> Student:
    """Read a student from an ONNX file, a safetensors file or a checkpoint.

    Args:
        path: The file; its suffix gives the format.
        model: Architecture; required if a safetensors file or a checkpoint names a Python file, whose code then runs.

    Raises:
        UserError: If the file can't be read, a package is missing, or the file is a torch.export file: loading one
            runs whatever code its author put there.
    """
    if Path(path).suffix == FORMATS["onnx"]:
        return _open_onnx(_check_path(path))
    return as_student(*_read_network(path, model=model))


class Transform:
    """The view of an image that the student was validated on; ``classes`` are the class names."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.size = int(metadata["image_size"])
        self.resize = str(metadata["resize"])
        self.classes = tuple(metadata["classes"])
        self.pixel_range = tuple(metadata.get("pixel_range", ()))

    def __call__(self, image: Image.Image | str | Path) -> "Tensor":
        """Return the view ``(3, S, S)``, float32 in [0, 1], of a Pillow image or an image file."""
        import torch

        decoded = (
            image.convert("RGB")
            if isinstance(image, Image.Image)
            else decode(Path(image), pixel_range=self.pixel_range)
        )
        return torch.from_numpy(np.ascontiguousarray(square(decoded, self.size, self.resize)))


def load_student(path: str | Path, *, model: str | None = None) -> "tuple[nn.Module, Transform]":
    """Load a student from a checkpoint or a safetensors file.

    Args:
        path: The file.
        model: Architecture; required if the file names a Python file, whose code then runs.

    Returns:
        A plain ``torch.nn.Module`` in evaluation mode, from images ``(B, 3, S, S)`` in [0, 1] to logits ``(B, C)``,
        normalization included, and the transform that turns an image into such a view; ``transform.classes`` holds
        the class names in the order of the logits.

    Raises:
        UserError: If the file can't be read.

    Example::

        student, transform = load_student("logs/NAME/distilled/version_0/checkpoints/best.ckpt")
        probabilities = student(transform("photo.jpg")[None]).softmax(dim=1)
    """
    network, metadata = _read_network(path, model=model)
    return network, Transform(metadata)


def _read_network(path: str | Path, *, model: str | None = None) -> "tuple[nn.Module, Mapping[str, Any]]":
    """Read a network in evaluation mode, and its metadata, from a safetensors file or a checkpoint."""
    path = _check_path(path)
    if path.suffix == FORMATS["onnx"]:
        raise UserError(f"{path}: an ONNX file can't be read as a torch.nn.Module; run it with kd.open_student")
    from kd.models import build_from_state, load_classifier

    if path.suffix == FORMATS["safetensors"]:
        metadata, state = _read_safetensors(path)
        return build_from_state(metadata, state, path=path, architecture=model), metadata
    classifier = load_classifier(path, architecture=model)
    return classifier, classifier.description.plain()


def as_student(network: "nn.Module", metadata: Mapping[str, Any]) -> Student:
    """Wrap a network on the CPU, so that it is called with numpy arrays."""
    import torch

    def logits(images: Array) -> Array:
        with torch.no_grad():
            values: Array = network(torch.from_numpy(images)).float().numpy()
        return values

    return Student(metadata, logits)


def _check_path(path: str | Path) -> Path:
    path = Path(path).expanduser()
    refuse_program(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def _open_onnx(path: Path) -> Student:
    session = open_session(path)
    metadata = require_metadata(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), path)
    (name,) = (tensor.name for tensor in session.get_inputs())

    def logits(images: Array) -> Array:
        values: Array = session.run(None, {name: images})[0]
        return values

    return Student(metadata, logits)


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    from kd.models import read_safetensors

    metadata, state = read_safetensors(path)
    return require_metadata(metadata.get(METADATA_KEY), path), state
