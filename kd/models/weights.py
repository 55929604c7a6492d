"""Reading weights and class names from files of other projects, without running code in them."""

import collections
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torchvision
from torch import Tensor

from kd.errors import DamagedFile, UserError
from kd.models.checkpoint import read_plain
from kd.models.hub import CONFIG, TIMM, TRANSFORMERS, import_timm, read_transformers

State = dict[str, Tensor]

# Where trainers of other projects keep a state dict; averaged weights come first.
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_STATE_KEYS = (*_EMA_KEYS, "state_dict", "model_state_dict", "model", "net", "network", "weights", "module")
_SHOWN = 3
_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


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
    """Read a folder as timm, transformers and the Hugging Face hub write it."""
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise UserError(f"{folder}: a folder must hold {CONFIG} and model.safetensors; there is no {CONFIG}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        architecture, arguments = config.get("architecture"), config.get("model_args") or {}
        if architecture is None and "model_type" in config:
            state, names, statistics = read_transformers(folder)
            mean, std = statistics or (None, None)
            return Weights(state, f"{TRANSFORMERS}{folder}", tuple(names), mean, std)
        pretrained = {**config, **(config.get("pretrained_cfg") or {})}
        by_index = config.get("id2label") or {}
        names = pretrained.get("label_names") or [by_index[index] for index in sorted(by_index, key=int)]
        mean, std = (tuple(map(float, pretrained[key])) if key in pretrained else None for key in ("mean", "std"))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{config_file}: not a model's configuration: {error}") from None
    if architecture is None:
        raise UserError(f"{config_file}: names neither an architecture of timm nor a model type of transformers")
    text = f"({', '.join(f'{name}={value!r}' for name, value in arguments.items())})" if arguments else ""
    files = [folder / name for name in _WEIGHTS_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(f"{folder}: there are no weights in it ({' or '.join(_WEIGHTS_FILES)})")
    state = read_weights(files[0]).state
    return Weights(state, f"{TIMM}{architecture}{text}", tuple(map(str, names)) or None, mean, std)


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
