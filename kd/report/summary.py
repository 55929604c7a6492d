"""``summary.json``: every phase, seed by seed and together; what the table and the page are made from."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.report.comparison import compare_objectives
from kd.report.measures import Predictions, compare, measure, together
from kd.report.verdict import paired

_ORDER = ("teacher", "assistant", "baseline", "distilled")

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

_RUN_KEYS = (
    "seed",
    "epochs",
    "steps",
    "val_acc",
    "best_val_acc",
    "val_loss",
    "agreement",
    "seconds",
    "images_per_second",
    "checkpoint",
    "history",
)
_ANSWER_KEYS = ("validation", "teacher_predictions")
_TITLES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "baseline": "student alone",
    "distilled": "student distilled",
}


def summarize(
    runs: Runs, *, data: str, folder: Path | None = None, costs: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Put the runs of an experiment together.

    Args:
        runs: By phase, what each training came to.
        data: Name of the data set.
        folder: The experiment's folder, from which the files of predictions are named.
        costs: By phase, what :func:`kd.models.measure_cost` measured of its network.

    Returns:
        ``phases`` (``teacher``, or ``teacher/NAME`` for each of several and ``teacher`` for what they answer together;
        ``assistant/NUMBER-NAME``; ``baseline``; ``distilled``), each with its runs and the mean and standard deviation
        of ``val_acc`` (the sample's, over n - 1; ``None`` for one run), ``measured``, the measures of all its runs
        are worth (see :func:`kd.report.measures.together`; ``None`` where they are not kept), its ``cost``, and
        ``kept``, the shares of the teacher's accuracy and parameters; ``gain``: what distillation gained over the
        baseline of the same seeds, paired, as mean, standard deviation and 95 % interval of the mean in fractions of 1,
        ``None`` where there is no pair; and ``compared``, the objectives that were compared, best first, each with what
        its predictions are worth and its own ``gain`` over the baseline.
    """
    phases: dict[str, Any] = {}
    for phase in sorted(runs, key=_place):
        if phase == "compared":
            continue
        mean, std = _mean_and_std([run["val_acc"] for run in runs[phase]])
        first = runs[phase][0]
        phases[phase] = {
            "model": first["model"],
            "parameters": first["parameters"],
            "runs": [_of_run(run, folder) for run in runs[phase]],
            "val_acc_mean": mean,
            "val_acc_std": std,
            "measured": _measured(runs[phase]),
            "cost": (costs or {}).get(phase),
        }
    if "teacher" in phases:
        for facts in phases.values():
            facts["kept"] = {
                name: facts[name] / phases["teacher"][name] if phases["teacher"][name] else None
                for name in ("val_acc_mean", "parameters")
            }
    compared = [_of_run(run, folder) | {"objective": run["objective"]} for run in runs.get("compared", [])]
    rows = compare_objectives(compared)
    for row in rows:
        row["measured"] = _measured([run for run in runs["compared"] if run["objective"] == row["objective"]])
        row["cost"] = (costs or {}).get("compared")
        row["gain"] = gain_over(runs.get("baseline", []), row["runs"])
    gain = gain_over(runs.get("baseline", []), runs.get("distilled", []))
    return {"data": data, "phases": phases, "gain": gain, "compared": rows}


def gain_over(baseline: Sequence[Mapping[str, Any]], distilled: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Pair the runs of each seed, and judge what the distilled ones gained in fractions of 1; no pair is ``None``."""
    alone = {run["seed"]: run["val_acc"] for run in baseline}
    pairs = [(run["seed"], run["val_acc"] - alone[run["seed"]]) for run in distilled if run["seed"] in alone]
    if not pairs:
        return None
    known = paired([gain for _, gain in pairs])
    return {
        "mean": known.mean,
        "std": known.std,
        "interval": None if known.interval is None else list(known.interval),
        "runs": [{"seed": seed, "val_acc": gain} for seed, gain in pairs],
    }


def write_summary(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write ``summary.json`` into an experiment's folder: the old file or the new one, never half of one."""
    path = folder / "summary.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    beside.replace(path)
    return path


def title_of(phase: str, phases: Mapping[str, Any]) -> str:
    """Return what a phase is called before a person.

    Args:
        phase: The phase.
        phases: All phases of its summary.
    """
    kind, _, which = phase.partition("/")
    if kind == "assistant":
        return f"assistant {which.partition('-')[0]}"
    members = [other for other in phases if other.startswith("teacher/")]
    return "teachers as one" if phase == "teacher" and members else _TITLES[kind]


def _place(phase: str) -> tuple[int, bool, str]:
    """Say where a phase stands: as the phases follow one another, several teachers before what they are together."""
    kind, slash, which = phase.partition("/")
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER), not slash, which


def _of_run(run: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    files = {key: _from(folder, run.get(key)) for key in _ANSWER_KEYS}
    return {key: run.get(key) for key in _RUN_KEYS} | files


def _from(folder: Path | None, path: str | None) -> str | None:
    """Name a file from the experiment's folder, if it lies within it, so that the folder may be moved."""
    if path is None or folder is None:
        return path
    whole, home = Path(path).absolute(), folder.absolute()
    return whole.relative_to(home).as_posix() if whole.is_relative_to(home) else str(whole)


def _measured(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Measure the predictions of a phase's runs; ``None`` where not all of them are kept."""
    facts = []
    # Of all seeds it is the same teacher, as a rule.
    teachers = {path: Predictions.read(path) for path in {run.get("teacher_predictions") for run in runs}}
    for run in runs:
        predictions, teacher = Predictions.read(run.get("validation")), teachers[run.get("teacher_predictions")]
        if predictions is None:
            return None
        facts.append(measure(predictions) | ((compare(predictions, teacher) if teacher is not None else None) or {}))
    return together(facts)


def _mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
