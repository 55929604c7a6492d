"""Partition of a stream of images over processes and workers, such that each image is read exactly once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SUBSTREAMS = 8
"""Substreams of a process, however many workers read them: the order is the same for any number of workers."""


@dataclass(frozen=True)
class Substreams:
    """A process's part of an epoch: a contiguous range of all images, divided into substreams.

    Each substream reads a contiguous range of its own, and batch ``i`` comes from substream ``i % SUBSTREAMS``.

    Args:
        start: Index of the first image of the part.
        count: Number of images.
        batch_size: Number of images in a batch.
        drop_last: Whether an incomplete last batch is dropped.
    """

    start: int
    count: int
    batch_size: int
    drop_last: bool = False

    @property
    def batches(self) -> int:
        """Number of batches."""
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def size(self, batch: int) -> int:
        """Return the number of images in a batch."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def piece(self, substream: int) -> tuple[int, int]:
        """Return the range of images of a substream, ``(begin, end)``."""
        begin = self.start + sum(self._length(earlier) for earlier in range(substream))
        return begin, begin + self._length(substream)

    def before(self, batch: int) -> int:
        """Return the number of images that a batch's substream yields before it."""
        return batch // SUBSTREAMS * self.batch_size

    def _length(self, substream: int) -> int:
        batches = range(substream, self.batches, SUBSTREAMS)
        return (len(batches) - 1) * self.batch_size + self.size(batches[-1]) if batches else 0

    def line(self) -> Iterator[int]:
        """Iterate over the indices of the images, batch by batch, as they are read without shuffling."""
        begins = [self.piece(substream)[0] for substream in range(SUBSTREAMS)]
        for batch in range(self.batches):
            first = begins[batch % SUBSTREAMS] + self.before(batch)
            yield from range(first, first + self.size(batch))


def usable_workers(workers: int) -> int:
    """Return the largest number of workers, at most ``workers``, among which the substreams divide evenly.

    Example:
        >>> [usable_workers(workers) for workers in (0, 1, 3, 7, 16)]
        [0, 1, 2, 4, 8]
    """
    divisors = [count for count in range(1, min(workers, SUBSTREAMS) + 1) if SUBSTREAMS % count == 0]
    return max(divisors, default=0)


def shard_ranges(counts: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Map a range of images to ranges within consecutive shards; past the last shard it continues with the first.

    Args:
        counts: Number of images of each shard, in order.
        begin: Index of the first image.
        end: Index after the last image.

    Returns:
        Number of the shard, index of its first image, and index after its last image.

    Example:
        >>> list(shard_ranges([3, 2], 1, 6))
        [(0, 1, 3), (1, 0, 2), (0, 0, 1)]
    """
    passed = 0
    while begin < end:
        for number, count in enumerate(counts):
            first, last = max(0, begin - passed), min(count, end - passed)
            if first < last:
                yield number, first, last
                begin = passed + last
            passed += count
