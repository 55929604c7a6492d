"""Networks of the published examples on MNIST, as their authors built them.

They take gray images of 28x28 pixels as the tool gives them: three channels alike, normalized.
"""

import torch
from torch import Tensor, nn

# Of MNIST's training images, pixels in [0, 1].
_MEAN, _STD = 0.1307, 0.3081
_SIDE = 28


class Gray(nn.Module):
    """The one channel of gray images, in [0, 1] again: the examples do not normalize their images.

    Shape:
        ``(B, 3, 28, 28)``, normalized, to ``(B, 1, 28, 28)``.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Take a batch back."""
        return images[:, :1] * _STD + _MEAN


def conv_teacher(num_classes: int, std: float | None = None) -> nn.Sequential:
    """Build 5x5 convolutions of 32 and 64 channels with max pooling, 1,024 hidden units, and dropout of a quarter.

    Args:
        num_classes: Number of classes C.
        std: Weights and biases are drawn from a normal distribution of this standard deviation (the published code: 1);
            ``None``: as PyTorch draws them.

    Source: https://github.com/DushyantaDhyani/kdtf
    """
    layers: list[nn.Module] = [Gray()]
    for inputs, outputs in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    hidden = [nn.Flatten(), nn.Linear(64 * (_SIDE // 4) ** 2, 1024), nn.ReLU(), nn.Dropout(0.25)]
    return _drawn(nn.Sequential(*layers, *hidden, nn.Linear(1024, num_classes)), std)


def softmax_regression(num_classes: int, std: float | None = None) -> nn.Sequential:
    """Build one layer from the 784 pixels to the classes.

    Args:
        num_classes: Number of classes C.
        std: As for :func:`conv_teacher`.

    Source: https://github.com/DushyantaDhyani/kdtf
    """
    return _drawn(nn.Sequential(Gray(), nn.Flatten(), nn.Linear(_SIDE**2, num_classes)), std)


def keras_convnet(num_classes: int, widths: tuple[int, int] = (16, 32)) -> nn.Sequential:
    """Build two 3x3 convolutions of stride 2, with a leaky ReLU and 2x2 max pooling of stride 1 between them.

    Padding is TensorFlow's "same" (right and below), initial weights are Keras's (Glorot & Bengio 2010, biases 0).

    Args:
        num_classes: Number of classes C.
        widths: Channels of the two; the example's teacher has 256 and 512, its student 16 and 32.

    Source: https://keras.io/examples/vision/knowledge_distillation/
    """
    first, second = widths
    network = nn.Sequential(
        Gray(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(1, first, 3, stride=2),
        nn.LeakyReLU(0.2),
        nn.ConstantPad2d((0, 1, 0, 1), float("-inf")),
        nn.MaxPool2d(2, stride=1),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(first, second, 3, stride=2),
        nn.Flatten(),
        nn.Linear(second * (_SIDE // 4) ** 2, num_classes),
    )
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)
    return network


def _drawn(network: nn.Sequential, std: float | None) -> nn.Sequential:
    if std is not None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, std)
    return network
