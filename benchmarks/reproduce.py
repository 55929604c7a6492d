"""The tables of the README: make one again and compare it with what is stated, or state it anew.

Each part of a table is an experiment, ``configs/reproduce/PART.yaml``, whose summary, resolved settings and report are
``results/PART/``. A table of several parts has those whose names begin with its own: ``fewer-labels`` and
``fewer-labels.all-images``.

    python -m benchmarks.reproduce mnist-linear
"""

import json
import math
import os
import platform
import shutil
import statistics
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
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from kd.report import gain_in_points, gain_over, measured_with, price_cells, price_headings, share, title_of

HOME = Path(__file__).parents[1]
LOGS = "logs"
CONFIGS, RESULTS = HOME / "configs" / "reproduce", HOME / "results"

PARTS = {
    "mnist-linear": "all weights drawn with a standard deviation of 1, as published",
    "mnist-linear.small-weights": "the student's weights as PyTorch draws them",
    "mnist-conv": "its own teacher",
    "mnist-conv.better-teacher": "a teacher that knows more than the student alone",
    "mnist-conv.free-logits": "from that teacher, by losses that leave the student its own logits",
    "mnist-conv.fresh-seeds": "the best of these, `ce=1 ttm=1`, with six other seeds",
    "imagenette-today": "from one teacher",
    "imagenette-today.views": "two views of each image instead of a new one each epoch",
    "imagenette-today.assistant": "the same two views, from the teacher to an assistant to the student",
    "imagenette-today.ensemble": "the same two views, from three teachers as one",
    "imagenette-first": "",
    "fewer-labels": "a tenth of the images, with labels",
    "fewer-labels.all-images": "the other images, too, without labels",
    "losses": "",
}
"""Every experiment, in the order in which they are run, with what tells it from the others of its table."""

FRONT, FRONT_OBJECTIVE = "imagenette-today", "ce=0.1 kl=0.9"
"""What the first page shows: an experiment's networks, and the objective by default, which no result chose."""

NEEDS = {
    "mnist-linear.small-weights": "mnist-linear",
    "mnist-conv.free-logits": "mnist-conv.better-teacher",
    "mnist-conv.fresh-seeds": "mnist-conv.better-teacher",
} | dict.fromkeys(
    (
        "imagenette-today.assistant",
        "imagenette-today.views",
        "imagenette-first",
        "fewer-labels",
        "fewer-labels.all-images",
    ),
    FRONT,
)
"""The experiments that distil the first teacher that another one trained."""

TIMED = ("losses",)
"""The tables that say how long a training took."""

PUBLISHED = {
    "mnist-linear": {
        "teacher": "97.9, 98.12",
        "student alone": "88.84",
        "ce=1 kl(temperature=2)=1": "89.14",
        "ce=1 kl(temperature=5)=1": "90.77",
    },
    "mnist-conv": {"teacher": "97.81", "student alone": "97.78", "ce=0.1 kl(temperature=10)=0.009": "96.92"},
}
"""What the authors of a recipe found, in per cent, by the names of our rows."""

_OF_ONE_RUN, _LEVEL = 0.005, 0.05
_MINUTE = 60


@dataclass(frozen=True)
class Row:
    """What one network of a table came to.

    Args:
        name: The phase's title, or the objective.
        mean: Accuracy at the last epoch, the mean over the seeds, a fraction of 1.
        std: Its standard deviation over the seeds, ``None`` for one.
        count: Number of seeds.
        gain: Over the student alone of the table, in points, in words.
        seconds: Of one training, the mean.
    """

    name: str
    mean: float
    std: float | None
    count: int
    gain: str
    seconds: float


def tables() -> list[str]:
    """List the names of the tables."""
    return [part for part in PARTS if "." not in part]


def parts_of(table: str) -> list[str]:
    """List the experiments of a table."""
    return [part for part in PARTS if part.partition(".")[0] == table]


def found() -> list[str]:
    """List the experiments whose results are kept."""
    return [part for part in PARTS if (RESULTS / part / "summary.json").is_file()]


def shown() -> list[str]:
    """List the tables of which at least one experiment's results are kept."""
    return [table for table in tables() if set(parts_of(table)) & set(found())]


def rows_of(summary: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> list[Row]:
    """Read the rows of a summary: phases in their order, then objectives, best first.

    Args:
        summary: As an experiment wrote it.
        baseline: The phase of the student alone that gains are over, if it is another experiment's.
    """
    phases = summary["phases"]
    baseline = phases.get("baseline", baseline)
    named = [(title_of(phase, phases), facts, phase == "distilled") for phase, facts in phases.items()]
    named += [(row["objective"], row, True) for row in summary["compared"]]
    rows = []
    for name, facts, is_distilled in named:
        gain = gain_over(baseline["runs"], facts["runs"]) if is_distilled and baseline else None
        seconds = statistics.fmean(run["seconds"] or 0.0 for run in facts["runs"])
        count = len(facts["runs"])
        rows.append(Row(name, facts["val_acc_mean"], facts["val_acc_std"], count, gain_in_points(gain), seconds))
    return rows


def markdown(table: str) -> str:
    """Write a table as the README shows it, from what is kept in ``results``."""
    published, is_timed = PUBLISHED.get(table, {}), table in TIMED
    heads = ["network or objective", *["published"] * bool(published), "accuracy, last epoch", "over the student alone"]
    heads += ["a training"] * is_timed
    rows: list[list[str]] = []
    commands, machines, baseline = [], set(), None
    for part in parts_of(table):
        if PARTS[part]:
            rows.append([f"*{PARTS[part]}*"])
        if part not in found():
            rows.append(["not run yet"])
            commands.append(" ".join(_command(part)))
            continue
        summary, facts = _read(RESULTS / part / "summary.json"), _read(RESULTS / part / "run.json")
        for row in rows_of(summary, baseline):
            cells = [f"`{row.name}`" if "=" in row.name or "(" in row.name else row.name]
            if row.name == title_of("distilled", {}):
                cells = [f"{row.name}, `{' '.join(_settings(part)['loss'])}`"]
            # What was published is of the recipe as it was published.
            cells += [published.get(row.name, "") if part == table else ""] * bool(published)
            rows.append([*cells, share(row.mean, row.std), row.gain, *[f"{row.seconds:.0f} s"] * is_timed])
        baseline = summary["phases"].get("baseline", baseline)
        if part in NEEDS and NEEDS[part] not in parts_of(table):
            first = f"{' '.join(_command(NEEDS[part]))}   # whose teacher it is"
            commands += [first] * (first not in commands)
        commands.append(f"{' '.join(_command(part))}   # {facts['minutes']:.0f} minutes")
        machines.add(f"{facts['machine']}, torch {facts['torch']}")
    words = "Mean ± standard deviation over three seeds where no other number is named; gains in points, paired by seed"
    words += ", with their 95 % interval"
    after = [f"{'; '.join([words, *sorted(machines)])}.", "", "```bash", *commands, "```"]
    return "\n".join([*_table(heads, rows), "", *after])


def front() -> str:
    """Write what a person gains, as the README's first page shows it: accuracy, size and speed of three networks."""
    summary = _read(RESULTS / FRONT / "summary.json")
    teacher, alone, compared = summary["phases"]["teacher"], summary["phases"]["baseline"], summary["compared"]
    (usual,) = (row for row in compared if row["objective"] == FRONT_OBJECTIVE)
    named = [("teacher", teacher, teacher["price"]), ("student alone", alone, alone["price"])]
    # Distilled it is the same network.
    named.append((f"student distilled, `{FRONT_OBJECTIVE}`", usual, alone["price"]))
    if compared[0] is not usual:
        words = f"student distilled, `{compared[0]['objective']}`, the best of {len(compared)}"
        named.append((words, compared[0], alone["price"]))
    heads = ["", "accuracy", "over the student alone", "parameters", "MB (float32)", "multiply-adds", "one image"]
    rows = [
        [
            name,
            share(facts["val_acc_mean"], facts["val_acc_std"]),
            gain_in_points(facts.get("gain")),
            f"{price['parameters']:,}",
            f"{price['megabytes']['float32']:.1f}",
            f"{price['multiply_adds'] / 1e6:,.0f} M",
            f"{price['speed']['cpu']['latency_ms']:.1f} ms",
        ]
        for name, facts, price in named
    ]
    seeds = len(alone["runs"])
    words = f"Mean ± standard deviation over {seeds} seeds; gains in points, with their 95 % interval"
    return "\n".join([*_table(heads, rows), "", f"{words}; {_read(RESULTS / FRONT / 'run.json')['machine']}."])


def networks() -> str:
    """Write the table of size and speed."""
    prices = json.loads((RESULTS / "networks" / "prices.json").read_text(encoding="utf-8"))
    lines = _table(price_headings(prices[0]), [price_cells(price) for price in prices])
    return "\n".join([*lines, "", measured_with(prices[0]), "", "```bash", "kd models --measure", "```"])


@dataclass(frozen=True)
class Settings:
    """Make a table of the README again, and compare it with what is stated.

    Args:
        table: The table.
        data_dir: Folder of the images; None: as its file has it.
        store: Keep what came out in results/, as what is stated from now on.
        only: Those of its experiments; none: all.
        show: Print the table as the README has it, and do nothing else.
    """

    table: Annotated[str, tyro.conf.Positional]
    data_dir: str | None = None
    store: bool = False
    only: tuple[str, ...] = ()
    show: bool = False


def run(part: str, data_dir: str | None, root: str) -> tuple[Path, dict[str, Any]]:
    """Run an experiment; return its folder, and with what and for how long.

    Args:
        part: Its name.
        data_dir: Folder of the images; ``None``: as its file has it.
        root: Folder of all experiments.
    """
    given = ["--default_root_dir", root] + ([] if data_dir is None else ["--data_dir", data_dir])
    if part in NEEDS and root != LOGS:
        given += ["--teacher_checkpoint", teacher_of(part, root)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *_command(part)[1:], *given], check=False, cwd=HOME)  # noqa: S603 (its own)
    if done.returncode:
        # It has said why.
        sys.exit(done.returncode)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return HOME / root / part, {
        "minutes": round((time.perf_counter() - start) / _MINUTE, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {cores} cores, {device}",
        "torch": torch.__version__.partition("+")[0],
    }


def teacher_of(part: str, root: str = LOGS) -> str:
    """Name the checkpoint of the teacher that an experiment takes from another one."""
    return f"{root}/{NEEDS[part]}/teacher/version_0/checkpoints/best.ckpt"


def tolerances(rows: list[Row]) -> list[float]:
    """Return how far each row's mean may lie from it elsewhere, a fraction of 1.

    Means of several seeds: as far apart as two of one population would be, with 95 % for all rows together, by the
    deviation that the rows share (Student's t, Bonferroni). Of a single run, half a point of accuracy.
    """
    several = [(row.std, row.count) for row in rows if row.std is not None]
    if not several:
        return [_OF_ONE_RUN] * len(rows)
    degrees = sum(count - 1 for _, count in several)
    pooled = math.sqrt(sum((count - 1) * std**2 for std, count in several) / degrees)
    quantile = float(stats.t.ppf(1 - _LEVEL / 2 / len(several), degrees))
    return [_OF_ONE_RUN if row.std is None else quantile * pooled * math.sqrt(2 / row.count) for row in rows]


def compare(stated: list[Row], now: list[Row], console: Console) -> bool:
    """Print what is stated beside what came out now; return whether each mean lies within its tolerance."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("network or objective", overflow="fold")
    for heading in ("stated", "now", "within"):
        table.add_column(heading, justify="right")
    found, holds = {row.name: row for row in now}, True
    for row, tolerance in zip(stated, tolerances(stated), strict=True):
        other = found.get(row.name)
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
    parts = [part for part in parts_of(settings.table) if not settings.only or part in settings.only]
    if not parts:
        console.print(f"There is no table {settings.table}; there are {', '.join(tables())}.", highlight=False)
        return 2
    if settings.show:
        console.print(markdown(settings.table), highlight=False, soft_wrap=True, markup=False)
        return 0
    unknown = [part for part in parts if part not in found()]
    if unknown and not settings.store:
        console.print(f"Nothing is stated of {', '.join(unknown)} yet: --store keeps what comes out.", highlight=False)
        return 2
    if settings.store:
        # Where experiments lie, so that later ones find its teacher.
        for part, folder, facts in _runs(parts, settings.data_dir, LOGS):
            _store(folder, RESULTS / part, facts)
        return 0
    holds = True
    with tempfile.TemporaryDirectory() as root:
        for part, folder, facts in _runs(parts, settings.data_dir, root):
            console.print(f"\n{part}, {facts['minutes']} minutes", highlight=False)
            stated = rows_of(_read(RESULTS / part / "summary.json"))
            holds &= compare(stated, rows_of(_read(folder / "summary.json")), console)
    console.print("As stated." if holds else "Not as stated.")
    return 0 if holds else 1


def _runs(parts: Sequence[str], data_dir: str | None, root: str) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    for part in parts:
        # Its facts are written when its training is through.
        if part in NEEDS and not (HOME / teacher_of(part, root)).parents[1].joinpath("metrics.json").is_file():
            run(NEEDS[part], data_dir, root)
        yield part, *run(part, data_dir, root)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, *([*row, *[""] * (len(heads) - len(row))] for row in rows)]
    head, *others = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|---" * len(heads) + "|", *others]


def _command(part: str) -> list[str]:
    return ["python", "experiment.py", "--config", f"configs/reproduce/{part}.yaml"]


def _settings(part: str) -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load((RESULTS / part / "config.yaml").read_text(encoding="utf-8"))
    return known


def _store(folder: Path, results: Path, facts: Mapping[str, Any]) -> None:
    results.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "summary.json", "report.html"):
        shutil.copyfile(folder / name, results / name)
    (results / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return known


if __name__ == "__main__":
    sys.exit(main())
