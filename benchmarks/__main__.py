"""Measure: ``uv run python -m benchmarks --data_dir DIR`` (``--quick`` for a look).

Each way of training runs in a process of its own, since the memory allocator is a process's, and waits until it is told
to make a few steps. So the ways take turns, all within one call, and what else the machine does falls on all alike. A
ratio is the median over the rounds of the ratios within a round, with its quartiles; a control pits the plain loop
against itself.
"""

import json
import os
import platform
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console

from benchmarks.ways import Way

RESULTS = Path(__file__).parent / "results"
PAIRS = {
    "resnet50 to resnet18": ("resnet50", "resnet18"),
    "densenet121 to simple": ("densenet121", "simple"),
    "densenet121 to mobilenet_v3_small": ("densenet121", "mobilenet_v3_small"),
}
# Whether the student of the limit trains in bfloat16 on a CPU: it is the slower way for depthwise networks.
BFLOAT16 = {"resnet18": True, "simple": True, "mobilenet_v3_small": False}


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Args:
        data_dir: Folder of class folders of photographs; none: such are made on the spot.
        image_size: Side of the views, in pixels.
        batch_size: Images in a batch.
        rounds: Turns that each way takes.
        steps: Steps of a turn, of those that compute the teacher's outputs.
        quick: Three rounds of one step, and the first pair alone.
    """

    data_dir: Path | None = None
    image_size: int = 224
    batch_size: int = 64
    rounds: int = 7
    steps: int = 1
    quick: bool = False


def take_turns(
    ways: dict[str, Way], settings: Settings, *, steps: dict[str, int], warm_up: dict[str, int]
) -> dict[str, list[float]]:
    """Let the ways take turns; return the seconds of a step by way, round by round."""
    for name, way in ways.items():
        way.seconds(warm_up[name])
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(settings.rounds):
        # Every second round backwards, so that none is always the one after the slowest.
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            taken[name].append(ways[name].seconds(steps[name]))
    return taken


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Return how many times as fast the other is: the median of the ratios by round, and their quartiles."""
    ratios = [first / second for first, second in zip(one, other, strict=True)]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def measure_pair(pair: str, folder: Path, settings: Settings, store: Path) -> list[dict[str, Any]]:
    """Measure a pair of networks, live and from the store."""
    teacher, student = PAIRS[pair]
    names: dict[str, Any] = {"teacher_name": teacher, "student_name": student}
    bfloat16 = BFLOAT16[student]
    sizes: dict[str, Any] = {"image_size": settings.image_size, "batch_size": settings.batch_size}
    ways = {
        "plain": Way("plain", folder, **sizes, **names),
        "control": Way("plain", folder, **sizes, **names),
        "limit": Way("limit", folder, **sizes, **names, bfloat16=bfloat16, stored=False),
        "live": Way("ours", folder, **sizes, **names, stored=False),
        "limit stored": Way("limit", folder, **sizes, **names, bfloat16=bfloat16, stored=True),
        "stored": Way("ours", folder, **sizes, **names, stored=True, store=store),
    }
    batches = sum(1 for path in folder.rglob("*") if path.is_file()) // settings.batch_size
    few = dict.fromkeys(ways, settings.steps) | {"stored": 4 * settings.steps, "limit stored": 4 * settings.steps}
    # The store is full after an epoch.
    warm_up = dict.fromkeys(ways, 2) | {"stored": batches + 3}
    try:
        taken = take_turns(ways, settings, steps=few, warm_up=warm_up)
    finally:
        for way in ways.values():
            way.end()
    rows = []
    for name, limit in (("live", "limit"), ("stored", "limit stored")):
        rows.append(
            {
                "row": name,
                "pair": pair,
                "ours_images_per_second": round(settings.batch_size / statistics.median(taken[name]), 1),
                "against_plain": ratio(taken["plain"], taken[name]),
                "against_limit": ratio(taken[limit], taken[name]),
                "against_torchdistill": None,
                "peak_mb": {one: round(ways[one].peak_mb) for one in ("plain", limit, name)},
            }
        )
    control = ratio(taken["plain"], taken["control"])
    return [*rows, {"row": "control: plain against plain", "pair": pair, "against_plain": control}]


def measure_input(folder: Path, settings: Settings) -> dict[str, Any]:
    """Measure the input pipeline alone."""
    sizes: dict[str, Any] = {"image_size": settings.image_size, "batch_size": settings.batch_size}
    ways = {"plain": Way("plain input", folder, **sizes), "ours": Way("our input", folder, **sizes)}
    try:
        steps = {"plain": 2 * settings.steps, "ours": 8 * settings.steps}
        taken = take_turns(ways, settings, steps=steps, warm_up={"plain": 1, "ours": 8})
    finally:
        for way in ways.values():
            way.end()
    return {
        "row": "input alone",
        "pair": None,
        "ours_images_per_second": round(settings.batch_size / statistics.median(taken["ours"]), 1),
        "against_plain": ratio(taken["plain"], taken["ours"]),
        "against_limit": None,
        "against_torchdistill": None,
    }


def photographs(folder: Path, *, classes: int = 10, count: int = 64) -> Path:
    """Make JPEGs of 500x375 px on the spot: smooth noise, which compresses about as photographs do."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True)
        for index in range(count):
            coarse = generator.integers(0, 255, (60, 80, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
            grain = generator.normal(0, 6, (375, 500, 3))
            pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{index}.jpg", quality=90)
    return folder


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a table."""

    def said(value: dict[str, float] | None) -> str:
        return "" if value is None else f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"

    lines = ["| what | networks | images/s | against plain | against the limit |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["row"], row["pair"] or "", str(row.get("ours_images_per_second", "")), said(row["against_plain"])]
        lines.append(f"| {' | '.join([*cells, said(row.get('against_limit'))])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure everything, and write it down."""
    settings = tyro.cli(Settings, prog="python -m benchmarks", use_underscores=True)
    console = Console()
    pairs = list(PAIRS)[:1] if settings.quick else list(PAIRS)
    if settings.quick:
        settings = Settings(settings.data_dir, settings.image_size, settings.batch_size, rounds=3, steps=1, quick=True)
    temporary = Path(tempfile.mkdtemp())
    os.environ["KD_CACHE"] = str(temporary / "cache")
    try:
        folder = settings.data_dir or photographs(temporary / "photographs")
        rows = [measure_input(folder, settings)]
        for pair in pairs:
            rows += measure_pair(pair, folder, settings, temporary / "logits")
            console.print(f"{pair}: done", highlight=False)
    finally:
        shutil.rmtree(temporary)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.machine()}-{cores}-cores-{torch.backends.cpu.get_cpu_capability().lower()}"
    about: dict[str, Any] = {
        "image_size": settings.image_size,
        "batch_size": settings.batch_size,
        "rounds": settings.rounds,
    }
    about |= {"torch": str(torch.__version__), "images": "given" if settings.data_dir else "made on the spot"}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{machine}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    words = ", ".join(f"{name} {value}" for name, value in about.items())
    (RESULTS / f"{machine}.md").write_text(f"{words}\n\n{as_markdown(rows)}\n", encoding="utf-8")
    console.print(as_markdown(rows), highlight=False, soft_wrap=True)
    console.print(f"\nFiles: {RESULTS / machine}.json and .md", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
