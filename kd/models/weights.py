"""Weights from anywhere: the state dict in a file of another project, matched to a network's parameter names."""

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from kd.errors import DamagedFile, UserError
from kd.models.catalog import (
    build_classifier,
    import_timm,
    published_size,
    torchvision_names,
    torchvision_state,
    usual_statistics,
)
from kd.models.checkpoint import read_plain
from kd.models.classifier import Classifier

State = dict[str, Tensor]

# Where trainers of other projects keep a state dict; averaged weights come first.
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_STATE_KEYS = (*_EMA_KEYS, "state_dict", "model_state_dict", "model", "net", "network", "weights", "module")
_SHOWN = 3
_COMPARED = 12
_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Weights:
    """The weights in a file, and what the file says about them.

    Args:
        state: The tensors by name.
        architecture: The network, if the file names it.
        classes: The class names, in the order of the logits, if the file lists them.
        mean: Mean of the pixels in [0, 1] by channel that the network expects, if the file records it.
        std: Their standard deviation, likewise.
        notes: What was chosen, for the user.
    """

    state: State
    architecture: str | None = None
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    notes: tuple[str, ...] = field(default=())


def read_weights(path: Path) -> Weights:
    """Read the weights in a file of another project, or in a folder as on the Hugging Face hub.

    Args:
        path: A state dict or a training checkpoint written by ``torch.save`` or a safetensors file; or a folder with
            ``config.json`` and ``model.safetensors``.

    Raises:
        UserError: If it can't be read without running code, or holds no state dict.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return Weights(read_safetensors(path)[1])
    content = read_plain(path)
    for key, state in _states(content):
        note = f"{path.name}: using the averaged weights under {key!r}" if key.startswith(_EMA_KEYS) else None
        return Weights(state, notes=(note,) if note else ())
    found = f"; its keys: {', '.join(map(str, list(content)[:_SHOWN]))}, ..." if isinstance(content, dict) else ""
    raise UserError(f"{path}: there is no state dict in it{found}")


def read_safetensors(path: Path) -> tuple[dict[str, str], State]:
    """Return the metadata and the tensors of a safetensors file.

    Raises:
        UserError: If it can't be read, or safetensors isn't installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading it needs safetensors: pip install safetensors") from None
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedFile(f"{path}: not a safetensors file: {error}") from None


def _states(content: object, name: str = "") -> Iterator[tuple[str, State]]:
    """Yield the state dicts in a file with their keys, the preferred one first."""
    if not isinstance(content, Mapping):
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    nested = [key for key in _STATE_KEYS if isinstance(content.get(key), Mapping)]
    if tensors and not nested:
        yield name, tensors
    for key in nested:
        yield from _states(content[key], f"{name}.{key}" if name else key)


def _read_folder(folder: Path) -> Weights:
    """Read a folder as timm and the Hugging Face hub write it."""
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    if not config_file.is_file():
        raise UserError(f"{folder}: a folder must hold config.json and model.safetensors; there is no config.json")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        pretrained = {**config, **(config.get("pretrained_cfg") or {})}
        by_index = config.get("id2label") or {}
        names = pretrained.get("label_names") or [by_index[index] for index in sorted(by_index, key=int)]
        architecture, arguments = config.get("architecture"), config.get("model_args") or {}
        mean, std = (tuple(map(float, pretrained[key])) if key in pretrained else None for key in ("mean", "std"))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{config_file}: not a model's configuration: {error}") from None
    if architecture is None:
        raise UserError(
            f"{config_file}: names no architecture of timm; for a model of transformers, write a function that builds "
            "it and returns its logits, and name that with --teacher_model my_code.py:function"
        )
    text = f"({', '.join(f'{name}={value!r}' for name, value in arguments.items())})" if arguments else ""
    state = read_safetensors(weights_file)[1]
    return Weights(state, f"timm/{architecture}{text}", tuple(map(str, names)) or None, mean, std)


def build_from_weights(
    weights: Weights,
    path: Path,
    *,
    architecture: str,
    data_classes: tuple[str, ...],
    classes: tuple[str, ...] | None,
    image_size: int,
    resize: str = "crop",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    flag: str = "--teacher_model",
    classes_flag: str = "--teacher_classes",
) -> tuple[Classifier, list[str]]:
    """Build a classifier in evaluation mode from weights of another project.

    Args:
        weights: The weights.
        path: Where they were read, for messages.
        architecture: The network.
        data_classes: The classes of the data; assumed to be the network's, in this order, if their number agrees and
            nothing else names them.
        classes: The class names in the order of the logits, if they are known.
        image_size: Side of the images, in pixels.
        resize: How images become square, ``crop`` or ``squash``.
        mean: Mean of the pixels in [0, 1] by channel; ``None``: the file's, or else that of the architecture.
        std: Standard deviation, likewise.
        flag: The flag of the architecture, for messages.
        classes_flag: The flag of the class names, for messages.

    Returns:
        The classifier, and notes on what was assumed.

    Raises:
        UserError: If the weights don't fit the network, or the class names the weights.
    """
    notes = list(weights.notes)
    classes = classes or weights.classes
    usual = usual_statistics(architecture)
    if mean is None or std is None:
        source = path.name if weights.mean else f"the configuration of {architecture}" if usual else "ImageNet, assumed"
        file_mean, file_std = (weights.mean, weights.std) if weights.mean and weights.std else usual or _STATISTICS
        mean, std = mean or file_mean, std or file_std
        notes.append(f"normalization of {path.name}: mean {_listed(mean)}, std {_listed(std)} ({source})")

    def build(number: int) -> tuple[Classifier, dict[str, Tensor]]:
        names = classes if classes is not None and len(classes) == number else tuple(map(str, range(number)))
        classifier = build_classifier(
            architecture, classes=names, image_size=image_size, resize=resize, mean=mean, std=std
        )
        return classifier, classifier.network.state_dict()

    number = len(classes or data_classes)
    classifier, own = build(number)
    state = _without_prefix(weights.state, own)
    outputs = {state[key].shape[0] for key in own.keys() & state.keys() if _is_head(own[key], state[key], number)}
    if len(outputs) == 1 and outputs != {number}:
        classifier, own = build(outputs.pop())
    _check_fit(state, own, given=weights.state, path=path, architecture=architecture, flag=flag)
    classifier.network.load_state_dict(state)
    number = len(classifier.description.classes)
    if classes is None and number == len(data_classes):
        notes.append(f"{path.name} doesn't name its classes: assumed to be the data's, in alphabetical order")
        classifier = _renamed(classifier, data_classes)
    elif classes is None or len(classes) != number:
        known = "doesn't name its classes" if classes is None else f"was given {len(classes):,} class names"
        imagenet = f", or {classes_flag} imagenet" if number == len(imagenet_names()) else ""
        raise UserError(
            f"{path}: has {number:,} outputs, and {known}; list them in the order of the outputs in a file and name it "
            f"with {classes_flag} FILE (one name per line){imagenet}"
        )
    _check_outputs(classifier, path)
    return classifier.eval(), notes


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
    _check_fit(state | head, own, given=given, path=path, architecture=architecture, flag=flag)
    classifier.network.load_state_dict(state | head)


def imagenet_names() -> list[str]:
    """Return the English names of ImageNet's 1,000 classes, in the order of the logits."""
    names: list[str] = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    return names


def read_class_names(text: str, *, flag: str, data_classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return class names in the order of a network's logits.

    Args:
        text: ``imagenet`` (by synset identifiers or English names, whichever the data has), or a file: text with one
            name per line, or a JSON list or mapping from positions to names.
        flag: The flag that ``text`` was given with, for messages.
        data_classes: The classes of the data.

    Raises:
        UserError: If the file can't be read, or a name occurs twice.
    """
    if text == "imagenet":
        if any(name in imagenet_names() for name in data_classes):
            return _distinct(imagenet_names())
        synsets: list[str] = list(import_timm().data.ImageNetInfo("imagenet-1k").label_names())
        return tuple(synsets)
    path = Path(text).expanduser()
    try:
        content = path.read_text(encoding="utf-8-sig")
        if content.lstrip().startswith(("[", "{")):
            values = json.loads(content)
            names = [values[key] for key in sorted(values, key=int)] if isinstance(values, dict) else values
        else:
            names = [line.strip() for line in content.splitlines() if line.strip()]
        names = [str(name) for name in names]
    except (OSError, ValueError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {text}: can't be read as a list of class names: {reason}") from None
    if len(set(names)) < len(names):
        raise UserError(f"{flag} {text}: class {max(names, key=names.count)!r} is listed twice")
    return tuple(names)


def _distinct(names: list[str]) -> tuple[str, ...]:
    """Number names that occur twice, as ``crane`` and ``maillot`` do in ImageNet."""
    counts: collections.Counter[str] = collections.Counter()
    found = []
    for name in names:
        counts[name] += 1
        found.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return tuple(found)


def _renamed(classifier: Classifier, classes: tuple[str, ...]) -> Classifier:
    classifier.description = dataclasses.replace(classifier.description, classes=classes)
    return classifier


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
    state: State, own: Mapping[str, Tensor], *, given: State, path: Path, architecture: str, flag: str
) -> None:
    """Refuse weights that don't fit a network, and name one that fits those given in the file."""
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if not (missing or unexpected or shapes):
        return
    differing = [f"{key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}" for key in shapes]
    parts = [
        f"{len(keys):,} {kind} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", differing))
        if keys
    ]
    fitting = _fitting_architecture(given)
    hint = f"; they fit {flag} {fitting}" if fitting else ""
    raise UserError(f"{path}: its weights don't fit {architecture}: {'; '.join(parts)}{hint}")


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


def _check_outputs(classifier: Classifier, path: Path) -> None:
    """Refuse a network that ends in a softmax, whose outputs are no logits."""
    size = classifier.description.image_size
    with torch.no_grad():
        outputs = classifier.eval()(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    if bool((outputs >= 0).all()) and torch.allclose(outputs.sum(dim=1), torch.ones(2), atol=1e-4):
        raise UserError(
            f"{path}: the network's outputs are probabilities; distillation needs logits: leave out the softmax at its "
            "end"
        )


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
