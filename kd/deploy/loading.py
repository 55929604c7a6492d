"""Loading a student into your own program."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kd.deploy.formats import read_network
from kd.pixels import decode, square


class Transform:
    """The view of an image that the student was validated on; ``classes`` are the class names."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.size = int(metadata["image_size"])
        self.resize = str(metadata["resize"])
        self.classes = tuple(metadata["classes"])

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """Return the view ``(3, S, S)``, float32 in [0, 1], of a Pillow image or an image file."""
        decoded = image.convert("RGB") if isinstance(image, Image.Image) else decode(Path(image))
        return torch.from_numpy(np.ascontiguousarray(square(decoded, self.size, self.resize)))


def load_student(path: str | Path, *, model: str | None = None) -> tuple[nn.Module, Transform]:
    """Load a student from a checkpoint or a safetensors file.

    Args:
        path: The file.
        model: Architecture; required if the file names a Python file, whose code then runs.

    Returns:
        A plain ``torch.nn.Module`` in evaluation mode, from images ``(B, 3, S, S)`` in [0, 1] to logits ``(B, C)``,
        normalization included, and the transform that turns an image into such a view; ``transform.classes`` holds
        the class names in the order of the logits.

    Raises:
        UserError: If the file can't be read.

    Example::

        student, transform = load_student("logs/NAME/distilled/version_0/checkpoints/best.ckpt")
        probabilities = student(transform("photo.jpg")[None]).softmax(dim=1)
    """
    network, metadata = read_network(path, model=model)
    return network, Transform(metadata)
