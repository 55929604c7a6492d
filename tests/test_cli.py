"""The commands, as a user runs them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kd.cli import experiment, main
from kd.data import ImageData
from kd.losses import LOSSES
from tests.conftest import MakeFolder

TINY = "--image_size 16 --batch_size 8 --augment none --accelerator cpu --teacher_model linear --student_model linear"


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_an_experiment_prints_its_table_and_names_its_files(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UV", raising=False)
    flags = f"--data_dir {make_folder(train=12)} --train_teacher --baseline --distill --max_epochs 3 --name tiny {TINY}"
    assert experiment(flags.split()) == 0
    out, err = printed(capsys)
    assert err == ""
    assert "student, distilled" in out
    for file in ("summary.json", "config.yaml", "distilled/version_0/checkpoints/best.ckpt"):
        assert f"  {file}\n" in out
        assert Path("logs/tiny", file).is_file()
    assert out.count(".ckpt") == 1
    assert "TensorBoard: tensorboard --logdir logs/tiny\n\nDistillation changed accuracy by " in out
    assert out.endswith("one seed can't separate a gain from noise, use --seeds 3.\n")
    # Lightning's own messages and tips are not printed.
    assert not any(word in out for word in ("TPU", "Tip", "litlogger", "Trainer.fit"))

    monkeypatch.setenv("UV", "/usr/bin/uv")
    assert experiment(f"{flags} --fast_dev_run".split()) == 0
    out, _ = printed(capsys)
    assert out.endswith("the figures mean nothing, and no files were written.\n")


def test_the_first_generations_file_runs_and_its_interpretation_is_printed(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f'{{"data_dir": "{make_folder()}", "gpus": 1, "image_size": 32, "max_epochs": 1, "batch_size": 8}}'
    Path("commandline_args.txt").write_text(text)
    assert experiment(["--no-teacher_pretrained", "--accelerator", "cpu", "--teacher_model", "linear"]) == 0
    out, _ = printed(capsys)
    assert "commandline_args.txt: read as a file of the first generation; its recipe is added: optimizer=sgd" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--bach_size 3", "error: --bach_size: unknown flag; did you mean '--batch_size'?"),
        ("--batch_size two", "error: --batch_size two: must be a whole number or auto"),
        ("--temperature 0", "error: --temperature 0: must be above 0"),
        ("--data_dir absent", "error: --data_dir absent: there is no such folder"),
        ("--dataset digits --distill", "error: --distill: no teacher found"),
        ("--dataset digits --distill --loss ce=1", "there is nothing to distill"),
        ("--dataset digits --accelerator gpu --image_size 8", "error: --accelerator gpu"),
    ],
)
def test_a_mistake_ends_in_status_2_and_one_message(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiment(flags.split()) == 2
    out, err = printed(capsys)
    assert words in err
    assert "Traceback" not in out + err
    assert err.count("error:") == 1


def test_an_error_names_the_file_that_its_setting_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("dataset: digits\nimage_size: 16\nloss: {kll: 1}\n")
    assert experiment(["--config", "c.yaml"]) == 2
    assert "error: --loss: there is no loss 'kll'; did you mean 'kl'?" in (err := printed(capsys)[1])
    assert err.endswith("(--loss was given in c.yaml, key 'loss')\n")
    assert experiment(["--config", "c.yaml", "--loss", "kll=1"]) == 2
    assert "was given in" not in printed(capsys)[1]


def test_a_truncated_image_is_named_by_whichever_process_reads_it(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    broken = folder / "train" / "ant" / "5.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    flags = f"--data_dir {folder} --max_epochs 1 --image_cache none {TINY}".split()
    assert experiment(flags) == 2
    _, err = printed(capsys)
    assert err.startswith(f"error: {broken}: this image can't be decoded: image file is truncated; repair or remove it")
    assert main(["check", *flags, "--on_bad_image", "skip"]) == 0
    out, _ = printed(capsys)
    assert f"Warning: {broken}: this image can't be decoded: image file is truncated; left out" in out
    broken.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "setup", lambda self, stage: broken.unlink(missing_ok=True), raising=False)
        for workers in ("0", "1"):
            broken.write_bytes(whole)
            assert experiment([*flags, "--num_workers", workers]) == 2
            _, err = printed(capsys)
            assert err.startswith(f"error: {broken}: this image can't be decoded: ")
            assert "Traceback" not in err
            broken.write_bytes(whole)
            assert (
                experiment([*flags, "--num_workers", workers, "--on_bad_image", "skip", "--name", f"w{workers}"]) == 0
            )
            out, _ = printed(capsys)
            assert re.search(r"warning: 1 undecodable image skipped, listed in .*ant/5\.png", out)
            assert Path(f"logs/w{workers}/skipped-images.txt").is_file()
    broken.write_bytes(whole)
    assert experiment([*flags, "--on_bad_image", "skip", "--name", "w0"]) == 0
    assert "went missing" not in printed(capsys)[0]


def test_names_are_shown_as_they_are(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder("pets[bold]")
    assert experiment(f"--data_dir {folder} --max_epochs 1 --name a[red]b {TINY}".split()) == 0
    out, _ = printed(capsys)
    assert "validation images of pets[bold]" in out
    assert "tensorboard --logdir logs/a[red]b" in out


def test_a_terminal_without_unicode_gets_the_table(repository: Path, make_folder: MakeFolder) -> None:
    flags = f"--data_dir {make_folder()} --max_epochs 1 --seeds 2 --name ascii {TINY}".split()
    done = run_python(repository, str(repository / "experiment.py"), *flags, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert Path("logs/ascii/summary.json").is_file()
    assert "labels only" in done.stdout


@pytest.mark.parametrize(("flag", "value"), [("--batch_size", "0"), ("--num_workers", "-1")])
def test_evaluate_has_bounds(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "absent.ckpt", flag, value]) == 2
    assert f"{flag} {value}: must be at least" in printed(capsys)[1]


def test_evaluate_measures_a_checkpoint(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(classes=tuple("abcdef"), train=12)
    assert experiment(f"--data_dir {folder} --max_epochs 2 --name e {TINY}".split()) == 0
    printed(capsys)
    assert main(["evaluate", "logs/e/baseline/version_0/checkpoints/best.ckpt", "--data_dir", str(folder)]) == 0
    out, _ = printed(capsys)
    assert "images" in out
    assert "30" in out
    assert "top-5 accuracy" in out
    assert main(["evaluate", "absent.ckpt", "--data_dir", str(folder)]) == 2
    assert "absent.ckpt: there is no such checkpoint" in printed(capsys)[1]


@pytest.fixture
def tensorboard(make_folder: MakeFolder, repository: Path) -> Iterator[str]:
    """Serve a finished run through ``kd tensorboard``; return its address."""
    flags = f"--data_dir {make_folder(train=12)} --baseline --max_epochs 2 --name served {TINY}"
    assert experiment(flags.split()) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "kd", "tensorboard", "logs/served", "--port", str(port)]
    server = subprocess.Popen(
        line,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(repository)},
        start_new_session=True,
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                if len(fetch(address, "runs")) == 2:
                    break
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def fetch(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"{address}/data/{path}", timeout=10) as response:  # noqa: S310 (on this machine)
        return json.load(response)


@pytest.mark.slow
def test_tensorboard_serves_runs_and_curves(tensorboard: str) -> None:
    assert sorted(fetch(tensorboard, "runs")) == ["baseline/version_0", "report"]
    tags = fetch(tensorboard, "plugin/scalars/tags")["baseline/version_0"]
    assert {"train/ce", "train/loss", "val/acc", "val/loss", "lr"} <= set(tags)
    assert len(fetch(tensorboard, "plugin/scalars/scalars?run=baseline%2Fversion_0&tag=val%2Facc")) == 2
    assert {"report/accuracy", "report/confusion-matrix"} <= set(fetch(tensorboard, "plugin/images/tags")["report"])


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_tensorboards_curves(tensorboard: str, chromium: str, tmp_path: Path) -> None:
    line = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    line += ["--disable-background-networking", "--disable-component-update", "--window-size=1400,2000"]
    line += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000", "--dump-dom"]
    shown = ""
    # The page fetches its data after loading; a slow machine may need another look.
    for _ in range(3):
        done = subprocess.run(
            [*line, f"{tensorboard}/#timeseries"], capture_output=True, text=True, check=True, timeout=120
        )
        shown = done.stdout
        if "<scalar-card" in shown:
            break
    assert shown.count("<scalar-card") >= 4
    assert "baseline/version_0" in shown


def test_a_mistyped_flag_of_a_command_ends_in_status_2_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "x.ckpt", "--output", "x.onnx", "--formt", "onnx"])
    assert end.value.code == 2
    assert "--format" in printed(capsys)[1]


def test_tensorboard_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tensorboard", "nowhere"]) == 2
    assert "nowhere: no such folder" in printed(capsys)[1]


def test_losses_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["losses", "--names"]) == 0
    assert printed(capsys)[0].splitlines() == list(LOSSES)
    assert main(["losses"]) == 0
    out, _ = printed(capsys)
    for words in ("KL(softmax", "softmax(z_b)[y_b]", "temperature=4.0", "Hinton", "path/to/file.py:function"):
        assert words in out


def test_models_are_listed_with_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out, _ = printed(capsys)
    assert "11,689,512" in next(line for line in out.splitlines() if " resnet18 " in line)
    assert "simple" in out


def test_networks_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["models", "--measure", "simple", "convnet(widths=[4])", "--image_size", "16", "--num_classes", "3"]
    assert main([*line, "--output", "costs.json"]) == 0
    out, _ = printed(capsys)
    first, second = json.loads(Path("costs.json").read_text(encoding="utf-8"))
    # 3 -> 4 channels of 3x3 without bias, two numbers a channel of batch normalization, 4 -> 3 with bias.
    assert second["parameters"] == 4 * 27 + 2 * 4 + 15
    assert second["multiply_adds"] == 16 * 16 * 4 * 27 + 12
    assert (first["model"], first["image_size"], first["num_classes"]) == ("simple", 16, 3)
    assert first["speed"]["cpu"]["latency_ms"] > 0
    assert f"{first['multiply_adds'] / 1e6:,.0f}" in next(row for row in out.splitlines() if "simple" in row)
    assert main(["models", "--measure", "resnet19"]) == 2
    assert "resnet18" in printed(capsys)[1]


def test_kd_experiment_is_experiment_py(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "--bach_size", "3"]) == 2
    assert "--bach_size" in printed(capsys)[1]
    with pytest.raises(SystemExit) as end:
        main(["experiment", "--help"])
    assert end.value.code == 0
    assert "usage: kd experiment" in printed(capsys)[0]


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("kd.cli.resolve", broken)
    with pytest.raises(ZeroDivisionError):
        experiment([])


def run_python(repository: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(repository)} | variables
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


def test_help_comes_before_anything_heavy_is_imported(repository: Path) -> None:
    code = (
        "import sys\nfrom kd.cli import experiment\n"
        "try:\n    experiment(['--help'])\n"
        "finally:\n    print([name for name in ('torch', 'torchvision', 'pytorch_lightning') if name in sys.modules])"
    )
    done = run_python(repository, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_experiment_py_is_the_command(repository: Path) -> None:
    done = run_python(repository, str(repository / "experiment.py"), "--temprature", "3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --temprature: unknown flag; did you mean '--temperature'")
    assert done.stdout == ""
