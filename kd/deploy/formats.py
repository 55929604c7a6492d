"""The files that a student is shipped as, and reading them again: ONNX, torch.export, safetensors, and a checkpoint.

Nothing here imports torch before a file needs it: an ONNX file is run by onnxruntime and numpy alone.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kd.errors import UserError

if TYPE_CHECKING:
    from torch import nn

METADATA_KEY = "kd"
"""Where a file holds, as JSON, what it takes to use it: ``Description.plain()``, and its accuracy."""

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Student:
    """A classifier that was read from a file, to be asked with numpy arrays.

    Args:
        about: Architecture, class names in order, image size, resize, mean, standard deviation, accuracy.
        logits: From images ``(B, 3, S, S)``, float32 in [0, 1], to logits ``(B, C)``.
    """

    about: Mapping[str, Any]
    logits: Callable[[Array], Array]


def open_student(path: str | Path, *, model: str | None = None) -> Student:
    """Read a student from an ONNX, torch.export or safetensors file, or from a checkpoint.

    Args:
        path: The file; its suffix says what it is.
        model: The network, where a safetensors file or a checkpoint names a Python file.

    Raises:
        UserError: If it can't be read, or a package that it takes is missing.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix == FORMATS["onnx"]:
        return _open_onnx(path)
    import torch

    network, about = read_network(path, model=model)

    def logits(images: Array) -> Array:
        with torch.no_grad():
            answer: Array = network(torch.from_numpy(images)).float().numpy()
        return answer

    return Student(about, logits)


def read_network(path: Path, *, model: str | None = None) -> "tuple[nn.Module, Mapping[str, Any]]":
    """Read a network, in evaluation mode, and what it takes to use it; arguments and errors as of :func:`open_student`.

    A safetensors file and a checkpoint hold weights alone, and the network is built anew; a torch.export file holds the
    network's operations, and is refused where it holds anything else, see :mod:`kd.deploy.archives`.
    """
    if path.suffix == FORMATS["torch"]:
        return _read_exported(path)
    from kd.models import load_classifier, load_weights

    if path.suffix == FORMATS["safetensors"]:
        about, state = _read_safetensors(path)
        return load_weights(about, state, whose=path, architecture=model), about
    classifier = load_classifier(path, architecture=model)
    return classifier, classifier.description.plain()


def _open_onnx(path: Path) -> Student:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UserError(f"{path}: an ONNX file takes the package onnxruntime: pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (onnxruntime raises classes of its own, one for each mishap)
        raise UserError(f"{path}: onnxruntime can't read it: {_first_line(error)}") from None
    about = _described(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), path)
    (name,) = (one.name for one in session.get_inputs())

    def logits(images: Array) -> Array:
        answer: Array = session.run(None, {name: images})[0]
        return answer

    return Student(about, logits)


def _read_exported(path: Path) -> "tuple[nn.Module, Mapping[str, Any]]":
    import torch

    from kd.deploy.archives import without_code

    more = {f"{METADATA_KEY}.json": ""}
    archive = without_code(path)
    before = logging.root.manager.disable
    # torch logs a traceback of what it then raises.
    logging.disable(logging.CRITICAL)
    try:
        program = torch.export.load(archive, extra_files=more)
    except Exception as error:  # noqa: BLE001 (a stranger's bytes make it raise anything)
        raise UserError(f"{path}: torch.export can't read it: {_first_line(error)}") from None
    finally:
        logging.disable(before)
    return program.module(), _described(more[f"{METADATA_KEY}.json"], path)


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise UserError(f"{path}: this takes the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return _described(metadata.get(METADATA_KEY), path), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: this is no safetensors file: {error}") from None


def _described(text: str | bytes | None, path: Path) -> Mapping[str, Any]:
    try:
        about = json.loads(text or "")
        size, classes = about["image_size"], about["classes"]
        known = {"resize": "crop"} | {name: about[name] for name in about}
    except (ValueError, KeyError, TypeError, RecursionError):
        known, size, classes = {}, None, None
    is_known = isinstance(classes, list) and len(classes) > 1 and all(isinstance(one, str) for one in classes)
    if not is_known or type(size) is not int or size < 1 or known["resize"] not in ("crop", "squash"):
        raise UserError(f"{path}: this file was not made by `kd export`: it does not say what its classes are")
    return known


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
