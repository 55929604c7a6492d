"""Classifiers as they are trained, saved and shipped: a network behind its input normalization, or an ensemble."""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter
from torch import Tensor, nn

AVERAGES = ("probabilities", "logits")


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("class names must differ")
    return names


@dataclasses.dataclass(frozen=True)
class Description:
    """What is needed to rebuild a classifier and to use it; ``mean`` and ``std`` are per channel, for pixels in [0, 1].

    ``pixel_range`` is that of images of more than 8 bits, see :func:`kd.pixels.decode`. A network with one channel
    takes the luminance of the colors. With several labels an image (``multilabel``), ``thresholds`` are the
    probabilities from which on each class is predicted; empty: 0.5. The annotations are checked by :meth:`from_plain`,
    as a file may hold anything.
    """

    architecture: str
    classes: Annotated[tuple[str, ...], Field(min_length=2), AfterValidator(_different)]
    image_size: Annotated[int, Field(ge=1, le=8192, strict=True)]
    resize: Literal["crop", "squash"]
    mean: Annotated[tuple[FiniteFloat, ...], Field(min_length=1, max_length=3)]
    std: Annotated[tuple[Annotated[FiniteFloat, Field(gt=0)], ...], Field(min_length=1, max_length=3)]
    channels: Literal[1, 3] = 3
    pixel_range: Annotated[tuple[FiniteFloat, ...], Field(max_length=2)] = ()
    multilabel: bool = False
    thresholds: tuple[Annotated[FiniteFloat, Field(ge=0, le=1)], ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return strings, numbers and lists only, as a checkpoint that is read with ``weights_only=True`` needs."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `kd.models.build_classifier`; what else there is isn't about the network."""
        names = ("architecture", "classes", "image_size", "resize", "mean", "std")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Description":
        """Validate what :meth:`plain` returned, ignoring other keys; raises ``pydantic.ValidationError``."""
        return TypeAdapter(cls).validate_python(dict(values))


class Normalization(nn.Module):
    """Subtract the mean of each channel of images ``(B, 3, H, W)`` and divide by its standard deviation.

    With one channel, the images are reduced to their luminance ``(B, 1, H, W)`` first, as in ITU-R BT.601.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], *, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalize a batch, in the precision of this module."""
        images = images.to(self.mean.dtype)
        if self.channels == 1:
            red, green, blue = images.unbind(dim=1)
            images = (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
        normalized: Tensor = (images - self.mean) / self.std
        return normalized


class Classifier(nn.Module):
    """A network behind its own input normalization.

    Args:
        network: Maps normalized images ``(B, 3, S, S)`` to logits ``(B, C)``.
        description: Architecture, class names, image size and normalization.

    Shape:
        ``(B, 3, S, S)`` in [0, 1] to logits ``(B, C)``.
    """

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.normalization = Normalization(description.mean, description.std, channels=description.channels)
        self.network = network
        self.description = description
        # The positions of the logits that are used; all if None.
        self.selected: Tensor | None
        self.register_buffer("selected", None)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return self.select(self.network(self.normalization(images)))

    def select(self, outputs: Any) -> Tensor:  # noqa: ANN401 (whatever a network returns)
        """Return the logits ``(B, C)`` of the classifier's classes in the network's outputs.

        The single output of a binary classifier is the logit of its second class; that of the first is 0.
        """
        logits = as_logits(outputs)
        if logits.ndim == 2 and logits.shape[1] == 1 and len(self.description.classes) == 2:  # noqa: PLR2004 (B, 1)
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits if self.selected is None else logits[:, self.selected]

    def restricted_to(self, classes: Sequence[str]) -> "Classifier":
        """Return a classifier with the same network and only the logits of some classes, matched by name.

        Raises:
            KeyError: If it doesn't know one of them.
        """
        positions = {name: index for index, name in enumerate(self.description.classes)}
        selected = torch.tensor([positions[name] for name in classes])
        restricted = Classifier(self.network, dataclasses.replace(self.description, classes=tuple(classes)))
        restricted.selected = selected if self.selected is None else self.selected[selected]
        return restricted.train(self.training)

    def with_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "Classifier":
        """Return a classifier with the same network behind another normalization, given by color channel."""
        if self.description.channels == 1:
            mean, std = ((sum(values) / len(values),) for values in (mean, std))
        other = Classifier(self.network, dataclasses.replace(self.description, mean=mean, std=std))
        other.selected = self.selected
        return other.train(self.training)

    def for_gray_images(self) -> Self:
        """Return a classifier with the same network behind the luminance of the images."""
        mean, std = ((sum(values) / len(values),) for values in (self.description.mean, self.description.std))
        return type(self)(self.network, dataclasses.replace(self.description, mean=mean, std=std, channels=1))

    def count_parameters(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters()) or getattr(self.network, "size", 0)


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict, plain or not, as one that the module itself returned.

    The versions of its layers are those of the installed packages, which torchvision's MNASNets ask for, and a layer
    under two names needs to be there only once.

    Raises:
        RuntimeError: If names or shapes don't match.
    """
    own = module.state_dict()
    complete = OrderedDict(state)
    by_memory = {value.data_ptr(): state[name] for name, value in own.items() if name in state and value.numel()}
    for name, value in own.items():
        if name not in complete and value.data_ptr() in by_memory:
            complete[name] = by_memory[value.data_ptr()]
    complete._metadata = own._metadata  # type: ignore[attr-defined]  # noqa: SLF001 (where torch keeps versions)
    module.load_state_dict(complete)


class Embedder(Classifier):
    """A network without a classifier layer behind its own input normalization: a teacher of features alone.

    Shape:
        ``(B, 3, S, S)`` in [0, 1] to features ``(B, D)``.
    """


def as_logits(outputs: Any) -> Tensor:  # noqa: ANN401 (whatever a network returns)
    """Return the logits in a network's outputs: the tensor, the first of several, or the one named ``logits``."""
    if isinstance(outputs, tuple | list):
        return as_logits(outputs[0])
    if isinstance(outputs, Mapping):
        return as_logits(outputs["logits"])
    logits: Tensor = outputs
    return logits


class Ensemble(nn.Module):
    r"""Classifiers with the same classes whose predictions are averaged, each at its own image size.

    Averaged probabilities, :math:`\log \sum_k w_k \sigma(v_k)`, are logits again: their softmax is the weighted mean of
    the members' probabilities. Averaged logits, :math:`\sum_k w_k v_k`, give the geometric mean. The logits of a single
    member are unchanged. With several labels an image, the probabilities of each class are averaged by themselves.

    Args:
        members: The classifiers.
        weights: Their nonnegative weights, of any positive sum; ``None``: equal weights.
        average: ``probabilities`` or ``logits``.

    Raises:
        ValueError: If weights and members don't match, or the members' classes differ.

    Source: Hinton, Vinyals & Dean (2015), section 2, https://arxiv.org/abs/1503.02531 (both means)
    """

    weights: Tensor

    def __init__(
        self, members: Sequence[Classifier], *, weights: Sequence[float] | None = None, average: str = "probabilities"
    ) -> None:
        super().__init__()
        weights = [1.0] * len(members) if not weights else list(weights)
        if not members or len(weights) != len(members):
            raise ValueError(f"an ensemble needs one weight per member, not {len(weights)} for {len(members)} members")
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"the weights of an ensemble must be nonnegative and not all 0: {weights}")
        if average not in AVERAGES:
            raise ValueError(f"an ensemble averages {' or '.join(AVERAGES)}, not {average}")
        if len({member.description.classes for member in members}) > 1:
            raise ValueError("the members of an ensemble must have the same classes in the same order")
        self.members: Sequence[Classifier] = nn.ModuleList(members)  # type: ignore[assignment]  # not generic
        self.average = average
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))
        self.description = dataclasses.replace(
            members[0].description, architecture=" + ".join(member.description.architecture for member in members)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        each: list[Tensor] = [member(resized(images, member.description.image_size)) for member in self.members]
        if len(each) == 1:
            return each[0]
        # In float32, whatever the precision of the members.
        logits = torch.stack([member.float() for member in each])
        weights = self.weights.float()[:, None, None]
        if self.average == "logits":
            return torch.sum(weights * logits, dim=0)
        if self.description.multilabel:
            # The log-odds of the mean probability of each class.
            positive, negative = ((F.logsigmoid(sign * logits) + weights.log()).logsumexp(dim=0) for sign in (1, -1))
            return positive - negative
        mixture: Tensor = (F.log_softmax(logits, dim=2) + weights.log()).logsumexp(dim=0)
        return mixture

    def count_parameters(self) -> int:
        """Return the number of parameters of all members."""
        return sum(member.count_parameters() for member in self.members)


def resized(images: Tensor, size: int) -> Tensor:
    """Resize square images ``(B, 3, S, S)`` to ``(B, 3, size, size)``, with antialiasing."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
