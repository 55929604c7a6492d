from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.data import ImageData, read_splits
from kd.errors import UserError
from kd.losses import build_objective
from kd.models import Classifier, build_classifier, load_classifier
from kd.teachers import FrozenTeacher
from kd.training import (
    ClassifierModule,
    DistillationModule,
    Hardware,
    PredictionRecorder,
    Recipe,
    Run,
    RunTensorBoard,
    evaluate,
    train,
)
from tests.conftest import MakeFolder

CPU = Hardware(accelerator="cpu", precision="32-true")
SIX = ("a", "b", "c", "d", "e", "f")


def network(classes: tuple[str, ...], architecture: str = "convnet(widths=[6])", seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(architecture, classes=classes, image_size=16, mean=(0.4,) * 3, std=(0.2,) * 3)


def images(folder: Path, **options: Any) -> ImageData:
    defaults: dict[str, Any] = {"image_size": 16, "batch_size": 8, "augment": "none"}
    return ImageData(read_splits(folder), **defaults | options)


def scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    assert run.folder is not None
    # TensorBoard sorts files of the same second by name: number 10 before number 9.
    for file in Path(run.folder).glob("events.out.*"):
        name, _, number = file.name.rpartition(".")
        file.rename(file.with_name(f"{name}.{int(number):06d}"))
    events = EventAccumulator(run.folder)
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def fit(module: ClassifierModule, data: ImageData, folder: Path, *, max_epochs: int, **options: Any) -> Run:
    defaults: dict[str, Any] = {"phase": "distilled", "hardware": CPU, "loggers": [RunTensorBoard(folder)]}
    return train(module, data, folder=folder, max_epochs=max_epochs, **defaults | options)


def test_a_training_writes_checkpoints_curves_and_results(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder(classes=SIX, train=12))
    module = ClassifierModule(network(SIX), recipe=Recipe(learning_rate=0.05))
    run = fit(module, data, tmp_path / "e", max_epochs=6, phase="teacher", hyperparameters={"x": 3})
    assert (run.phase, run.seed, run.epochs, run.steps, run.model) == ("teacher", 0, 6, 54, "convnet(widths=[6])")
    assert run.val_acc > 0.5
    assert run.best_val_acc >= run.val_acc
    assert run.agreement is None
    assert run.folder == str(tmp_path / "e")
    checkpoints = sorted(path.name for path in Path(run.folder, "checkpoints").iterdir())
    assert checkpoints == ["best.ckpt", "last.ckpt"]
    logged = scalars(run)
    assert {"train/loss", "train/ce", "train/acc", "val/loss", "val/acc", "val/top5", "lr", "images_per_second"} <= set(
        logged
    )
    assert logged["val/acc"][-1][0] == 53
    assert logged["val/acc"][-1][1] == pytest.approx(run.val_acc)
    # One for each epoch, and the last repeated for the HPARAMS tab.
    assert [step for step, _ in logged["val/acc"]] == [8, 17, 26, 35, 44, 53, 53]
    assert logged["lr"][0][1] > logged["lr"][-1][1]
    assert "epoch" not in logged


def test_checkpoints_are_plain_classifiers(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder())
    classes = data.splits.classes
    module = DistillationModule(
        teacher=FrozenTeacher(network(classes)), student=network(classes, seed=1), objective=build_objective("kl")
    )
    run = fit(module, data, tmp_path / "e", max_epochs=2)
    last = Path(run.folder or "", "checkpoints", "last.ckpt")
    again = load_classifier(last)
    batch = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(batch), module.model.eval()(batch), rtol=0, atol=0)
    assert again.description.classes == classes
    assert torch.load(last, weights_only=True)["classifier"]["val_acc"] == pytest.approx(run.val_acc)
    assert run.agreement is not None
    measured = evaluate(again, data, hardware=CPU)
    assert measured["val/acc"] == pytest.approx(run.val_acc)
    assert measured["val/loss"] == pytest.approx(run.val_loss, rel=1e-5)
    assert not again.training


def test_agreement_is_the_fraction_of_equal_predictions(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder(), batch_size=4)
    teacher = network(data.splits.classes)
    module = DistillationModule(
        teacher=FrozenTeacher(teacher),
        student=network(data.splits.classes, seed=1),
        objective=build_objective("kl"),
        teacher_acc=0.25,
    )
    run = fit(module, data, tmp_path / "e", max_epochs=2)
    views = torch.stack([data.val_views[0, index][0] for index in range(len(data.splits.val))]).float() / 255
    decisions = [model.eval()(views).argmax(dim=1) for model in (teacher, module.model)]
    assert run.agreement == pytest.approx((decisions[0] == decisions[1]).float().mean().item())
    assert [value for _, value in scalars(run)["teacher/acc"]] == [0.25, 0.25]


def test_given_teacher_decisions_are_not_computed_again(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder(), batch_size=4)
    classes = data.splits.classes
    student, predictions = network(classes, "linear", seed=1), PredictionRecorder()
    # The student's own predictions, given as the teacher's: the agreement is 1.
    evaluate(student, data, hardware=CPU, predictions=predictions)
    assert predictions.path is None
    module = DistillationModule(
        teacher=FrozenTeacher(network(classes)),
        student=student.train(),
        objective=build_objective("kl"),
        recipe=Recipe(learning_rate=1e-12),
        teacher_decisions=predictions.decisions,
    )
    run = fit(module, data, tmp_path / "e", max_epochs=2)
    assert run.agreement == 1


def test_logged_terms_are_unweighted_means_of_all_batches(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder(), batch_size=5)
    classes = data.splits.classes
    module = DistillationModule(
        teacher=FrozenTeacher(network(classes)),
        student=network(classes, seed=1),
        objective=build_objective("ce=0.25 kl=3"),
        recipe=Recipe(learning_rate=1e-12),
    )
    run = fit(module, data, tmp_path / "e", max_epochs=1)
    logged = scalars(run)
    assert len(logged["train/loss"]) == 5
    for (_, total), (_, ce), (_, kl) in zip(logged["train/loss"], logged["train/ce"], logged["train/kl"], strict=True):
        assert total == pytest.approx(0.25 * ce + 3 * kl, rel=1e-5)


def test_scheduled_weights_are_those_of_the_epoch(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder())
    classes = data.splits.classes
    module = DistillationModule(
        teacher=FrozenTeacher(network(classes)),
        student=network(classes, seed=1),
        objective=build_objective("ce=stop(0.5, 1) kl=linear(1, 3)"),
    )
    run = fit(module, data, tmp_path / "e", max_epochs=3)
    logged = scalars(run)
    for (step, total), (_, ce), (_, kl) in zip(
        logged["train/loss"], logged["train/ce"], logged["train/kl"], strict=True
    ):
        epoch = step // 3
        assert total == pytest.approx((0.5 if epoch == 0 else 0) * ce + (1 + epoch) * kl, rel=1e-5)


def test_runs_of_one_seed_are_bit_identical_and_write_no_files_without_a_folder(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder()

    def weights(seed: int, workers: int) -> dict[str, torch.Tensor]:
        data = images(folder, augment="rotate", seed=seed, num_workers=workers)
        torch.rand(seed + workers)  # earlier draws have no effect
        module = ClassifierModule(network(data.splits.classes, "simple"), seed=seed)
        train(module, data, phase="baseline", folder=None, hardware=CPU, max_epochs=2)
        return module.model.state_dict()

    first, again, other = weights(0, 0), weights(0, 2), weights(1, 0)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first["network.0.weight"], other["network.0.weight"])
    assert list(Path.cwd().iterdir()) == []


# Each part saves its checkpoints in its own folder.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_views_after_a_resume_are_those_of_the_uninterrupted_run(make_folder: MakeFolder, tmp_path: Path) -> None:
    from pytorch_lightning import Trainer
    from pytorch_lightning.callbacks import ModelCheckpoint

    from kd.training import quiet_lightning

    folder = make_folder()

    class Recording(ClassifierModule):
        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
            seen.append(batch[0])
            return super().training_step(batch, batch_idx)

    def views(workers: int, max_epochs: int, checkpoint: Path | None = None) -> list[torch.Tensor]:
        seen.clear()
        data = images(folder, augment="crop", num_workers=workers)
        options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        trainer = Trainer(
            max_epochs=max_epochs,
            use_distributed_sampler=False,
            enable_model_summary=False,
            callbacks=[
                ModelCheckpoint(tmp_path / f"{workers}{max_epochs}{checkpoint is None}", filename="part", save_top_k=1)
            ],
            **options,
        )
        module = Recording(network(data.splits.classes))
        with quiet_lightning():
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return list(seen)

    seen: list[torch.Tensor] = []
    whole = views(0, 4)
    first = views(0, 2)
    for workers in (0, 1):
        rest = views(workers, 4, tmp_path / "02True" / "part.ckpt")
        torch.testing.assert_close([*first, *rest], whole, rtol=0, atol=0)


def test_a_fast_dev_run_writes_no_files(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder(), batch_size=2)
    hardware = Hardware(accelerator="cpu", precision="32-true", fast_dev_run=True)
    module = ClassifierModule(network(data.splits.classes))
    run = fit(module, data, tmp_path / "e", max_epochs=3, hardware=hardware, loggers=[])
    assert (run.steps, run.checkpoint, run.folder) == (1, None, None)
    assert not (tmp_path / "e").exists()


def test_max_steps_ends_a_training_with_limited_batches(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder(), batch_size=4)
    hardware = Hardware(accelerator="cpu", precision="32-true", limit_train_batches=4, limit_val_batches=0.5)
    module, options = ClassifierModule(network(data.splits.classes)), {"accumulate": 2, "gradient_clip": 0.1}
    run = fit(module, data, tmp_path / "e", max_epochs=50, max_steps=3, hardware=hardware, **options)
    assert (run.steps, run.epochs) == (3, 2)


@pytest.mark.parametrize(("max_steps", "validated"), [(2, [1]), (4, [3]), (5, [3, 4]), (8, [3, 7])])
def test_a_training_that_ends_within_an_epoch_is_validated_at_its_end(
    make_folder: MakeFolder, tmp_path: Path, max_steps: int, validated: list[int]
) -> None:
    data = images(make_folder(), batch_size=6)
    module = ClassifierModule(network(data.splits.classes))
    run = fit(module, data, tmp_path / "e", max_epochs=3, max_steps=max_steps)
    assert run.steps == max_steps
    # The last is repeated for the HPARAMS tab.
    assert [step for step, _ in scalars(run)["val/acc"]] == [*validated, validated[-1]]
    last = Path(run.folder or "", "checkpoints", "last.ckpt")
    assert torch.load(last, weights_only=True)["classifier"]["val_acc"] == pytest.approx(run.val_acc)
    assert evaluate(load_classifier(last), data, hardware=CPU)["val/acc"] == pytest.approx(run.val_acc)


def test_a_loss_that_is_not_finite_is_none(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder())
    module = ClassifierModule(network(data.splits.classes), recipe=Recipe(optimizer="sgd", learning_rate=1e30))
    # The step's loss is finite, but the updated weights are not.
    run = fit(module, data, tmp_path / "e", max_epochs=1, max_steps=1)
    assert run.val_loss is None


def test_unsupported_hardware_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder())
    module = ClassifierModule(network(data.splits.classes))
    for wrong in (
        {"accelerator": "quantum"},
        {"precision": "12-true"},
        {"strategy": "magic"},
        {"devices": "many"},
        {"precision": "transformer-engine"},
    ):
        hardware = Hardware(**{"accelerator": "cpu", "precision": "32-true"} | wrong)  # type: ignore[arg-type]
        flag, value = next(iter(wrong.items()))
        with pytest.raises(UserError, match=f"--{flag} {value}"):
            fit(module, data, tmp_path / "e", max_epochs=1, hardware=hardware)


def test_a_limit_below_one_batch_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    data = images(make_folder())
    hardware = Hardware(accelerator="cpu", precision="32-true", limit_val_batches=0.0001)
    with pytest.raises(UserError, match="Lightning refuses this configuration"):
        evaluate(network(data.splits.classes), data, hardware=hardware)


@pytest.mark.parametrize("devices", ["auto", "1", "4"])
def test_without_a_gpu_auto_is_one_cpu_with_a_note(devices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    chosen, notes = Hardware(devices=devices).resolved()
    assert (chosen.accelerator, chosen.devices, chosen.precision) == ("cpu", "1", "auto")
    assert "No GPU found: running on the CPU" in notes[0]
    assert ("--devices 4 would need GPUs" in notes[0]) is (devices == "4")


def test_explicit_hardware_is_not_changed() -> None:
    explicit = Hardware(accelerator="cpu", devices="2", precision="bf16-mixed")
    assert explicit.resolved() == (explicit, [])
