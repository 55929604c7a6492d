"""Which part of a stream each process and worker reads: arithmetic, that no image is read twice or missed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SUBSTREAMS = 8
"""Streams that a process reads side by side, however many workers share them out: the order is the same for any."""


@dataclass(frozen=True)
class Substreams:
    """A process's part of an epoch: a piece of the line of all images, in lanes that take turns at giving a batch.

    Each lane reads a piece of its own from end to end, and batch ``i`` comes from lane ``i % SUBSTREAMS``.

    Args:
        start: Where on the line the part begins.
        count: How many images it has.
        batch_size: Images in a batch.
        drop_last: Whether a last batch that is not full is left out.
    """

    start: int
    count: int
    batch_size: int
    drop_last: bool = False

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def size(self, batch: int) -> int:
        """Return how many images a batch has."""
        return min(self.batch_size, self.count - batch * self.batch_size)

    def piece(self, lane: int) -> tuple[int, int]:
        """Return where on the line a lane begins and ends."""
        begin = self.start + sum(self._length(one) for one in range(lane))
        return begin, begin + self._length(lane)

    def before(self, batch: int) -> int:
        """Return how many images its lane gave before a batch."""
        return batch // SUBSTREAMS * self.batch_size

    def _length(self, lane: int) -> int:
        turns = len(range(lane, self.batches, SUBSTREAMS))
        has_last = bool(self.batches) and (self.batches - 1) % SUBSTREAMS == lane
        return turns * self.batch_size - (self.batch_size - self.size(self.batches - 1) if has_last else 0)

    def line(self) -> Iterator[int]:
        """Iterate over the places on the line, batch by batch, as they are given where nothing is shuffled."""
        begins = [self.piece(lane)[0] for lane in range(SUBSTREAMS)]
        for batch in range(self.batches):
            first = begins[batch % SUBSTREAMS] + self.before(batch)
            yield from range(first, first + self.size(batch))


def usable_workers(workers: int) -> int:
    """Return how many workers there are, of at most so many, if each has the same number of lanes.

    Example:
        >>> [usable_workers(workers) for workers in (0, 1, 3, 7, 16)]
        [0, 1, 2, 4, 8]
    """
    return max((one for one in range(1, min(workers, SUBSTREAMS) + 1) if SUBSTREAMS % one == 0), default=0)


def shard_ranges(counts: Sequence[int], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Cut a piece out of a line of archives; past its end the line begins anew.

    Args:
        counts: Images of each archive, in the order of the line.
        begin: Where the piece begins.
        end: Where it ends.

    Returns:
        Number of the archive, its first image, and that after the last.

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
