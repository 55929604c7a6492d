"""Reading a classifier from a checkpoint: plain tensors and values only, so that no code in the file is executed."""

import argparse
import collections
import dataclasses
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from kd.errors import DamagedFile, UserError
from kd.files import write_atomically
from kd.models.catalog import build_classifier
from kd.models.classifier import Classifier, Description, load_weights
from kd.registry import is_own_code, parse_choice, runs_own_code

CLASSIFIER_KEY = "classifier"
"""Key in a checkpoint of the classifier's description and its accuracy."""

STATE_PREFIX = "model."
"""Prefix of the classifier's weights in a checkpoint's ``state_dict``."""

_ZIP = b"PK\x03\x04"


def read_plain(path: Path, *, mapped: bool = False) -> Any:  # noqa: ANN401 (what the file holds)
    """Read a file with ``torch.load(weights_only=True)``, and verify its checksums.

    Args:
        path: A file written by ``torch.save``.
        mapped: Whether to leave the tensors on the disk.

    Raises:
        DamagedFile: If the file is truncated or damaged.
        UserError: If it is missing, or holds anything but tensors, plain values and a few harmless types.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    if (problem := find_damage(path)) is not None:
        raise DamagedFile(f"{path}: can't be read as a checkpoint: {problem}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless_types()):
            # torch warns about objects in a foreign file before it refuses them.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001 (arbitrary bytes make the unpickler raise anything)
        if "TorchScript" in str(error):
            raise UserError(
                f"{path}: a TorchScript file, reading which may execute code; if you trust it, convert it with\n"
                f"  weights = torch.jit.load({str(path)!r}).state_dict()\n  torch.save(weights, 'weights.pth')"
            ) from None
        if (foreign := re.search(r"GLOBAL (\S+)", str(error))) is None:
            raise DamagedFile(f"{path}: can't be read as a checkpoint: {_why_not_read(path)}") from None
        # torch's own message recommends loading the file without weights_only.
        raise UserError(
            f"{path}: can't be read as a checkpoint: it contains {foreign[1]}; only tensors and plain values are read, "
            "as other objects may execute code. If you trust the file, convert it with\n"
            f"  model = torch.load({str(path)!r}, weights_only=False)  # or what it holds as a dictionary\n"
            "  torch.save(model.state_dict(), 'weights.pth')"
        ) from None


class _Ignored:
    """Takes the place of an object that is not needed, such as a configuration, when a checkpoint is read."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _harmless_types() -> list[Any]:
    """Return the types besides tensors and plain values that public trainers store, and that execute nothing."""
    numeric = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")]
    reconstructed = (np._core.multiarray.scalar, np._core.multiarray._reconstruct)  # type: ignore[attr-defined]  # noqa: SLF001
    renamed = [(each, f"numpy.core.multiarray.{each.__name__}") for each in reconstructed]
    configurations = {
        "dictconfig": ("DictConfig",),
        "listconfig": ("ListConfig",),
        "base": ("Metadata", "ContainerMetadata"),
        "nodes": ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode"),
    }
    ignored = [f"omegaconf.{module}.{name}" for module, names in configurations.items() for name in names]
    return [
        *(argparse.Namespace, collections.defaultdict, pathlib.PosixPath, np.ndarray, np.dtype, Any, dict, list),
        *numeric,
        *reconstructed,
        *renamed,
        *((_Ignored, name) for name in (*ignored, "lightning_fabric.utilities.data.AttributeDict")),
        (_Ignored, "pytorch_lightning.utilities.parsing.AttributeDict"),
    ]


def find_damage(path: Path) -> str | None:
    """Verify the CRC-32 of each part of a file written by ``torch.save``, as ``torch.load`` doesn't.

    Returns:
        What is damaged, or ``None``; files in torch's format before 1.6 have no checksums.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) != _ZIP:
                return None
            with zipfile.ZipFile(file) as archive:
                part = archive.testzip()
    except Exception as error:  # noqa: BLE001 (arbitrary bytes make zipfile raise anything)
        return f"it is truncated or damaged ({str(error) or type(error).__name__})"
    return None if part is None else f"it is damaged: {part.partition('/')[2]} doesn't match its checksum"


def _why_not_read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(len(_ZIP))
    except OSError as failure:
        return str(failure.strerror)
    if not head:
        return "it is empty"
    return "it is truncated or damaged" if head == _ZIP else "it was not written by torch.save, or is damaged"


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the classifier's description and the state dict of a checkpoint."""
    checkpoint = read_plain(path)
    match [checkpoint.get(key) for key in (CLASSIFIER_KEY, "state_dict")] if isinstance(checkpoint, dict) else []:
        case dict(description), dict(state):
            return description, state
    raise UserError(f"{path}: not a checkpoint of a classifier that kd trained")


def is_own_checkpoint(content: object) -> bool:
    """Return whether the content of a file is a checkpoint of this program."""
    return isinstance(content, dict) and isinstance(content.get(CLASSIFIER_KEY), dict)


def read_accuracy(path: Path) -> float | None:
    """Return the validation accuracy that a checkpoint records, in [0, 1]; ``None`` for files of other projects."""
    try:
        accuracy = _read_checkpoint(path)[0].get("val_acc")
    except UserError:
        return None
    return accuracy if isinstance(accuracy, float) else None


def write_thresholds(path: Path, thresholds: Sequence[float]) -> None:
    """Write the thresholds of a classifier of several labels an image into its checkpoint."""
    checkpoint = read_plain(path)
    checkpoint[CLASSIFIER_KEY] |= {"thresholds": list(thresholds)}
    with write_atomically(path) as file:
        torch.save(checkpoint, file)


def load_classifier(path: str | Path, *, architecture: str | None = None, flag: str = "--model") -> Classifier:
    """Load a classifier from a checkpoint, in evaluation mode.

    Args:
        path: The checkpoint of a teacher or a student.
        architecture: The expected network; required if the checkpoint names a Python file, whose code then runs.
        flag: The flag of the architecture, for error messages.

    Raises:
        UserError: If the checkpoint can't be read, or holds another network.
    """
    path = Path(path).expanduser()
    metadata, state = _read_checkpoint(path)
    weights = {
        key.removeprefix(STATE_PREFIX): value
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(STATE_PREFIX)
    }
    return build_from_state(metadata, weights, path=path, architecture=architecture, flag=flag)


def build_from_state(
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    path: Path,
    architecture: str | None = None,
    flag: str = "--model",
) -> Classifier:
    """Build a classifier in evaluation mode from its description and its weights, read from ``path``."""
    try:
        description = Description.from_plain(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path}: the description of its classifier is invalid: {reason}") from None
    if architecture is None and runs_own_code(description.architecture):
        raise UserError(
            f"{path}: its network is from a Python file; to run that code, add {flag} '{description.architecture}'"
        )
    if architecture is not None and not _same_network(architecture, description.architecture):
        raise UserError(f"{flag} {architecture}: {path} holds {description.architecture}")
    classifier = build_classifier(
        **description.arguments() | {"architecture": architecture or description.architecture}
    )
    kept = {name: getattr(description, name) for name in ("pixel_range", "multilabel", "thresholds")}
    classifier.description = dataclasses.replace(classifier.description, **kept)
    try:
        load_weights(classifier, state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its weights don't match {description.architecture}: {error}") from None
    return classifier.eval()


def _same_network(first: str, second: str) -> bool:
    """Compare two networks; a Python file may be in another folder."""
    return _without_folders(first) == _without_folders(second)


def _without_folders(architecture: str) -> tuple[str, dict[str, Any]]:
    name, hyperparameters = parse_choice(architecture)
    return name.rpartition("/")[2] if is_own_code(name) else name, {
        key: _without_folders(value) if isinstance(value, str) and runs_own_code(value) else value
        for key, value in hyperparameters.items()
    }
