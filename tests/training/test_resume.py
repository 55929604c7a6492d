"""An interrupted and resumed training is bit-identical to an uninterrupted one."""

import os
import re
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from kd.console import make_console
from kd.data import Batches, ImageData, Mixing, ShardData, ShardedSplits, load_splits, read_splits, write_shards
from kd.errors import Interrupted, UserError
from kd.losses import build_objective
from kd.models import Classifier, build_classifier
from kd.teachers import FrozenTeacher
from kd.training import (
    DistillationModule,
    Hardware,
    Interruption,
    Recipe,
    ResumeOptions,
    Run,
    RunTensorBoard,
    newest_checkpoint,
    train,
)
from kd.training.modules import Batch, ClassifierModule
from tests.conftest import MakeFolder

CPU = Hardware(accelerator="cpu", precision="32-true")
BATCHES, EPOCHS = 5, 3


class _Killed(Exception):  # noqa: N818 (simulates a kill)
    """Ends a training at once."""


class _InterruptedModule(DistillationModule):
    """Receives SIGTERM at a given moment of a step or of a validation."""

    def at(self, moment: Callable[["_InterruptedModule"], bool], interruption: Interruption) -> "_InterruptedModule":
        self._moment, self._interruption = moment, interruption
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._signal_at_moment()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._signal_at_moment()
        return super().validation_step(batch, batch_idx)

    def _signal_at_moment(self) -> None:
        # A second signal would end the program at once.
        if self._interruption.received is None and self._moment(self):
            os.kill(os.getpid(), signal.SIGTERM)


def _network(classes: tuple[str, ...], seed: int) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier("convnet(widths=[6])", classes=classes, image_size=16, mean=(0.4,) * 3, std=(0.2,) * 3)


class _Training:
    """A training of a student with everything that has state: an average, a schedule, mixing, features, views."""

    def __init__(self, folder: Path, images: Path, **options: Any) -> None:
        self.folder, self.images = folder, images
        self.workers = options.pop("num_workers", 0)
        self.streams = options.pop("streams", False)
        self.recipe = options.pop("recipe", Recipe(learning_rate=0.01, warmup_epochs=1))
        self.objective = options.pop("objective", "ce=0.5 kl(temperature=linear(4, 2))=0.5")
        self.options: dict[str, Any] = {"max_epochs": EPOCHS, "phase": "distilled", "hardware": CPU} | options

    def run(
        self,
        moment: Callable[[DistillationModule], bool] = lambda _: False,
        *,
        resumes: bool = False,
        save_every: int | None = None,
    ) -> Run:
        interruption = Interruption()
        data = self._data(image_size=16, batch_size=4, augment="rotate", num_workers=self.workers, seed=3)
        classes = data.splits.classes
        module = _InterruptedModule(
            teacher=FrozenTeacher(_network(classes, 1)),
            student=_network(classes, 2),
            objective=build_objective(self.objective, num_classes=len(classes), soft_labels=True),
            recipe=self.recipe,
            seed=3,
            mixing=Mixing(mixup=0.4, num_classes=len(classes)),
            ema=None if self.recipe.swa else 0.9,
        ).at(moment, interruption)
        checkpoint = newest_checkpoint(self.folder) if resumes else None
        resume = ResumeOptions(checkpoint=checkpoint, save_every=save_every, interruption=interruption)
        loggers = [RunTensorBoard(self.folder, purge_step=resume.first_step)]
        with interruption.listening():
            return train(module, data, folder=self.folder, loggers=loggers, resume=resume, **self.options)

    def _data(self, **options: Any) -> Batches:
        if not self.streams:
            return ImageData(read_splits(self.images), **options)
        shards = self.folder.parent / "shards"
        if not shards.is_dir():
            write_shards(read_splits(self.images), shards, per_shard=3)
        splits = load_splits("webdataset", shards)
        assert isinstance(splits, ShardedSplits)
        return ShardData(splits, **options)

    def state(self) -> dict[str, Any]:
        checkpoint = self.folder / "checkpoints" / "last.ckpt"
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        plain = {key: state[key] for key in ("state_dict", "module", "optimizer_states", "lr_schedulers")}
        return plain | {"metrics": state["training_metrics"]}

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        # TensorBoard sorts files of the same second by name: number 10 before number 9.
        for file in (self.folder).glob("events.out.*"):
            name, _, number = file.name.rpartition(".")
            file.rename(file.with_name(f"{name}.{int(number):06d}"))
        events = EventAccumulator(str(self.folder))
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if tag != "images_per_second"
        }


@pytest.fixture
def folder_of_images(make_folder: MakeFolder) -> Path:
    # Five batches of four from two classes.
    return make_folder(classes=("a", "b"), train=10)


def _kill_at(step: int) -> Callable[[DistillationModule], bool]:
    def kill(module: DistillationModule) -> bool:
        if module.global_step == step:
            raise _Killed
        return False

    return kill


def _assert_identical(resumed: _Training, run: Run, whole: _Training, expected: Run) -> None:
    torch.testing.assert_close(resumed.state(), whole.state(), rtol=0, atol=0)
    assert resumed.curves() == whole.curves()
    for name in ("history", "steps", "epochs", "val_acc", "best_val_acc"):
        assert getattr(run, name) == getattr(expected, name)


@pytest.mark.parametrize(
    ("step", "saved_at", "options"),
    [
        (0, 1, {}),
        (2, 3, {}),
        # The last step of an epoch is followed by its validation.
        (4, 5, {}),
        (5, 6, {}),
        (7, 8, {"num_workers": 1}),
        (8, 9, {"max_steps": 12}),
        (2, 3, {"streams": True}),
        (8, 9, {"streams": True, "num_workers": 2}),
        (1, 1, {"accumulate": 2}),
        (3, 2, {"accumulate": 2}),
        (6, 7, {"gradient_clip": 0.1, "objective": "ce=0.5 kl=0.5 hint=0.1"}),
    ],
)
def test_a_training_stopped_by_a_signal_saves_and_resumes_to_the_same_result(
    folder_of_images: Path, tmp_path: Path, step: int, saved_at: int, options: dict[str, Any]
) -> None:
    whole, cut = (_Training(tmp_path / name, folder_of_images, **options) for name in ("whole", "cut"))
    expected = whole.run()
    batches = step // BATCHES, step % BATCHES
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM: saved in .*last\.ckpt") as stopped:
        cut.run(lambda module: (module.current_epoch, module.trainer.fit_loop.batch_idx) == batches)
    assert stopped.value.received == signal.SIGTERM
    assert torch.load(cut.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved_at
    _assert_identical(cut, cut.run(resumes=True), whole, expected)


def test_a_signal_during_validation_is_handled_at_its_end(folder_of_images: Path, tmp_path: Path) -> None:
    whole, cut = (_Training(tmp_path / name, folder_of_images) for name in ("whole", "cut"))
    expected = whole.run()
    with pytest.raises(Interrupted, match="saved"):
        cut.run(lambda module: module.trainer.validating and module.current_epoch == 1)
    _assert_identical(cut, cut.run(resumes=True), whole, expected)


def test_a_killed_training_resumes_from_its_last_checkpoint(folder_of_images: Path, tmp_path: Path) -> None:
    whole, cut = (_Training(tmp_path / name, folder_of_images) for name in ("whole", "cut"))
    expected = whole.run()
    with pytest.raises(_Killed):
        cut.run(_kill_at(9), save_every=2)
    assert ResumeOptions(newest_checkpoint(cut.folder)).first_step == 8
    _assert_identical(cut, cut.run(resumes=True, save_every=2), whole, expected)


def test_a_training_killed_before_its_first_checkpoint_restarts_in_its_folder(
    folder_of_images: Path, tmp_path: Path
) -> None:
    whole, cut = (_Training(tmp_path / name, folder_of_images) for name in ("whole", "cut"))
    expected = whole.run()
    with pytest.raises(_Killed):
        cut.run(_kill_at(3))
    _assert_identical(cut, cut.run(resumes=True), whole, expected)


def test_a_newer_checkpoint_saved_by_lightning_for_slurm_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert newest_checkpoint(tmp_path) is None
    for name, step in (("hpc_ckpt_1.ckpt", 5), ("hpc_ckpt_2.ckpt", 9), ("checkpoints/last.ckpt", 9)):
        torch.save({"global_step": step}, tmp_path / name)
        assert newest_checkpoint(tmp_path) == tmp_path / name
    torch.save({"global_step": 11}, tmp_path / "hpc_ckpt_3.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "hpc_ckpt_3.ckpt"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(
    folder_of_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = (_Training(tmp_path / name, folder_of_images) for name in ("whole", "cut"))
    expected = whole.run()
    with pytest.raises(_Killed):
        cut.run(_kill_at(9), save_every=2)
    last = cut.folder / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(last) as archive:
        weights = [info for info in archive.infolist() if "/data/" in info.filename]
        part = max(weights, key=lambda info: info.file_size)
    content = bytearray(last.read_bytes())
    content[part.header_offset + part.file_size // 2 + 64] ^= 1
    last.write_bytes(content)
    # torch itself reads the changed weight.
    torch.load(last, weights_only=True)
    previous = newest_checkpoint(cut.folder, make_console())
    assert previous == last.with_name("previous.ckpt")
    assert re.search(r"last\.ckpt: .* doesn't match its checksum", capsys.readouterr().out.replace("\n", " "))
    assert ResumeOptions(previous).first_step == 6
    _assert_identical(cut, cut.run(resumes=True, save_every=2), whole, expected)
    assert not last.with_name("previous.ckpt").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(optimizer="sgd", nesterov=True, learning_rate=0.05, schedule="multistep", milestones=(1, 1.5)),
        Recipe(learning_rate=0.01, schedule="step", step_epochs=0.7, gamma=0.5),
        Recipe(learning_rate=0.01, schedule="poly", poly_power=2, warmup_epochs=0.5),
        Recipe(learning_rate=0.01, schedule="onecycle"),
        Recipe(learning_rate=0.01, optimizer="rmsprop(momentum=0.5)"),
        Recipe(learning_rate=0.01, optimizer="nadam", layer_decay=0.5),
        Recipe(learning_rate=0.01, freeze="backbone"),
        Recipe(learning_rate=0.01, freeze=1),
        Recipe(learning_rate=0.01, freeze=3),
        Recipe(learning_rate=0.01, swa=2, schedule="constant"),
        Recipe(learning_rate=0.01, update_bn=True),
    ],
    ids=lambda recipe: ",".join(
        f"{name}={value}" for name, value in vars(recipe).items() if value != getattr(Recipe(), name)
    ),
)
def test_every_recipe_is_resumed_to_the_bit(folder_of_images: Path, tmp_path: Path, recipe: Recipe) -> None:
    whole, cut = (_Training(tmp_path / name, folder_of_images, recipe=recipe) for name in ("whole", "cut"))
    expected = whole.run()
    with pytest.raises(_Killed):
        cut.run(_kill_at(9), save_every=2)
    _assert_identical(cut, cut.run(resumes=True, save_every=2), whole, expected)


def test_early_stopping_counts_on_in_a_resumed_training(folder_of_images: Path, tmp_path: Path) -> None:
    # A vanishing learning rate, so that no epoch is better than the first.
    recipe = Recipe(optimizer="sgd", nesterov=True, learning_rate=1e-9, schedule="multistep", milestones=(1,))
    whole, cut = (
        _Training(tmp_path / name, folder_of_images, recipe=recipe, early_stopping=2, max_epochs=9)
        for name in ("whole", "cut")
    )
    expected = whole.run()
    assert (expected.epochs, len(expected.history)) == (3, 3)
    steps = expected.steps // 3
    with pytest.raises(_Killed):
        cut.run(_kill_at(2 * steps + 1), save_every=1)
    _assert_identical(cut, cut.run(resumes=True, save_every=1), whole, expected)


def test_a_finished_training_is_not_trained_again(folder_of_images: Path, tmp_path: Path) -> None:
    whole = _Training(tmp_path / "whole", folder_of_images)
    expected = whole.run()

    def fails(module: DistillationModule) -> bool:
        raise AssertionError("the module was called")

    again = whole.run(fails, resumes=True)
    assert (again.history, again.val_acc, again.validation) == (expected.history, expected.val_acc, expected.validation)


@pytest.mark.parametrize("where", ["a term", "the gradient"])
def test_a_diverged_training_stops_and_keeps_its_last_checkpoint(
    folder_of_images: Path, tmp_path: Path, where: str
) -> None:
    class Broken(ClassifierModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.global_step != 7:
                return loss
            if where == "a term":
                self.last_terms["ce"] = self.last_terms["ce"] * torch.inf
                return loss * torch.inf
            # A finite value with an infinite gradient.
            weight = next(self.model.parameters())
            return loss + (weight - weight.detach()).abs().sqrt().sum()

    data = ImageData(read_splits(folder_of_images), image_size=16, batch_size=4)
    module = Broken(_network(data.splits.classes, 0), recipe=Recipe(learning_rate=0.01, schedule="constant"))
    terms = "ce, the gradient" if where == "a term" else "the gradient"
    with pytest.raises(
        UserError, match=rf"in step 7 \(counted from 0\): {terms} not finite at learning rate 0\.01"
    ) as stop:
        train(
            module,
            data,
            phase="teacher",
            folder=tmp_path,
            hardware=CPU,
            max_epochs=3,
            resume=ResumeOptions(save_every=1),
        )
    assert "earlier checkpoints are intact" in str(stop.value)
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 7
    assert all(bool(value.isfinite().all()) for value in kept["state_dict"].values())
