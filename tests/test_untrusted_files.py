"""Untrusted input: no file that is read executes code, and names are escaped wherever they are shown."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd import load_student
from kd.cli import experiment, main
from kd.errors import UserError
from kd.models import Classifier, build_classifier, load_classifier
from kd.models.checkpoint import CLASSIFIER_KEY, STATE_PREFIX
from kd.report.measures import Predictions
from tests.conftest import CLASSES, MakeFolder

TINY = "--image_size 16 --batch_size 8 --augment none --accelerator cpu --teacher_model linear --student_model linear"
CODE = "__import__('os').mkdir({!r})"


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the folder that a payload would create."""
    return tmp_path / "payload_was_executed"


def checkpoint_of(classifier: Classifier) -> dict[str, Any]:
    state = {STATE_PREFIX + name: value for name, value in classifier.state_dict().items()}
    return {CLASSIFIER_KEY: classifier.description.plain(), "state_dict": state}


def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier("linear", classes=CLASSES, image_size=16, mean=(0.5,) * 3, std=(0.2,) * 3)


def plant_in_checkpoint(mark: Path, path: Path) -> None:
    torch.save(checkpoint_of(classifier()) | {"payload": Payload(mark)}, path)


def plant_in_legacy_checkpoint(mark: Path, path: Path) -> None:
    content = checkpoint_of(classifier()) | {"payload": Payload(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plant_pickle(mark: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(mark)))


def assert_refused(arguments: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Assert that a command fails with one message that names the file; return the message."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert str(file) in err
    return err


def test_the_payload_is_executed_by_an_unsafe_load(mark: Path, tmp_path: Path) -> None:
    plant_pickle(mark, tmp_path / "trap")
    pickle.loads((tmp_path / "trap").read_bytes())  # noqa: S301 (the test's own file)
    assert mark.is_dir()


@pytest.mark.parametrize("plant", [plant_in_checkpoint, plant_in_legacy_checkpoint, plant_pickle])
def test_a_checkpoint_executes_nothing(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str], plant: Callable[[Path, Path], None]
) -> None:
    folder = make_folder(train=1, val=1)
    path = Path("planted.ckpt").absolute()
    plant(mark, path)
    data = ["--data_dir", str(folder)]
    for arguments in (
        ["check", "--distill", "--teacher_checkpoint", str(path), *data, *TINY.split()],
        ["experiment", "--distill", "--teacher_checkpoint", str(path), *data, *TINY.split()],
        ["evaluate", str(path), *data],
        ["export", str(path), "--output", "x.onnx", *data],
        ["predict", str(path), str(folder)],
    ):
        assert_refused(arguments, path, capsys)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_student(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_a_pickle_named_as_an_exported_student_executes_nothing(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    folder = make_folder(train=1, val=1)
    path = Path(f"planted{suffix}").absolute()
    for plant in (plant_pickle, plant_in_checkpoint):
        plant(mark, path)
        assert_refused(["predict", str(path), str(folder)], path, capsys)
        assert_refused(["evaluate", str(path), "--data_dir", str(folder)], path, capsys)
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_student(path)
    assert not mark.exists()


def test_a_torch_export_file_is_refused_without_being_opened(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(train=1, val=1)
    path = Path("planted.pt2").absolute()
    plant_pickle(mark, path)
    monkeypatch.setattr(torch.export, "load", None)
    for file in (path, Path("absent.pt2")):
        for command in (["predict", str(file), str(folder)], ["evaluate", str(file), "--data_dir", str(folder)]):
            message = assert_refused(command, file, capsys)
            assert "torch.export files are not read" in message
            assert "use the ONNX file or the checkpoint" in message
        with pytest.raises(UserError, match=r"torch\.export\.load in your own code if you trust the file"):
            load_student(file)
    assert not mark.exists()


def test_a_python_file_named_in_a_checkpoint_is_not_executed(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(CODE.format(str(mark)))
    content = checkpoint_of(classifier())
    content[CLASSIFIER_KEY]["architecture"] = "own.py:network"
    path = Path("own.ckpt").absolute()
    torch.save(content, path)
    folder = make_folder(train=1, val=1)
    assert "a Python file" in assert_refused(["predict", str(path), str(folder)], path, capsys)
    assert_refused(["evaluate", str(path), "--data_dir", str(folder)], path, capsys)
    assert_refused(
        ["check", "--distill", "--teacher_checkpoint", str(path), "--data_dir", str(folder), *TINY.split()],
        path,
        capsys,
    )
    assert not mark.exists()


def test_settings_execute_nothing(make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(train=1, val=1)
    version = Path("logs/photos/baseline/version_0").absolute()
    (version / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint_of(classifier()), version / "checkpoints" / "best.ckpt")
    for text in (f"seed: !!python/object/apply:os.mkdir ['{mark}']", f"!!python/object/new:os.mkdir ['{mark}']"):
        for parent in (version.parent.parent, version):
            (parent / "config.yaml").write_text(text)
        for arguments in (
            ["check", "--config", str(version / "config.yaml"), "--data_dir", str(folder)],
            ["experiment", "--resume", str(version.parent.parent)],
        ):
            assert "not valid YAML" in assert_refused(arguments, Path("config.yaml"), capsys)
        checkpoint = version / "checkpoints" / "best.ckpt"
        assert_refused(["export", str(checkpoint), "--output", "x.onnx"], version / "config.yaml", capsys)
    Path("commandline_args.txt").write_text(f"--name $(mkdir {mark}) `mkdir {mark}`")
    assert_refused(["check", "--data_dir", str(folder)], Path("commandline_args.txt"), capsys)
    assert not mark.exists()


def run(folder: Path, *flags: str) -> None:
    line = f"--data_dir {folder} --max_epochs 1 --name planted {TINY} --allow_weak_teacher".split()
    assert experiment([*line, *flags]) == 0


def test_files_of_an_earlier_run_execute_nothing(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(train=8, val=4)
    stores = ("--image_cache", "stores", "--teacher_cache", "stores")
    run(folder, "--train_teacher", "--distill", *stores)
    home = Path("logs/planted").absolute()
    pickled = pickle.dumps(Payload(mark))

    # The checkpoint of an interrupted training is refused.
    interrupted = Path("logs/planted/distilled/version_0")
    (interrupted / "metrics.json").rename(interrupted / "kept.json")
    plant_in_checkpoint(mark, interrupted / "checkpoints" / "last.ckpt")
    line = f"experiment --data_dir {folder} --max_epochs 1 --name planted {TINY} --allow_weak_teacher --resume".split()
    line += [*stores, "--train_teacher", "--distill"]
    assert_refused(line, interrupted / "checkpoints" / "last.ckpt", capsys)
    (interrupted / "kept.json").rename(interrupted / "metrics.json")

    # Caches and records are rebuilt or ignored.
    for pattern in ("stores/*/index.npz", "stores/*/about.json", "stores/*/*.f32", "cache/examined/*.npz"):
        files = list(Path().glob(pattern)) or list(Path("..").glob(pattern))
        assert files, pattern
        for file in files:
            file.write_bytes(pickled)
    for file in (*home.glob("*/version_*/started.json"), *home.glob("*/version_*/metrics.json")):
        file.write_bytes(pickled)
    run(folder, "--train_teacher", "--distill", *stores)
    assert capsys.readouterr().err == ""

    # Predictions are ignored by the report; an invalid summary is refused.
    predictions = [*home.glob("*/version_*/validation.npz"), *home.glob("predictions/*.npz")]
    assert predictions
    for number, file in enumerate(predictions):
        np.savez(file, logits=np.array([Payload(mark)], dtype=object), labels=np.zeros(1))
        if number % 2:
            file.write_bytes(pickled)
        assert Predictions.read(file) is None
    assert main(["report", str(home)]) == 0
    (home / "summary.json").write_bytes(pickled)
    assert_refused(["report", str(home)], home / "summary.json", capsys)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[" * 100_000,
        "{}",
        '{"data": 1, "phases": [], "gain": null, "compared": []}',
        '{"data": "x", "phases": {"teacher": {"runs": 3}}, "gain": null, "compared": []}',
        '{"data": "x", "phases": {}, "gain": [], "compared": {}}',
    ],
)
def test_an_invalid_summary_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("summary.json").write_text(text)
    assert_refused(["report", "."], Path("summary.json"), capsys)


NAMES = ("<img src=x onerror=alert(1)>", "<script>alert(2)<!--", "--><svg onload=alert(3)>", "$\\frac$ & ${}", "..a")


def test_class_names_are_escaped_in_a_report(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder("<b>data", classes=(*NAMES[:4], "ant"), train=4, val=2)
    run(folder, "--train_teacher", "--distill")
    home = Path("logs/planted")
    pages = [home / "report.html", home / "report.md", *home.glob("figures/*.svg")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for tag in ("<img src=x", "<script", "<svg onload", "<b>data"):
            assert tag not in text, page
    assert "&lt;b&gt;data" in pages[0].read_text(encoding="utf-8")
    assert load_classifier(home / "distilled/version_0/checkpoints/best.ckpt").description.classes[-1] == "ant"


def test_names_do_not_lead_out_of_the_experiments_folder(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(train=4, val=2)
    for name in ("../x", "a/b", "/tmp/x", "..", "."):  # noqa: S108 (refused)
        assert_refused(["experiment", "--data_dir", str(folder), "--name", name, *TINY.split()], Path(name), capsys)
    run(folder, "--baseline")
    home = Path("logs/planted")
    summary = json.loads((home / "summary.json").read_text())
    summary["phases"]["teacher/../../../../x"] = summary["phases"]["baseline"]
    summary["phases"]["baseline"]["runs"][0]["validation"] = "../../../x.npz"
    (home / "summary.json").write_text(json.dumps(summary))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(home.absolute())}
    assert main(["report", str(home)]) == 0
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(home.absolute())} == before
