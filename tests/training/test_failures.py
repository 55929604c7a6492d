"""What the machine does not give is said in plain words, and what was written before stays whole."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd.errors import UserError
from kd.training.checkpoints import DurableCheckpointIO
from kd.training.failures import in_plain_words


def test_the_best_weights_are_held_back_until_the_last_are_written_or_all_ends(tmp_path: Path) -> None:
    best, last = (tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    writer, weights = DurableCheckpointIO(), torch.zeros(2)
    writer.save_checkpoint({"state_dict": {"w": weights}}, best)
    weights += 1
    assert not best.exists()
    writer.save_checkpoint({"global_step": 1}, last)
    assert writer.load_checkpoint(best)["state_dict"]["w"].tolist() == [0, 0]
    writer.save_checkpoint({"state_dict": {"w": weights}}, best)
    assert writer.load_checkpoint(best)["state_dict"]["w"].tolist() == [0, 0]
    writer.teardown()
    assert writer.load_checkpoint(best)["state_dict"]["w"].tolist() == [1, 1]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    last = place / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"global_step": 1}, last)
    assert [path.name for path in place.iterdir()] == ["last.ckpt"]
    # A device that is always full.
    (place / "last.ckpt.part").symlink_to("/dev/full")
    large = {"global_step": 2, "weights": torch.zeros(10**6)}
    with pytest.raises(UserError, match=r"last\.ckpt can't be written: .*; the one before it is whole: .*last\.ckpt"):
        DurableCheckpointIO().save_checkpoint(large, last)
    assert DurableCheckpointIO().load_checkpoint(last) == {"global_step": 1}
    assert [path.name for path in place.iterdir()] == ["last.ckpt"]


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the checkpoint .*last\.ckpt can't be written: File exists$"):
        DurableCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


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
