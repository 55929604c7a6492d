"""Benchmarks: ``uv run --group benchmarks python -m benchmarks --data_dir DIR`` (``--quick`` for a short trial).

Each training method runs in its own process, with a memory allocator of its own. The methods are measured alternately,
so that other load on the machine affects all equally. A speedup is the median of the ratios within each round, with
quartiles; as a control, the plain loop is compared with itself.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks import measures, peer
from benchmarks.images import write_photos
from benchmarks.measures import PAIRS, Effort, Row
from benchmarks.plain import Task
from kd.console import make_console
from kd.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """Size of the benchmarks.

    Args:
        data_dir: Folder of class folders of photographs; none: synthetic images.
        image_size: Side of the views, in pixels.
        batch_size: Images per batch.
        rounds: Measurements per method.
        steps: Timed steps per measurement; four times as many with stored logits.
        quick: Smoke test: three rounds, the first pair of networks, few and small images.
        only: Benchmarks to run: input, pairs, scale, ten, overhead; none: all. Other stored rows are kept.
        results: Output folder; none: benchmarks/results, or no output with --quick.
    """

    data_dir: Path | None = None
    image_size: int = 224
    batch_size: int = 64
    rounds: int = 7
    steps: int = 1
    quick: bool = False
    only: tuple[str, ...] = ()
    results: Path | None = None


def measure(settings: Settings, effort: Effort, console: Console) -> list[Row]:
    """Run the selected benchmarks and print progress."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    pairs = list(PAIRS)[:1] if settings.quick else list(PAIRS)
    benchmarks: list[tuple[str, Callable[[Effort], list[Row]]]] = [("input", measures.input_alone)]
    for device in devices:
        benchmarks += [("pairs", partial(measures.pair, name, device=device)) for name in pairs]
    benchmarks += [("scale", measures.images_and_workers), ("ten", measures.ten_runs), ("overhead", measures.overhead)]
    rows: list[Row] = []
    for name, benchmark in benchmarks:
        if not settings.only or name in settings.only:
            rows += benchmark(effort)
            console.print(f"{rows[-1]['row']}: done")
    return rows


def as_markdown(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""

    def cell(value: Any) -> str:  # noqa: ANN401 (any value in a row)
        if isinstance(value, dict) and "median" in value:
            return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
        if isinstance(value, dict):
            return ", ".join(f"{name} {number:,}" for name, number in value.items())
        return "" if value is None else str(value)

    heads = {
        "row": "measurement",
        "pair": "networks",
        "images_per_second": "images/s",
        "against_plain": "speedup over plain",
        "against_limit": "over the limit",
        "against_torchdistill": "over torchdistill",
        "peak_mb": "peak memory, MB",
    }
    lines = [f"| {' | '.join([*heads.values(), 'more'])} |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        more = "; ".join(f"{name} {cell(value)}" for name, value in row.items() if name not in heads)
        lines.append(f"| {' | '.join([*(cell(row.get(name)) for name in heads), more])} |")
    return "\n".join(lines)


def write(rows: list[Row], about: dict[str, Any], folder: Path) -> Path:
    """Write rows and table, keeping earlier rows that were not measured again; return the path without a suffix."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    path = folder / f"{platform.machine()}-{cores}-cores-{torch.backends.cpu.get_cpu_capability().lower()}"
    if path.with_suffix(".json").is_file():
        measured = {(row["row"], row["pair"]) for row in rows}
        earlier = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        rows = [*rows, *(row for row in earlier if (row["row"], row["pair"]) not in measured)]
    heading = ", ".join(f"{name} {value}" for name, value in about.items())
    gpu = "" if any("GPU" in row["row"] for row in rows) else "\nNot yet measured on a GPU.\n"
    write_json(path.with_suffix(".json"), rows)
    write_text(path.with_suffix(".md"), f"{heading}\n\n{as_markdown(rows)}\n{gpu}")
    return path


def main() -> None:
    """Run the benchmarks and write the results."""
    settings = tyro.cli(Settings, prog="python -m benchmarks", use_underscores=True)
    console = make_console()
    if not peer.is_installed():
        console.print("torchdistill is not installed (--group benchmarks): skipped")
    temporary = Path(tempfile.mkdtemp())
    os.environ["KD_CACHE"] = str(temporary / "cache")
    quick = settings.quick
    try:
        effort = Effort(
            task=Task(
                settings.data_dir or write_photos(temporary / "photos", count=16 if quick else 64),
                image_size=64 if quick else settings.image_size,
                batch_size=16 if quick else settings.batch_size,
            ),
            temporary=temporary,
            rounds=3 if quick else settings.rounds,
            steps=settings.steps,
            images=(64, 128) if quick else (1000, 9000),
            small_size=64 if quick else 128,
            compared=(64, 32, 64, 1, 1) if quick else (320, 100, 224, 2, 8),
        )
        rows = measure(settings, effort, console)
    finally:
        shutil.rmtree(temporary)
    about = {
        "image_size": effort.task.image_size,
        "batch_size": effort.task.batch_size,
        "rounds": effort.rounds,
        "torch": torch.__version__,
        "images": "photographs" if settings.data_dir else "synthetic",
    }
    console.print(as_markdown(rows))
    results = settings.results or (None if quick else RESULTS)
    if results is not None:
        path = write(rows, about, results)
        console.print(f"\nFiles: {path}.json and .md")


if __name__ == "__main__":
    main()
