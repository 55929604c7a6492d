"""Reproduce a documented table and compare it with the stored results, or store the new results.

Row means are compared, with a tolerance for the variation between seeds:

    python -m benchmarks.reproduce mnist-linear
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import readme, tables
from kd.console import make_console
from kd.files import write_json
from kd.report import read_summary, share

_SINGLE_RUN_TOLERANCE, _SIGNIFICANCE = 0.005, 0.05


@dataclass(frozen=True)
class Settings:
    """Reproduce a documented table and compare it with the stored results.

    Args:
        table: Name of the table.
        data_dir: Folder of the images; None: as in the configuration.
        store: Store the new results in results/ and update the documentation.
        only: Experiments of the table to run; none: all.
        show: Only print the documented table.
    """

    table: Annotated[str, tyro.conf.Positional]
    data_dir: str | None = None
    store: bool = False
    only: tuple[str, ...] = ()
    show: bool = False


def run(part: str, data_dir: str | None, root: str, flags: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Run an experiment; return its folder, and its duration and hardware.

    Args:
        part: Name of the experiment.
        data_dir: Folder of the images; ``None``: as in the configuration.
        root: Folder of all experiments.
        flags: Additional flags.
    """
    command = [sys.executable, *tables.command(part)[1:], "--default_root_dir", root]
    command += [] if data_dir is None else ["--data_dir", data_dir]
    command += flags
    if part in tables.NEEDS and root != tables.LOGS:
        command += ["--teacher_checkpoint", teacher_of(part, root)]
    start = time.perf_counter()
    status = subprocess.run(command, check=False, cwd=tables.HOME).returncode  # noqa: S603 (own command)
    if status:
        # The experiment has printed the reason.
        sys.exit(status)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return tables.HOME / root / part, {
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {cores} cores, {device}",
        "torch": torch.__version__.partition("+")[0],
    }


def teacher_of(part: str, root: str = tables.LOGS) -> str:
    """Return the path of the teacher checkpoint that an experiment takes from another experiment."""
    return f"{root}/{tables.NEEDS[part]}/teacher/version_0/checkpoints/best.ckpt"


def tolerances(rows: list[tables.Row]) -> list[float]:
    """Return the largest accepted deviation of each row's mean, as a fraction of 1.

    For means over several seeds: the simultaneous 95 % bound on the difference of two such means under equal
    expectation, from the pooled standard deviation (Student's t, Bonferroni). For single runs: half a percentage point.
    """
    repeated = [(row.std, row.count) for row in rows if row.std is not None]
    if not repeated:
        return [_SINGLE_RUN_TOLERANCE] * len(rows)
    stds, counts = np.array(repeated).T
    degrees = (counts - 1).sum()
    pooled = np.sqrt(((counts - 1) * stds**2).sum() / degrees)
    quantile = stats.t.ppf(1 - _SIGNIFICANCE / 2 / len(repeated), degrees)
    return [
        _SINGLE_RUN_TOLERANCE if row.std is None else float(quantile * pooled * np.sqrt(2 / row.count)) for row in rows
    ]


def compare(stored: list[tables.Row], reproduced: list[tables.Row], console: Console) -> bool:
    """Print stored and reproduced rows side by side; return whether every mean is within its tolerance."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("network or objective", overflow="fold")
    for heading in ("stored", "reproduced", "within tolerance"):
        table.add_column(heading, justify="right")
    by_name, is_reproduced = {row.name: row for row in reproduced}, True
    for row, tolerance in zip(stored, tolerances(stored), strict=True):
        other = by_name.get(row.name)
        is_within = other is not None and abs(other.mean - row.mean) <= tolerance
        is_reproduced &= is_within
        accuracy = "missing" if other is None else share(other.mean, other.std)
        verdict = f"{'yes' if is_within else 'no'} (± {100 * tolerance:.2f})"
        table.add_row(row.name, share(row.mean, row.std), accuracy, verdict)
    console.print(table)
    return is_reproduced


def main() -> int:
    """Reproduce a table; return the exit status: 0 if it is reproduced, 1 if not, 2 for invalid arguments."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.reproduce", use_underscores=True)
    console = make_console()
    table_parts = tables.parts_of(settings.table)
    parts = [part for part in table_parts if not settings.only or part in settings.only]
    error = _argument_error(settings, table_parts, parts)
    if error:
        console.print(error)
        return 2
    if settings.show:
        console.print(tables.markdown(settings.table))
        return 0
    if settings.store:
        # In the default folder, where later experiments look for their teacher.
        for part, folder, facts in _runs(parts, settings.data_dir, tables.LOGS):
            _store(folder, tables.RESULTS / part, facts)
        readme.fill_pages()
        return 0
    is_reproduced, root = True, tempfile.mkdtemp()
    for part, folder, facts in _runs(parts, settings.data_dir, root):
        console.print(f"\n{part}, {facts['minutes']} minutes")
        stored, reproduced = (tables.rows_of(read_summary(place)) for place in (tables.RESULTS / part, folder))
        is_reproduced &= compare(stored, reproduced, console)
    if not is_reproduced:
        console.print(f"Not reproduced. The new results are in {root}.")
        return 1
    shutil.rmtree(root)
    console.print("Reproduced.")
    return 0


def _argument_error(settings: Settings, table_parts: Sequence[str], parts: Sequence[str]) -> str | None:
    if not table_parts:
        return f"{settings.table}: there is no such table; choose from {', '.join(tables.names())}"
    unknown = [part for part in settings.only if part not in table_parts]
    if unknown:
        return f"--only {' '.join(unknown)}: not in {settings.table}; choose from {', '.join(table_parts)}"
    if settings.show:
        return None
    if settings.store:
        existing = [part for part in parts if (tables.HOME / tables.LOGS / part / "summary.json").is_file()]
        folders = ", ".join(f"{tables.LOGS}/{part}" for part in existing)
        return f"--store: {folders} already exists; move it away" if existing else None
    missing = [part for part in parts if part not in tables.found()]
    return f"{', '.join(missing)}: no stored results to compare with; add --store" if missing else None


def _runs(parts: Sequence[str], data_dir: str | None, root: str) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    for part in parts:
        if part in tables.NEEDS:
            # metrics.json is written when the teacher's training is complete.
            version = (tables.HOME / teacher_of(part, root)).parents[1]
            if not (version / "metrics.json").is_file():
                run(tables.NEEDS[part], data_dir, root, [*tables.ONLY_TEACHER, "--resume"])
        yield part, *run(part, data_dir, root)


def _store(folder: Path, results: Path, facts: Mapping[str, Any]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "summary.json"):
        shutil.copyfile(folder / name, results / name)
    write_json(results / "run.json", facts)


if __name__ == "__main__":
    sys.exit(main())
