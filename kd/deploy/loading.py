"""A student for a program of one's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kd.deploy.formats import FORMATS, read_network
from kd.errors import UserError
from kd.pixels import decode, square


class Transform:
    """Makes the view of an image that a student was validated on.

    Args:
        about: What the student says of itself: ``image_size``, ``resize``, ``classes``.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self.size = int(about["image_size"])
        self.resize = str(about["resize"])
        self.classes = tuple(about["classes"])

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """Return the view ``(3, S, S)``, float32 in [0, 1], of a Pillow image or of a file.

        Raises:
            UserError: If the file can't be decoded.
        """
        opened = image.convert("RGB") if isinstance(image, Image.Image) else decode(Path(image))
        return torch.from_numpy(np.ascontiguousarray(square(opened, self.size, self.resize)))


def load_student(path: str | Path, *, model: str | None = None) -> tuple[nn.Module, Callable[..., Tensor]]:
    """Read a student from a checkpoint, a torch.export or a safetensors file.

    Args:
        path: The file.
        model: The network, where the file names a Python file, whose code then runs.

    Returns:
        A plain ``torch.nn.Module`` in evaluation mode, from images ``(B, 3, S, S)`` in [0, 1] to logits ``(B, C)`` with
        its normalization inside, and the transform that makes such a view of an image; ``transform.classes`` are the
        names of the classes, in the order of the logits.

    Raises:
        UserError: If it can't be read.

    Example::

        student, transform = load_student("logs/NAME/distilled/version_0/checkpoints/best.ckpt")
        probabilities = student(transform("photo.jpg")[None]).softmax(dim=1)
    """
    path = Path(path).expanduser()
    if path.suffix == FORMATS["onnx"]:
        raise UserError(f"{path}: an ONNX file is no torch.nn.Module; kd.deploy.open_student runs it with onnxruntime")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    network, about = read_network(path, model=model)
    return network, Transform(dict(about))
