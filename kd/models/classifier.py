"""A classifier as it is trained, saved and shipped: a network with the normalization that it wants in front."""

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Description:
    """What it takes to build a classifier again, and to use it.

    Args:
        architecture: The network as a person names it, such as ``resnet18`` or ``convnet(widths=[16, 32])``.
        classes: Names of the classes, in the order of the logits.
        image_size: Side of the images that it was made for, in pixels.
        resize: How plain views of them become square, ``crop`` or ``squash``.
        mean: Mean of red, green and blue that it subtracts, pixels in [0, 1].
        std: Standard deviation that it divides by.
    """

    architecture: str
    classes: tuple[str, ...]
    image_size: int
    resize: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def plain(self) -> dict[str, Any]:
        """Return strings, numbers and lists alone, as a checkpoint that is read with ``weights_only=True`` needs."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Description":
        """Read what :meth:`plain` returned; other keys are passed over.

        Raises:
            ValueError: If something is missing, or is not what it should be.
        """
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise ValueError(f"{missing[0]!r} is missing")
        for name, (is_right, words) in _RIGHT.items():
            if not is_right(values[name]):
                raise ValueError(f"{name} is {words}, not {str(values[name])[:80]!r}")
        known: dict[str, Any] = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**known | {name: tuple(known[name]) for name in ("classes", "mean", "std")})


_LARGEST_SIZE = 8192


def _are(kind: type | types.UnionType, value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, kind) for one in value)


def _are_channels(value: Any) -> bool:  # noqa: ANN401 (whatever a file holds)
    return _are(int | float, value) and len(value) in (1, 3) and all(math.isfinite(one) for one in value)


# What a description that was read from a file must be like: nobody else looks.
_RIGHT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (lambda value: isinstance(value, str), "the name of a network"),
    "classes": (lambda value: _are(str, value) and len(set(value)) == len(value) > 1, "a list of different names"),
    "image_size": (
        lambda value: type(value) is int and 0 < value <= _LARGEST_SIZE,
        f"a whole number from 1 to {_LARGEST_SIZE}",
    ),
    "resize": (lambda value: value in ("crop", "squash"), "crop or squash"),
    "mean": (_are_channels, "a number for each channel"),
    "std": (lambda value: _are_channels(value) and all(one > 0 for one in value), "a number above 0 for each channel"),
}


class Normalization(nn.Module):
    """Subtract the mean of each channel and divide by its standard deviation.

    Args:
        mean: Of red, green and blue, pixels in [0, 1].
        std: Of red, green and blue.

    Shape:
        ``(B, 3, H, W)`` in [0, 1] to ``(B, 3, H, W)``, in the precision of the module.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalize a batch."""
        normalized: Tensor = (images.to(self.mean.dtype) - self.mean) / self.std
        return normalized


class Classifier(nn.Module):
    """A network behind its own normalization.

    Args:
        network: Takes normalized images ``(B, 3, S, S)``, gives logits ``(B, C)``.
        description: What it is.

    Shape:
        ``(B, 3, S, S)`` in [0, 1] to logits ``(B, C)``.
    """

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.normalization = Normalization(description.mean, description.std)
        self.network = network
        self.description = description

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        logits: Tensor = self.network(self.normalization(images))
        return logits

    def count_parameters(self) -> int:
        """Count the numbers that training sets."""
        return sum(parameter.numel() for parameter in self.network.parameters())
