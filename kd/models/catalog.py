"""Building a network by its name: from torchvision, from timm, one of our own small ones, or from a user's file."""

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torchvision
from torch import Tensor, nn

from kd.errors import UserError
from kd.models import small
from kd.models.classifier import Classifier, Description, Embedder
from kd.models.hub import (
    IMAGENET,
    TIMM,
    TRANSFORMERS,
    Statistics,
    build_timm,
    build_transformers,
    fetch,
    import_timm,
    timm_configuration,
    transformers_size,
    transformers_statistics,
)
from kd.registry import (
    Registry,
    accepts,
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

REUSED_HEAD = "simkd"
"""Name of the networks of :mod:`kd.models.reused_head`, ``simkd(student=..., teacher=...)``."""

# These have auxiliary heads, and weights for pixels in [-1, 1].
_INCEPTION = ("googlenet", "inception_v3")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_IMAGENET_CLASSES = 1000


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
    mean: tuple[float, ...] = IMAGENET[0],
    std: tuple[float, ...] = IMAGENET[1],
    pretrained: bool = False,
    pretrained_flag: str = "--teacher_pretrained",
) -> Classifier:
    """Build a classifier with a new head, and check it on images of the given size.

    Args:
        architecture: A name from torchvision, ``timm/NAME``, ``transformers/FOLDER``, ``simple``, ``convnet``, ``mlp``
            or ``linear``, also with hyperparameters as ``name(key=value)``; or ``path/to/file.py:factory``, called with
            ``num_classes`` if it takes that. A network that takes gray images gets the luminance of the colors.
        classes: Names of the classes.
        image_size: Side S of the images, in pixels.
        resize: How images become square, ``crop`` or ``squash``; only recorded in the description.
        mean: Per-channel mean of the data, in [0, 1], for a network without published weights; default: ImageNet's.
        std: Per-channel standard deviation of the data, likewise.
        pretrained: Start from published weights and their normalization; the head is always new.
        pretrained_flag: The flag of ``pretrained``, for error messages.

    Raises:
        UserError: If the name or a hyperparameter is unknown, the weights are unavailable, or the network doesn't
            support such images or ends in a softmax.
    """
    flag = pretrained_flag if pretrained else None
    network = _build_network(architecture, len(classes), image_size, flag=flag)
    mean, std = (usual_statistics(architecture) if pretrained else None) or (mean, std)
    description = Description(architecture, classes, image_size, resize, mean, std)  # type: ignore[arg-type]
    return checked(Classifier(network, description))


def build_embedder(
    architecture: str,
    *,
    classes: tuple[str, ...],
    image_size: int,
    resize: str = "crop",
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Embedder:
    """Build a network without its classifier layer, whose outputs are features.

    Args:
        architecture: As of :func:`build_classifier`; the outputs of the user's own network are taken as its features.
        classes: Classes of the data, for the description.
        image_size: Side of the images, in pixels.
        resize: How images become square.
        mean: Per-channel mean of the images that it expects, in [0, 1].
        std: Their standard deviation, likewise.

    Raises:
        UserError: As of :func:`build_classifier`.
    """
    name, _ = parse_choice(architecture)
    if name == REUSED_HEAD:
        raise UserError(
            f"{name}: the classifier layer of such a student is its teacher's; take that teacher's features"
        )
    # timm and transformers leave it out themselves.
    network = _build_network(architecture, 0 if name.startswith((TIMM, TRANSFORMERS)) else len(classes), image_size)
    if not (name.startswith((TIMM, TRANSFORMERS)) or is_own_code(name)):
        network.set_submodule(classifier_layer(network), nn.Identity())
    description = Description(architecture, classes, image_size, resize, mean, std)  # type: ignore[arg-type]
    return checked(Embedder(network, description))


def classifier_layer(network: nn.Module) -> str:
    """Return the name of a network's classifier layer, its last linear layer or convolution.

    Raises:
        UserError: If it has none.
    """
    layers: list[str] = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers:
        raise UserError("it has no linear layer or convolution as its classifier layer")
    return layers[-1]


def allow_checkpointing(classifier: Classifier) -> None:
    """Recompute activations in the backward pass instead of keeping them, by the network's own function.

    Raises:
        UserError: If the network has none.
    """
    network = classifier.network
    for name, arguments in (("set_grad_checkpointing", (True,)), ("gradient_checkpointing_enable", ())):
        if callable(function := getattr(network, name, None)):
            try:
                function(*arguments)
            except (AssertionError, ValueError, NotImplementedError) as error:
                raise UserError(f"it has no gradient checkpointing: {error}") from None
            return
    raise UserError("it has no gradient checkpointing; many networks of timm/ and transformers/ do")


def _build_network(architecture: str, num_classes: int, image_size: int, *, flag: str | None = None) -> nn.Module:
    name, hyperparameters = parse_choice(architecture)
    if not is_own_code(name):
        try:
            return _build_by_name(name, num_classes, image_size, hyperparameters, flag=flag)
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            what = f"{architecture} can't be built for images of {image_size} px and {num_classes} classes"
            raise UserError(f"{what}: {error}") from None
    if flag is not None:
        raise UserError(f"{flag}: {name} is your own code; load the weights there")
    factory = load_own_code(name)
    check_hyperparameters(factory, hyperparameters, choice=architecture)
    arguments = {"num_classes": num_classes} if accepts(factory, "num_classes") else {}
    network = call_own_code(architecture, factory, **arguments | hyperparameters)
    if not isinstance(network, nn.Module):
        raise UserError(f"{architecture!r}: the factory returned a {type(network).__name__}, not a torch.nn.Module")
    return network


_AnyClassifier = TypeVar("_AnyClassifier", bound=Classifier)


def checked(classifier: _AnyClassifier) -> _AnyClassifier:
    """Return a classifier that was tried on images of its size, with gray images if it takes these.

    Raises:
        UserError: If it can't process such images, or its outputs aren't one logit for each class.
    """
    try:
        _check_outputs(classifier)
    except UserError as error:
        try:
            gray = classifier.for_gray_images()
            _check_outputs(gray)
        except UserError:
            raise error from None
        return gray
    return classifier


def _check_outputs(classifier: Classifier) -> None:
    """Refuse a network that doesn't map images of its size to one logit per class, or to features."""
    description, architecture = classifier.description, classifier.description.architecture
    size = description.image_size
    classifier.eval()
    try:
        with torch.no_grad():
            outputs = classifier(torch.zeros(2, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        usual = usual_size(architecture)
        designed = "" if usual is None else f" (designed for {usual} px)"
        raise UserError(
            f"{architecture} can't process images of {size} px{designed}; change --image_size ({reason})"
        ) from None
    finally:
        classifier.train()
    got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
    if isinstance(classifier, Embedder):
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:  # noqa: PLR2004 (B, D)
            raise UserError(f"{architecture}: expected features of shape (2, D) for 2 images, got {got}")
        return
    expected = (2, len(description.classes))
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
        raise UserError(f"{architecture}: expected logits of shape {expected} for 2 images, got {got}")
    if bool((outputs >= 0).all()) and torch.allclose(outputs.float().sum(dim=1), torch.ones(2), atol=1e-4):
        raise UserError(
            f"{architecture}: the network's outputs are probabilities; distillation and training need logits: leave "
            "out the softmax at its end"
        )


def usual_size(architecture: str) -> int | None:
    """Return the image size that a network was designed for, in pixels, if its package records it."""
    name, _ = parse_choice(architecture)
    if name.startswith(TRANSFORMERS):
        return transformers_size(name.removeprefix(TRANSFORMERS))
    if name.startswith(TIMM):
        configuration = timm_configuration(name.removeprefix(TIMM))
        return int(configuration["input_size"][-1]) if configuration is not None else None
    if name in torchvision_names():
        return int(torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0])
    return None


def usual_statistics(architecture: str) -> Statistics | None:
    """Return the mean and standard deviation that a network's published weights expect, if these are recorded."""
    name, _ = parse_choice(architecture)
    if name.startswith(TRANSFORMERS):
        return transformers_statistics(name.removeprefix(TRANSFORMERS))
    if name.startswith(TIMM):
        configuration = timm_configuration(name.removeprefix(TIMM))
        return None if configuration is None else (tuple(configuration["mean"]), tuple(configuration["std"]))
    if name not in torchvision_names():
        return None
    if name in _INCEPTION:
        return (0.5,) * 3, (0.5,) * 3
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return tuple(preset.mean), tuple(preset.std)


def published_state(architecture: str, flag: str) -> tuple[dict[str, Tensor], int]:
    """Return the published weights of a network with their classifier layer, and their number of classes.

    Args:
        architecture: A name from torchvision or ``timm/NAME``.
        flag: The flag that asks for them, for messages.

    Raises:
        UserError: If there are none, or they can't be downloaded.
    """
    (name, hyperparameters), number = parse_choice(architecture), _IMAGENET_CLASSES
    if name.startswith(TIMM):
        configuration = timm_configuration(name.removeprefix(TIMM)) or {}
        number = int(configuration.get("num_classes", _IMAGENET_CLASSES))
        network = build_timm(name.removeprefix(TIMM), number, hyperparameters, flag=flag)
    elif name in torchvision_names():
        network = _published_torchvision(name, flag)
    else:
        raise UserError(f"{flag}: there are no published weights for {name}")
    return {key: value for key, value in network.state_dict().items() if not key.startswith(_AUXILIARY)}, number


def _build_by_name(
    name: str, num_classes: int, image_size: int, hyperparameters: dict[str, Any], *, flag: str | None
) -> nn.Module:
    if name.startswith(TIMM):
        return build_timm(name.removeprefix(TIMM), num_classes, hyperparameters, flag=flag)
    if name == REUSED_HEAD and hyperparameters:
        # It consists of two networks that are built here.
        from kd.models.reused_head import build_reused_head

        return build_reused_head(num_classes, image_size, **hyperparameters)
    if name not in SMALL and not name.startswith(TRANSFORMERS):
        return _build_torchvision(name, num_classes, hyperparameters, flag=flag)
    if flag is not None:
        folder = name.removeprefix(TRANSFORMERS)
        hint = f"; to start from those in the folder, use {flag} {folder}" if name not in SMALL else ""
        raise UserError(f"{flag}: there are no published weights for {name}{hint}")
    if name.startswith(TRANSFORMERS):
        return build_transformers(name.removeprefix(TRANSFORMERS), num_classes, hyperparameters)
    check_hyperparameters(SMALL[name], hyperparameters, choice=name)
    return SMALL[name](num_classes, image_size, **hyperparameters)


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


def _build_torchvision(name: str, num_classes: int, hyperparameters: dict[str, Any], *, flag: str | None) -> nn.Module:
    if name not in torchvision_names():
        names = [*torchvision_names(), *SMALL]
        raise UserError(f"there is no network {name!r}{suggestion(name, names)} (`kd models` lists them all)")
    builder = torchvision.models.get_model_builder(name)
    options = {"aux_logits": False, "init_weights": flag is None} if name in _INCEPTION else {}
    network: nn.Module = builder(weights=None, num_classes=num_classes, **options | hyperparameters)
    if flag is None:
        return network
    published, own = _published_torchvision(name, flag).state_dict(), network.state_dict()
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
    return network


def _published_torchvision(name: str, flag: str) -> nn.Module:
    """Return a network as torchvision loads it, as some of its files name layers differently than its networks."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    return fetch(functools.partial(torchvision.models.get_model_builder(name), weights=weights), weights.url, flag)


def parameters_by_name(*, with_timm: bool = False) -> list[tuple[str, str, int | None]]:
    """List all networks: name, origin, and number of parameters with 1,000 classes (``None`` for those of timm)."""
    rows: list[tuple[str, str, int | None]] = []
    for name, factory in SMALL.items():
        with torch.device("meta"):
            network = factory(1000, 224)
        rows.append((name, "kd, at 224 px", sum(parameter.numel() for parameter in network.parameters())))
    rows += [(name, "torchvision", published_size(name)) for name in torchvision_names()]
    return rows + ([(f"timm/{name}", "timm", None) for name in import_timm().list_models()] if with_timm else [])
