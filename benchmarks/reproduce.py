"""Make a table of the README again and compare it with what is stated, or state it anew.

What is compared is each row's mean, within what another draw of the seeds would do:

    python -m benchmarks.reproduce mnist-linear
"""

import json
import math
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

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from benchmarks import readme, tables
from kd.report import read_summary, share

_TOLERANCE_OF_ONE_RUN, _LEVEL = 0.005, 0.05
_MINUTE = 60


@dataclass(frozen=True)
class Settings:
    """Make a table of the README again, and compare it with what is stated.

    Args:
        table: The table.
        data_dir: Folder of the images; None: as its file has it.
        store: Keep what came out in results/ and in the README, as what is stated from now on.
        only: Those of its experiments; none: all.
        show: Print the table as the README has it, and do nothing else.
    """

    table: Annotated[str, tyro.conf.Positional]
    data_dir: str | None = None
    store: bool = False
    only: tuple[str, ...] = ()
    show: bool = False


def run(part: str, data_dir: str | None, root: str, others: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Run an experiment; return its folder, and with what and for how long.

    Args:
        part: Its name.
        data_dir: Folder of the images; ``None``: as its file has it.
        root: Folder of all experiments.
        others: Flags besides.
    """
    given = ["--default_root_dir", root] + ([] if data_dir is None else ["--data_dir", data_dir]) + [*others]
    if part in tables.NEEDS and root != tables.LOGS:
        given += ["--teacher_checkpoint", teacher_of(part, root)]
    start = time.perf_counter()
    command = [sys.executable, *tables.command(part)[1:], *given]
    done = subprocess.run(command, check=False, cwd=tables.HOME)  # noqa: S603 (its own)
    if done.returncode:
        # It has said why.
        sys.exit(done.returncode)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return tables.HOME / root / part, {
        "minutes": round((time.perf_counter() - start) / _MINUTE, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {cores} cores, {device}",
        "torch": torch.__version__.partition("+")[0],
    }


def teacher_of(part: str, root: str = tables.LOGS) -> str:
    """Name the checkpoint of the teacher that an experiment takes from another one."""
    return f"{root}/{tables.NEEDS[part]}/teacher/version_0/checkpoints/best.ckpt"


def tolerances(rows: list[tables.Row]) -> list[float]:
    """Return how far each row's mean may lie from it elsewhere, a fraction of 1.

    Means of several seeds: as far apart as two of one population would be, with 95 % for all rows together, by the
    deviation that the rows share (Student's t, Bonferroni). Of a single run, half a point of accuracy.
    """
    several = [(row.std, row.count) for row in rows if row.std is not None]
    if not several:
        return [_TOLERANCE_OF_ONE_RUN] * len(rows)
    degrees = sum(count - 1 for _, count in several)
    pooled = math.sqrt(sum((count - 1) * std**2 for std, count in several) / degrees)
    quantile = float(stats.t.ppf(1 - _LEVEL / 2 / len(several), degrees))
    return [_TOLERANCE_OF_ONE_RUN if row.std is None else quantile * pooled * math.sqrt(2 / row.count) for row in rows]


def compare(stated: list[tables.Row], now: list[tables.Row], console: Console) -> bool:
    """Print what is stated beside what came out now; return whether each mean lies within its tolerance."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("network or objective", overflow="fold")
    for heading in ("stated", "now", "within"):
        table.add_column(heading, justify="right")
    found_now, holds = {row.name: row for row in now}, True
    for row, tolerance in zip(stated, tolerances(stated), strict=True):
        other = found_now.get(row.name)
        is_within = other is not None and abs(other.mean - row.mean) <= tolerance
        holds = holds and is_within
        came = "missing" if other is None else share(other.mean, other.std)
        limit = f"{'yes' if is_within else 'no'} (± {100 * tolerance:.2f})"
        table.add_row(escape(row.name), share(row.mean, row.std), came, limit)
    console.print(table)
    return holds


def main() -> int:
    """Make a table again; the exit status says whether it came out as stated."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.reproduce", use_underscores=True)
    console = Console()
    every = tables.parts_of(settings.table)
    parts = [part for part in every if not settings.only or part in settings.only]
    mistake = _mistake(settings, every, parts)
    if mistake:
        console.print(mistake, highlight=False, soft_wrap=True, markup=False)
        return 2
    if settings.show:
        console.print(tables.markdown(settings.table), highlight=False, soft_wrap=True, markup=False)
        return 0
    if settings.store:
        # Where experiments lie, so that later ones find its teacher.
        for part, folder, facts in _runs(parts, settings.data_dir, tables.LOGS):
            _store(folder, tables.RESULTS / part, facts)
        readme.fill_pages()
        return 0
    holds, root = True, tempfile.mkdtemp()
    for part, folder, facts in _runs(parts, settings.data_dir, root):
        console.print(f"\n{part}, {facts['minutes']} minutes", highlight=False)
        stated, now = (tables.rows_of(read_summary(place)) for place in (tables.RESULTS / part, folder))
        holds &= compare(stated, now, console)
    if not holds:
        console.print(f"Not as stated. What came out is in {root}.", highlight=False, soft_wrap=True)
        return 1
    shutil.rmtree(root)
    console.print("As stated.")
    return 0


def _mistake(settings: Settings, every: Sequence[str], parts: Sequence[str]) -> str | None:
    if not every:
        return f"There is no table {settings.table}; there are {', '.join(tables.names())}."
    strange = [part for part in settings.only if part not in every]
    if strange:
        return f"{settings.table} has no {', '.join(strange)}; it has {', '.join(every)}."
    if settings.show:
        return None
    if settings.store:
        there = [part for part in parts if (tables.HOME / tables.LOGS / part / "summary.json").is_file()]
        return f"{', '.join(there)} lies in {tables.LOGS} from an earlier time: move it away." if there else None
    unknown = [part for part in parts if part not in tables.found()]
    return f"Nothing is stated of {', '.join(unknown)} yet: --store keeps what comes out." if unknown else None


def _runs(parts: Sequence[str], data_dir: str | None, root: str) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    for part in parts:
        if part in tables.NEEDS:
            # A teacher's facts are written when its training is through.
            version = (tables.HOME / teacher_of(part, root)).parents[1]
            if not (version / "metrics.json").is_file():
                run(tables.NEEDS[part], data_dir, root, [*tables.ONLY_TEACHER, "--resume"])
        yield part, *run(part, data_dir, root)


def _store(folder: Path, results: Path, facts: Mapping[str, Any]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "summary.json"):
        shutil.copyfile(folder / name, results / name)
    (results / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
