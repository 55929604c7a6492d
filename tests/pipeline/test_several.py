"""Several teachers, assistants, images without labels, mixtures and averages, through the settings."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kd.errors import UserError
from kd.models import load_classifier
from kd.report import summarize
from tests.conftest import MakeFolder
from tests.pipeline.test_experiment import run, weights

TWO = ["--teacher_model", "convnet(widths=[6])", "convnet(widths=[4])"]


def event_folders(folder: Path) -> list[str]:
    """Return the names under which TensorBoard shows the runs."""
    return sorted({path.parent.relative_to(folder).as_posix() for path in folder.rglob("events.out.tfevents.*")})


def test_several_teachers_are_trained_measured_and_answer_as_one(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    done, output = run(folder, "--train_teacher", "--distill", *TWO, "--name", "two")
    members = ["teacher/convnet_widths_6", "teacher/convnet_widths_4"]
    assert list(done.runs) == [*members, "teacher", "distilled"]
    assert event_folders(Path("logs/two")) == sorted(f"{phase}/version_0" for phase in (*members, "distilled"))
    for name in ("convnet(widths=[6])", "convnet(widths=[4])"):
        assert f"teacher {name} · validation accuracy " in output
    assert "ensemble convnet(widths=[6]) + convnet(widths=[4]) · validation accuracy " in output
    together = done.runs["teacher"][0]
    assert together["parameters"] == sum(done.runs[phase][0]["parameters"] for phase in members)
    assert done.runs["distilled"][0]["teacher_checkpoints"] == [done.runs[phase][0]["checkpoint"] for phase in members]
    summary = json.loads(json.dumps(summarize(done.runs, data=done.data)))
    assert summary["phases"]["teacher"]["model"] == "convnet(widths=[6]) + convnet(widths=[4])"
    # A later call finds them both, each by its network.
    again, output = run(folder, "--distill", *TWO, "--name", "again")
    for phase in members:
        assert f"teacher checkpoint: {done.runs[phase][0]['checkpoint']}" in output
        assert again.runs[phase][0]["val_acc"] == done.runs[phase][0]["val_acc"]
    torch.testing.assert_close(weights(again.runs["distilled"][0]), weights(done.runs["distilled"][0]), rtol=0, atol=0)
    checkpoints = [done.runs[phase][0]["checkpoint"] for phase in members]
    given, _ = run(folder, "--distill", *TWO, "--name", "given", "--teacher_checkpoint", *checkpoints)
    torch.testing.assert_close(weights(given.runs["distilled"][0]), weights(again.runs["distilled"][0]), rtol=0, atol=0)
    for flags in (["--teacher_average", "logits"], ["--ensemble_weights", "3", "1"]):
        other, _ = run(folder, "--distill", *TWO, "--name", "again", *flags)
        one, two = (weights(which.runs["distilled"][0])["model.network.0.weight"] for which in (other, again))
        assert not torch.equal(one, two)


def test_teachers_alone_are_measured_together(make_folder: MakeFolder) -> None:
    done, output = run(make_folder(train=12), "--train_teacher", *TWO)
    assert "ensemble convnet(widths=[6]) + convnet(widths=[4])" in output
    assert "teacher" in done.runs


def test_the_same_network_twice_is_trained_with_two_seeds(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    twice = ["--teacher_model", "convnet(widths=[6])", "convnet(widths=[6])"]
    first, _ = run(folder, "--train_teacher")
    with pytest.raises(UserError, match=r"no finished convnet\(widths=\[6\]\) with another seed for"):
        run(folder, "--distill", *twice)
    done, _ = run(folder, "--train_teacher", *twice, "--name", "twice")
    runs = done.runs["teacher/convnet_widths_6"]
    assert [one["seed"] for one in runs] == [0, 1]
    torch.testing.assert_close(weights(runs[0]), weights(first.runs["teacher"][0]), rtol=0, atol=0)
    again, _ = run(folder, "--distill", *twice, "--name", "twice")
    # In their order, in which they have their weights.
    assert [one["checkpoint"] for one in again.runs["teacher/convnet_widths_6"]] == [one["checkpoint"] for one in runs]


def test_assistants_are_distilled_one_from_the_other(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    # On so few images even a good assistant may not be told from chance.
    chain = ["--assistants", "convnet(widths=[5])", "convnet(widths=[5])", "--allow_weak_teacher"]
    done, output = run(folder, "--train_teacher", "--distill", "--baseline", "--seeds", "2", *chain, "--name", "chain")
    names = ["assistant/1-convnet_widths_5", "assistant/2-convnet_widths_5"]
    assert list(done.runs) == ["teacher", *names, "baseline", "distilled"]
    assert event_folders(Path("logs/chain")) == sorted(
        [
            *(f"{phase}/version_0" for phase in ("teacher", *names)),
            *(f"{phase}/version_{index}" for phase in ("baseline", "distilled") for index in (0, 1)),
        ]
    )
    assert output.count("assistant convnet(widths=[5]) · validation accuracy ") == 2
    taught_by = [done.runs[phase][0]["teacher_checkpoints"] for phase in (*names, "distilled")]
    assert taught_by == [[done.runs[phase][0]["checkpoint"]] for phase in ("teacher", *names)]
    assert done.runs[names[0]][0]["agreement"] is not None
    # Born again: the same network, another teacher, other weights.
    assert not torch.equal(*(weights(done.runs[phase][0])["model.network.0.weight"] for phase in names))
    assert list(json.loads(json.dumps(summarize(done.runs, data=done.data)))["phases"]) == [
        "teacher",
        *names,
        "baseline",
        "distilled",
    ]
    # The student is compared with the baseline of an earlier call, and shown with who taught it.
    alone, _ = run(folder, "--baseline", "--seeds", "2", "--name", "chain")
    assert list(alone.runs) == ["baseline", "distilled", names[1]]


def test_what_is_compared_is_compared_in_the_student_alone(make_folder: MakeFolder) -> None:
    # The first teacher has no map; the assistant, which teaches the student, has.
    networks = ["--teacher_model", "mlp(hidden=[32])", "--assistants", "convnet(widths=[6])", "--allow_weak_teacher"]
    objectives = ["--compare_losses", "kl", "ce=1 hint(teacher_node=2)=1"]
    done, _ = run(make_folder(train=12), "--train_teacher", *networks, *objectives, "--max_epochs", "1")
    assert [one["objective"] for one in done.runs["compared"]] == objectives[1:]


def test_a_long_objective_has_a_folder_of_a_name_that_fits(make_folder: MakeFolder) -> None:
    long = " ".join(f"kl(temperature={temperature}.0)=0.1" for temperature in range(1, 18))
    done, _ = run(
        make_folder(train=12),
        "--train_teacher",
        "--compare_losses",
        "kl",
        long,
        "--max_epochs",
        "1",
        "--allow_weak_teacher",
    )
    assert done.runs["compared"][1]["objective"] == long


def test_a_student_is_shown_beside_the_teacher_that_taught_it(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    run(folder, "--train_teacher", "--distill", "--name", "one")
    done, _ = run(folder, "--train_teacher", "--baseline", "--name", "one")
    # The second call trains a teacher with the same weights, bit for bit.
    assert list(done.runs) == ["teacher", "baseline", "distilled"]
    done, _ = run(folder, "--train_teacher", "--baseline", "--name", "one", "--teacher_learning_rate", "0.01")
    assert list(done.runs) == ["teacher", "baseline"]


def test_a_step_of_the_chain_is_a_distillation_like_any_other(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    chain, _ = run(
        folder,
        "--train_teacher",
        "--distill",
        "--assistants",
        "convnet(widths=[3])",
        "--name",
        "chain",
        "--allow_weak_teacher",
    )
    straight, _ = run(folder, "--distill", "--name", "straight")
    assistant, student = chain.runs["assistant/1-convnet_widths_3"][0], straight.runs["distilled"][0]
    torch.testing.assert_close(weights(assistant), weights(student), rtol=0, atol=0)


def test_a_teacher_of_another_size_sees_the_students_view_resized(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    flags = ["--teacher_image_size", "24"]
    done, output = run(folder, "--train_teacher", "--distill", "--loss", "ce=0.1", "kl=0.9", "hint=0.1", *flags)
    teacher = done.runs["teacher"][0]
    assert teacher["image_size"] == 24
    assert load_classifier(teacher["checkpoint"]).description.image_size == 24
    assert load_classifier(done.runs["distilled"][0]["checkpoint"]).description.image_size == 16
    again, output = run(folder, "--distill", *flags)
    assert f"teacher checkpoint: {teacher['checkpoint']}" in output
    assert again.runs["teacher"][0]["val_acc"] > 0.5


def test_images_without_labels_add_steps_to_the_distilled_student_alone(make_folder: MakeFolder) -> None:
    folder = make_folder(train=8)
    for index in range(8):
        Path("more").mkdir(exist_ok=True)
        Image.new("RGB", (12, 12), (10 * index, 60, 60)).save(f"more/{index}.png")
    flags = [
        "--baseline",
        "--distill",
        "--batch_size",
        "4",
        "--max_epochs",
        "1",
        "--train_fraction",
        "0.5",
        "--allow_weak_teacher",
    ]
    first, _ = run(folder, "--train_teacher", *flags)
    steps = {}
    for name, more in {"data": ["--unlabeled_data", "more"], "rest": ["--unlabeled_rest"]}.items():
        both, _ = run(folder, *flags, *more, "--name", name)
        steps[name] = {phase: both.runs[phase][0]["steps"] for phase in ("baseline", "distilled")}
        torch.testing.assert_close(
            weights(both.runs["baseline"][0]), weights(first.runs["baseline"][0]), rtol=0, atol=0
        )
    assert first.runs["distilled"][0]["steps"] == 3
    assert steps == {"data": {"baseline": 3, "distilled": 5}, "rest": {"baseline": 3, "distilled": 6}}
    # What has images without labels is another recipe.
    alone, _ = run(folder, "--baseline", *flags[2:], "--unlabeled_rest", "--name", "data")
    assert "distilled" not in alone.runs


def test_baseline_and_distilled_meet_the_same_mixtures(make_folder: MakeFolder) -> None:
    still = ["--learning_rate", "1e-30", "--teacher_learning_rate", "0.02", "--weight_decay", "0"]
    mixed = ["--mixup", "0.4", "--cutmix", "1"]
    folder = make_folder(train=12)
    done, _ = run(folder, "--train_teacher", "--baseline", "--distill", *still, *mixed)
    plain, _ = run(folder, "--baseline", *still)
    # The statistics of batch normalization are those of the mixtures.
    torch.testing.assert_close(
        weights(done.runs["baseline"][0]), weights(done.runs["distilled"][0]), rtol=0, atol=1e-25
    )
    name = "model.network.1.running_var"
    assert not torch.equal(weights(done.runs["baseline"][0])[name], weights(plain.runs["baseline"][0])[name])
    # The teacher's own training is not mixed.
    taught, _ = run(folder, "--train_teacher", *still, "--name", "plain")
    torch.testing.assert_close(weights(taught.runs["teacher"][0]), weights(done.runs["teacher"][0]), rtol=0, atol=0)


def test_the_average_is_the_students(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    done, _ = run(folder, "--train_teacher", "--baseline", "--distill", "--ema", "0.9")
    kinds, states = {}, {}
    for phase, (one, *_) in done.runs.items():
        checkpoint = torch.load(Path(one["folder"], "checkpoints", "last.ckpt"), weights_only=True)
        kinds[phase] = {name.partition(".")[0] for name in checkpoint["module"]}
        states[phase] = checkpoint
    assert kinds == {"teacher": {"model"}, "baseline": {"model", "average"}, "distilled": {"model", "average"}}
    for phase in ("baseline", "distilled"):
        shipped, module = states[phase]["state_dict"], states[phase]["module"]
        for name, value in shipped.items():
            assert torch.equal(value, module[f"average.module.{name.removeprefix('model.')}"])


def test_a_loss_that_leaves_the_last_layer_alone_is_remarked_on(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    _, output = run(folder, "--train_teacher", "--distill", "--loss", "hint=1")
    assert "note: hint: no term uses the student's logits, so its last layer isn't trained" in output
    _, output = run(folder, "--distill", "--loss", "hint=1", "ce=1")
    assert "so its last layer" not in output


def test_a_trial_run_goes_through_everything(make_folder: MakeFolder) -> None:
    flags = [
        "--train_teacher",
        "--baseline",
        "--distill",
        *TWO,
        "--assistants",
        "linear",
        "--fast_dev_run",
        "--ema",
        "0.9",
    ]
    done, _ = run(make_folder(), *flags, "--mixup", "1", "--loss", "ce", "kl", "jacobian")
    assert list(done.runs) == [
        *(
            "teacher/convnet_widths_6",
            "teacher/convnet_widths_4",
            "teacher",
            "assistant/1-linear",
            "baseline",
            "distilled",
        )
    ]
    assert not Path("logs").exists()
