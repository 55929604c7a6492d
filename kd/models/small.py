"""Small networks of our own, right for any image size that leaves a pixel after their pooling."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_SIMPLE_LEAST = 2**3


class Layers(nn.Sequential):
    """Layers one after the other, where rectifying waits for a max pooling that follows it.

    The largest of four, rectified, is the largest of four that are rectified: outputs and gradients are the same to the
    last bit, for a quarter of the rectifying. Whoever traces the layers to read their maps finds them as they stand.

    Shape:
        As of the first and the last layer.
    """

    def forward(self, images: Tensor | torch.fx.Proxy) -> Tensor:
        """Compute a batch."""
        layers = list(self)
        if isinstance(images, Tensor):
            for place, (first, second) in enumerate(itertools.pairwise(self)):
                if isinstance(first, nn.ReLU) and isinstance(second, nn.MaxPool2d):
                    layers[place : place + 2] = second, first
        maps: Any = images
        for layer in layers:
            maps = layer(maps)
        return cast("Tensor", maps)


def simple(num_classes: int, image_size: int, *, dropout: float = 0.25, hidden: int = 512) -> nn.Sequential:
    """Build three 3x3 convolutions of 16, 32, 64 channels, each with ReLU and 2x2 max pooling, and a hidden layer.

    Most of its weights are in the hidden layer: 25.7 million of them at 224 px, 8.4 million at 128 px.

    Args:
        num_classes: Number of classes C.
        image_size: Side of the images in pixels, at least 8.
        dropout: Part of the hidden units that are dropped in training.
        hidden: Number of hidden units.

    Shape:
        ``(B, 3, image_size, image_size)`` to ``(B, C)``.

    Raises:
        ValueError: If the images are smaller.
    """
    if image_size < _SIMPLE_LEAST:
        raise ValueError(f"three poolings leave no pixel of less than {_SIMPLE_LEAST} px")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 16, 32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    flat = 64 * (image_size // 8) ** 2
    head = [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)]
    return Layers(*layers, *head)


def convnet(num_classes: int, image_size: int, *, widths: Sequence[int] = (16, 32, 64)) -> nn.Sequential:  # noqa: ARG001
    """Build 3x3 convolutions with batch normalization, ReLU and 2x2 max pooling, then the mean of the map, and a layer.

    Args:
        num_classes: Number of classes C.
        image_size: Side of the images in pixels; each but the last of the convolutions halves it.
        widths: Channels of each convolution.

    Shape:
        ``(B, 3, image_size, image_size)`` to ``(B, C)``.
    """
    _check_sizes(widths=widths)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, *widths)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    # The mean takes the place of the last pooling.
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)]
    return Layers(*layers[:-1], *head)


def mlp(num_classes: int, image_size: int, *, hidden: Sequence[int] = (256,), dropout: float = 0.0) -> nn.Sequential:
    """Build fully connected layers with ReLU and dropout on the flattened image.

    Args:
        num_classes: Number of classes C.
        image_size: Side of the images in pixels.
        hidden: Units of each hidden layer.
        dropout: Part of the hidden units that are dropped in training.

    Shape:
        ``(B, 3, image_size, image_size)`` to ``(B, C)``.
    """
    if hidden:
        _check_sizes(hidden=hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise((3 * image_size**2, *hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear((*hidden,)[-1] if hidden else 3 * image_size**2, num_classes))


def linear(num_classes: int, image_size: int) -> nn.Sequential:
    """Build softmax regression: one layer on the flattened image.

    Args:
        num_classes: Number of classes C.
        image_size: Side of the images in pixels.

    Shape:
        ``(B, 3, image_size, image_size)`` to ``(B, C)``.
    """
    return mlp(num_classes, image_size, hidden=())


def _check_sizes(**sizes: Sequence[int]) -> None:
    for name, given in sizes.items():
        if not isinstance(given, list | tuple) or not given or not all(isinstance(n, int) and n > 0 for n in given):
            raise ValueError(f"{name} is a list of whole numbers above 0, such as [16, 32], and not {given!r}")
