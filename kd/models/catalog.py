"""Building a network by its name: from torchvision, from timm, one of our own small ones, or from a user's file."""

import functools
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from kd.errors import UserError
from kd.models import small
from kd.models.classifier import Classifier, Description
from kd.registry import (
    Registry,
    call_own_code,
    check_hyperparameters,
    is_own_code,
    load_own_code,
    parse_choice,
    suggestion,
)

SMALL: Registry[Callable[..., nn.Module]] = Registry("network")
"""Our own small networks by name, called with ``num_classes`` and ``image_size``."""
for _factory in (small.simple, small.convnet, small.mlp, small.linear):
    SMALL.register(_factory.__name__)(_factory)

# These have auxiliary heads, and weights for pixels in [-1, 1].
_INCEPTION = ("googlenet", "inception_v3")
_IMAGENET_CLASSES = 1000

_Built = tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...]] | None]
"""A network, and the mean and standard deviation that its published weights expect, if it has them."""


def torchvision_names() -> list[str]:
    """List torchvision's image classifiers without the quantized ones; all have published weights."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build_classifier(
    architecture: str,
    *,
    classes: tuple[str, ...],
    image_size: int,
    resize: str = "crop",
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pretrained: bool = False,
    pretrained_flag: str = "--teacher_pretrained",
) -> Classifier:
    """Build a classifier with a new head, and check it on images of the given size.

    Args:
        architecture: A name from torchvision, ``timm/NAME``, ``simple``, ``convnet``, ``mlp`` or ``linear``, also
            with hyperparameters as ``name(key=value)``; or ``path/to/file.py:factory``, called with ``num_classes``.
        classes: Names of the classes.
        image_size: Side S of the images, in pixels.
        resize: How images become square, ``crop`` or ``squash``; only recorded in the description.
        mean: Per-channel mean of the data, in [0, 1], for a network without published weights.
        std: Per-channel standard deviation of the data, likewise.
        pretrained: Start from published weights and their normalization; the head is always new.
        pretrained_flag: The flag of ``pretrained``, for error messages.

    Raises:
        UserError: If the name or a hyperparameter is unknown, the weights are unavailable, or the network doesn't
            support such images.
    """
    name, hyperparameters = parse_choice(architecture)
    flag = pretrained_flag if pretrained else None
    statistics = None
    if is_own_code(name):
        if pretrained:
            raise UserError(f"{pretrained_flag}: {name} is your own code; load the weights there")
        factory = load_own_code(name)
        check_hyperparameters(factory, hyperparameters, choice=architecture)
        network = call_own_code(architecture, factory, num_classes=len(classes), **hyperparameters)
    else:
        try:
            network, statistics = _build_by_name(name, len(classes), image_size, hyperparameters, flag=flag)
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            what = f"{architecture} can't be built for images of {image_size} px and {len(classes)} classes"
            raise UserError(f"{what}: {error}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{architecture!r}: the factory returned a {type(network).__name__}, not a torch.nn.Module")
    mean, std = statistics or (mean, std)
    classifier = Classifier(network, Description(architecture, classes, image_size, resize, mean, std))  # type: ignore[arg-type]
    _check_logits(classifier, image_size)
    return classifier


def _check_logits(classifier: Classifier, size: int) -> None:
    """Refuse a network that doesn't map images of this size to one logit per class."""
    architecture = classifier.description.architecture
    classifier.eval()
    try:
        with torch.no_grad():
            logits = classifier(torch.zeros(2, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        usual = usual_size(architecture)
        designed = "" if usual is None else f" (designed for {usual} px)"
        raise UserError(
            f"{architecture} can't process images of {size} px{designed}; change --image_size ({reason})"
        ) from None
    finally:
        classifier.train()
    expected = (2, len(classifier.description.classes))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{architecture}: expected logits of shape {expected} for 2 images, got {got}")


def usual_size(architecture: str) -> int | None:
    """Return the image size that a network was designed for, in pixels, if torchvision or timm records it."""
    name, _ = parse_choice(architecture)
    if name.startswith("timm/"):
        configuration = import_timm().get_pretrained_cfg(name.removeprefix("timm/"))
        return int(configuration.input_size[-1]) if configuration is not None else None
    if name in torchvision_names():
        return int(torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0])
    return None


def usual_statistics(architecture: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation that a network's published weights expect, if these are recorded."""
    name, _ = parse_choice(architecture)
    if name.startswith("timm/"):
        configuration = import_timm().get_pretrained_cfg(name.removeprefix("timm/"))
        return None if configuration is None else (tuple(configuration.mean), tuple(configuration.std))
    if name not in torchvision_names():
        return None
    if name in _INCEPTION:
        return (0.5,) * 3, (0.5,) * 3
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return tuple(preset.mean), tuple(preset.std)


def import_timm() -> ModuleType:
    """Import timm, an optional dependency."""
    try:
        import timm
    except ImportError:
        raise UserError("timm is not installed; install it with `pip install timm`") from None
    return timm


def _build_by_name(
    name: str, num_classes: int, image_size: int, hyperparameters: dict[str, Any], *, flag: str | None
) -> _Built:
    if name.startswith("timm/"):
        return _build_timm(name.removeprefix("timm/"), num_classes, hyperparameters, flag=flag)
    if name not in SMALL:
        return _build_torchvision(name, num_classes, hyperparameters, flag=flag)
    if flag is not None:
        raise UserError(f"{flag}: there are no published weights for {name}")
    check_hyperparameters(SMALL[name], hyperparameters, choice=name)
    return SMALL[name](num_classes, image_size, **hyperparameters), None


def published_size(name: str) -> int:
    """Return the number of parameters of a network of torchvision with ImageNet's 1,000 classes."""
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def torchvision_state(name: str) -> dict[str, Tensor]:
    """Return the names and shapes of the parameters and buffers of a network of torchvision, without data.

    Empty for the RegNets, which torchvision can't build without data.
    """
    options = {"aux_logits": False, "init_weights": False} if name in _INCEPTION else {}
    state: dict[str, Tensor] = {}
    with torch.device("meta"), suppress(NotImplementedError):
        state = torchvision.models.get_model(name, weights=None, **options).state_dict()
    return state


def _build_torchvision(name: str, num_classes: int, hyperparameters: dict[str, Any], *, flag: str | None) -> _Built:
    if name not in torchvision_names():
        names = [*torchvision_names(), *SMALL]
        raise UserError(f"there is no network {name!r}{suggestion(name, names)} (`kd models` lists them all)")
    builder = torchvision.models.get_model_builder(name)
    options = {"aux_logits": False, "init_weights": flag is None} if name in _INCEPTION else {}
    network: nn.Module = builder(weights=None, num_classes=num_classes, **options | hyperparameters)
    if flag is None:
        return network, None
    weights = torchvision.models.get_model_weights(name).DEFAULT
    # Loaded by torchvision, as some of its files name layers differently than its networks.
    published = _fetch(functools.partial(builder, weights=weights), weights.url, flag).state_dict()
    own = network.state_dict()
    head = {
        key
        for key, value in own.items()
        if key in published
        and published[key].shape[:1] == (_IMAGENET_CLASSES,)
        and published[key].shape[1:] == value.shape[1:]
    }
    matching = {key: value for key, value in published.items() if key in own and own[key].shape == value.shape}
    if others := own.keys() - matching.keys() - head:
        raise UserError(
            f"{flag} {name}: the published weights don't match these hyperparameters, at {min(others)} and "
            f"{len(others) - 1} other places"
        )
    network.load_state_dict(matching, strict=False)
    return network, usual_statistics(name)


def _build_timm(name: str, num_classes: int, hyperparameters: dict[str, Any], *, flag: str | None) -> _Built:
    timm = import_timm()
    if not timm.is_model(name):
        raise UserError(f"there is no network 'timm/{name}'{suggestion(name, timm.list_models())} (`kd models --timm`)")
    build = functools.partial(timm.create_model, name, num_classes=num_classes, **hyperparameters)
    if flag is None:
        return build(), None
    configuration = timm.get_pretrained_cfg(name)
    if configuration is None:
        raise UserError(f"{flag}: timm has no published weights for {name}")
    hub = f"https://huggingface.co/{configuration.hf_hub_id}/resolve/main/model.safetensors"
    network = _fetch(functools.partial(build, pretrained=True), str(configuration.url or hub), flag)
    return network, usual_statistics(f"timm/{name}")


def _fetch(build: Callable[[], nn.Module], url: str, flag: str) -> nn.Module:
    """Build a network with published weights; if they can't be downloaded, name the file and where to put it."""
    try:
        return build()
    except (OSError, RuntimeError, ValueError) as error:
        remedy = f"put that file into {torch.hub.get_dir()}/checkpoints"
        if "huggingface.co" in url:
            repository = "/".join(url.split("/")[3:5])
            remedy = f"run `hf download {repository}` on a machine with access, and copy its Hugging Face cache here"
        raise UserError(
            f"{flag}: the weights can't be downloaded ({str(error).partition(chr(10))[0]}).\n"
            f"  The missing file is {url.rpartition('/')[2]}, from {url}.\n"
            f"  Without network access, {remedy}, or start from random weights with {flag.replace('--', '--no-')}."
        ) from None


def parameters_by_name(*, with_timm: bool = False) -> list[tuple[str, str, int | None]]:
    """List all networks: name, origin, and number of parameters with 1,000 classes (``None`` for those of timm)."""
    rows: list[tuple[str, str, int | None]] = []
    for name, factory in SMALL.items():
        with torch.device("meta"):
            network = factory(1000, 224)
        rows.append((name, "kd, at 224 px", sum(parameter.numel() for parameter in network.parameters())))
    rows += [(name, "torchvision", published_size(name)) for name in torchvision_names()]
    return rows + ([(f"timm/{name}", "timm", None) for name in import_timm().list_models()] if with_timm else [])
