"""Building a network by its name: torchvision's, timm's, our own small ones, or a person's own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from kd.errors import UserError
from kd.models import small
from kd.models.classifier import Classifier, Description
from kd.registry import Registry, check_hyperparameters, is_own_code, load_own_code, parse_choice, suggestion

Factory = Callable[..., nn.Module]

SMALL: Registry[Factory] = Registry("network")
"""Our own small networks by name: called with ``num_classes`` and ``image_size``."""
for _factory in (small.simple, small.convnet, small.mlp, small.linear):
    SMALL.register(_factory.__name__)(_factory)


def torchvision_names() -> list[str]:
    """List torchvision's classifiers of images, all with published weights (its quantised twins are left out)."""
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
        pretrained: Start from published weights, but for a head of another size; the network then normalises as they
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
        network = factory(num_classes=len(classes), **hyperparameters)
    else:
        try:
            network, statistics = _build_by_name(name, len(classes), image_size, hyperparameters, flag=flag)
        except (TypeError, ValueError, RuntimeError) as error:
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
        raise UserError(
            f"{description.architecture} can't take images of {size} px{_usual_size(description.architecture)}; "
            f"--image_size changes it ({reason})"
        ) from None
    finally:
        classifier.train()
    wanted = (2, len(description.classes))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UserError(f"{description.architecture}: for 2 images it should give logits of shape {wanted}, not {got}")


def _usual_size(architecture: str) -> str:
    """Say for which size a network was made, where torchvision or timm knows."""
    name, _ = parse_choice(architecture)
    if name.startswith("timm/"):
        import timm

        configuration = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        return f" (it was made for {configuration.input_size[-1]})" if configuration is not None else ""
    if name in torchvision_names():
        weights = torchvision.models.get_model_weights(name).DEFAULT
        return f" (it was made for {weights.transforms().crop_size[0]})"
    return ""


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
    options: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):
        # In training mode their auxiliary heads would make a tuple of the logits.
        options = {"aux_logits": False, "init_weights": flag is None, "transform_input": flag is not None}
    if flag is None:
        return _call(builder, num_classes=num_classes, **options | hyperparameters), None
    weights = torchvision.models.get_model_weights(name).DEFAULT
    network = _call(builder, num_classes=num_classes, **options | hyperparameters)
    state = _fetch(functools.partial(weights.get_state_dict, progress=True, check_hash=True), weights.url, flag)
    own = network.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    preset = weights.transforms()
    return network, (tuple(preset.mean), tuple(preset.std))


def _call(builder: Factory, **options: Any) -> nn.Module:
    return builder(weights=None, **options)


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
    network = _fetch(functools.partial(build, pretrained=True), f"timm/{name}", flag)
    configuration = network.pretrained_cfg
    return network, (tuple(configuration["mean"]), tuple(configuration["std"]))


def _fetch(fetch: Callable[[], Any], url: str, flag: str) -> Any:  # noqa: ANN401 (a network, or its weights)
    """Fetch weights, or say which file is missing and where it belongs."""
    try:
        return fetch()
    except (OSError, RuntimeError, ValueError) as error:
        file = url.rpartition("/")[2]
        place = (
            f"put that file into {torch.hub.get_dir()}/checkpoints" if "://" in url else "put it into the hub's cache"
        )
        raise UserError(
            f"{flag}: the weights could not be fetched ({error}).\n"
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
