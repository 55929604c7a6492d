"""The tables of the README, made of what is kept in ``results``.

Each part of a table is an experiment, ``configs/reproduce/PART.yaml``, whose summary, resolved settings and report are
``results/PART/``. A table of several parts has those whose names begin with its own: ``fewer-labels`` and
``fewer-labels.all-images``.
"""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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


def names() -> list[str]:
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
    return [table for table in names() if set(parts_of(table)) & set(found())]


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
            commands.append(" ".join(command(part)))
            continue
        summary, facts = read(RESULTS / part / "summary.json"), read(RESULTS / part / "run.json")
        for row in rows_of(summary, baseline):
            cells = [f"`{row.name}`" if "=" in row.name or "(" in row.name else row.name]
            if row.name == title_of("distilled", {}):
                cells = [f"{row.name}, `{' '.join(_settings(part)['loss'])}`"]
            # What was published is of the recipe as it was published.
            cells += [published.get(row.name, "") if part == table else ""] * bool(published)
            rows.append([*cells, share(row.mean, row.std), row.gain, *[f"{row.seconds:.0f} s"] * is_timed])
        baseline = summary["phases"].get("baseline", baseline)
        if part in NEEDS and NEEDS[part] not in parts_of(table):
            first = f"{' '.join(command(NEEDS[part]))}   # whose teacher it is"
            commands += [first] * (first not in commands)
        commands.append(f"{' '.join(command(part))}   # {facts['minutes']:.0f} minutes")
        machines.add(f"{facts['machine']}, torch {facts['torch']}")
    words = "Mean ± standard deviation over three seeds where no other number is named; gains in points, paired by seed"
    words += ", with their 95 % interval"
    after = [f"{'; '.join([words, *sorted(machines)])}.", "", "```bash", *commands, "```"]
    return "\n".join([*_table(heads, rows), "", *after])


def front() -> str:
    """Write what a person gains, as the README's first page shows it: accuracy, size and speed of three networks."""
    summary = read(RESULTS / FRONT / "summary.json")
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
    return "\n".join([*_table(heads, rows), "", f"{words}; {read(RESULTS / FRONT / 'run.json')['machine']}."])


def networks() -> str:
    """Write the table of size and speed."""
    prices = json.loads((RESULTS / "networks" / "prices.json").read_text(encoding="utf-8"))
    lines = _table(price_headings(prices[0]), [price_cells(price) for price in prices])
    return "\n".join([*lines, "", measured_with(prices[0]), "", "```bash", "kd models --measure", "```"])


def fill(page: str) -> str:
    """Return a page with the tables that are now kept, each between ``<!-- results: NAME, ... -->`` and its end."""

    def filled(found: re.Match[str]) -> str:
        made = {"front": front, "networks": networks}.get(found["name"])
        return f"{found['start']}{made() if made else markdown(found['name'])}\n{found['end']}"

    pattern = r"(?P<start><!-- results: (?P<name>[\w-]+), .*? -->\n).*?(?P<end><!-- end of (?P=name) -->)"
    return re.sub(pattern, filled, page, flags=re.DOTALL)


def command(part: str) -> list[str]:
    """Return the command line that runs an experiment."""
    return ["python", "experiment.py", "--config", f"configs/reproduce/{part}.yaml"]


def read(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return known


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, *([*row, *[""] * (len(heads) - len(row))] for row in rows)]
    head, *others = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|---" * len(heads) + "|", *others]


def _settings(part: str) -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load((RESULTS / part / "config.yaml").read_text(encoding="utf-8"))
    return known
