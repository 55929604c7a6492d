"""Teachers in ONNX files, run by onnxruntime."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.exported import METADATA_KEY, open_session, parse_metadata

_CHANNELS = 3


class OnnxNetwork(nn.Module):
    """The network in an ONNX file, for inference on the CPU.

    Args:
        path: The file: one input of images ``(B, 3, S, S)`` or ``(B, S, S, 3)``, the first output their logits.

    Attributes:
        metadata: What ``kd export`` wrote into the file, or ``None``.
        image_size: Side S that the file prescribes, in pixels, or ``None``.
        size: Size of the file in units of a float32 weight, about the number of parameters.

    Raises:
        UserError: If the file can't be read, or takes no images.
    """

    digest: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = open_session(path)
        inputs = self._session.get_inputs()
        shape: list[Any] = list(inputs[0].shape)
        if len(inputs) != 1 or len(shape) != 4 or _CHANNELS not in (shape[1], shape[3]):  # noqa: PLR2004 (B, C, H, W)
            raise UserError(f"{path}: must take images (B, 3, H, W) as its only input, not {shape}")
        self._name: str = inputs[0].name
        self._dtype = np.float16 if "float16" in inputs[0].type else np.float32
        self._has_channels_last = shape[1] != _CHANNELS
        self._batch_size = shape[0] if isinstance(shape[0], int) else None
        self.image_size = shape[2] if isinstance(shape[2], int) else None
        self.metadata = parse_metadata(self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
        # Large weights are in a file of their own.
        external = path.with_name(f"{path.name}.data")
        content = path.read_bytes() + (external.read_bytes() if external.is_file() else b"")
        self.size = len(content) // 4
        # Identifies the weights, which torch doesn't see.
        digest = np.frombuffer(hashlib.sha256(content).digest(), dtype=np.uint8)
        self.register_buffer("digest", torch.from_numpy(digest.copy()))

    def __deepcopy__(self, memo: object) -> "OnnxNetwork":
        """Return itself: a session has no state and can't be copied."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``(B, C)`` of images ``(B, 3, S, S)``."""
        values = images.detach().cpu().to(torch.float32).numpy().astype(self._dtype)
        if self._has_channels_last:
            values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
        size = self._batch_size or len(values)
        outputs = []
        for start in range(0, len(values), size):
            chunk = values[start : start + size]
            # A fixed batch is filled by repeating the first image.
            filled = np.concatenate([chunk, *[chunk[:1]] * (size - len(chunk))])
            outputs.append(self._session.run(None, {self._name: filled})[0][: len(chunk)])
        return torch.from_numpy(np.concatenate(outputs)).float().flatten(1).to(images.device)
