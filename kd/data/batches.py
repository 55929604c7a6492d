"""What a training asks of its images, wherever these come from."""

import signal
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.data.images import Splits
from kd.errors import UserError


class Batches(LightningDataModule):
    """Batches ``(images, labels)`` of views: ``(B, 3, S, S)``, float32 in [0, 1], and ``(B,)``, int64 (-1: none).

    The views cross to the device as uint8 and become numbers in [0, 1] there, in the layout that ``channels_last``
    says: whoever trains sets it as the network has it.

    Args:
        splits: The images.
        image_size: Side S of the views, in pixels.
        batch_size: Images in a batch, on each device.
        num_workers: Processes that load images; 0 is the training process itself.
        seed: What views and order hang on.
        period: Epochs after which the same views come again in the same order; ``None``: never.
        has_unlabeled: Whether some of the training images have no label.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        image_size: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        period: int | None,
        has_unlabeled: bool,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.period = period
        self.has_unlabeled = has_unlabeled
        self.channels_last = False

    @property
    @abstractmethod
    def train_count(self) -> int:
        """How many training images an epoch has, over all processes."""

    @abstractmethod
    def validation_indices(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Return which validation images a process measures, in their order."""

    @abstractmethod
    def first_views(self, count: int) -> list[tuple[Tensor, int]]:
        """Return the first views of the first epoch, ``(3, S, S)``, uint8, with their labels."""

    def share(self, batch: int) -> float:
        """Return how much this process's batch counts in the mean over all processes' batches of a step.

        Where the images can't be shared out evenly, the last batches are not of one size.

        Args:
            batch: Its number in the epoch.

        Returns:
            1 where all are of one size.
        """
        rank, world_size = self._place()
        counts, drop_last = self._counts(world_size)
        left = [count - batch * self.batch_size for count in counts]
        if world_size == 1 or drop_last or self.batch_size == 1 or min(left) >= self.batch_size:
            return 1.0
        sizes = [min(one, self.batch_size) for one in left]
        return sizes[rank] * world_size / sum(sizes)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401, ARG002 (Lightning's)
        """Turn bytes into numbers in [0, 1] on the device."""
        images, labels = batch
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(torch.float32, memory_format=layout).div_(255), labels

    def _counts(self, world_size: int) -> tuple[list[int], bool]:
        """Count each process's images of an epoch; say whether all leave out their last batch.

        All do where one of them would be left with a single image, which batch normalization can't take; so all make
        the same number of steps.

        Raises:
            UserError: If one of them has no more than a single image.
        """
        counts = shares(self.train_count, world_size)
        drop_last = self.batch_size > 1 and any(count % self.batch_size == 1 for count in counts)
        if drop_last and min(counts) == 1:
            raise UserError("there is a single training image (on each device); training needs at least two")
        return counts, drop_last

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _next_epoch(self) -> int:
        """Return the epoch that the training loader is built for.

        Lightning takes the first batches of a resumed run before it sets the sampler's epoch, and restores the loader's
        state only within an epoch.
        """
        return 0 if self.trainer is None else int(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]

    def _batches_done(self) -> int:
        """Return how many batches of the epoch were trained on; the loader is ahead by those it has prefetched."""
        return 0 if self.trainer is None else int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed)  # type: ignore[attr-defined]

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(dataset, **self._loader_options(), **options)

    def _training_loader(
        self, dataset: Dataset[Any], *, skip: Callable[[int], None], **options: Any
    ) -> DataLoader[tuple[Tensor, int]]:
        return ResumableLoader(dataset, batches_done=self._batches_done, skip=skip, **self._loader_options(), **options)

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": _unchanged,  # The views put a batch together themselves.
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _ignore_signals,
            "pin_memory": torch.cuda.is_available(),
        }


class ResumableLoader(DataLoader[tuple[Tensor, int]]):
    """A loader whose position within an epoch is part of a checkpoint, as Lightning saves and restores it.

    Args:
        dataset: What to load from.
        batches_done: Returns how many batches of the epoch were trained on.
        skip: Makes the next iteration begin after so many batches.
        options: Of the :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batches_done: Callable[[], int],
        skip: Callable[[int], None],
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self._batches_done = batches_done
        self._skip = skip

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"batches": self._batches_done()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a position."""
        self._skip(state_dict["batches"])


def shares(count: int, world_size: int) -> list[int]:
    """Share images out over processes: the first ones have one more, where it does not come out even."""
    return [len(range(rank, count, world_size)) for rank in range(world_size)]


def _ignore_signals(worker: int) -> None:  # noqa: ARG001 (torch's signature)
    """Ignore signals that all processes receive: the training process finishes its step, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:  # noqa: ANN401 (a batch of any form)
    return batch
