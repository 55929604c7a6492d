"""Building a network by its name: torchvision's, timm's, our own small ones, or a person's own."""

import functools
from collections.abc import Callable, Mapping
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

Factory = Callable[..., nn.Module]

SMALL: Registry[Factory] = Registry("network")
"""Our own small networks by name: called with ``num_classes`` and ``image_size``."""
for _factory in (small.simple, small.convnet, small.mlp, small.linear):
    SMALL.register(_factory.__name__)(_factory)


def torchvision_names() -> list[str]:
    """List torchvision's classifiers of images, all with published weights (its quantized twins are left out)."""
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
    """Build a classifier with a head of the right size, and try it on images of the right size.

    Args:
        architecture: A name from torchvision, ``timm/NAME``, one of :data:`SMALL`, any of them with hyperparameters as
            ``name(key=value)``, or ``path/to/file.py:factory``, called with ``num_classes``.
        classes: Names of the classes.
        image_size: Side S of the images, in pixels.
        resize: How the images become square, for the description.
        mean: The data's mean, for a network without published weights.
        std: The data's standard deviation, likewise.
        pretrained: Start from published weights, but for a head of another size; the network then normalizes as they
            want it.
        pretrained_flag: The flag that asked for the weights, for the messages.

    Raises:
        UserError: If the name or a hyperparameter is unknown, the weights can't be had, or the network can't take such
            images.
    """
    name, hyperparameters = parse_choice(architecture)
    flag = pretrained_flag if pretrained else None
    statistics = None
    if is_own_code(name):
        if pretrained:
            raise UserError(f"{pretrained_flag}: {name} is your own code; let it load its own weights")
        factory = load_own_code(name)
        check_hyperparameters(factory, hyperparameters, choice=architecture)
        network = call_own_code(architecture, factory, num_classes=len(classes), **hyperparameters)
    else:
        try:
            network, statistics = _build_by_name(name, len(classes), image_size, hyperparameters, flag=flag)
        except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
            what = f"there is no {architecture} for images of {image_size} px and {len(classes)} classes"
            raise UserError(f"{what}: {error}") from None
    if not isinstance(network, nn.Module):
        raise UserError(f"{architecture!r}: the factory returned a {type(network).__name__}, not a torch.nn.Module")
    mean, std = statistics or (mean, std)
    description = Description(architecture, classes, image_size, resize, mean, std)
    classifier = Classifier(network, description)
    _try_on(classifier, image_size)
    return classifier


def _try_on(classifier: Classifier, size: int) -> None:
    """Refuse a network that can't take images of this size, or that gives anything but one logit a class."""
    description = classifier.description
    classifier.eval()
    try:
        with torch.no_grad():
            logits = classifier(torch.zeros(2, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        usual = usual_size(description.architecture)
        made_for = "" if usual is None else f" (it was made for {usual})"
        raise UserError(
            f"{description.architecture} can't take images of {size} px{made_for}; --image_size changes it ({reason})"
        ) from None
    finally:
        classifier.train()
    wanted = (2, len(description.classes))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{description.architecture}: for 2 images it should give logits of shape {wanted}, not {got}")


def usual_size(architecture: str) -> int | None:
    """Return for which size of images a network was made, in pixels, where torchvision or timm knows."""
    name, _ = parse_choice(architecture)
    if name.startswith("timm/"):
        import timm

        configuration = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        return int(configuration.input_size[-1]) if configuration is not None else None
    if name in torchvision_names():
        return int(torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0])
    return None


_AUXILIARY = ("googlenet", "inception_v3")
_IMAGENET_CLASSES = 1000

Built = tuple[nn.Module, tuple[tuple[float, ...], tuple[float, ...]] | None]


def _build_by_name(
    name: str, num_classes: int, image_size: int, hyperparameters: dict[str, Any], *, flag: str | None
) -> Built:
    if name.startswith("timm/"):
        return _build_timm(name.removeprefix("timm/"), num_classes, hyperparameters, flag=flag)
    if name not in SMALL:
        return _build_torchvision(name, num_classes, hyperparameters, flag=flag)
    if flag is not None:
        raise UserError(f"{flag}: there are no published weights for {name}")
    check_hyperparameters(SMALL[name], hyperparameters, choice=name)
    return SMALL[name](num_classes, image_size, **hyperparameters), None


def _build_torchvision(name: str, num_classes: int, hyperparameters: dict[str, Any], *, flag: str | None) -> Built:
    if name not in torchvision_names():
        known = [*torchvision_names(), *SMALL]
        raise UserError(f"there is no network {name!r}{suggestion(name, known)} (`kd models` lists them all)")
    builder = torchvision.models.get_model_builder(name)
    # In training mode the auxiliary heads of these two would make a tuple of the logits.
    options = {"aux_logits": False, "init_weights": flag is None} if name in _AUXILIARY else {}
    network: nn.Module = builder(weights=None, num_classes=num_classes, **options | hyperparameters)
    if flag is None:
        return network, None
    weights = torchvision.models.get_model_weights(name).DEFAULT
    # torchvision's own loading, since some of its files hold other names than its networks.
    published = _fetch(functools.partial(builder, weights=weights), weights.url, flag).state_dict()
    _copy_all_but_the_head(network, published, what=f"{flag} {name}")
    # The files of these two come from another framework, and want pixels from -1 to 1.
    preset = weights.transforms()
    statistics = ((0.5,) * 3, (0.5,) * 3) if name in _AUXILIARY else (tuple(preset.mean), tuple(preset.std))
    return network, statistics


def _copy_all_but_the_head(network: nn.Module, published: Mapping[str, Tensor], *, what: str) -> None:
    """Copy published weights, all but those that have a number for each class.

    Raises:
        UserError: If anything else differs, since part of the network would silently stay random.
    """
    own = network.state_dict()
    fitting = {key: value for key, value in published.items() if key in own and own[key].shape == value.shape}
    strange = [
        key for key in own.keys() - fitting.keys() if key not in published or not _is_head(own[key], published[key])
    ]
    if strange:
        raise UserError(
            f"{what}: with these hyperparameters the published weights do not fit, at {min(strange)} and "
            f"{len(strange) - 1} other places"
        )
    network.load_state_dict(fitting, strict=False)


def _is_head(own: Tensor, published: Tensor) -> bool:
    return published.shape[:1] == (_IMAGENET_CLASSES,) and own.shape[1:] == published.shape[1:]


def _build_timm(name: str, num_classes: int, hyperparameters: dict[str, Any], *, flag: str | None) -> Built:
    try:
        import timm
    except ImportError:
        raise UserError(f"timm/{name}: timm is not installed; install it with `pip install timm`") from None
    if not timm.is_model(name):
        raise UserError(f"there is no network 'timm/{name}'{suggestion(name, timm.list_models())} (`kd models --timm`)")
    build = functools.partial(timm.create_model, name, num_classes=num_classes, **hyperparameters)
    if flag is None:
        return build(), None
    configuration = timm.get_pretrained_cfg(name)
    if configuration is None:
        raise UserError(f"{flag}: timm has no published weights for {name}")
    url = (
        str(configuration.url or "")
        or f"https://huggingface.co/{configuration.hf_hub_id}/resolve/main/model.safetensors"
    )
    network = _fetch(functools.partial(build, pretrained=True), url, flag)
    return network, (tuple(configuration.mean), tuple(configuration.std))


def _fetch(fetch: Callable[[], Any], url: str, flag: str) -> Any:  # noqa: ANN401 (a network, or its weights)
    """Fetch weights, or say which file is missing and where it belongs."""
    try:
        return fetch()
    except (OSError, RuntimeError, ValueError) as error:
        file = url.rpartition("/")[2]
        place = f"put that file into {torch.hub.get_dir()}/checkpoints"
        if "huggingface.co" in url:
            repository = "/".join(url.split("/")[3:5])
            place = f"run `hf download {repository}` on one with a network, and copy its Hugging Face cache here"
        raise UserError(
            f"{flag}: the weights could not be fetched ({str(error).partition(chr(10))[0]}).\n"
            f"  The missing file is {file}, from {url}.\n"
            f"  Where there is no network, {place}, or start from random weights with "
            f"{flag.replace('--', '--no-')}."
        ) from None


def parameters_by_name(*, with_timm: bool = False) -> list[tuple[str, str, int | None]]:
    """List the networks that go by name: name, where it comes from, parameters with 1,000 classes.

    Args:
        with_timm: List timm's too, without their parameters (building them all takes minutes).

    Raises:
        UserError: If timm is asked for and is not installed.
    """
    rows: list[tuple[str, str, int | None]] = []
    for name, factory in SMALL.items():
        with torch.device("meta"):
            network = factory(1000, 224)
        rows.append((name, "kd, at 224 px", sum(parameter.numel() for parameter in network.parameters())))
    rows += [
        (name, "torchvision", torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])
        for name in torchvision_names()
    ]
    if with_timm:
        try:
            import timm
        except ImportError:
            raise UserError("timm is not installed; install it with `pip install timm`") from None
        rows += [(f"timm/{name}", "timm", None) for name in timm.list_models()]
    return rows
