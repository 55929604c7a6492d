"""Loggers by name: TensorBoard, CSV, Weights & Biases and MLflow, through Lightning's, in a run's folder."""

import csv
import importlib.util
import json
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from kd.errors import UserError
from kd.files import write_json
from kd.training.loggers import RunTensorBoard

IDENTIFIERS_FILE = "trackers.json"
"""File in a run's folder with its identifiers at Weights & Biases and MLflow, for a resumed run to continue there."""

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
_CONNECT = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI; without it, a database in the folder of all experiments is used",
}


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose packages aren't installed.

    Raises:
        UserError: If one is missing.
    """
    for name in names:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            install = "mlflow-skinny" if package == "mlflow" else package
            raise UserError(f"--logger {name}: {package} is not installed; install it with `pip install {install}`")


def build_loggers(
    names: Sequence[str], *, folder: Path, root: Path, experiment: str, run: str, first_step: int = 0
) -> list[Logger]:
    """Build the loggers of a run.

    Args:
        names: ``tensorboard``, ``csv``, ``wandb`` or ``mlflow``.
        folder: The run's folder.
        root: The folder of all experiments, which holds MLflow's database unless ``MLFLOW_TRACKING_URI`` is set.
        experiment: Name of the experiment: a group of Weights & Biases, an experiment of MLflow.
        run: Name of the run.
        first_step: The step that a resumed run continues at; what was logged from it on is replaced, where the logger
            can do that.

    Raises:
        UserError: If a logger can't be started, as without a login.
    """
    builders: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: RunTensorBoard(folder, purge_step=first_step),
        "csv": lambda: RunCSV(folder, purge_step=first_step),
        "wandb": lambda: _start_wandb(folder, experiment=experiment, run=run),
        "mlflow": lambda: _start_mlflow(folder, root=root, experiment=experiment, run=run),
    }
    loggers = []
    for name in names:
        try:
            loggers.append(builders[name]())
        except Exception as error:
            if name not in _CONNECT or isinstance(error, UserError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--logger {name}: {reason}; {_CONNECT[name]}") from error
    return loggers


class RunCSV(CSVLogger):
    """Scalars as ``metrics.csv`` in a run's folder; rows from ``purge_step`` on are replaced."""

    def __init__(self, folder: Path, *, purge_step: int = 0) -> None:
        super().__init__(str(folder), name="", version="")
        path, rows = folder / "metrics.csv", list[dict[str, Any]]()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < purge_step]
        if _is_first_process():
            # Lightning's writer removes the file, so that the rows are written again.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
                self.experiment.metrics = rows


class RunWandb(WandbLogger):
    """A run of Weights & Biases that ends with the training, as the next one in this process is another run."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def _start_wandb(folder: Path, *, experiment: str, run: str) -> WandbLogger:
    folder.mkdir(parents=True, exist_ok=True)
    identifier = _identifiers(folder).get("wandb") or uuid.uuid4().hex[:8]
    project = os.environ.get("WANDB_PROJECT", "kd")
    logger = RunWandb(name=run, project=project, group=experiment, save_dir=str(folder), id=identifier, resume="allow")
    _ = logger.experiment
    _keep_identifier(folder, "wandb", identifier)
    return logger


def _start_mlflow(folder: Path, *, root: Path, experiment: str, run: str) -> MLFlowLogger:
    root.mkdir(parents=True, exist_ok=True)
    # It reports each table of a new database.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logger = MLFlowLogger(
        experiment_name=experiment,
        run_name=run,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.absolute()}/mlflow.db",
        artifact_location=None if os.environ.get("MLFLOW_TRACKING_URI") else str(root.absolute() / "mlflow-artifacts"),
        run_id=_identifiers(folder).get("mlflow"),
    )
    if _is_first_process():
        _keep_identifier(folder, "mlflow", str(logger.run_id))
    return logger


def _is_first_process() -> bool:
    return not getattr(rank_zero_only, "rank", 0)


def _identifiers(folder: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads((folder / IDENTIFIERS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@rank_zero_only
def _keep_identifier(folder: Path, name: str, identifier: str) -> None:
    write_json(folder / IDENTIFIERS_FILE, _identifiers(folder) | {name: identifier})


def log_report(names: Sequence[str], *, folder: Path, root: Path, page: Path, figures: Sequence[Path]) -> None:
    """Log an experiment's report to Weights & Biases and MLflow, as a run called ``report``.

    Args:
        names: The loggers.
        folder: The experiment's folder.
        root: The folder of all experiments.
        page: The HTML page.
        figures: PNG files.
    """
    remote = [name for name in names if name in _CONNECT]
    place = folder / "report-trackers"
    for logger in build_loggers(remote, folder=place, root=root, experiment=folder.absolute().name, run="report"):
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
            logger.experiment.log({f"report/{path.stem}": wandb.Image(str(path)) for path in figures})
        elif isinstance(logger, MLFlowLogger):
            for path in (page, *figures):
                logger.experiment.log_artifact(logger.run_id, str(path))
        logger.finalize("success")
