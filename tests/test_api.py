"""Experiments from Python, and the parts in a plain Lightning script."""

import re
from pathlib import Path
from typing import Any

import pytest

import kd
from tests.conftest import REPOSITORY, MakeFolder

SETTINGS: dict[str, Any] = {"image_size": 16, "batch_size": 8, "max_epochs": 2, "accelerator": "cpu"}


@pytest.fixture
def photos(make_folder: MakeFolder) -> Path:
    return make_folder()


def test_an_experiment_from_python_returns_its_results(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    # The file of flags belongs to the command line.
    Path("commandline_args.txt").write_text("--no_such_flag\n")
    teacher = kd.train_teacher(photos, model="convnet(widths=[8,16])", name="first", **SETTINGS)
    assert 0 <= teacher.accuracy <= 1
    assert teacher.checkpoint == Path("logs/first/teacher/version_0/checkpoints/best.ckpt")
    settings = SETTINGS | {"name": "second", "allow_weak_teacher": True}
    student = kd.distill(photos, teacher=teacher, student="linear", loss=["kl=1"], **settings)
    assert set(student.accuracies) == {"teacher", "baseline", "distilled"}
    assert student.accuracy == student.accuracies["distilled"]
    assert "Distillation changed accuracy by" in student.verdict
    assert student.report() == student.folder / "report.html"
    exported = student.export("student.onnx")
    assert exported.is_file()
    assert Path("student.md").is_file()
    rows = student.predict(photos / "val", top=1)
    expected = kd.open_student(exported)
    assert {row["class"] for row in rows} <= set(expected.metadata["classes"])
    assert len(rows) == len(list((photos / "val").rglob("*.*")))
    with pytest.raises(kd.UserError, match="no such image or folder"):
        student.predict("nothing.png")
    compared = kd.compare(
        photos,
        losses=["kl", "mse"],
        teacher=teacher.checkpoint,
        teacher_model=["convnet(widths=[8,16])"],
        student="linear",
        baseline=False,
        **settings,
    )
    assert compared.accuracy == max(compared.accuracies["kl"], compared.accuracies["mse"])
    assert "compared" in str(compared.checkpoint)


def test_a_wrong_keyword_is_a_clear_error(photos: Path) -> None:
    with pytest.raises(kd.UserError, match="max_epoch"):
        kd.distill(photos, max_epoch=3)
    with pytest.raises(kd.UserError, match="fast_dev_run: writes no files"):
        kd.train_teacher(photos, model="linear", fast_dev_run=True, **SETTINGS)


def script() -> str:
    """Return the Lightning script of the documentation."""
    page = (REPOSITORY / "docs" / "guides" / "python.md").read_text()
    codes: list[str] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return next(code for code in codes if "pl.Trainer" in code)


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logging interval", "ignore:.*exists and is not empty"
)
def test_the_script_of_the_documentation_trains_a_student(photos: Path) -> None:
    code = script()
    assert len(code.strip().splitlines()) <= 25
    teacher = kd.train_teacher(photos, model="linear", name="teacher", **SETTINGS)
    small = {
        '"photos"': repr(str(photos)),
        "image_size=64": "image_size=16",
        "mobilenet_v3_small": "linear",
        '"teacher.ckpt"': repr(str(teacher.checkpoint)),
        "resnet18": "linear",
        "max_epochs=5": "max_epochs=2, accelerator='cpu', enable_progress_bar=False, enable_model_summary=False",
    }
    for old, new in small.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 (the documentation's)
    assert {"val/acc", "val/agreement"} <= set(names["trainer"].callback_metrics)
    assert "train/kl" in Path("logs/lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    student = kd.load_classifier("student.ckpt")
    assert student.description.classes == names["data"].splits.classes
