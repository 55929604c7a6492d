"""Reading a classifier from a checkpoint: plain tensors and a description, and no code of whoever wrote it."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.errors import UserError
from kd.models.catalog import build_classifier
from kd.models.classifier import Classifier, Description
from kd.registry import is_own_code, parse_choice

CLASSIFIER_KEY = "classifier"
"""Where a checkpoint holds the description of its classifier, plain, with its accuracy."""

STATE_PREFIX = "model."
"""What the classifier's weights are called by in a checkpoint's ``state_dict``."""


_ZIP = b"PK\x03\x04"


def read_plain(path: Path, *, mapped: bool = False) -> Any:  # noqa: ANN401 (what the file holds)
    """Read a file of torch's with ``weights_only=True``: tensors and plain values, nothing that runs.

    Args:
        path: The file.
        mapped: Whether its tensors stay on the disk, for those who look at plain values alone.

    Raises:
        UserError: If there is no such file, or it can't be read so.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    try:
        with warnings.catch_warnings():
            # torch warns of what a foreign file holds before it refuses it.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # noqa: BLE001 (a stranger's bytes make the unpickler raise anything)
        reason = _why_not_read(path, error)
        raise UserError(f"{path}: this can't be read as a checkpoint of plain weights: {reason}") from None


def _why_not_read(path: Path, error: Exception) -> str:
    """Say what is wrong with a file in words that advise nobody to trust it, as torch's own do."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign is not None:
        return f"besides weights it holds {foreign[1]}, and what is not a plain value is not read, as it may run code"
    try:
        with path.open("rb") as file:
            head = file.read(len(_ZIP))
    except OSError as failure:
        return str(failure.strerror)
    if not head:
        return "it is empty"
    return "it is cut short or damaged" if head == _ZIP else "it is no file of weights that torch wrote, or damaged"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a classifier's checkpoint.

    Raises:
        UserError: If there is no such file, or it is no checkpoint of this tool.
    """
    checkpoint: dict[str, Any] = read_plain(path)
    parts = [checkpoint.get(key) for key in (CLASSIFIER_KEY, "state_dict")] if isinstance(checkpoint, dict) else [None]
    if not all(isinstance(one, dict) for one in parts):
        raise UserError(f"{path}: this is no checkpoint of a classifier that this tool trained")
    try:
        Description.from_plain(checkpoint[CLASSIFIER_KEY])
    except ValueError as error:
        raise UserError(f"{path}: the description of its classifier is not whole: {error}") from None
    return checkpoint


def read_description(path: Path) -> Description:
    """Read what a checkpoint's classifier is, without building it; errors as of :func:`read_checkpoint`."""
    return Description.from_plain(read_checkpoint(path)[CLASSIFIER_KEY])


def accuracy_in(path: Path) -> float | None:
    """Return the accuracy on validation images that a checkpoint says, a fraction of 1; errors as above."""
    accuracy = read_checkpoint(path)[CLASSIFIER_KEY].get("val_acc")
    return accuracy if isinstance(accuracy, float) else None


def load_classifier(path: str | Path, *, architecture: str | None = None, flag: str = "--model") -> Classifier:
    """Build the classifier that a checkpoint holds, in evaluation mode.

    Args:
        path: The checkpoint, of a teacher or a student.
        architecture: The network that it must be, as a person named it. It must be given where the checkpoint names a
            Python file, whose code runs only if a person asked for it.
        flag: The flag that gives the architecture, for the messages.

    Raises:
        UserError: If the checkpoint can't be read, or holds another network.
    """
    path = Path(path).expanduser()
    checkpoint = read_checkpoint(path)
    description = Description.from_plain(checkpoint[CLASSIFIER_KEY])
    state = {
        key.removeprefix(STATE_PREFIX): value
        for key, value in checkpoint["state_dict"].items()
        if isinstance(key, str) and key.startswith(STATE_PREFIX)
    }
    return build_from_state(description.plain(), state, path=path, architecture=architecture, flag=flag)


def build_from_state(
    metadata: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    path: Path,
    architecture: str | None = None,
    flag: str = "--model",
) -> Classifier:
    """Build a classifier from its description and its weights, in evaluation mode.

    Args:
        metadata: As :meth:`Description.plain` returned it; other keys are ignored.
        state: Its state dict.
        path: The file that they were read from, for error messages.
        architecture: As of :func:`load_classifier`.
        flag: As of :func:`load_classifier`.

    Raises:
        UserError: If the file holds another network, or its weights do not fit.
    """
    try:
        description = Description.from_plain(dict(metadata))
    except ValueError as error:
        raise UserError(f"{path}: the description of its classifier is not whole: {error}") from None
    if architecture is None and is_own_code(parse_choice(description.architecture)[0]):
        raise UserError(
            f"{path} holds a network from {description.architecture}, a Python file; say {flag} "
            f"'{description.architecture}' if that code may run"
        )
    if architecture is not None and not _same_network(architecture, description.architecture):
        raise UserError(f"{path} holds {description.architecture}, and {flag} says {architecture}")
    classifier = build_classifier(
        architecture or description.architecture,
        classes=description.classes,
        image_size=description.image_size,
        resize=description.resize,
        mean=description.mean,
        std=description.std,
    )
    try:
        classifier.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its weights do not fit {description.architecture}: {error}") from None
    return classifier.eval()


def _same_network(one: str, other: str) -> bool:
    """Compare two names of networks; a person's file may have moved, its function's name may not."""
    (one_name, one_parameters), (other_name, other_parameters) = parse_choice(one), parse_choice(other)
    if is_own_code(one_name) and is_own_code(other_name):
        one_name, other_name = (name.rpartition("/")[2] for name in (one_name, other_name))
    return (one_name, one_parameters) == (other_name, other_parameters)
