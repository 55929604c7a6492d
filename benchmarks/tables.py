"""Tables of experiments, generated from ``results``.

Each part of a table is an experiment, ``configs/reproduce/PART.yaml``. ``results/PART/`` contains its summary, its
resolved settings, and its duration and hardware (``run.json``). The table ``NAME`` consists of the parts ``NAME`` and
``NAME.*``, such as ``fewer-labels`` and ``fewer-labels.all-images``.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd.report import gain_in_points, paired_difference, read_summary, share, title_of

HOME = Path(__file__).parents[1]
LOGS = "logs"
CONFIGS, RESULTS = HOME / "configs" / "reproduce", HOME / "results"

PARTS = {
    "mnist-linear": "all weights initialized with a standard deviation of 1, as published",
    "mnist-linear.small-weights": "the student's weights initialized as by PyTorch",
    "mnist-conv": "its own teacher",
    "mnist-conv.better-teacher": "a teacher that is more accurate than the student trained on labels only",
    "mnist-conv.free-logits": "the same teacher, losses that don't constrain the student's logits directly",
    "mnist-conv.fresh-seeds": "the best of these objectives with six other seeds",
    "mnist-conv.more-seeds": "the same with eighteen more seeds",
    "imagenette-today": "one teacher",
    "imagenette-today.views": "two views of each image instead of a new one in each epoch",
    "imagenette-today.assistant": "the same two views, with a teacher assistant",
    "imagenette-today.ensemble": "the same two views, an ensemble of three teachers",
    "imagenette-today.fresh-seeds": "new views in each epoch, six other seeds",
    "imagenette-first": "",
    "fewer-labels": "a tenth of the images, labeled, 450 steps",
    "fewer-labels.same-steps": "the same images, labels only, 1,184 steps",
    "fewer-labels.all-images": "plus the other images, unlabeled, 1,184 steps",
    "losses": "",
}
"""All experiments in order of execution, each with its subheading in the table."""

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
"""Experiments that use another experiment's teacher."""

ONLY_TEACHER = ["--no-baseline", "--compare_losses"]
"""Flags with which an experiment trains only its teacher."""

TIMED = ("losses",)
"""Tables with a column of training times."""

PUBLISHED = {
    "mnist-linear": {
        "teacher": "97.9 (T = 2), 98.12 (T = 5)",
        "student, labels only": "88.84",
        "ce=1 kl(temperature=2)=1": "89.14",
        "ce=1 kl(temperature=5)=1": "90.77",
    },
    "mnist-conv": {"teacher": "97.81", "student, labels only": "97.78", "ce=0.1 kl(temperature=10)=0.9": "96.92"},
}
"""Published accuracies in percent, by table and row."""

CAPTION = (
    "Mean ± standard deviation over three seeds unless stated otherwise; gains in percentage points, paired by seed, "
    "with 95 % confidence intervals, simultaneous over the objectives of an experiment"
)
"""Caption of every table."""


@dataclass(frozen=True)
class Row:
    """Results of one network.

    Args:
        name: Title of the phase, or the objective.
        mean: Mean accuracy after the last epoch, a fraction of 1.
        std: Standard deviation over the seeds; ``None`` for one seed.
        count: Number of seeds.
        gain: Gain over the baseline with its confidence interval, formatted, in percentage points.
        seconds: Median training time; ``None`` if the experiment did not train the network.
        is_objective: Whether the name is an objective.
    """

    name: str
    mean: float
    std: float | None
    count: int
    gain: str
    seconds: float | None
    is_objective: bool = False


def names() -> list[str]:
    """Return the names of all tables."""
    return [part for part in PARTS if "." not in part]


def parts_of(table: str) -> list[str]:
    """Return the experiments of a table."""
    return [part for part in PARTS if part.partition(".")[0] == table]


def found() -> list[str]:
    """Return the experiments with stored results."""
    return [part for part in PARTS if (RESULTS / part / "summary.json").is_file()]


def rows_of(summary: Mapping[str, Any], other_baseline: Sequence[Mapping[str, Any]] = ()) -> list[Row]:
    """Return the rows of a summary: phases in order, then objectives, best first.

    Args:
        summary: An experiment's summary.
        other_baseline: Baseline runs of other experiments, for an experiment without a baseline.
    """
    phases, objectives = summary["phases"], max(1, len(summary["compared"]))
    baseline = baseline_of(summary) or other_baseline
    named = [(title_of(phase, phases), facts, phase == "distilled", False) for phase, facts in phases.items()]
    named += [(row["objective"], row, True, True) for row in summary["compared"]]
    rows = []
    for name, facts, is_distilled, is_objective in named:
        gain = paired_difference(facts["runs"], baseline, comparisons=objectives) if is_distilled else None
        durations = [run["seconds"] for run in facts["runs"] if run["seconds"] is not None]
        seconds = statistics.median(durations) if durations else None
        mean, std = facts["val_acc_mean"], facts["val_acc_std"]
        rows.append(Row(name, mean, std, len(facts["runs"]), gain_in_points(gain), seconds, is_objective))
    return rows


def baseline_of(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the baseline's runs, if any."""
    runs: list[Mapping[str, Any]] = summary["phases"].get("baseline", {"runs": []})["runs"]
    return runs


def markdown(table: str) -> str:
    """Return a table as Markdown."""
    published, is_timed = PUBLISHED.get(table, {}), table in TIMED
    heads = ["network or objective", *["published"] * bool(published), "accuracy, last epoch", "gain over labels only"]
    heads += ["training time"] * is_timed
    rows: list[list[str]] = []
    commands, machines = [], set()
    baseline: dict[int, Mapping[str, Any]] = {}
    for part in parts_of(table):
        if PARTS[part]:
            rows.append([f"*{PARTS[part]}*"])
        if part not in found():
            rows.append(["not run yet"])
            commands.append(" ".join(command(part)))
            continue
        summary, facts = read_summary(RESULTS / part), facts_of(part)
        for row in rows_of(summary, list(baseline.values())):
            cells = [f"`{row.name}`" if row.is_objective else row.name]
            if row.name == title_of("distilled", {}):
                cells = [f"{row.name}, `{' '.join(_settings(part)['loss'])}`"]
            # Published accuracies apply to the published recipe only.
            cells += [published.get(row.name, "") if part == table else ""] * bool(published)
            rows.append(
                [
                    *cells,
                    share(row.mean, row.std),
                    row.gain,
                    *["" if row.seconds is None else f"{row.seconds:.0f} s"] * is_timed,
                ]
            )
        baseline |= {run["seed"]: run for run in baseline_of(summary)}
        if part in NEEDS and NEEDS[part] not in parts_of(table):
            teacher = f"{' '.join([*command(NEEDS[part]), *ONLY_TEACHER])}   # trains the teacher"
            commands += [teacher] * (teacher not in commands)
        commands.append(f"{' '.join(command(part))}   # {facts['minutes']:.0f} minutes")
        machines.add(f"{facts['machine']}, torch {facts['torch']}")
    caption = [f"{'; '.join([CAPTION, *sorted(machines)])}.", "", "```bash", *commands, "```"]
    return "\n".join([*grid(heads, rows), "", *caption])


def command(part: str) -> list[str]:
    """Return the command that runs an experiment."""
    return ["python", "experiment.py", "--config", f"configs/reproduce/{part}.yaml"]


def facts_of(part: str) -> dict[str, Any]:
    """Read the duration and hardware of an experiment."""
    facts: dict[str, Any] = json.loads((RESULTS / part / "run.json").read_text(encoding="utf-8"))
    return facts


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; short rows are padded with empty cells."""
    lines = [heads, *([*row, *[""] * (len(heads) - len(row))] for row in rows)]
    head, *others = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|---" * len(heads) + "|", *others]


def _settings(part: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((RESULTS / part / "config.yaml").read_text(encoding="utf-8"))
    return settings
