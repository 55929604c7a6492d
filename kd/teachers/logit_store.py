"""A store of a teacher's logits, which later runs read instead of computing them again."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest, xxh3_128

from kd.files import reserve, write_atomically, write_text

ABOUT_FILE = "about.json"
_VERSION = 2
_SAMPLES_PER_SIDE = 8
_TEMPERATURE = 4.0


class LogitStore:
    """Logits by epoch and batch, one memory-mapped file per epoch, written as they are computed.

    Each batch has checksums of its logits and of a sample of its pixels: a batch that is incomplete, corrupt or of
    other images isn't read. With ``top``, only the K largest logits of each image are kept; all others get one value,
    such that the K classes keep their probabilities at a temperature of 1.

    Args:
        folder: Folder of all stores.
        key: Plain values by name that the logits depend on; each key has its own subfolder.
        batches: Batches per epoch.
        batch_size: Maximum number of images in a batch.
        classes: Number of classes C.
        top: Number of logits to keep, K; ``None``, or too many to save space: all.
        has_room: Whether there is space for a number of bytes more, asked before each epoch is stored.

    Attributes:
        problem: Why an epoch isn't stored, or ``None``.
        divergence: Mean KL divergence of the kept from the exact soft targets at a temperature of 4, in nats per image.
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
        has_room: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.classes = classes
        # K class indices, K logits, and the value of all others.
        self.top = top if top is not None and 2 * top + 1 < classes else None
        width = classes if self.top is None else 2 * self.top + 1
        about = {"version": _VERSION, "top": self.top, "shape": [batches, batch_size, width]} | dict(key)
        text = json.dumps(about, sort_keys=True)
        self.folder = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        # Its time tells when the store was last used.
        write_text(self.folder / ABOUT_FILE, text)
        self.divergence = 0.0
        self.problem: str | None = None
        self.read_batches = 0
        self.written_batches = 0
        self._shape = (batches, batch_size, width)
        self._epoch_bytes = 4 * batches * (batch_size * width + 2)
        self._has_room = has_room
        self._epoch = -1
        self._arrays: tuple[NDArray[np.float32], NDArray[np.uint32]] | None = None

    def read(self, epoch: int, batch: int, images: Tensor) -> Tensor | None:
        """Return the logits ``(B, C)`` of a batch of images ``(B, 3, S, S)``, or ``None`` if they aren't stored."""
        arrays = self._open(epoch)
        if arrays is None:
            return None
        logits, checksums = arrays
        kept = logits[batch, : len(images)]
        if not np.array_equal(checksums[batch], [_checksum(kept), _checksum(_sample(images))]):
            return None
        self.read_batches += 1
        # A copy, which outlives the mapping of this epoch's file.
        return self._unpack(torch.from_numpy(np.array(kept)))

    def write(self, epoch: int, batch: int, images: Tensor, logits: Tensor) -> Tensor:
        """Store the logits ``(B, C)`` of a batch, unless the disk is too full; return them as :meth:`read` will."""
        kept, result = logits.detach().float(), logits
        if self.top is not None:
            kept = _pack(kept, self.top)
            result = self._unpack(kept)
            self.divergence += (_divergence(logits, result) - self.divergence) / (self.written_batches + 1)
        arrays = self._open(epoch)
        if arrays is not None:
            values = kept.cpu().numpy()
            arrays[0][batch, : len(values)] = values
            arrays[1][batch] = _checksum(values), _checksum(_sample(images))
            self.written_batches += 1
        return result

    def _unpack(self, kept: Tensor) -> Tensor:
        if self.top is None:
            return kept
        indices, values, others = kept[:, : self.top], kept[:, self.top : -1], kept[:, -1:]
        return others.repeat(1, self.classes).scatter(1, indices.long(), values)

    def _open(self, epoch: int) -> tuple[NDArray[np.float32], NDArray[np.uint32]] | None:
        """Map an epoch's file, created if need be, as logits and checksums; ``None`` if the disk is too full."""
        if epoch == self._epoch:
            return self._arrays
        self._epoch, self._arrays = epoch, None
        path = self.folder / f"{epoch:05d}.f32"
        # Without its folder, or without room on the disk, training continues without the store.
        try:
            if not path.is_file() or path.stat().st_size != self._epoch_bytes:
                if not self._has_room(self._epoch_bytes):
                    self.problem = "there is not enough disk space, or --cache_limit is reached"
                    return None
                with write_atomically(path) as file:
                    reserve(file, self._epoch_bytes)
            self._arrays = _map(path, self._shape, mode="r+")
        except OSError as error:
            self.problem = error.strerror
        return self._arrays


def verify_store(folder: Path) -> tuple[int, int]:
    """Compare the logits in a store's folder with their checksums; return the numbers of batches and of damaged ones.

    A batch shorter than the others, the last of an epoch, is skipped.
    """
    shape = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))["shape"]
    counts = np.zeros(2, dtype=int)
    for path in folder.glob("*.f32"):
        logits, checksums = _map(path, (shape[0], shape[1], shape[2]), mode="r")
        full = [batch for batch in range(shape[0] - 1) if checksums[batch].any()]
        counts += len(full), sum(_checksum(logits[batch]) != checksums[batch][0] for batch in full)
    return int(counts[0]), int(counts[1])


def _map(
    path: Path, shape: tuple[int, int, int], *, mode: Literal["r", "r+"]
) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Map an epoch's file as logits and, for each batch, checksums of its logits and its pixels."""
    logits = np.memmap(path, dtype=np.float32, mode=mode, shape=shape)
    return logits, np.memmap(path, dtype=np.uint32, mode=mode, offset=logits.nbytes, shape=(shape[0], 2))


def digest_of_weights(network: nn.Module) -> str:
    """Return a hash of all weights and buffers of a network."""
    digest = xxh3_128()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(logits: Tensor, top: int) -> Tensor:
    """Return ``(B, 2K + 1)``: the classes of the K largest logits, these logits, and the value of all others."""
    values, indices = logits.topk(top, dim=1)
    others = logits.scatter(1, indices, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([indices.float(), values, others - math.log(logits.shape[1] - top)], dim=1)


def _divergence(exact: Tensor, kept: Tensor) -> float:
    """Return the KL divergence of the kept soft targets from the exact ones, in nats per image."""
    target, approximation = (F.log_softmax(logits.float() / _TEMPERATURE, dim=1) for logits in (exact, kept))
    return float(F.kl_div(approximation, target, reduction="batchmean", log_target=True))


def _sample(images: Tensor) -> NDArray[np.float32]:
    """Return a sample of the pixels of each image."""
    step = max(1, images.shape[-1] // _SAMPLES_PER_SIDE)
    sample: NDArray[np.float32] = images[:, :, ::step, ::step].float().cpu().numpy()
    return sample


def _checksum(values: NDArray[np.float32]) -> int:
    # Never 0, which is what a file holds where nothing was written.
    return xxh3_64_intdigest(np.ascontiguousarray(values).data) % 2**32 or 1
