"""TensorBoard, CSV, Weights & Biases and MLflow log a run offline, and continue it when it is resumed."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kd.cli import experiment
from kd.errors import UserError
from kd.training.tracking import IDENTIFIERS_FILE, RunCSV, build_loggers, check_loggers
from tests.conftest import MakeFolder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_of_a_resumed_run_replace_those_from_its_step_on(tmp_path: Path) -> None:
    for first, steps in ((0, range(4)), (2, range(2, 6))):
        logger = RunCSV(tmp_path, purge_step=first)
        for step in steps:
            logger.log_metrics({"train/loss": step + first / 10}, step)
        logger.save()
    found = [(int(row["step"]), float(row["train/loss"])) for row in rows(tmp_path / "metrics.csv")]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.2), (3, 3.2), (4, 4.2), (5, 5.2)]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def mlflow_runs(root: Path, name: str) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{root.absolute()}/mlflow.db")
    found = client.get_experiment_by_name(name)
    assert found is not None
    return {run.info.run_name: (client, run) for run in client.search_runs([found.experiment_id])}


@pytest.mark.filterwarnings("ignore")  # those of the packages themselves
def test_an_experiment_is_logged_everywhere(offline: None, make_folder: MakeFolder) -> None:
    flags = ["--data_dir", str(make_folder()), "--image_size", "16", "--batch_size", "8", "--max_epochs", "2"]
    flags += ["--student_model", "linear", "--accelerator", "cpu", "--name", "pets"]
    assert experiment([*flags, "--logger", "tensorboard", "csv", "wandb", "mlflow"]) == 0
    folder = Path("logs/pets/baseline/version_0")
    record = json.loads((folder / "metrics.json").read_text())
    assert list(folder.glob("events.out.*"))
    curve = [float(row["val/acc"]) for row in rows(folder / "metrics.csv") if row["val/acc"]]
    assert curve == pytest.approx([epoch["val/acc"] for epoch in record["history"]])
    identifiers = json.loads((folder / IDENTIFIERS_FILE).read_text())
    assert list((folder / "wandb").glob(f"offline-run-*-{identifiers['wandb']}/run-{identifiers['wandb']}.wandb"))
    assert list(Path("logs/pets/report-trackers/wandb").glob("offline-run-*"))
    client, run = mlflow_runs(Path("logs"), "pets")["baseline/version_0"]
    assert (run.info.run_id, run.info.status) == (identifiers["mlflow"], "FINISHED")
    history = client.get_metric_history(run.info.run_id, "val/acc")
    assert [point.value for point in history] == pytest.approx(curve)
    assert run.data.params["max_epochs"] == "2"
    assert client.list_artifacts(run.info.run_id)
    client, report = mlflow_runs(Path("logs"), "pets")["report"]
    assert "report.html" in [artifact.path for artifact in client.list_artifacts(report.info.run_id)]


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_continues_under_its_identifier(offline: None, tmp_path: Path) -> None:
    folder, found = tmp_path / "run", []
    for step in (0, 1):
        loggers = build_loggers(["wandb", "mlflow"], folder=folder, root=tmp_path, experiment="pets", run="baseline")
        for logger in loggers:
            logger.log_metrics({"val/acc": 0.5}, step)
            logger.finalize("success")
        found.append(json.loads((folder / IDENTIFIERS_FILE).read_text()))
    assert found[0] == found[1]
    assert len(list((folder / "wandb").glob(f"offline-run-*-{found[0]['wandb']}"))) >= 1
    client, run = mlflow_runs(tmp_path, "pets")["baseline"]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/acc")] == [0, 1]


def test_a_logger_that_can_not_start_is_one_message(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://server")
    with pytest.raises(UserError, match=r"--logger mlflow: .*nowhere.*; check MLFLOW_TRACKING_URI"):
        build_loggers(["mlflow"], folder=tmp_path, root=tmp_path, experiment="pets", run="baseline")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="--logger mlflow: mlflow is not installed; install it with `pip install mlflow-skinny`"
    ):
        check_loggers(["tensorboard", "mlflow"])
