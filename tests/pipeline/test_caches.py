"""A run that reads stored logits ends with weights bit-identical to those of a run that computes them."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd.console import make_console
from kd.data import read_splits
from kd.errors import UserError
from kd.pipeline.caches import cache_images
from tests.conftest import MakeFolder
from tests.pipeline.test_experiment import run, weights

KILLED = """
import os, signal, sys
from kd.teachers import LogitStore
from kd.cli import experiment
plain = LogitStore.write
def write(self, *given):
    told = plain(self, *given)
    if self.written_batches == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return told
LogitStore.write = write
sys.exit(experiment(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_reading_run_equals_a_computing_run(make_folder: MakeFolder, workers: str) -> None:
    folder = make_folder(train=12)
    flags = ["--distill", "--num_workers", workers, "--augment", "crop", "--seeds", "2"]
    run(folder, "--train_teacher")
    plain, _ = run(folder, *flags, "--teacher_cache", "none", "--name", "plain")
    first, output = run(folder, *flags, "--teacher_cache", "stores", "--name", "first")
    assert "read from the cache" not in output
    again, output = run(folder, *flags, "--teacher_cache", "stores", "--name", "again")
    assert output.count("teacher logits: 15 batches read from the cache\n") == 2
    for seed in range(2):
        states = [weights(done.runs["distilled"][seed]) for done in (plain, first, again)]
        torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
        torch.testing.assert_close(states[2], states[0], rtol=0, atol=0)


def test_another_student_and_another_objective_read_the_same_store(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    run(folder, "--train_teacher", "--distill")
    for flags in (["--loss", "mse"], ["--student_model", "linear"], ["--temperature", "2"], ["--learning_rate", "0.1"]):
        _, output = run(folder, "--distill", *flags)
        assert "teacher logits: 15 batches read from the cache\n" in output
    # Longer training reads what there is.
    _, output = run(folder, "--distill", "--max_epochs", "4")
    assert "teacher logits: 15 batches read from the cache, 5 computed" in output
    for flags in (
        ["--seed", "7"],
        ["--augment", "rotate"],
        ["--image_size", "16", "--train_fraction", "0.5"],
        ["--batch_size", "6"],
        ["--mixup", "0.2"],
        ["--loss", "kl", "hint"],
    ):
        _, output = run(folder, "--distill", *flags)
        assert "read from the cache" not in output
    # Another teacher of the same network.
    run(folder, "--train_teacher", "--seed", "3")
    _, output = run(
        folder,
        "--distill",
        "--teacher_checkpoint",
        "logs/photos-convnet_widths_6-convnet_widths_3/teacher/version_1/checkpoints/best.ckpt",
    )
    assert "read from the cache" not in output


def test_after_a_kill_what_was_written_is_read_and_the_rest_is_computed(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    run(folder, "--train_teacher")
    plain, _ = run(folder, "--distill", "--teacher_cache", "none", "--name", "plain")
    line = [
        "--config",
        "small.yaml",
        "--data_dir",
        str(folder),
        "--distill",
        "--teacher_cache",
        "stores",
        "--name",
        "killed",
    ]
    killed = subprocess.run([sys.executable, "-c", KILLED, *line], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    done, output = run(folder, "--distill", "--teacher_cache", "stores", "--name", "whole")
    assert "teacher logits: 4 batches read from the cache, 11 computed" in output
    torch.testing.assert_close(weights(done.runs["distilled"][0]), weights(plain.runs["distilled"][0]), rtol=0, atol=0)


def test_views_that_come_again_are_read_again(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    run(folder, "--train_teacher")
    flags = ["--distill", "--views", "1", "--augment", "crop"]
    plain, _ = run(folder, *flags, "--teacher_cache", "none", "--name", "plain")
    stored, output = run(folder, *flags, "--name", "stored")
    assert "teacher logits: 10 batches read from the cache, 5 computed" in output
    torch.testing.assert_close(
        weights(stored.runs["distilled"][0]), weights(plain.runs["distilled"][0]), rtol=0, atol=0
    )


def test_a_teacher_sees_new_views_in_each_epoch_whatever_its_students_see(make_folder: MakeFolder) -> None:
    folder, few = make_folder(train=12), ("--views", "1", "--augment", "crop")
    plain, _ = run(folder, "--train_teacher", "--baseline", "--augment", "crop", "--name", "plain")
    again, _ = run(folder, "--train_teacher", "--baseline", *few, "--name", "again")
    for phase in ("teacher", "baseline"):
        one, other = (weights(done.runs[phase][0]) for done in (plain, again))
        same = all(torch.equal(one[name], other[name]) for name in one)
        assert same == (phase == "teacher")


def test_a_store_of_images_is_read_by_later_runs_and_changes_nothing_that_was_not_made_smaller(
    make_folder: MakeFolder,
) -> None:
    folder = make_folder(train=12)
    plain, _ = run(folder, "--baseline", "--image_cache", "none", "--name", "plain")
    stored, _ = run(folder, "--baseline", "--image_cache", "images", "--name", "stored")
    assert len(list(Path("images").glob("*/pixels.u8"))) == 2
    # Images of 20x16 px for views of 16: nothing was made smaller.
    torch.testing.assert_close(weights(stored.runs["baseline"][0]), weights(plain.runs["baseline"][0]), rtol=0, atol=0)
    assert stored.runs["baseline"][0]["provenance"]["settings"]["image_cache"] == 18


def test_a_store_that_can_not_be_written_is_a_clean_error(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    Path("file").touch()
    with pytest.raises(UserError, match="--image_cache file: can't write decoded images there"):
        run(folder, "--baseline", "--image_cache", "file")
    with pytest.raises(UserError, match="--teacher_cache file: can't write the teacher's logits there"):
        run(folder, "--train_teacher", "--distill", "--teacher_cache", "file")


def test_a_run_that_keeps_the_largest_logits_says_what_that_costs(make_folder: MakeFolder) -> None:
    names = tuple(f"class{number}" for number in range(6))
    folder = make_folder(train=4, classes=names)
    run(folder, "--train_teacher")
    first, output = run(folder, "--distill", "--teacher_top", "2")
    assert "teacher logits: the largest 2 of 6 kept; soft targets at temperature 4 differ by" in output
    again, output = run(folder, "--distill", "--teacher_top", "2")
    assert "read from the cache\n" in output
    states = [weights(done.runs["distilled"][0]) for done in (first, again)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    exact, _ = run(folder, "--distill")
    assert any(not torch.equal(states[0][name], value) for name, value in weights(exact.runs["distilled"][0]).items())


def test_views_of_the_device_train_a_student(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12, size=(40, 40))
    run(folder, "--train_teacher", "--augment", "crop")
    flags = ["--distill", "--augment", "crop", "--augment_on"]
    there, _ = run(folder, *flags, "device", "--name", "there")
    here, output = run(folder, *flags, "cpu", "--name", "here")
    # Nearly the same views: another store.
    assert "read from the cache" not in output
    states = [weights(done.runs["distilled"][0]) for done in (there, here)]
    assert states[0].keys() == states[1].keys()


@pytest.mark.timeout(300)
def test_compiled_networks_train_and_leave_the_same_checkpoint(make_folder: MakeFolder) -> None:
    folder = make_folder(train=12)
    run(folder, "--train_teacher")
    compiled, output = run(folder, "--distill", "--compile", "--name", "compiled")
    assert "--compile: not used" not in output
    plain, _ = run(folder, "--distill", "--name", "plain")
    states = [weights(done.runs["distilled"][0]) for done in (compiled, plain)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-4)


def test_without_a_compiler_it_goes_on_and_says_so(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(train=12)
    monkeypatch.setattr("kd.pipeline.components.why_not_compiled", lambda _: "no C++ compiler")
    done, output = run(folder, "--baseline", "--compile")
    assert "--compile: not used, it fails here: no C++ compiler" in output
    assert done.runs["baseline"][0]["checkpoint"]


def test_a_run_that_can_keep_no_store_says_why(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("KD_CACHE", str(in_the_way / "cache"))
    train = read_splits(make_folder()).train
    said = io.StringIO()
    stored = cache_images(train, image_size=16, augment="crop", where="auto", console=make_console(file=said))
    assert stored is train
    assert said.getvalue().startswith("note: decoded images aren't cached, each is decoded in every epoch: can't write")
