"""Fitting weights of any origin to a network: prefixes removed, names and shapes compared, classes named."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kd.errors import UserError
from kd.models.catalog import (
    build_classifier,
    build_embedder,
    published_size,
    torchvision_names,
    torchvision_state,
    usual_statistics,
)
from kd.models.classifier import Classifier, load_weights
from kd.models.hub import IMAGENET, Pooled
from kd.models.weights import State, Weights, read_weights

_SHOWN = 3
_COMPARED = 12


def build_from_weights(
    weights: Weights,
    source: str,
    *,
    architecture: str,
    data_classes: tuple[str, ...],
    classes: tuple[str, ...] | None,
    image_size: int,
    resize: str = "crop",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    features_only: bool = False,
    flag: str = "--teacher_model",
    naming: str = "",
) -> tuple[Classifier, list[str]]:
    """Build a classifier in evaluation mode from weights of another project.

    Args:
        weights: The weights.
        source: Where they were read, for messages.
        architecture: The network.
        data_classes: The classes of the data; assumed to be the network's, in this order, if their number agrees and
            nothing else names them.
        classes: The class names in the order of the logits, if they are known.
        image_size: Side of the images, in pixels.
        resize: How images become square, ``crop`` or ``squash``.
        mean: Mean of the pixels in [0, 1] by channel; ``None``: the file's, or else that of the architecture.
        std: Standard deviation, likewise.
        features_only: Whether to leave out the classifier layer, see :class:`kd.models.classifier.Embedder`.
        flag: The flag of the architecture, for messages.
        naming: How to name the classes, for messages.

    Returns:
        The classifier, and notes on what was assumed.

    Raises:
        UserError: If the weights don't fit the network, or the class names the weights.
    """
    notes, name = list(weights.notes), source.rpartition("/")[2]
    classes = classes or weights.classes
    usual = usual_statistics(architecture)
    if mean is None or std is None:
        recorded = f"the configuration of {architecture}" if usual else "ImageNet, assumed"
        file_mean, file_std = (weights.mean, weights.std) if weights.mean and weights.std else usual or IMAGENET
        mean, std = mean or file_mean, std or file_std
        origin = name if weights.mean else recorded
        notes.append(f"normalization of {name}: mean {_listed(mean)}, std {_listed(std)} ({origin})")
    common: dict[str, Any] = {"image_size": image_size, "resize": resize, "mean": mean, "std": std}
    if features_only:
        embedder = build_embedder(architecture, classes=data_classes, **common)
        # The names of transformers' backbones are those without the wrapper.
        network = embedder.network.backbone if isinstance(embedder.network, Pooled) else embedder.network
        own = network.state_dict()
        state = _without_prefix(weights.state, own)
        if unused := sorted(state.keys() - own.keys()):
            notes.append(f"{name}: without the classifier layer, {_shorten(unused)} not used")
        kept = {key: value for key, value in state.items() if key in own}
        _check_fit(kept, own, given=weights.state, source=source, architecture=architecture, flag=flag)
        load_weights(network, kept)
        return embedder.eval(), notes

    def build(number: int) -> tuple[Classifier, dict[str, Tensor]]:
        names = classes if classes is not None and len(classes) == number else tuple(map(str, range(number)))
        classifier = build_classifier(architecture, classes=names, **common)
        return classifier, classifier.network.state_dict()

    number = len(classes or data_classes)
    classifier, own = build(number)
    state = _without_prefix(weights.state, own)
    outputs = {state[key].shape[0] for key in own.keys() & state.keys() if _is_head(own[key], state[key], number)}
    if len(outputs) == 1 and outputs != {number}:
        classifier, own = build(outputs.pop())
    _check_fit(state, own, given=weights.state, source=source, architecture=architecture, flag=flag)
    load_weights(classifier.network, state)
    names, assumed = name_outputs(
        len(classifier.description.classes), classes, data_classes=data_classes, source=source, naming=naming
    )
    classifier.description = dataclasses.replace(classifier.description, classes=names)
    return classifier.eval(), [*notes, *assumed]


def name_outputs(
    number: int, names: tuple[str, ...] | None, *, data_classes: tuple[str, ...], source: str, naming: str
) -> tuple[tuple[str, ...], list[str]]:
    """Return the class names of a network's outputs, and a note if they are assumed to be the data's.

    Args:
        number: Number of outputs.
        names: Their names, if they are known.
        data_classes: The classes of the data.
        source: Where the network comes from, for messages.
        naming: How to name the classes, for messages.

    Raises:
        UserError: If they aren't known, and the data has another number of classes, or their number differs.
    """
    if names is None and number == len(data_classes):
        name = source.rpartition("/")[2]
        return data_classes, [f"{name} doesn't name its classes: assumed to be the data's, in alphabetical order"]
    if names is not None and len(names) == number:
        return names, []
    known = "doesn't name its classes" if names is None else f"was given {len(names):,} class names"
    raise UserError(f"{source}: has {number:,} outputs, and {known}; {naming}")


def initialize_from(classifier: Classifier, path: Path, *, flag: str) -> None:
    """Initialize a network with the weights in a file; its classifier layer stays new if it has other classes.

    Args:
        classifier: The classifier, changed in place.
        path: As of :func:`read_weights`.
        flag: The flag that named the file, for messages.

    Raises:
        UserError: If the file can't be read, or its weights don't fit the network.
    """
    own, number = classifier.network.state_dict(), len(classifier.description.classes)
    given = read_weights(path).state
    state = _without_prefix(given, own)
    head = {
        key: own[key]
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape and _is_head(own[key], state[key], number)
    }
    architecture = classifier.description.architecture
    _check_fit(state | head, own, given=given, source=str(path), architecture=architecture, flag=flag)
    load_weights(classifier.network, state | head)


def keep_classes(student: Classifier, loaded: Classifier) -> None:
    """Give a classifier the weights of another of the same architecture, the rows of its classifier layer by class.

    Args:
        student: The classifier, changed in place.
        loaded: The one with the weights, restricted to the classes of the first.

    Raises:
        UserError: If the rows can't be found, as the architecture doesn't depend on the number of classes.
    """
    state, selected = loaded.network.state_dict(), loaded.selected
    if selected is not None:
        own, description = student.network.state_dict(), student.description
        others = tuple(map(str, range(len(description.classes) + 1)))
        larger = build_classifier(**description.arguments() | {"classes": others})
        head = [key for key, value in larger.network.state_dict().items() if own[key].shape != value.shape]
        state |= {key: state[key][selected] for key in head}
    load_weights(student.network, state)


def _is_head(own: Tensor, given: Tensor, number: int) -> bool:
    """Return whether two tensors may be those of a classifier layer with different numbers of classes."""
    return own.ndim > 0 and given.ndim == own.ndim and own.shape[0] == number and own.shape[1:] == given.shape[1:]


def _without_prefix(state: State, own: Mapping[str, Tensor]) -> State:
    """Return the tensors whose names, without a common prefix such as ``module.``, match most of the network's."""
    names = list(own)
    prefixes = dict.fromkeys(
        key[: -len(name)] for name in names[:1] + names[-1:] for key in state if key == name or key.endswith(f".{name}")
    )
    # Of several networks in a file, averages come first.
    ordered = sorted(prefixes, key=lambda prefix: (-sum(prefix + name in state for name in names), "ema" not in prefix))
    prefix = ordered[0] if ordered else ""
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    # Not all projects save the counters of batch normalization, which evaluation doesn't use.
    return {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | found


def _check_fit(
    state: State, own: Mapping[str, Tensor], *, given: State, source: str, architecture: str, flag: str
) -> None:
    """Refuse weights that don't fit a network, and name one that fits those given in the file."""
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unexpected or shapes):
        return
    differing = [f"{key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in shapes]
    parts = [
        f"{len(keys):,} {kind} ({_shorten(keys)})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if keys
    ]
    fitting = _fitting_architecture(given)
    hint = f"; they fit {flag} {fitting}" if fitting else ""
    if not (hint or shapes) and len({key.rpartition(".")[0] for key in missing}) == 1:
        hint = (
            "; if they have no classifier layer, distill the network's features: --teacher_features --loss ce=0.5 "
            "embedding=0.5"
        )
    raise UserError(f"{source}: its weights don't fit {architecture}: {'; '.join(parts)}{hint}")


def _fitting_architecture(state: State) -> str | None:
    """Return the network of torchvision that has just these parameter names and shapes, but for the last layer."""
    last = [value for value in state.values() if value.ndim > 1][-1:]
    # With ImageNet's classes instead of its own, as published sizes are given.
    size = sum(value.numel() for value in state.values()) + sum((1000 - len(head)) * head[0].numel() for head in last)
    # Building all of them takes half a minute, so only those of a similar size are compared.
    for name in sorted(torchvision_names(), key=lambda name: abs(published_size(name) - size))[:_COMPARED]:
        own = _without_counters(torchvision_state(name))
        given = _without_counters(_without_prefix(state, own))
        if own and own.keys() == given.keys() and all(own[key].shape[1:] == given[key].shape[1:] for key in own):
            return name
    return None


def _without_counters(state: Mapping[str, Tensor]) -> State:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _shorten(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
