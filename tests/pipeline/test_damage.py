"""Whatever happens to the files of an experiment, a command repairs or ignores it, or ends with one message."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kd.cli import experiment, main
from tests.conftest import MakeFolder

FLAGS = (
    "--image_size 16 --batch_size 8 --accelerator cpu --student_model linear --baseline --max_epochs 2 "
    "--checkpoint_every 2 --name run --resume"
)
EXPERIMENT = Path("logs/run")
VERSION = EXPERIMENT / "baseline" / "version_0"


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replace_by_list(path: Path) -> None:
    path.write_text("[1, 2]")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove(path: Path) -> None:
    path.unlink()


CASES = {
    "config.yaml": (cut, replace_by_folder),
    "summary.json": (cut, replace_by_list),
    "report.html": (replace_by_folder,),
    "baseline/version_0/metrics.json": (cut, replace_by_list, replace_by_folder),
    "baseline/version_0/started.json": (empty, replace_by_list),
    "baseline/version_0/validation.npz": (scramble, replace_by_folder),
    "baseline/version_0/checkpoints/best.ckpt": (scramble, remove),
    "baseline/version_0/checkpoints/last.ckpt": (cut, replace_by_folder),
    "baseline/version_0/events": (cut,),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_damaged_files_are_repaired_ignored_or_named(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags = ["--data_dir", str(make_folder()), *FLAGS.split()]
    assert experiment(flags) == 0
    shutil.copytree(EXPERIMENT, "whole")

    def restore() -> Path:
        shutil.rmtree(EXPERIMENT, ignore_errors=True)
        shutil.copytree("whole", EXPERIMENT)
        return next(VERSION.glob("events*")) if name.endswith("events") else EXPERIMENT / name

    def run(command: Callable[[], int]) -> None:
        capsys.readouterr()
        status, error = command(), capsys.readouterr().err
        assert status == 0 or (status == 2 and error.startswith("error: "))
        assert "Traceback" not in error

    for damage in CASES[name]:
        damage(restore())
        run(lambda: main(["report", str(EXPERIMENT)]))
        run(lambda: experiment(flags))
        # The same damage to a training that was interrupted.
        path = restore()
        (VERSION / "metrics.json").unlink()
        if path.exists():
            damage(path)
        run(lambda: experiment(flags))
