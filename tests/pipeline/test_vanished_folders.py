"""Folders that disappear while a network is trained."""

import shutil
from pathlib import Path

import pytest
import torch

from kd.errors import UserError
from kd.pipeline import run_experiment
from kd.settings import Settings, resolve
from tests.conftest import MakeFolder


def settings_for(folder: Path, name: str) -> Settings:
    flags = "--image_size 16 --batch_size 8 --accelerator cpu --student_model linear --max_epochs 4 --augment crop"
    flags += f" --train_teacher --distill --teacher_model convnet(widths=[6]) --allow_weak_teacher --name {name}"
    flags += f" --data_dir {folder}"
    return resolve(flags.split()).settings


def weights(name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(
        f"logs/{name}/distilled/version_0/checkpoints/last.ckpt", weights_only=True
    )["state_dict"]
    return state


def test_a_cache_that_vanishes_changes_nothing(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder()
    run_experiment(settings_for(folder, "whole"))

    def remove_caches(epoch: int, accuracy: float) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    run_experiment(settings_for(folder, "without"), on_epoch=remove_caches)
    torch.testing.assert_close(weights("without"), weights("whole"), rtol=0, atol=0)


def test_a_log_folder_that_vanishes_ends_the_training_with_one_message(make_folder: MakeFolder) -> None:
    def replace_logs(epoch: int, accuracy: float) -> None:
        shutil.rmtree("logs")
        Path("logs").write_text("a file in its place")

    with pytest.raises(
        UserError, match=r"logs\S*: Not a directory|can't write the checkpoint .*: (Not a d|File exists)"
    ):
        run_experiment(settings_for(make_folder(), "pets"), on_epoch=replace_logs)
