"""DistillationModule beyond logits: features and their adapters, gradients, mixed images, missing labels."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.data import ImageData, Mixing, read_splits
from kd.errors import UserError
from kd.losses import LOSSES, build_objective
from kd.models import Classifier, Ensemble, build_classifier, load_classifier, reuse_head
from kd.teachers import FrozenTeacher
from kd.training import DistillationModule, Hardware, Recipe, Run, build_trainer, train
from tests.conftest import CLASSES, MakeFolder

SIZE = 16
CPU = Hardware(accelerator="cpu", precision="32-true")
TEACHER, STUDENT = "convnet(widths=[4,6])", "convnet(widths=[3,5])"


def network(architecture: str, seed: int = 0, size: int = SIZE) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(architecture, classes=CLASSES, image_size=size, mean=(0.4,) * 3, std=(0.2,) * 3)


def module(loss: str, *, student: str = STUDENT, teacher: str = TEACHER, **options: Any) -> DistillationModule:
    recipe = Recipe(learning_rate=0.02, weight_decay=0.0, schedule="constant")
    objective, taught_by, learner = build_objective(loss), network(teacher), network(student, seed=1)
    return DistillationModule(
        teacher=FrozenTeacher(taught_by),
        student=reuse_head(learner, taught_by) if objective.reuses_head else learner,
        objective=objective,
        recipe=recipe,
        **options,
    )


def data(make_folder: MakeFolder, **options: Any) -> ImageData:
    folder = Path("../photos")
    splits = read_splits(folder if folder.is_dir() else make_folder())
    return ImageData(splits, image_size=SIZE, batch_size=8, augment="none", **options)


def fit(distiller: DistillationModule, images: ImageData, folder: Path, *, epochs: int = 2) -> Run:
    return train(distiller, images, phase="distilled", folder=folder, hardware=CPU, max_epochs=epochs)


def totals_by_name(distiller: DistillationModule) -> list[dict[str, torch.Tensor]]:
    totals = distiller.metrics.totals(torch.device("cpu"))
    return [dict(zip(distiller.metrics.names, part, strict=True)) for part in totals]


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.is_single_label])
def test_ten_steps_decrease_each_loss(name: str) -> None:
    # Evaluation mode disables dropout, so that all values are comparable.
    distillation = module(f"ce=0 {name}=1" if name != "ce" else name, student="simple").eval()
    images = torch.rand(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 3
    parameters = [parameter for parameter in distillation.parameters() if parameter.requires_grad]
    # Adam's steps don't shrink with the gradient: pkt is 2e-5 here, and SGD's steps would be lost in its rounding.
    optimizer = torch.optim.Adam(parameters, lr=0.001)
    values = []
    for _ in range(11):
        optimizer.zero_grad()
        teacher = distillation.teacher_outputs(images)
        total, _ = distillation.objective(distillation.student_outputs(images, teacher), teacher, labels)
        total.backward()
        optimizer.step()
        values.append(total.item())
    # Well above rounding errors; soft_ce is at least the entropy of the teacher's predictions.
    assert values[-1] < values[0] - 1e-4 * abs(values[0])


@pytest.mark.parametrize("loss", ["hint", "vid", "crd", "hint=1 at=100 rkd=0.1"])
def test_adapters_are_trained_but_not_part_of_the_student(loss: str, make_folder: MakeFolder, tmp_path: Path) -> None:
    distiller = module(loss)
    before = [parameter.detach().clone() for parameter in distiller.adapters.parameters()]
    assert before
    run = fit(distiller, data(make_folder), tmp_path / "e")
    after = list(distiller.adapters.parameters())
    assert all(not torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert run.parameters == distiller.model.count_parameters()
    best = Path(run.checkpoint or "")
    last = torch.load(best.with_name("last.ckpt"), weights_only=True)
    assert set(torch.load(best, weights_only=True)["state_dict"]) == set(last["state_dict"])
    assert {name.partition(".")[0] for name in last["state_dict"]} == {"model"}
    assert {name.partition(".")[0] for name in last["module"]} == {"model", "adapters"}
    assert "module" not in torch.load(best, weights_only=True)
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(load_classifier(best.with_name("last.ckpt"))(images), distiller.model.eval()(images))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_resumed_run_restores_adapters_and_average(make_folder: MakeFolder, tmp_path: Path) -> None:
    images = data(make_folder)
    whole, half = module("ce=1 hint=1", ema=0.9), module("ce=1 hint=1", ema=0.9)
    fit(whole, images, tmp_path / "whole", epochs=4)
    checkpoint = Path(fit(half, images, tmp_path / "half").checkpoint or "").with_name("last.ckpt")
    again = module("ce=1 hint=1", ema=0.9)
    trainer = build_trainer(CPU, max_epochs=4, logger=False, enable_checkpointing=False)
    trainer.fit(again, datamodule=images, ckpt_path=checkpoint, weights_only=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_adapters_of_one_seed_have_the_same_initial_weights() -> None:
    torch.manual_seed(5)
    distiller = module("hint", seed=3)
    torch.manual_seed(6)
    other, third = module("hint=0.1 vid=1", seed=3), module("hint", seed=4)
    torch.testing.assert_close(distiller.adapters[0].state_dict(), other.adapters[0].state_dict(), rtol=0, atol=0)
    assert not torch.equal(distiller.adapters[0].state_dict()["weight"], third.adapters[0].state_dict()["weight"])


def test_feature_losses_between_equal_networks_are_zero() -> None:
    distiller = DistillationModule(
        teacher=FrozenTeacher(network(TEACHER)), student=network(TEACHER), objective=build_objective("hint at sp rkd")
    ).eval()
    images = torch.rand(4, 3, SIZE, SIZE)
    teacher = distiller.teacher_outputs(images)
    total, _ = distiller.objective(distiller.student_outputs(images, teacher), teacher, torch.zeros(4).long())
    assert total.item() == pytest.approx(0, abs=1e-10)
    assert len(distiller.adapters) == 0


def test_the_teacher_computes_features_in_evaluation_mode() -> None:
    distiller = module("hint")
    distiller.train()
    images = torch.rand(4, 3, SIZE, SIZE)
    before = copy.deepcopy(distiller.teacher.network.state_dict())
    both = [distiller.teacher_outputs(images[:count]).features["6"][:2] for count in (4, 2)]
    torch.testing.assert_close(both[0], both[1])
    assert not both[0].requires_grad
    torch.testing.assert_close(distiller.teacher.network.state_dict(), before, rtol=0, atol=0)


def test_gradients_are_those_of_the_teachers_top_logit() -> None:
    distiller = module("jacobian").eval()
    images = torch.rand(3, 3, SIZE, SIZE)
    teacher = distiller.teacher_outputs(images)
    student = distiller.student_outputs(images, teacher)
    assert teacher.gradients is not None
    assert student.gradients is not None
    assert not teacher.gradients.requires_grad
    # Finite differences along one pixel.
    index, step = 1, 1e-2
    moved = images.clone()
    moved[index, 0, 4, 4] += step
    first = teacher.logits.argmax(dim=1)[index]
    for outputs, logits in ((teacher, distiller.teacher(moved).logits), (student, distiller.model(moved))):
        assert outputs.gradients is not None
        slope = (logits[index, first] - outputs.logits[index, first]) / step
        torch.testing.assert_close(slope, outputs.gradients[index, 0, 4, 4], rtol=0.1, atol=1e-3)


def test_attention_can_be_differentiated_twice() -> None:
    distiller = DistillationModule(
        teacher=FrozenTeacher(network("vit_b_32(image_size=32)", size=32)),
        student=network("vit_b_32(image_size=32)", seed=1, size=32),
        objective=build_objective("jacobian=1 kl=1"),
    )
    distiller.dry_run()


def test_a_network_that_is_not_twice_differentiable_is_refused() -> None:
    distiller = DistillationModule(
        teacher=FrozenTeacher(network("resnet18", size=32)),
        student=network("mobilenet_v3_small", size=32),
        objective=build_objective("ce=1 jacobian=1"),
    )
    with pytest.raises(
        UserError, match="--loss ce jacobian: can't train mobilenet_v3_small with this objective: derivative"
    ):
        distiller.dry_run()


def test_teacher_and_student_see_the_same_mixed_images(make_folder: MakeFolder, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class RecordingTeacher(FrozenTeacher):
        def __call__(self, images: Tensor) -> Any:
            seen.append(images)
            return super().__call__(images)

    class Student(DistillationModule):
        def student_outputs(self, images: Tensor, teacher: Any) -> Any:
            assert images is seen[-1]
            return super().student_outputs(images, teacher)

    images = data(make_folder)
    distiller = Student(
        teacher=RecordingTeacher(network(TEACHER)),
        student=network(STUDENT, seed=1),
        objective=build_objective("ce kl"),
        mixing=Mixing(mixup=1.0, cutmix=1.0, num_classes=3),
    )
    fit(distiller, images, tmp_path / "e", epochs=1)
    plain = {tuple(views.flatten().tolist()) for views, _ in images.train_dataloader()}
    assert len(seen) == 3
    assert not any(tuple((255 * batch).round().byte().flatten().tolist()) in plain for batch in seen)


def test_terms_that_need_labels_are_means_over_labeled_images() -> None:
    distiller = module("ce=0.5 kl=1 dkd=1", has_unlabeled=True)
    images, labels = torch.rand(6, 3, SIZE, SIZE), torch.tensor([0, -1, 2, -1, -1, 1])
    distiller.eval()
    total = distiller.training_step((images, labels), 0)
    has = labels >= 0
    z, v = distiller.model(images), distiller.teacher(images).logits
    expected = {
        "ce": F.cross_entropy(z[has], labels[has]),
        "kl": LOSSES["kl"]()(z, v, labels),  # type: ignore[operator]
        "dkd": LOSSES["dkd"]()(z[has], v[has], labels[has]),  # type: ignore[operator]
    }
    torch.testing.assert_close(total, 0.5 * expected["ce"] + expected["kl"] + expected["dkd"])
    names = ["ce", "kl", "dkd", "acc"]
    sums, weights = totals_by_name(distiller)
    for name in names[:3]:
        torch.testing.assert_close(sums[name], expected[name])
    assert [weights[name].item() for name in names] == [1, 1, 1, 1]


def test_a_batch_without_labels_trains_on_the_teacher_alone() -> None:
    distiller = module("ce=0.5 kl=1", has_unlabeled=True)
    images, labels = torch.rand(4, 3, SIZE, SIZE), torch.full((4,), -1)
    total = distiller.training_step((images, labels), 0)
    total.backward()
    sums, weights = totals_by_name(distiller)
    assert [weights[name].item() for name in ("ce", "kl", "loss", "acc")] == [0, 1, 1, 0]
    torch.testing.assert_close(sums["kl"], sums["loss"])
    alone = module("ce=1", has_unlabeled=True)
    assert alone.training_step((images, labels), 0).item() == 0


def test_the_last_layer_has_a_gradient_if_no_term_depends_on_it() -> None:
    # DDP waits for the gradient of each parameter.
    distiller = module("ce=1 hint=1", has_unlabeled=True)
    distiller.training_step((torch.rand(4, 3, SIZE, SIZE), torch.full((4,), -1)), 0).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters() if parameter.requires_grad)


def test_labels_have_no_effect_if_no_term_needs_them(make_folder: MakeFolder, tmp_path: Path) -> None:
    states = []
    for index, hidden in enumerate((True, False)):
        images = data(make_folder, reads_labels=not hidden)
        distiller = module("kl=1", has_unlabeled=images.has_unlabeled)
        run = fit(distiller, images, tmp_path / str(index))
        states.append(distiller.model.state_dict())
        assert ("train/acc" in distiller.metrics.latest) is not hidden
        assert run.val_acc > 0
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_the_average_is_validated_and_saved(make_folder: MakeFolder, tmp_path: Path) -> None:
    distiller = module("ce=1 kl=1", ema=0.5)
    steps: list[dict[str, Tensor]] = []

    class Recording(DistillationModule):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            steps.append({name: value.clone() for name, value in self.model.state_dict().items()})

    distiller.__class__ = Recording
    run = fit(distiller, data(make_folder), tmp_path / "e", epochs=1)
    expected: dict[str, Tensor] = {}
    for count, state in enumerate(steps):
        share = 1.0 if count == 0 else 1 - min(0.5, (1 + count) / (10 + count))
        for name, value in state.items():
            expected[name] = value if not value.is_floating_point() or count == 0 else expected[name].lerp(value, share)
    assert len(steps) == 3
    saved = load_classifier(run.checkpoint or "")
    torch.testing.assert_close(dict(saved.state_dict()), expected)
    assert not torch.equal(expected["network.0.weight"], distiller.model.state_dict()["network.0.weight"])
    trainer = build_trainer(CPU, logger=False, enable_checkpointing=False)
    (measured,) = trainer.validate(distiller, datamodule=data(make_folder), verbose=False)
    images, labels = next(iter(data(make_folder).val_dataloader()))
    assert measured["val/loss"] != F.cross_entropy(distiller.model.eval()(images / 255), labels).item()
    assert run.val_acc == measured["val/acc"]


def test_an_ensemble_has_logits_but_no_features() -> None:
    ensemble = Ensemble([network(TEACHER), network("linear")])
    distiller = DistillationModule(
        teacher=FrozenTeacher(ensemble), student=network(STUDENT), objective=build_objective("kl=1 jacobian=1")
    )
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(distiller.teacher_outputs(images).logits, ensemble.eval()(images))
    distiller.dry_run()
    with pytest.raises(UserError, match=r"features are compared with those of one teacher, not of 2: convnet"):
        DistillationModule(teacher=FrozenTeacher(ensemble), student=network(STUDENT), objective=build_objective("hint"))


def test_a_teacher_of_another_image_size_computes_features_of_the_students_images() -> None:
    distiller = DistillationModule(
        teacher=FrozenTeacher(network(TEACHER, size=24)),
        student=network(STUDENT),
        objective=build_objective("hint=1 at=1"),
    )
    images = torch.rand(2, 3, SIZE, SIZE)
    assert distiller.teacher_outputs(images).features["6"].shape == (2, 6, 12, 12)
    distiller.dry_run()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("hint(student_node=11)", r"--loss hint: convnet\(widths=\[3,5\]\) has no node '11'"),
        ("hint(teacher_node=lyer)", r"--loss hint: convnet\(widths=\[4,6\]\) has no node 'lyer'"),
        (
            "hint(student_node=[2, 6], teacher_node=6)",
            r"must have the same number of nodes, not 2 \(2, 6\) and 1 \(6\)",
        ),
        ("hint(student_node=[2, 6])", "2 nodes are given for one network, but the other has 1"),
        ("at(student_node=7)", "the student's 7 and the teacher's 6 can't be compared: a map of one pixel"),
    ],
)
def test_incomparable_features_are_refused(loss: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        module(loss)


def test_stages_are_paired_from_the_last_one_on() -> None:
    distiller = module("at", student="convnet(widths=[3,5,7])")
    (term,) = distiller.objective.terms
    assert [(pair.student, pair.teacher) for pair in term.pairs] == [("5", "1"), ("10", "6")]
    named = module("at(student_node=[2, 6])", student="convnet(widths=[3,5,7])")
    assert [(pair.student, pair.teacher) for pair in named.objective.terms[0].pairs] == [("2", "1"), ("6", "6")]
