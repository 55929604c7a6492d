"""Networks of the published MNIST examples.

Input: gray images of 28x28 pixels as three equal, normalized channels.
"""

import torch
from torch import Tensor, nn

# Statistics of MNIST's training images, with pixels in [0, 1].
_MEAN, _STD = 0.1307, 0.3081
_SIDE = 28


class Gray(nn.Module):
    """Restores one channel in [0, 1], as the examples do not normalize their images.

    Shape:
        ``(B, 3, 28, 28)``, normalized, to ``(B, 1, 28, 28)``.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Undo the normalization."""
        return images[:, :1] * _STD + _MEAN


def conv_teacher(num_classes: int, std: float | None = None) -> nn.Sequential:
    """Build 5x5 convolutions of 32 and 64 channels with max pooling, 1,024 hidden units, and dropout of 0.25.

    Args:
        num_classes: Number of classes C.
        std: Standard deviation of the normally distributed initial weights and biases (published code: 1);
            ``None``: PyTorch's default initialization.

    Source: https://github.com/DushyantaDhyani/kdtf
    """
    layers: list[nn.Module] = [Gray()]
    for inputs, outputs in ((1, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    hidden = [nn.Flatten(), nn.Linear(64 * (_SIDE // 4) ** 2, 1024), nn.ReLU(), nn.Dropout(0.25)]
    return _initialize(nn.Sequential(*layers, *hidden, nn.Linear(1024, num_classes)), std)


def softmax_regression(num_classes: int, std: float | None = None) -> nn.Sequential:
    """Build a linear layer from the 784 pixels to the classes.

    Args:
        num_classes: Number of classes C.
        std: As for :func:`conv_teacher`.

    Source: https://github.com/DushyantaDhyani/kdtf
    """
    return _initialize(nn.Sequential(Gray(), nn.Flatten(), nn.Linear(_SIDE**2, num_classes)), std)


def keras_convnet(num_classes: int, widths: tuple[int, int] = (16, 32)) -> nn.Sequential:
    """Build two 3x3 convolutions of stride 2, with a leaky ReLU and 2x2 max pooling of stride 1 between them.

    Padding as TensorFlow's "same" (right and bottom), initialization as Keras's (Glorot & Bengio 2010, biases 0).

    Args:
        num_classes: Number of classes C.
        widths: Output channels of the convolutions; 256 and 512 for the example's teacher, 16 and 32 for its student.

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


def _initialize(network: nn.Sequential, std: float | None) -> nn.Sequential:
    if std is not None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, std)
    return network
