"""Nobody gets in: no file that is read runs anything, and names are data wherever they are shown."""

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


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the folder that must not be there in the end."""
    return tmp_path / "somebody_was_here"


def checkpoint_of(classifier: Classifier) -> dict[str, Any]:
    state = {STATE_PREFIX + name: value for name, value in classifier.state_dict().items()}
    return {CLASSIFIER_KEY: classifier.description.plain(), "state_dict": state}


def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier("linear", classes=CLASSES, image_size=16, mean=(0.5,) * 3, std=(0.2,) * 3)


def in_a_checkpoint(mark: Path, path: Path) -> None:
    torch.save(checkpoint_of(classifier()) | {"intruder": Intruder(mark)}, path)


def in_an_old_checkpoint(mark: Path, path: Path) -> None:
    content = checkpoint_of(classifier()) | {"intruder": Intruder(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_a_pickle(mark: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Intruder(mark)))


def refused(arguments: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end in one message, which names the file."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert str(file) in err
    return err


def test_the_intruder_is_one(mark: Path, tmp_path: Path) -> None:
    as_a_pickle(mark, tmp_path / "trap")
    pickle.loads((tmp_path / "trap").read_bytes())  # noqa: S301 (our own)
    assert mark.is_dir()


@pytest.mark.parametrize("plant", [in_a_checkpoint, in_an_old_checkpoint, as_a_pickle])
def test_a_checkpoint_runs_nothing(
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
        refused(arguments, path, capsys)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_student(path)
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors"])
def test_a_pickle_in_the_place_of_a_student_runs_nothing(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    folder = make_folder(train=1, val=1)
    path = Path(f"planted{suffix}").absolute()
    for plant in (as_a_pickle, in_a_checkpoint):
        plant(mark, path)
        refused(["predict", str(path), str(folder)], path, capsys)
        refused(["evaluate", str(path), "--data_dir", str(folder)], path, capsys)
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_student(path)
    assert not mark.exists()


def test_a_torch_export_file_is_refused_without_being_opened(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(train=1, val=1)
    path = Path("planted.pt2").absolute()
    as_a_pickle(mark, path)
    monkeypatch.setattr(torch.export, "load", None)
    for whose in (path, Path("absent.pt2")):
        for command in (["predict", str(whose), str(folder)], ["evaluate", str(whose), "--data_dir", str(folder)]):
            message = refused(command, whose, capsys)
            assert "torch.export files are not read" in message
            assert "use the ONNX file or the checkpoint" in message
        with pytest.raises(UserError, match=r"torch\.export\.load in your own code if you trust the file"):
            load_student(whose)
    assert not mark.exists()


def test_the_file_of_somebodys_network_runs_only_where_it_is_named(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.py").write_text(CODE.format(str(mark)))
    content = checkpoint_of(classifier())
    content[CLASSIFIER_KEY]["architecture"] = "own.py:network"
    path = Path("own.ckpt").absolute()
    torch.save(content, path)
    folder = make_folder(train=1, val=1)
    assert "a Python file" in refused(["predict", str(path), str(folder)], path, capsys)
    refused(["evaluate", str(path), "--data_dir", str(folder)], path, capsys)
    refused(
        ["check", "--distill", "--teacher_checkpoint", str(path), "--data_dir", str(folder), *TINY.split()],
        path,
        capsys,
    )
    assert not mark.exists()


def test_settings_run_nothing(make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(train=1, val=1)
    version = Path("logs/photos/baseline/version_0").absolute()
    (version / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint_of(classifier()), version / "checkpoints" / "best.ckpt")
    for text in (f"seed: !!python/object/apply:os.mkdir ['{mark}']", f"!!python/object/new:os.mkdir ['{mark}']"):
        for place in (version.parent.parent, version):
            (place / "config.yaml").write_text(text)
        for arguments in (
            ["check", "--config", str(version / "config.yaml"), "--data_dir", str(folder)],
            ["experiment", "--resume", str(version.parent.parent)],
        ):
            assert "not valid YAML" in refused(arguments, Path("config.yaml"), capsys)
        checkpoint = version / "checkpoints" / "best.ckpt"
        refused(["export", str(checkpoint), "--output", "x.onnx"], version / "config.yaml", capsys)
    Path("commandline_args.txt").write_text(f"--name $(mkdir {mark}) `mkdir {mark}`")
    refused(["check", "--data_dir", str(folder)], Path("commandline_args.txt"), capsys)
    assert not mark.exists()


def run(folder: Path, *flags: str) -> None:
    line = f"--data_dir {folder} --max_epochs 1 --name planted {TINY} --allow_weak_teacher".split()
    assert experiment([*line, *flags]) == 0


def test_what_a_training_left_runs_nothing(
    make_folder: MakeFolder, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(train=8, val=4)
    stores = ("--image_cache", "stores", "--teacher_cache", "stores")
    run(folder, "--train_teacher", "--distill", *stores)
    home = Path("logs/planted").absolute()
    pickled = pickle.dumps(Intruder(mark))

    # A training that was begun: its checkpoint is refused.
    begun = Path("logs/planted/distilled/version_0")
    (begun / "metrics.json").rename(begun / "kept.json")
    in_a_checkpoint(mark, begun / "checkpoints" / "last.ckpt")
    line = f"experiment --data_dir {folder} --max_epochs 1 --name planted {TINY} --allow_weak_teacher --resume".split()
    line += [*stores, "--train_teacher", "--distill"]
    refused(line, begun / "checkpoints" / "last.ckpt", capsys)
    (begun / "kept.json").rename(begun / "metrics.json")

    # Stores and notes: made anew, or passed over.
    for pattern in ("stores/*/index.json", "stores/*/about.json", "stores/*/*.f32", "cache/examined/*.json"):
        files = list(Path().glob(pattern)) or list(Path("..").glob(pattern))
        assert files, pattern
        for file in files:
            file.write_bytes(pickled)
    for file in (*home.glob("*/version_*/begun.json"), *home.glob("*/version_*/metrics.json")):
        file.write_bytes(pickled)
    run(folder, "--train_teacher", "--distill", *stores)
    assert capsys.readouterr().err == ""

    # What a report is made from: passed over, but for the summary.
    answers = [*home.glob("*/version_*/validation.npz"), *home.glob("answers/*.npz")]
    assert answers
    for number, file in enumerate(answers):
        np.savez(file, logits=np.array([Intruder(mark)], dtype=object), labels=np.zeros(1))
        if number % 2:
            file.write_bytes(pickled)
        assert Predictions.read(file) is None
    assert main(["report", str(home)]) == 0
    (home / "summary.json").write_bytes(pickled)
    refused(["report", str(home)], home / "summary.json", capsys)
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
def test_another_summary_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("summary.json").write_text(text)
    refused(["report", "."], Path("summary.json"), capsys)


NAMES = ("<img src=x onerror=alert(1)>", "<script>alert(2)<!--", "--><svg onload=alert(3)>", "$\\frac$ & ${}", "..a")


def test_names_of_classes_are_text_in_a_report(make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_no_name_leaves_its_folder(make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(train=4, val=2)
    for name in ("../x", "a/b", "/tmp/x", "..", "."):  # noqa: S108 (refused)
        refused(["experiment", "--data_dir", str(folder), "--name", name, *TINY.split()], Path(name), capsys)
    run(folder, "--baseline")
    home = Path("logs/planted")
    summary = json.loads((home / "summary.json").read_text())
    summary["phases"]["teacher/../../../../x"] = summary["phases"]["baseline"]
    summary["phases"]["baseline"]["runs"][0]["validation"] = "../../../x.npz"
    (home / "summary.json").write_text(json.dumps(summary))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(home.absolute())}
    assert main(["report", str(home)]) == 0
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(home.absolute())} == before
