"""What the machine does not give is said in plain words, and what was written before stays whole."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.errors import UserError
from kd.training.checkpoints import AtomicCheckpointIO
from kd.training.failures import in_plain_words


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_previous_one(tmp_path: Path) -> None:
    last = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, last)
    large = {"global_step": 2, "weights": torch.zeros(10**6)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(UserError, match=r"can't write the checkpoint .*last\.ckpt: .*; the previous one is intact"):
            AtomicCheckpointIO().save_checkpoint(large, last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert AtomicCheckpointIO().load_checkpoint(last) == {"global_step": 1}
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write the checkpoint .*last\.ckpt: File exists$"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "events.out"), r"the disk is full \(events\.out\); the last"),
        (MemoryError(), "there is not memory enough: a smaller --batch_size needs less"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total of 8 GiB"),
            r"^--batch_size 48: there is not memory enough \(CUDA out .* allocate 9 GiB\); --batch_size 24 --acc",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            "--batch_size 48: there is not memory enough",
        ),
    ],
)
def test_memory_and_disk_that_run_out_are_said_plainly(raised: Exception, words: str) -> None:
    with pytest.raises(UserError, match=words), in_plain_words(batch_size=48):
        raise raised


def test_what_is_a_bug_stays_one() -> None:
    for bug in (RuntimeError("shape '[3]' is invalid"), OSError(errno.EIO, "Input/output error"), ValueError("no")):
        with pytest.raises(type(bug), match=str(bug.args[-1]).replace("[", r"\[")), in_plain_words():
            raise bug


class _Deadly(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_a_process_that_loads_images_and_is_killed_is_told_of() -> None:
    words = "a process that loads images was killed, as happens where memory runs out"
    with pytest.raises(UserError, match=words), in_plain_words():
        next(iter(DataLoader(_Deadly(), num_workers=1)))
