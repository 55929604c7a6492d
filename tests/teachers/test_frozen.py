"""A frozen teacher is not changed by training, and sees the student's images."""

import copy
import operator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kd.data import ImageData, read_splits
from kd.losses import Outputs, build_objective
from kd.models import Classifier, build_classifier
from kd.teachers import FrozenTeacher
from kd.training import DistillationModule, Hardware, train
from tests.conftest import CLASSES, MakeFolder

SIZE = 16


def network(architecture: str, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(architecture, classes=CLASSES, image_size=SIZE, mean=(0.4,) * 3, std=(0.2,) * 3)


class RecordingTeacher(FrozenTeacher):
    """A teacher that records its mode and its images at each call."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__(classifier)
        self.modes: list[bool] = []
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Outputs:
        self._record(images)
        return super().__call__(images)

    def decisions(self, images: Tensor) -> Tensor:
        self._record(images)
        return super().decisions(images)

    def _record(self, images: Tensor) -> None:
        self.modes.append(any(module.training for module in self.network.modules()))
        self.seen.append(images)


class Student(DistillationModule):
    """A student that records its training images."""

    seen: list[Tensor]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen = [*getattr(self, "seen", []), batch[0]]
        return super().training_step(batch, batch_idx)


@pytest.fixture
def fitted(make_folder: MakeFolder, tmp_path: Path) -> tuple[RecordingTeacher, dict[str, Tensor], Student, Path]:
    teacher = RecordingTeacher(network("convnet(widths=[4, 6])"))
    before = copy.deepcopy(teacher.network.state_dict())
    module = Student(
        teacher=teacher,
        student=network("convnet(widths=[3])", seed=1),
        objective=build_objective("ce=0.5 kl=0.5 mse=0.1"),
    )
    data = ImageData(read_splits(make_folder()), image_size=SIZE, batch_size=6)
    run = train(
        module, data, phase="distilled", folder=tmp_path / "e", hardware=Hardware(accelerator="cpu"), max_epochs=2
    )
    assert run.checkpoint is not None
    return teacher, before, module, Path(run.checkpoint)


Fitted = tuple[RecordingTeacher, dict[str, Tensor], Student, Path]


def test_weights_and_buffers_are_bit_identical_after_a_fit(fitted: Fitted) -> None:
    teacher, before, _, _ = fitted
    assert any("running_mean" in name for name in before)
    torch.testing.assert_close(teacher.network.state_dict(), before, rtol=0, atol=0)


def test_it_is_always_in_evaluation_mode(fitted: Fitted) -> None:
    teacher, _, module, _ = fitted
    module.train()
    assert not teacher.network.training
    # 2 epochs of 4 batches, and the 3 validation batches once.
    assert teacher.modes == [False] * (2 * 4 + 3)


def test_it_receives_the_same_tensors_as_the_student(fitted: Fitted) -> None:
    teacher, _, module, _ = fitted
    in_training = [*teacher.seen[:4], *teacher.seen[7:]]
    assert len(module.seen) == 8
    assert all(map(operator.is_, in_training, module.seen))


def test_it_is_in_no_checkpoint_optimizer_or_parameter_count(fitted: Fitted) -> None:
    _, before, module, checkpoint = fitted
    own = sum(parameter.numel() for parameter in module.model.parameters())
    assert sum(parameter.numel() for parameter in module.parameters()) == own
    assert not any("teacher" in name for name, _ in [*module.named_modules(), *module.named_buffers()])
    assert "optimizer_states" not in torch.load(checkpoint, weights_only=True)
    state = torch.load(checkpoint.with_name("last.ckpt"), weights_only=True)
    assert {name.partition(".")[0] for name in state["state_dict"]} == {"model"}
    in_optimizer = sum(len(group["params"]) for group in state["optimizer_states"][0]["param_groups"])
    assert in_optimizer == len(list(module.model.parameters()))
    shapes = {tuple(value.shape) for name, value in before.items() if value.ndim == 4 and "network" in name}
    assert not shapes & {tuple(value.shape) for value in state["state_dict"].values()}


def test_its_logits_do_not_depend_on_the_rest_of_the_batch() -> None:
    teacher = FrozenTeacher(network("convnet(widths=[4, 6])"))
    images = torch.rand(5, 3, SIZE, SIZE)
    torch.testing.assert_close(teacher(images).logits[:1], teacher(images[:1]).logits)
    torch.testing.assert_close(teacher(images).logits, teacher(images.flip(0)).logits.flip(0))


def test_its_logits_have_no_gradient_and_the_student_can_be_trained() -> None:
    teacher = FrozenTeacher(network("linear"))
    student = network("linear", seed=1)
    images = torch.rand(5, 3, SIZE, SIZE)
    outputs = teacher(images)
    assert not outputs.logits.requires_grad
    total, _ = build_objective("mse=1 kl=1")(Outputs(student(images)), outputs, torch.zeros(5, dtype=torch.long))
    total.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_changing_the_original_network_does_not_change_the_teacher() -> None:
    classifier = network("convnet(widths=[4])")
    teacher = FrozenTeacher(classifier)
    before = copy.deepcopy(teacher.network.state_dict())
    assert classifier.training
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1)
    torch.testing.assert_close(teacher.network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_its_weights_have_the_precision_of_the_run(make_folder: MakeFolder, tmp_path: Path, precision: str) -> None:
    teacher = RecordingTeacher(network("convnet(widths=[4, 6])"))
    module = DistillationModule(
        teacher=teacher, student=network("convnet(widths=[3])", seed=1), objective=build_objective("ce=0.5 kl=0.5")
    )
    data = ImageData(read_splits(make_folder()), image_size=SIZE, batch_size=6)
    hardware = Hardware(accelerator="cpu", precision=precision)
    run = train(module, data, phase="distilled", folder=tmp_path / "e", hardware=hardware, max_epochs=1)
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {value.dtype for value in teacher.network.state_dict().values() if value.is_floating_point()} == {dtype}
    assert 0 <= run.val_acc <= 1
