"""What the surroundings of an experiment do to it: closed output, other folders, taken ports, little shared memory."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kd import preflight
from kd.cli import experiment, main
from tests.conftest import MakeFolder
from tests.pipeline.test_splits import FLAGS


def weights(name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(f"logs/{name}/baseline/version_0/checkpoints/last.ckpt")["state_dict"]
    return state


def test_a_closed_output_does_not_end_a_training(repository: Path, make_folder: MakeFolder) -> None:
    flags = [*FLAGS, "--data_dir", str(make_folder(train=6, val=4)), "--baseline"]
    command = [sys.executable, str(repository / "experiment.py"), *flags]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert Path("logs/pets/summary.json").is_file()


def test_an_experiment_is_resumed_from_another_folder_with_its_own_images(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = make_folder("here/small", train=6, val=4)
    monkeypatch.chdir(small.parent)
    assert experiment([*FLAGS, "--data_dir", "small", "--baseline"]) == 0
    config = yaml.safe_load(Path("logs/pets/config.yaml").read_text())
    assert config["data_dir"] == str(small)
    # Another folder of the same name holds other images.
    other = make_folder("there/small", train=5, val=3)
    monkeypatch.chdir(other.parent)
    capsys.readouterr()
    assert experiment(["--resume", str(small.parent / "logs" / "pets")]) == 0
    assert "already finished" in capsys.readouterr().out
    assert experiment(["--resume", str(small.parent / "logs" / "pets"), "--data_dir", "small"]) == 2
    assert "training images" in capsys.readouterr().err


def test_tables_without_a_data_dir_are_recorded_by_their_place(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(train=6, val=4)
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(folder.rglob("*.png"))]
    monkeypatch.chdir(folder)
    Path("labels.csv").write_text("\n".join(["path,label,split", *rows]))
    assert experiment([*FLAGS, "--train_data", "labels.csv", "--baseline"]) == 0
    config = yaml.safe_load(Path("logs/pets/config.yaml").read_text())
    assert (config["train_data"], config["val_data"]) == (str(folder / "labels.csv"), str(folder / "val"))


def test_a_taken_port_is_one_message_before_any_process_is_started(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        flags = [*FLAGS, "--data_dir", str(make_folder(train=6, val=4)), "--baseline", "--devices", "2"]
        assert experiment(flags) == 2
    error = capsys.readouterr().err
    assert f"--devices 2: MASTER_PORT={port} can't be used: Address already in use; set another port" in error


def test_too_little_shared_memory_is_one_message(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage
    full = usage("/")._replace(free=400)
    monkeypatch.setattr(
        "kd.preflight.shutil.disk_usage", lambda path: full if Path(path) == preflight._SHARED_MEMORY else usage(path)
    )
    flags = [*FLAGS, "--data_dir", str(make_folder(train=6, val=4)), "--baseline", "--num_workers"]
    assert experiment([*flags, "2"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert (
        "--num_workers 2: batches take 0.0 MB of shared memory, but /dev/shm has 0.0 MB free; start the container"
        in error
    )
    assert "--shm-size=1g or --ipc=host, or use --num_workers 0" in error
    assert experiment([*flags, "0"]) == 0


@pytest.mark.parametrize("images", [20, 25])
def test_accumulated_batches_give_the_weights_of_large_ones(make_folder: MakeFolder, images: int) -> None:
    folder = make_folder(classes=("ant", "bee"), train=images, val=4)
    flags = [*FLAGS, "--data_dir", str(folder), "--baseline", "--schedule", "constant", "--optimizer", "sgd"]
    flags += ["--teacher_model", "linear", "--learning_rate", "0.1", "--max_epochs", "2"]
    assert experiment([*flags, "--name", "large", "--batch_size", "12"]) == 0
    assert experiment([*flags, "--name", "small", "--batch_size", "4", "--accumulate", "3"]) == 0
    found = weights("small")
    for key, value in weights("large").items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)


def test_a_script_without_a_guard_is_told_so(repository: Path, make_folder: MakeFolder, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\nimport kd\n\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        f"kd.train_teacher({str(make_folder(train=6, val=4))!r}, model='linear', image_size=8, batch_size=8, "
        "augment='none', accelerator='cpu', max_epochs=1, num_workers=1, image_cache='none', name='x')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment, timeout=180
    )
    assert done.returncode != 0
    assert "if __name__ == '__main__':" in done.stderr


def test_a_file_system_without_locks_is_named(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--data_dir", str(make_folder(train=6, val=4)), "--baseline"]
    flock = fcntl.flock

    def refuse(descriptor: int, operation: int) -> None:
        if "logs" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", refuse)
    assert experiment(flags) == 2
    assert "--default_root_dir logs: can't write there: No locks available; choose another" in capsys.readouterr().err
    lines = ("dataset: digits", "image_size: 8", "name: s", "train_teacher: true", "teacher_model: linear")
    Path("search.yaml").write_text("\n".join([*lines, "student_model: linear", "sweep: {temperature: [1]}"]))
    assert main(["sweep", "search.yaml"]) == 2
    error = capsys.readouterr().err
    assert "--default_root_dir logs: can't write to this folder" in error
    assert "No locks available" in error
