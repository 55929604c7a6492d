"""Exhausted memory and disk give readable errors, and earlier checkpoints stay intact."""

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
from kd.training.trainer import AtomicCheckpointIO, readable_errors


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
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


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't write the checkpoint .*last\.ckpt: Not a directory$"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "events.out"), r"the disk is full \(events\.out\); the last"),
        (MemoryError(), "out of memory: try a smaller --batch_size"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a total of 8 GiB"),
            r"^--batch_size 48: out of memory \(CUDA out .* allocate 9 GiB\); --batch_size 24 --acc",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            "--batch_size 48: out of memory",
        ),
    ],
)
def test_exhausted_memory_and_disk_are_reported_with_a_remedy(raised: Exception, words: str) -> None:
    with pytest.raises(UserError, match=words), readable_errors(batch_size=48):
        raise raised


def test_other_errors_keep_their_traceback() -> None:
    for bug in (RuntimeError("shape '[3]' is invalid"), OSError(errno.EIO, "Input/output error"), ValueError("no")):
        with pytest.raises(type(bug), match=str(bug.args[-1]).replace("[", r"\[")), readable_errors():
            raise bug


class _KilledWorker(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_a_killed_data_loading_process_is_reported() -> None:
    words = "a data loading process was killed, probably out of memory"
    with pytest.raises(UserError, match=words), readable_errors():
        next(iter(DataLoader(_KilledWorker(), num_workers=1)))
