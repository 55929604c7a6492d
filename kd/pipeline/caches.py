"""Caches of decoded images and of the teacher's logits, shared by all runs."""

import hashlib
import math
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from kd.data import ImageData, LabeledImages, cache_decoded, cache_dir, room_for_cache, short_side
from kd.errors import UserError
from kd.models import Classifier, Compute, Ensemble
from kd.pipeline.cache_folder import make_room
from kd.provenance import code_digests, without_folders
from kd.teachers import LogitStore, digest_of_weights

NONE, AUTO = "none", "auto"


_GB = 1e9
_FREE_SHARE = 0.2
"""Fraction of the free disk space that the logits of one training may take."""


def cache_images(
    images: LabeledImages, *, image_size: int, augment: str, where: str, console: Console, limit: float | None = None
) -> LabeledImages:
    """Return the same images, read through the cache of decoded images.

    Args:
        images: The images.
        image_size: Side of the views, in pixels.
        augment: Augmentation; crops need a longer short side.
        where: ``none``; ``auto``: the cache folder, if there is room; or a folder.
        console: Where progress is shown.
        limit: Maximum size of the cache folder, in GB; ``None``: a quarter of the disk.

    Raises:
        UserError: If the named folder can't be written to.
    """
    if where == NONE:
        return images
    folder = cache_dir() / "decoded" if where == AUTO else Path(where).expanduser()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("decoding images", total=len(images))
        try:
            stored = cache_decoded(
                images,
                short_side(image_size, augment),
                folder,
                has_room=(lambda size: size <= room_for_cache(folder) and _make_room(size, limit))
                if where == AUTO
                else None,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except OSError as error:
            if where != AUTO:
                raise UserError(f"--image_cache {where}: can't write decoded images there: {error}") from None
            # Without a cache, training is slower and otherwise the same.
            stored, reason = images, f"can't write to {folder} ({error.strerror or error})"
        else:
            reason = f"there is not enough disk space at {folder} or memory, or --cache_limit is reached"
    if stored.cached_side is None and images.files:
        console.print(f"note: decoded images aren't cached, each is decoded in every epoch: {reason}")
    return stored


def logit_store(
    network: Classifier | Ensemble,
    data: ImageData,
    *,
    compute: Compute,
    where: str,
    devices: str,
    limit: float | None = None,
    compiled: bool = False,
    top: int | None = None,
) -> Callable[[int, int], LogitStore | None] | None:
    """Return a function that opens the store of a teacher's logits for ``(rank, world_size)``, or ``None``.

    Args:
        network: The teacher.
        data: The student's images.
        compute: The teacher's precision and memory layout.
        where: ``none``; ``auto``: the cache folder; or a folder.
        devices: Name of the accelerator.
        limit: Maximum size of the cache folder, in GB; ``None``: a quarter of the disk.
        compiled: Whether the teacher is compiled.
        top: Number of logits kept per view, the largest; ``None``: all.
    """
    images = data.train_views.images
    if where == NONE or images.fingerprint is None:
        return None
    folder = cache_dir() / "logits" if where == AUTO else Path(where).expanduser()
    ensemble = network if isinstance(network, Ensemble) else None
    key = {
        "teacher": digest_of_weights(network),
        "network": without_folders(network.description.architecture),
        "code": code_digests([network.description.architecture, data.augment]),
        "average": ensemble and ensemble.average,
        "sizes": ensemble and [member.description.image_size for member in ensemble.members],
        "classes": list(network.description.classes),
        "teacher_size": network.description.image_size,
        "computes": [compute.precision, compute.channels_last, compiled],
        "images": images.fingerprint,
        "indices": _digest(torch.tensor(data.train_indices).numpy().tobytes()),
        "keys": _digest("\0".join(images.keys).encode()),
        "views": [
            data.augment,
            data.erasing,
            data.resize,
            data.image_size,
            data.seed,
            data.cached_side,
            data.on_device,
        ],
        "batches": [data.batch_size, data.period, data.train_weights is not None],
        "machine": [devices, platform.machine(), torch.__version__, torch.get_num_threads()],
    }

    def open_store(rank: int, world_size: int) -> LogitStore | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            least_free = (1 - _FREE_SHARE) * shutil.disk_usage(folder).free
            return LogitStore(
                folder,
                key | {"rank": rank, "world_size": world_size},
                batches=math.ceil(len(data.train_indices) / (world_size * data.batch_size)),
                batch_size=data.batch_size,
                classes=len(network.description.classes),
                top=top,
                has_room=lambda size: (
                    (where != AUTO or _make_room(size, limit)) and shutil.disk_usage(folder).free - size >= least_free
                ),
            )
        except OSError as error:
            if where == AUTO:
                return None
            raise UserError(f"--teacher_cache {where}: can't write the teacher's logits there: {error}") from None

    return open_store


def _make_room(size: int, limit: float | None) -> bool:
    return make_room(size, None if limit is None else limit * _GB)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
