"""The tables of experiments, made of what is kept in ``results``.

Each part of a table is an experiment, ``configs/reproduce/PART.yaml``, whose summary, resolved settings and report lie
in ``results/PART/``, with what it ran on and for how long (``run.json``). A table of several parts has those whose
names begin with its own: ``fewer-labels`` and ``fewer-labels.all-images``.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd.report import gain_in_points, gain_over, read_summary, share, title_of

HOME = Path(__file__).parents[1]
LOGS = "logs"
CONFIGS, RESULTS = HOME / "configs" / "reproduce", HOME / "results"

PARTS = {
    "mnist-linear": "all weights drawn with a standard deviation of 1, as published",
    "mnist-linear.small-weights": "the student's weights as PyTorch draws them",
    "mnist-conv": "its own teacher",
    "mnist-conv.better-teacher": "a teacher that knows more than the student alone",
    "mnist-conv.free-logits": "from that teacher, by losses that leave the student its own logits",
    "mnist-conv.fresh-seeds": "the best of these, with six other seeds",
    "mnist-conv.more-seeds": "and with eighteen more",
    "imagenette-today": "from one teacher",
    "imagenette-today.views": "two views of each image instead of a new one each epoch",
    "imagenette-today.assistant": "the same two views, from the teacher to an assistant to the student",
    "imagenette-today.ensemble": "the same two views, from three teachers as one",
    "imagenette-today.fresh-seeds": "new views in each epoch, and six other seeds",
    "imagenette-first": "",
    "fewer-labels": "a tenth of the images, with labels, 450 steps",
    "fewer-labels.same-steps": "the same images, the student alone for 1,184 steps",
    "fewer-labels.all-images": "the other images, too, without labels, 1,184 steps",
    "losses": "",
}
"""Every experiment, in the order in which they are run, with what tells it from the others of its table."""

NEEDS = {
    "mnist-linear.small-weights": "mnist-linear",
    "mnist-conv.free-logits": "mnist-conv.better-teacher",
    "mnist-conv.fresh-seeds": "mnist-conv.better-teacher",
    "mnist-conv.more-seeds": "mnist-conv.better-teacher",
    "imagenette-today.assistant": "imagenette-today",
    "imagenette-today.fresh-seeds": "imagenette-today",
    "imagenette-today.views": "imagenette-today",
    "imagenette-first": "imagenette-today",
    "fewer-labels": "imagenette-today",
    "fewer-labels.all-images": "imagenette-today",
}
"""The experiments that distill the first teacher that another one trained."""

ONLY_TEACHER = ["--no-baseline", "--compare_losses"]
"""Flags with which such another one trains its teacher and nothing else."""

TIMED = ("losses",)
"""The tables that say how long a training took."""

PUBLISHED = {
    "mnist-linear": {
        "teacher": "97.9 (T = 2), 98.12 (T = 5)",
        "student alone": "88.84",
        "ce=1 kl(temperature=2)=1": "89.14",
        "ce=1 kl(temperature=5)=1": "90.77",
    },
    "mnist-conv": {"teacher": "97.81", "student alone": "97.78", "ce=0.1 kl(temperature=10)=0.9": "96.92"},
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
        gain: Over the student alone, in points, in words.
        seconds: Of one training, the median; ``None`` of networks that were not trained there.
        is_objective: Whether the name is an objective's.
    """

    name: str
    mean: float
    std: float | None
    count: int
    gain: str
    seconds: float | None
    is_objective: bool = False


def names() -> list[str]:
    """List the names of the tables."""
    return [part for part in PARTS if "." not in part]


def parts_of(table: str) -> list[str]:
    """List the experiments of a table."""
    return [part for part in PARTS if part.partition(".")[0] == table]


def found() -> list[str]:
    """List the experiments whose results are kept."""
    return [part for part in PARTS if (RESULTS / part / "summary.json").is_file()]


def rows_of(summary: Mapping[str, Any], elsewhere: Sequence[Mapping[str, Any]] = ()) -> list[Row]:
    """Read the rows of a summary: phases in their order, then objectives, best first.

    Args:
        summary: As an experiment wrote it.
        elsewhere: Runs of the student alone, by other experiments, that gains are over where it has none itself.
    """
    phases = summary["phases"]
    alone = alone_of(summary) or elsewhere
    named = [(title_of(phase, phases), facts, phase == "distilled", False) for phase, facts in phases.items()]
    named += [(row["objective"], row, True, True) for row in summary["compared"]]
    rows = []
    for name, facts, is_distilled, is_objective in named:
        gain = gain_in_points(gain_over(alone, facts["runs"]) if is_distilled else None)
        known = [run["seconds"] for run in facts["runs"] if run["seconds"] is not None]
        seconds = statistics.median(known) if known else None
        mean, std = facts["val_acc_mean"], facts["val_acc_std"]
        rows.append(Row(name, mean, std, len(facts["runs"]), gain, seconds, is_objective))
    return rows


def alone_of(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the runs of the student alone, none if there are none."""
    runs: list[Mapping[str, Any]] = summary["phases"].get("baseline", {"runs": []})["runs"]
    return runs


def markdown(table: str) -> str:
    """Write a table as the README shows it, from what is kept in ``results``."""
    published, is_timed = PUBLISHED.get(table, {}), table in TIMED
    heads = ["network or objective", *["published"] * bool(published), "accuracy, last epoch", "over the student alone"]
    heads += ["a training"] * is_timed
    rows: list[list[str]] = []
    commands, machines = [], set()
    alone: dict[int, Mapping[str, Any]] = {}
    for part in parts_of(table):
        if PARTS[part]:
            rows.append([f"*{PARTS[part]}*"])
        if part not in found():
            rows.append(["not run yet"])
            commands.append(" ".join(command(part)))
            continue
        summary, facts = read_summary(RESULTS / part), facts_of(part)
        for row in rows_of(summary, list(alone.values())):
            cells = [f"`{row.name}`" if row.is_objective else row.name]
            if row.name == title_of("distilled", {}):
                cells = [f"{row.name}, `{' '.join(_settings(part)['loss'])}`"]
            # What was published is of the recipe as it was published.
            cells += [published.get(row.name, "") if part == table else ""] * bool(published)
            rows.append(
                [
                    *cells,
                    share(row.mean, row.std),
                    row.gain,
                    *["" if row.seconds is None else f"{row.seconds:.0f} s"] * is_timed,
                ]
            )
        alone |= {run["seed"]: run for run in alone_of(summary)}
        if part in NEEDS and NEEDS[part] not in parts_of(table):
            first = f"{' '.join([*command(NEEDS[part]), *ONLY_TEACHER])}   # whose teacher it is"
            commands += [first] * (first not in commands)
        commands.append(f"{' '.join(command(part))}   # {facts['minutes']:.0f} minutes")
        machines.add(f"{facts['machine']}, torch {facts['torch']}")
    words = "Mean ± standard deviation over three seeds where no other number is named; gains in points, paired by seed"
    words += ", with their 95 % interval"
    after = [f"{'; '.join([words, *sorted(machines)])}.", "", "```bash", *commands, "```"]
    return "\n".join([*grid(heads, rows), "", *after])


def command(part: str) -> list[str]:
    """Return the command line that runs an experiment."""
    return ["python", "experiment.py", "--config", f"configs/reproduce/{part}.yaml"]


def facts_of(part: str) -> dict[str, Any]:
    """Read on what an experiment ran, and for how many minutes."""
    known: dict[str, Any] = json.loads((RESULTS / part / "run.json").read_text(encoding="utf-8"))
    return known


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table of Markdown, line by line; short rows are filled up."""
    lines = [heads, *([*row, *[""] * (len(heads) - len(row))] for row in rows)]
    head, *others = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|---" * len(heads) + "|", *others]


def _settings(part: str) -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load((RESULTS / part / "config.yaml").read_text(encoding="utf-8"))
    return known
