"""A store of a teacher's logits: what it said of a view is read by every later run that shows it the same views."""

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

_VERSION = 1
_ABOUT = "about.json"
_SAMPLED = 8
_LOST_AT = 4.0


class LogitStore:
    """Logits batch by batch, one file an epoch, written as they are computed.

    The key names everything that a batch's logits hang on; what does not match lies in another folder, and is never
    read. A batch carries a checksum over its logits and a sample of the pixels that they are the answer to, so that
    what a killed run left half-written, and any other batch, is computed again.

    Of many classes the K largest logits may be kept alone. The others then take one value, such that the
    probabilities of the K stay as they are at a temperature of 1; at a higher one they move, and ``lost`` says by how
    much. What :meth:`write` returns is what :meth:`read` would: a run that writes learns from what one that reads
    learns from.

    Args:
        folder: Folder of all stores.
        key: What the logits hang on: plain values by name.
        batches: Batches of an epoch.
        batch_size: The most images in one.
        classes: Number of classes C.
        top: K; ``None``, or so many that it would save nothing: all.
        share: Nothing more is written once the disk's free space is below what this share of it would take, a fraction
            of 1.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        batches: int,
        batch_size: int,
        classes: int,
        top: int | None = None,
        share: float = 0.2,
    ) -> None:
        self.classes = classes
        # Each of the K takes the room of two: which class it is, and its logit; what is spread takes one.
        self.top = top if top is not None and 2 * top + 1 < classes else None
        width = classes if self.top is None else 2 * self.top + 1
        text = json.dumps({"version": _VERSION, "top": self.top} | dict(key), sort_keys=True)
        self.folder = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _ABOUT).write_text(text, encoding="utf-8")
        self.shape = (batches, batch_size, width)
        self.lost = 0.0
        self.read_batches = 0
        self.written_batches = 0
        free = shutil.disk_usage(folder).free
        epoch_bytes = 4 * batches * (batch_size * width + 1)
        self._epochs_left = int(share * free / epoch_bytes)
        self._epoch = -1
        self._logits: NDArray[np.float32] | None = None
        self._checksums: NDArray[np.uint32] | None = None

    def read(self, epoch: int, batch: int, images: Tensor) -> Tensor | None:
        """Return the logits ``(B, C)`` of a batch of images ``(B, 3, S, S)``, or ``None`` where they are not there."""
        if not self._open(epoch) or self._logits is None or self._checksums is None:
            return None
        kept = self._logits[batch, : len(images)]
        if int(self._checksums[batch]) != _checksum(kept, images):
            return None
        self.read_batches += 1
        # A copy: it lives on when the next epoch's file takes this one's place.
        return self._unpacked(torch.from_numpy(np.array(kept)))

    def write(self, epoch: int, batch: int, images: Tensor, logits: Tensor) -> Tensor:
        """Put the logits ``(B, C)`` of a batch of images into the store, unless the disk is too full.

        Returns:
            What is to be learned from: the logits that were given or, where the K largest are kept, what these tell.
        """
        if self.top is None:
            kept, told = logits.detach().float(), logits
        else:
            kept = _packed(logits.detach().float(), self.top)
            told = self._unpacked(kept)
            self.lost += (_lost(logits, told) - self.lost) / (self.written_batches + 1)
        if self._open(epoch) and self._logits is not None and self._checksums is not None:
            values = kept.cpu().numpy()
            self._logits[batch, : len(values)] = values
            self._checksums[batch] = _checksum(values, images)
            self.written_batches += 1
        return told

    def _unpacked(self, kept: Tensor) -> Tensor:
        """Return logits ``(B, C)`` from what is kept of them."""
        if self.top is None:
            return kept
        which, values, spread = kept[:, : self.top], kept[:, self.top : -1], kept[:, -1:]
        return spread.repeat(1, self.classes).scatter(1, which.long(), values)

    def _open(self, epoch: int) -> bool:
        """Map an epoch's file, which is made first where it is not there; say whether there is one."""
        if epoch == self._epoch:
            return self._logits is not None
        self._epoch, self._logits, self._checksums = epoch, None, None
        path = self.folder / f"{epoch:05d}.f32"
        batches, batch_size, width = self.shape
        if not path.is_file():
            if self._epochs_left < 1:
                return False
            self._epochs_left -= 1
            # Sparse: what is not written takes no room.
            with path.open("ab") as file:
                file.truncate(4 * batches * (batch_size * width + 1))
        self._logits = np.memmap(path, dtype=np.float32, mode="r+", shape=self.shape)
        offset = 4 * batches * batch_size * width
        self._checksums = np.memmap(path, dtype=np.uint32, mode="r+", offset=offset, shape=(batches,))
        return True


def _packed(logits: Tensor, top: int) -> Tensor:
    """Return ``(B, 2K + 1)``: which classes are the K largest, their logits, and the one that all others share."""
    values, which = logits.topk(top, dim=1)
    others = logits.scatter(1, which, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([which.float(), values, others - math.log(logits.shape[1] - top)], dim=1)


def _lost(logits: Tensor, told: Tensor) -> float:
    """Return the divergence of what is told from what was said, at a temperature of 4, in nats an image."""
    said, heard = (F.log_softmax(one.float() / _LOST_AT, dim=1) for one in (logits, told))
    return float(F.kl_div(heard, said, reduction="batchmean", log_target=True))


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
