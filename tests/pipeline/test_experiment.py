"""Whole experiments on small folders, through the settings, as the commands run them."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd.console import make_console
from kd.errors import UserError
from kd.pipeline import Experiment, check_experiment, evaluate_checkpoint, run_experiment
from kd.settings import resolve
from kd.training import Hardware
from tests.conftest import REPOSITORY, MakeFolder

SMALL = """
image_size: 16
batch_size: 8
augment: none
max_epochs: 3
learning_rate: 0.02
accelerator: cpu
teacher_model: convnet(widths=[6])
student_model: convnet(widths=[3])
"""


def run(folder: Path, *flags: str) -> tuple[Experiment, str]:
    output = io.StringIO()
    Path("small.yaml").write_text(SMALL)
    settings, *_ = resolve(["--config", "small.yaml", "--data_dir", str(folder), *flags])
    return run_experiment(settings, console=make_console(file=output)), output.getvalue()


def weights(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(Path(run["folder"], "checkpoints", "last.ckpt"), weights_only=True)
    state: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return state


def test_the_protocol_of_cifar_runs_in_a_short_form(make_folder: MakeFolder) -> None:
    config = ["--config", str(REPOSITORY / "configs" / "cifar100.yaml"), "--dataset", "imagefolder"]
    short = ["--max_epochs", "2", "--milestones", "1", "--teacher_model", "linear", "--accelerator", "cpu"]
    flags = [*config, *short, "--data_dir", str(make_folder()), "--baseline", "--name", "cifar"]
    settings, *_ = resolve(flags)
    done = run_experiment(settings, console=make_console(file=io.StringIO()))
    recipe = done.runs["baseline"][0]["provenance"]["settings"]
    expected = {"augment": "pad_crop", "optimizer": "sgd", "nesterov": True, "schedule": "multistep", "batch_size": 64}
    assert {name: recipe[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--nesterov",), "--nesterov: is a kind of momentum of sgd; add --optimizer sgd"),
        (("--schedule", "multistep"), "--schedule multistep: needs --milestones"),
        (("--milestones", "1", "2"), "--milestones 1.0 2.0: only used by --schedule multistep, not cosine"),
    ],
)
def test_an_optimization_that_contradicts_itself_is_refused(
    make_folder: MakeFolder, flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run(make_folder(), "--baseline", *flags)


def test_the_baseline_minimizes_the_objective_that_is_given(make_folder: MakeFolder) -> None:
    Path("own.py").write_text(
        "import torch.nn.functional as F\n\n\ndef half(student, teacher, labels):\n"
        "    return F.cross_entropy(student, labels) / 2\n\n\ndef mimic(student, teacher, labels):\n"
        "    return F.mse_loss(student, teacher)\n"
    )
    folder = make_folder()
    done, _ = run(folder, "--baseline", "--baseline_loss", "focal(gamma=1)=0.5", "own.py:half=2", "--name", "own")
    (record,) = done.runs["baseline"]
    assert record["provenance"]["settings"]["baseline_loss"] == ["focal(gamma=1)=0.5", "own.py:half=2"]
    assert "own.py" in record["provenance"]["code"]
    events = EventAccumulator(record["folder"])
    events.Reload()
    assert {"train/focal", "train/half"} <= set(events.Tags()["scalars"])
    for loss, name in (("kl=1", "kl"), ("own.py:mimic=1", "mimic")):
        with pytest.raises(UserError, match=rf"--baseline_loss {loss}: {name} depends on a teacher's logits"):
            run(folder, "--baseline", "--baseline_loss", loss)


def test_an_objective_that_no_phase_uses_is_noted(make_folder: MakeFolder) -> None:
    _, output = run(make_folder(), "--baseline", "--loss", "kl=1", "--fast_dev_run")
    assert "note: --loss kl=1: not used, as no student is distilled with it (--distill)" in " ".join(output.split())


def test_all_phases_over_two_seeds_leave_what_the_plan_says(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    done, output = run(folder, "--train_teacher", "--baseline", "--distill", "--seeds", "2", "--name", "all")
    assert {phase: [one["seed"] for one in runs] for phase, runs in done.runs.items()} == {
        "teacher": [0],
        "baseline": [0, 1],
        "distilled": [0, 1],
    }
    assert "teacher convnet(widths=[6]) · validation accuracy 100.0%" in output
    assert done.folder == Path("logs/all")
    assert {path.name for path in done.folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "predictions",
        "teacher",
        "baseline",
        "distilled",
    }
    for phase, runs in done.runs.items():
        for version, one in enumerate(runs):
            place = done.folder / phase / f"version_{version}"
            assert one["folder"] == str(place)
            assert json.loads((place / "metrics.json").read_text()) == one
            assert yaml.safe_load((place / "config.yaml").read_text())["seeds"] == 2
    assert all(0 <= one["agreement"] <= 1 for one in done.runs["distilled"])
    again, *_ = resolve(["--config", str(done.folder / "config.yaml")])
    assert again.phases.name == "all"


def test_baseline_and_distilled_of_one_seed_start_from_the_same_weights_and_see_the_same_images(
    make_folder: MakeFolder,
) -> None:
    # With a learning rate that changes nothing, what is left is what they started from, and the statistics of batch
    # normalization are those of the images that they met, in the order that they met them.
    still = ["--learning_rate", "1e-30", "--teacher_learning_rate", "0.02", "--weight_decay", "0"]
    done, _ = run(make_folder(train=12), "--train_teacher", "--baseline", "--distill", "--seeds", "2", *still)
    alone, distilled = done.runs["baseline"], done.runs["distilled"]
    for one, other in zip(alone, distilled, strict=True):
        torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=1e-25)
    first, second = weights(alone[0]), weights(alone[1])
    assert not torch.equal(first["model.network.0.weight"], second["model.network.0.weight"])
    assert not torch.equal(first["model.network.1.running_mean"], second["model.network.1.running_mean"])


def test_distill_alone_takes_the_teacher_of_an_earlier_call_and_meets_its_baseline(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    first, _ = run(folder, "--train_teacher", "--baseline")
    done, output = run(folder, "--distill")
    assert f"teacher checkpoint: {first.runs['teacher'][0]['checkpoint']}" in output
    assert done.folder == first.folder == Path("logs/photos-convnet_widths_6-convnet_widths_3")
    assert done.runs["teacher"][0]["val_acc"] == first.runs["teacher"][0]["val_acc"]
    # The same recipe: comparable, and so in one table.
    assert done.runs["baseline"] == first.runs["baseline"]
    other, _ = run(folder, "--distill", "--max_epochs", "2")
    assert "baseline" not in other.runs
    # One batch (1) is not all of them (1.0).
    limited, _ = run(folder, "--distill", "--limit_val_batches", "1")
    assert "baseline" not in limited.runs
    # An experiment of another name finds the teacher, too.
    third, output = run(folder, "--distill", "--name", "third")
    assert f"teacher checkpoint: {first.runs['teacher'][0]['checkpoint']}" in output
    assert third.folder == Path("logs/third")


def test_baseline_alone_meets_what_was_distilled_earlier_and_its_teacher(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    first, _ = run(folder, "--train_teacher", "--distill", "--seeds", "2")
    done, _ = run(folder, "--baseline", "--seeds", "2")
    assert done.runs["distilled"] == first.runs["distilled"]
    assert done.runs["teacher"] == first.runs["teacher"]
    # What an earlier run left broken is that run's affair.
    Path(first.runs["distilled"][1]["folder"], "metrics.json").write_text("[")
    done, _ = run(folder, "--baseline", "--seeds", "2")
    assert done.runs["distilled"] == first.runs["distilled"][:1]


def test_a_found_teachers_accuracy_is_the_one_measured_here(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    first, _ = run(folder, "--train_teacher")
    assert first.runs["teacher"][0]["val_acc"] == 1.0
    # The same name and classes, other images: two of five in each class are another class's.
    for index in range(2):
        for one, other in (("ant", "bee"), ("bee", "cat"), ("cat", "ant")):
            (folder / "val" / other / f"{index}.png").rename(folder / "val" / one / f"other{index}.png")
    done, output = run(folder, "--distill", "--allow_weak_teacher")
    assert "validation accuracy 60.0%" in output
    assert done.runs["teacher"][0]["val_acc"] == pytest.approx(0.6)


def test_a_teacher_checkpoint_may_be_named(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(train=12)
    first, _ = run(folder, "--train_teacher")
    moved = tmp_path / "teacher.ckpt"
    Path(first.runs["teacher"][0]["checkpoint"]).rename(moved)
    done, output = run(folder, "--distill", "--teacher_checkpoint", str(moved), "--name", "given")
    assert f"teacher checkpoint: {moved}" in output
    assert done.runs["teacher"][0]["val_acc"] == 1.0
    assert done.runs["teacher"][0]["parameters"] == first.runs["teacher"][0]["parameters"]


def test_objectives_are_compared_from_the_same_teacher(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    flags = ["--train_teacher", "--compare_losses", "ce=0.1 kl(temperature=2)=0.9", "mse", "--seeds", "2"]
    done, output = run(folder, *flags, "--name", "bench")
    assert "distilled convnet(widths=[3]) · mse · seed 1" in output
    compared = [(one["objective"], one["seed"]) for one in done.runs["compared"]]
    assert compared == [
        ("ce=0.1 kl(temperature=2)=0.9", 0),
        ("mse", 0),
        ("ce=0.1 kl(temperature=2)=0.9", 1),
        ("mse", 1),
    ]
    assert "distilled" not in done.runs
    assert {path.name for path in Path("logs/bench/compared").iterdir()} == {"ce_0.1_kl_temperature_2_0.9", "mse"}
    assert Path("logs/bench/compared/mse/version_1/checkpoints/best.ckpt").is_file()
    # The same objective by --distill comes to the same weights.
    again, _ = run(folder, "--distill", "--loss", "mse", "--name", "bench")
    mse = next(one for one in done.runs["compared"] if one["objective"] == "mse")
    torch.testing.assert_close(weights(again.runs["distilled"][0]), weights(mse), rtol=0, atol=0)


def test_no_phase_named_trains_the_student_on_the_labels(make_folder: MakeFolder) -> None:
    done, _ = run(make_folder())
    assert list(done.runs) == ["baseline"]


def test_a_fast_dev_run_goes_through_everything_and_leaves_no_files(make_folder: MakeFolder) -> None:
    done, output = run(make_folder(), "--train_teacher", "--baseline", "--distill", "--fast_dev_run", "--seeds", "2")
    assert {phase: len(runs) for phase, runs in done.runs.items()} == {"teacher": 1, "baseline": 2, "distilled": 2}
    assert not done.kept
    assert not Path("logs").exists()
    assert "teacher convnet(widths=[6]) · validation accuracy" in output


def test_the_fraction_is_the_students_alone(make_folder: MakeFolder) -> None:
    flags = ["--allow_weak_teacher", "--train_fraction", "0.5", "--batch_size", "4", "--max_epochs", "1"]
    done, _ = run(make_folder(train=8), "--train_teacher", "--baseline", "--distill", *flags)
    assert {phase: runs[0]["steps"] for phase, runs in done.runs.items()} == {
        "teacher": 6,
        "baseline": 3,
        "distilled": 3,
    }


def test_the_teachers_twins_are_the_teachers_alone(make_folder: MakeFolder) -> None:
    twins = ["--teacher_epochs", "2", "--teacher_steps", "4", "--max_steps", "5"]
    done, _ = run(make_folder(train=8), "--train_teacher", "--baseline", *twins)
    assert done.runs["teacher"][0]["steps"] == 4
    assert done.runs["baseline"][0]["steps"] == 5


def test_a_teacher_that_has_learned_nothing_is_refused_unless_allowed(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    weak = ["--train_teacher", "--distill", "--teacher_learning_rate", "1e-30", "--max_epochs", "1"]
    with pytest.raises(UserError, match=r"is no better than chance: .* gives 33.3%; train it longer"):
        run(folder, *weak)
    done, output = run(folder, *weak, "--allow_weak_teacher")
    assert "arning: the teacher's accuracy" in output
    assert "distilled" in done.runs
    settings, *_ = resolve(["--config", "small.yaml", "--data_dir", str(folder), "--distill", "--allow_weak_teacher"])
    found = check_experiment(settings, console=make_console(file=io.StringIO()))
    assert any(one.level == "warning" and "no better than chance" in one.text for one in found)


def test_a_teacher_is_measured_on_all_validation_images_whatever_the_limit(make_folder: MakeFolder) -> None:
    # Of the first batch alone, all images would be of one class, and none could be better than chance.
    flags = ["--train_teacher", "--distill", "--limit_val_batches", "1", "--batch_size", "4"]
    _, output = run(make_folder(train=12), *flags)
    assert "validation accuracy 100.0%" in output


def test_own_loss_and_own_model_from_files(make_folder: MakeFolder) -> None:
    Path("mine.py").write_text(
        "from torch import nn\nimport torch.nn.functional as F\n"
        "def far(student_logits, teacher_logits, labels):\n    return F.l1_loss(student_logits, teacher_logits)\n"
        "def net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, num_classes))\n"
    )
    flags = ["--teacher_model", "mine.py:net", "--student_model", "mine.py:net", "--loss", "ce=0.1", "mine.py:far=0.9"]
    done, _ = run(make_folder(train=12), "--train_teacher", "--distill", *flags)
    checkpoint = done.runs["distilled"][0]["checkpoint"]
    folder = str(make_folder("again"))
    with pytest.raises(UserError, match=r"to run that code, add --model 'mine.py:net'"):
        evaluate_checkpoint(checkpoint, data_dir=folder)
    assert evaluate_checkpoint(checkpoint, data_dir=folder, model="mine.py:net")["images"] == 15


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--distill", "--distill: no teacher found: no finished .* under logs; train one"),
        ("--distill --loss ce=1", "--distill --loss ce=1: there is nothing to distill"),
        ("--distill --loss ce=1 kl=0", "there is nothing to distill"),
        ("--train_teacher --teacher_checkpoint x.ckpt", "the teacher is either trained or loaded"),
        ("--name ../x", "--name ../x: not a valid folder name"),
        ("--precision 12-true", "--precision 12-true"),
        ("--limit_train_batches 2.5", "--limit_train_batches 2.5"),
        ("--batch_size 1 --image_size 2 --student_model convnet(widths=[4,4])", "--batch_size 1: convnet"),
        ("--default_root_dir small.yaml", "--default_root_dir small.yaml: can't write there"),
        ("--compare_losses kl kll=1", r"--compare_losses 'kll=1': there is no loss 'kll'; did you mean 'kl'\?"),
        ("--compare_losses kl kl", "--compare_losses: 'kl' is listed twice"),
        ("--loss kll=1", r"there is no loss 'kll'; did you mean 'kl'\?"),
        ("--num_classes 5", "--num_classes 5: photos has 3"),
        ("--student_model resnet19", "--student_model resnet19: there is no network 'resnet19'"),
        ("--baseline --student_pretrained", "--student_pretrained: there are no published weights"),
        ("--train_teacher --teacher_pretrained", "--teacher_pretrained: there are no published weights"),
        ("--distill --teacher_checkpoint absent.ckpt", "absent.ckpt: there is no such checkpoint"),
        ("--loss hint(student_node=layr)=1 --train_teacher --distill", r"--loss hint: convnet.* has no node 'layr'"),
        ("--loss hint(layer=3)=1", "there is no hyperparameter 'layer'"),
        ("--loss at --train_teacher --distill --student_model mlp", "--loss at: mlp has no last feature map"),
        ("--loss kl=-1", "the weight of kl must be 0 or more"),
        ("--milestones 3", "--milestones 3.0: only used by --schedule multistep, not cosine"),
        ("--gamma 0.5", "--gamma 0.5: only used by --schedule step or multistep, not cosine"),
        ("--step_epochs 3 --schedule poly", "--step_epochs 3: only used by --schedule step, not poly"),
        ("--schedule multistep --milestones 1 99", "--milestones 99: never reached in"),
        ("--swa 1 --ema 0.9", "--swa --ema: both average the weights; drop one of them"),
        ("--swa 99", "--swa 99: never reached, as --max_epochs is"),
        ("--freeze 99", "write --freeze backbone for a linear probe"),
        ("--freeze backbone --update_bn", "--freeze --update_bn: the statistics of frozen layers are kept"),
        ("--optimizer adamm", "--optimizer adamm: there is no such optimizer; did you mean 'adam'?"),
        ("--gradient_checkpointing", "--gradient_checkpointing --student_model"),
        ("--augment cropp", "--augment cropp: there is no augmentation 'cropp'; did you mean 'crop'?"),
        ("--loss dkd --mixup 0.2", r"--loss: dkd needs integer labels; it can't be combined with mixup or CutMix"),
        ("--unlabeled_data absent", "--unlabeled_data absent: there is no such folder"),
        ("--unlabeled_rest", "--unlabeled_rest: all training images are labeled; set --train_fraction"),
        (
            "--teacher_model linear mlp --ensemble_weights 1",
            "--ensemble_weights 1.0: 1 given, but --teacher_model names 2",
        ),
        (
            "--teacher_model linear mlp --ensemble_weights 0 0",
            "--ensemble_weights: at least one weight must be positive",
        ),
        ("--distill --teacher_model linear mlp --teacher_checkpoint x", "--teacher_checkpoint x: 1 given"),
        ("--teacher_model linear --teacher_image_size 8 9", "--teacher_image_size 8 9: 2 given"),
        ("--train_teacher --distill --teacher_model linear mlp --loss hint", "features are compared with those of one"),
        ("--train_teacher --distill --assistants resnet19", "--assistants resnet19: there is no network 'resnet19'"),
        (
            "--train_teacher --distill --assistants linear --assistant_pretrained",
            "--assistant_pretrained: there are no",
        ),
        ("--teacher_model", "--teacher_model"),
        (
            "--ema 0.9 --precision bf16-true",
            "--ema --precision bf16-true: half precision is too coarse for an average of weights",
        ),
        ("--dataset mnits", r"there is no data set 'mnits'; did you mean 'mnist'\?"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(make_folder: MakeFolder, flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(make_folder(), *flags.split())
    assert not Path("logs").exists()


def test_a_teacher_of_other_classes_or_another_size_is_refused(make_folder: MakeFolder) -> None:
    first, _ = run(make_folder(train=12), "--train_teacher")
    given = ["--distill", "--teacher_checkpoint", first.runs["teacher"][0]["checkpoint"]]
    with pytest.raises(UserError, match=r"was trained on other classes: only the teacher has cat; only pets has dog"):
        run(make_folder("pets", classes=("ant", "bee", "dog")), *given)
    with pytest.raises(
        UserError, match=r"trained on images of 16 px, but --image_size is 24; add --teacher_image_size 16"
    ):
        run(make_folder("more"), *given, "--image_size", "24")
    with pytest.raises(UserError, match=r"--teacher_model linear: .* holds convnet\(widths=\[6\]\)"):
        run(make_folder("other"), *given, "--teacher_model", "linear")


def test_a_checkpoint_is_measured_on_any_folder_of_its_classes(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    done, _ = run(folder, "--train_teacher")
    checkpoint = done.runs["teacher"][0]["checkpoint"]
    measured = evaluate_checkpoint(checkpoint, data_dir=str(folder))
    assert measured["val/acc"] == pytest.approx(done.runs["teacher"][0]["best_val_acc"])
    assert measured["images"] == 15
    # A folder of class folders will do.
    hardware = Hardware(accelerator="cpu", precision="32-true")
    assert evaluate_checkpoint(checkpoint, data_dir=str(folder / "train"), hardware=hardware)["images"] == 36
    with pytest.raises(UserError, match=r"was trained on other classes: only the images have 0, 1, 2, 3, 4, \.\.\."):
        evaluate_checkpoint(checkpoint, dataset="digits")
    # Some of the classes, in another order: they are matched by name.
    some = make_folder("some", classes=("cat", "ant"), train=3)
    (some / "val" / "ant").rename(some / "val" / "zant")
    with pytest.raises(UserError, match="only the images have zant"):
        evaluate_checkpoint(checkpoint, data_dir=str(some))
    (some / "val" / "zant").rename(some / "val" / "ant")
    for place in (folder / "val").iterdir():
        if place.name != "bee":
            shutil.rmtree(some / "val" / place.name)
            shutil.copytree(place, some / "val" / place.name)
    measured = evaluate_checkpoint(checkpoint, data_dir=str(some))
    assert (measured["images"], measured["val/acc"]) == (10, 1.0)
    with pytest.raises(UserError, match="--data_dir absent: there is no such folder"):
        evaluate_checkpoint(checkpoint, data_dir="absent")
    with pytest.raises(UserError, match="--dataset imagefolder: set --data_dir"):
        evaluate_checkpoint(checkpoint)
