"""A store of a teacher's logits: what it said of a view is read by every later run that shows it the same views."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_VERSION = 1
_ABOUT = "about.json"
_SAMPLED = 8


class LogitStore:
    """Logits batch by batch, one file an epoch, written as they are computed.

    The key names everything that a batch's logits hang on; what does not match lies in another folder, and is never
    read. A batch carries a checksum over its logits and a sample of the pixels that they are the answer to, so that
    what a killed run left half-written, and any other batch, is computed again.

    Args:
        folder: Folder of all stores.
        key: What the logits hang on: plain values by name.
        batches: Batches of an epoch.
        batch_size: The most images in one.
        classes: Number of classes C.
        share: Nothing more is written once the disk's free space is below what this share of it would take, a fraction
            of 1.
    """

    def __init__(
        self, folder: Path, key: Mapping[str, Any], *, batches: int, batch_size: int, classes: int, share: float = 0.2
    ) -> None:
        text = json.dumps({"version": _VERSION} | dict(key), sort_keys=True)
        self.folder = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _ABOUT).write_text(text, encoding="utf-8")
        self.shape = (batches, batch_size, classes)
        self.read_batches = 0
        self.written_batches = 0
        free = shutil.disk_usage(folder).free
        epoch_bytes = 4 * batches * (batch_size * classes + 1)
        self._epochs_left = int(share * free / epoch_bytes)
        self._epoch = -1
        self._logits: NDArray[np.float32] | None = None
        self._checksums: NDArray[np.uint32] | None = None

    def read(self, epoch: int, batch: int, images: Tensor) -> Tensor | None:
        """Return the logits ``(B, C)`` of a batch of images ``(B, 3, S, S)``, or ``None`` where they are not there."""
        if not self._open(epoch) or self._logits is None or self._checksums is None:
            return None
        logits = self._logits[batch, : len(images)]
        if int(self._checksums[batch]) != _checksum(logits, images):
            return None
        self.read_batches += 1
        # A copy: it lives on when the next epoch's file takes this one's place.
        return torch.from_numpy(np.array(logits))

    def write(self, epoch: int, batch: int, images: Tensor, logits: Tensor) -> None:
        """Put the logits ``(B, C)`` of a batch of images into the store, unless the disk is too full."""
        if not self._open(epoch) or self._logits is None or self._checksums is None:
            return
        values = logits.detach().float().cpu().numpy()
        self._logits[batch, : len(values)] = values
        self._checksums[batch] = _checksum(values, images)
        self.written_batches += 1

    def _open(self, epoch: int) -> bool:
        """Map an epoch's file, which is made first where it is not there; say whether there is one."""
        if epoch == self._epoch:
            return self._logits is not None
        self._epoch, self._logits, self._checksums = epoch, None, None
        path = self.folder / f"{epoch:05d}.f32"
        batches, batch_size, classes = self.shape
        if not path.is_file():
            if self._epochs_left < 1:
                return False
            self._epochs_left -= 1
            # Sparse: what is not written takes no room.
            with path.open("ab") as file:
                file.truncate(4 * batches * (batch_size * classes + 1))
        self._logits = np.memmap(path, dtype=np.float32, mode="r+", shape=self.shape)
        offset = 4 * batches * batch_size * classes
        self._checksums = np.memmap(path, dtype=np.uint32, mode="r+", offset=offset, shape=(batches,))
        return True


def digest_of_weights(network: nn.Module) -> str:
    """Return what changes when any of a network's weights or statistics does."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksum(logits: NDArray[np.float32], images: Tensor) -> int:
    step = max(1, images.shape[-1] // _SAMPLED)
    sample = images[:, :, ::step, ::step].float().cpu().contiguous().numpy()
    # Never 0, which is what a file holds where nothing was written.
    return zlib.crc32(sample.data, zlib.crc32(np.ascontiguousarray(logits).data)) or 1
