"""Small networks for images ``(B, 3, S, S)`` of any size: ``simple``, ``convnet``, ``mlp`` and ``linear``.

Max pooling precedes ReLU. As ReLU is monotonic, they commute: outputs and gradients are bit-identical to the usual
order, with a quarter of the work for ReLU.
"""

import itertools
from collections.abc import Sequence

from torch import nn

_SIMPLE_MIN_SIZE = 2**3


def simple(num_classes: int, image_size: int, *, dropout: float = 0.25, hidden: int = 512) -> nn.Sequential:
    """Build three 3x3 convolutions of 16, 32, 64 channels, each with 2x2 max pooling and ReLU, and one hidden layer.

    Most of its weights are in the hidden layer: 25.7 million at 224 px, 8.4 million at 128 px. The minimum
    size is 8 px.
    """
    if image_size < _SIMPLE_MIN_SIZE:
        raise ValueError(f"three poolings need images of at least {_SIMPLE_MIN_SIZE} px")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 16, 32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    flat = 64 * (image_size // 8) ** 2
    head = [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)]
    return nn.Sequential(*layers, *head)


def convnet(num_classes: int, image_size: int, *, widths: Sequence[int] = (16, 32, 64)) -> nn.Sequential:  # noqa: ARG001
    """Build 3x3 convolutions with batch normalization, 2x2 max pooling and ReLU, global average pooling, and a head.

    ``widths`` are the output channels of the convolutions; each but the last is followed by pooling, which halves the
    image.
    """
    _check_sizes(widths=widths)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.MaxPool2d(2), nn.ReLU()]
    # Global average pooling takes the place of the last max pooling.
    del layers[-2]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def mlp(num_classes: int, image_size: int, *, hidden: Sequence[int] = (256,), dropout: float = 0.0) -> nn.Sequential:
    """Build a multilayer perceptron on the flattened image: layers of ``hidden`` units, each with ReLU and dropout."""
    if hidden:
        _check_sizes(hidden=hidden)
    sizes = (3 * image_size**2, *hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def linear(num_classes: int, image_size: int) -> nn.Sequential:
    """Build softmax regression: one linear layer on the flattened image."""
    return mlp(num_classes, image_size, hidden=())


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, value in sizes.items():
        if not isinstance(value, list | tuple) or not value or not all(isinstance(n, int) and n > 0 for n in value):
            raise ValueError(f"{name} must be a list of positive integers, such as [16, 32], not {value!r}")
