"""Networks of timm and of transformers, by name or in a local folder, and fetching published weights."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.registry import parse_choice, suggestion

TIMM, TRANSFORMERS = "timm/", "transformers/"
"""Prefixes of the names of these packages' networks."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the pixels in [0, 1], by channel."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Those of ImageNet."""

CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_LOCAL = "local-dir:"
_SOURCES = ("hf-hub:", _LOCAL)
"""What timm's own names may begin with."""


def import_timm() -> ModuleType:
    """Import timm, an optional dependency."""
    try:
        import timm
    except ImportError:
        raise UserError("timm is not installed; install it with `pip install timm`") from None
    return timm


def build_timm(name: str, num_classes: int, hyperparameters: dict[str, Any], *, flag: str | None) -> nn.Module:
    """Build a network of timm.

    Args:
        name: Its name, also ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.
        num_classes: Number of classes; 0: without a classifier layer.
        hyperparameters: Other arguments of ``timm.create_model``.
        flag: The flag that asks for published weights, or ``None``.
    """
    timm = import_timm()
    if not (name.startswith(_SOURCES) or timm.is_model(name)):
        raise UserError(f"there is no network 'timm/{name}'{suggestion(name, timm.list_models())} (`kd models --timm`)")
    if name.startswith(_LOCAL) and not (Path(name.partition(":")[2]) / CONFIG).is_file():
        raise UserError(f"{name.partition(':')[2]}: there is no {CONFIG} of timm in this folder")
    build = functools.partial(
        timm.create_model, name, num_classes=num_classes, pretrained=flag is not None, **hyperparameters
    )
    if flag is None or name.startswith(_LOCAL):
        network: nn.Module = fetch(build, _url(name), None) if name.startswith("hf-hub:") else build()
        return network
    configuration = timm_configuration(name)
    if configuration is None:
        raise UserError(f"{flag}: timm has no published weights for {name}")
    return fetch(build, str(configuration.get("url") or _url(name)), flag)


def timm_folder(architecture: str) -> Path | None:
    """Return the folder of ``timm/local-dir:FOLDER``; ``None`` for other networks."""
    name, _ = parse_choice(architecture)
    return Path(name.removeprefix(TIMM + _LOCAL)).expanduser() if name.startswith(TIMM + _LOCAL) else None


@functools.cache
def timm_configuration(name: str) -> dict[str, Any] | None:
    """Return what timm records about a network's published weights, or ``None``."""
    timm = import_timm()
    if name.startswith(_SOURCES):
        with torch.device("meta"):
            values: dict[str, Any] = dict(build_timm(name, 2, {}, flag=None).pretrained_cfg)  # type: ignore[arg-type]
        return values
    configuration = timm.get_pretrained_cfg(name)
    return None if configuration is None else configuration.to_dict()


def _url(name: str) -> str:
    timm = import_timm()
    configuration = None if name.startswith(_SOURCES) else timm.get_pretrained_cfg(name)
    repository = name.partition(":")[2] if configuration is None else configuration.hf_hub_id
    return f"https://huggingface.co/{repository}/resolve/main/model.safetensors"


def import_transformers() -> Any:  # noqa: ANN401 (its attributes are loaded lazily)
    """Import transformers, an optional dependency, without its progress bars and hints."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed; install it with `pip install transformers`") from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers


def build_transformers(folder: str, num_classes: int, hyperparameters: dict[str, Any]) -> nn.Module:
    """Build an image classifier of transformers from the configuration in a folder, with new weights.

    Args:
        folder: Folder with ``config.json``.
        num_classes: Number of classes; 0: without a classifier layer, see :class:`Pooled`.
        hyperparameters: Changed values of the configuration.
    """
    transformers = import_transformers()
    configuration = _transformers_configuration(folder)
    configuration.update(hyperparameters | {"num_labels": max(num_classes, 1)})
    network: nn.Module = transformers.AutoModelForImageClassification.from_config(configuration)
    return network if num_classes else Pooled(network.base_model)  # type: ignore[arg-type]  # typed as a tensor


class Pooled(nn.Module):
    """A backbone of transformers whose output is its pooled features ``(B, D)``, or else its class token."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of a batch."""
        outputs = self.backbone(images)
        pooled: Tensor | None = outputs.get("pooler_output")
        return outputs.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def read_transformers(folder: Path) -> tuple[dict[str, Tensor], list[str], Statistics | None]:
    """Read the weights in a folder of transformers that come from its files, the class names, and the normalization.

    Raises:
        UserError: If they can't be read as those of an image classifier.
    """
    configuration = _transformers_configuration(str(folder))
    network, loading = _reading(
        folder,
        lambda transformers: transformers.AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
        ),
    )
    new = set(loading["missing_keys"])
    state = {key: value for key, value in network.state_dict().items() if key not in new}
    names: dict[int, str] = configuration.id2label
    values = _preprocessing(folder)
    statistics = tuple(values["image_mean"]), tuple(values["image_std"])
    return state, [names[index] for index in sorted(names)], statistics if all(statistics) else None


def transformers_size(folder: str) -> int | None:
    """Return the side of the images that a network of transformers takes, in pixels, if it is recorded."""
    recorded = getattr(_transformers_configuration(folder), "image_size", None)
    sizes = _preprocessing(Path(folder)) if recorded is None else {"size": recorded}
    size = sizes.get("crop_size") or sizes.get("size")
    while isinstance(size, dict | list | tuple) and size:
        size = next(iter(size.values() if isinstance(size, dict) else size))
    return size if isinstance(size, int) else None


def transformers_statistics(folder: str) -> Statistics | None:
    """Return the normalization that the preprocessing of a network of transformers records."""
    values = _preprocessing(Path(folder))
    mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    return (mean, std) if mean and std else None


def _transformers_configuration(folder: str) -> Any:  # noqa: ANN401 (a configuration of transformers)
    return _reading(
        Path(folder),
        lambda transformers: transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ),
    )


def _reading(folder: Path, read: Callable[[Any], Any]) -> Any:  # noqa: ANN401 (what transformers reads)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: a folder of transformers must hold {CONFIG} and model.safetensors")
    try:
        return read(import_transformers())
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (transformers raises whatever its parts raise)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: transformers can't read an image classifier in it: {reason}") from None


def _preprocessing(folder: Path) -> dict[str, Any]:
    path = folder / _PREPROCESSOR
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not values.get("do_normalize", True):
            values |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
        return {"image_mean": (), "image_std": ()} | values
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a preprocessing configuration: {error}") from None


def fetch(build: Callable[[], nn.Module], url: str, flag: str | None) -> nn.Module:
    """Build a network with published weights; if they can't be downloaded, name the file and where to put it."""
    try:
        return build()
    except (OSError, RuntimeError, ValueError) as error:
        remedy = f"put that file into {torch.hub.get_dir()}/checkpoints"
        if "huggingface.co" in url:
            repository = "/".join(url.split("/")[3:5])
            remedy = f"run `hf download {repository}` on a machine with access, and copy its Hugging Face cache here"
        random = "" if flag is None else f", or start from random weights with {flag.replace('--', '--no-')}"
        start, reason = "" if flag is None else f"{flag}: ", str(error).partition("\n")[0]
        raise UserError(
            f"{start}the weights can't be downloaded ({reason}).\n"
            f"  The missing file is {url.rpartition('/')[2]}, from {url}.\n"
            f"  Without network access, {remedy}{random}."
        ) from None
