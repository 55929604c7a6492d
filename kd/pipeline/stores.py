"""Where decoded images and the teacher's logits are kept, so that nothing is computed twice."""

import hashlib
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import Progress

from kd.data import CacheLimits, ImageData, LabeledImages, Splits, cache_decoded, cache_dir, short_side
from kd.errors import UserError
from kd.models import Classifier, Compute, Ensemble
from kd.teachers import LogitStore, digest_of_weights

NONE, AUTO = "none", "auto"


def store_splits(splits: Splits, *, image_size: int, augment: str, where: str, console: Console) -> Splits:
    """Return the same images, read from stores of decoded ones.

    Args:
        splits: The images.
        image_size: Side of the views, in pixels.
        augment: The augmentation of the training images, whose short side is longer where parts of them are shown.
        where: ``none``; ``auto``, the folder of caches, where there is room; or a folder.
        console: Where to show how far it is.

    Raises:
        UserError: If a store can't be written to the folder that was named.
    """
    return replace(
        splits,
        train=store_images(splits.train, image_size=image_size, augment=augment, where=where, console=console),
        val=store_images(splits.val, image_size=image_size, augment="none", where=where, console=console),
    )


def store_images(
    images: LabeledImages, *, image_size: int, augment: str, where: str, console: Console
) -> LabeledImages:
    """Return the same images, read from a store of decoded ones; arguments and errors as of :func:`store_splits`."""
    if where == NONE:
        return images
    folder = cache_dir() / "decoded" if where == AUTO else Path(where).expanduser()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Decoding images", total=len(images))
        try:
            stored = cache_decoded(
                images,
                short_side(image_size, augment),
                folder,
                limits=CacheLimits() if where == AUTO else None,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        except OSError as error:
            if where != AUTO:
                raise UserError(
                    f"--image_cache {where}: the store of decoded images can't be written: {error}"
                ) from None
            # Without a store it is slower, and nothing else.
            stored, reason = images, f"it can't be written to {folder} ({error.strerror or error})"
        else:
            reason = f"it would take more than a fifth of the free disk at {folder}, or half of the memory"
    if stored.cached_side is None and images.files:
        _say(console, f"Note: without a store each image is decoded in each epoch: {reason}.")
    return stored


@rank_zero_only
def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def logit_store(
    network: Classifier | Ensemble,
    data: ImageData,
    *,
    compute: Compute,
    where: str,
    devices: str,
    compiled: bool = False,
    top: int | None = None,
) -> Callable[[int, int], LogitStore | None] | None:
    """Return what opens the store of a teacher's logits for ``(rank, world_size)``, or ``None`` where there is none.

    Args:
        network: The teacher.
        data: The images that it is shown.
        compute: How it computes.
        where: ``none``; ``auto``, the folder of caches; or a folder.
        devices: The accelerator's name.
        compiled: Whether its network is compiled.
        top: How many of the logits are kept, if not all.

    Raises:
        UserError: If nothing can be written to the folder that was named.
    """
    images = data.train_views.images
    if where == NONE or images.fingerprint is None:
        return None
    folder = cache_dir() / "logits" if where == AUTO else Path(where).expanduser()
    indices = torch.tensor(data.train_indices).numpy()
    key = {
        "teacher": digest_of_weights(network),
        "average": network.average if isinstance(network, Ensemble) else None,
        "sizes": [one.description.image_size for one in network.members] if isinstance(network, Ensemble) else None,
        "classes": list(network.description.classes),
        "teacher_size": network.description.image_size,
        "computes": [compute.precision, compute.channels_last, compiled],
        "images": images.fingerprint,
        "indices": hashlib.blake2b(indices.data, digest_size=16).hexdigest(),
        "keys": hashlib.blake2b("\0".join(images.keys).encode(), digest_size=16).hexdigest(),
        "views": [data.augment, data.resize, data.image_size, data.seed, data.cached_side, data.on_device],
        "batches": [data.batch_size, data.period],
        "machine": [devices, platform.machine(), torch.__version__, torch.get_num_threads()],
    }

    def opened(rank: int, world_size: int) -> LogitStore | None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return LogitStore(
                folder,
                key | {"rank": rank, "world_size": world_size},
                batches=-(-len(data.train_indices) // (world_size * data.batch_size)),
                batch_size=data.batch_size,
                classes=len(network.description.classes),
                top=top,
            )
        except OSError as error:
            if where == AUTO:
                return None
            raise UserError(f"--teacher_cache {where}: the store of logits can't be written: {error}") from None

    return opened
