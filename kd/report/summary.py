"""``summary.json``: the results of every phase, by seed and aggregated; tables and page are made from it."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.files import write_json
from kd.report.comparison import compare_objectives
from kd.report.measures import Predictions, aggregate, compare, measure
from kd.report.verdict import paired_difference

_RUN_KEYS = (
    *("seed", "epochs", "steps", "val_acc", "best_val_acc", "val_loss", "agreement", "seconds", "images_per_second"),
    *("checkpoint", "history"),
)
_FILE_KEYS = ("validation", "teacher_predictions")
_TITLES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "baseline": "student, labels only",
    "distilled": "student, distilled",
}
_ORDER = tuple(_TITLES)
_OLD_KEYS = {'"price":': '"cost":', '"teacher_answers":': '"teacher_predictions":'}


def summarize(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    data: str,
    folder: Path | None = None,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Aggregate the runs of an experiment.

    Args:
        runs: By phase, the results of each training.
        data: Name of the data set.
        folder: The experiment's folder; paths of predictions are stored relative to it.
        costs: By phase, what :func:`kd.models.measure_cost` measured of its network.

    Returns:
        - ``phases``: ``teacher`` (or ``teacher/NAME`` for each of several, and ``teacher`` for their ensemble),
          ``assistant/NUMBER-NAME``, ``baseline`` and ``distilled``, each with its ``runs``, ``val_acc_mean`` and
          ``val_acc_std`` (over n - 1; ``None`` for one run), ``measured`` (see
          :func:`kd.report.measures.aggregate`; ``None`` without stored predictions), ``cost``, and ``kept``, the shares
          of the teacher's accuracy and parameters.
        - ``gain``: the gain of the distilled student over the baseline, paired by seed, see
          :func:`kd.report.verdict.paired_difference`.
        - ``compared``: the compared objectives, best first, see :func:`kd.report.comparison.compare_objectives`, each
          with ``measured`` and ``cost``.
    """
    phases: dict[str, Any] = {}
    for phase in sorted(runs.keys() - {"compared"}, key=_position):
        accuracies = [run["val_acc"] for run in runs[phase]]
        phases[phase] = {
            "model": runs[phase][0]["model"],
            "parameters": runs[phase][0]["parameters"],
            "runs": [_selected(run, folder) for run in runs[phase]],
            "val_acc_mean": statistics.fmean(accuracies),
            "val_acc_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "measured": _measured(runs[phase]),
            "cost": (costs or {}).get(phase),
        }
    if "teacher" in phases:
        for facts in phases.values():
            facts["kept"] = {
                name: facts[name] / phases["teacher"][name] if phases["teacher"][name] else None
                for name in ("val_acc_mean", "parameters")
            }
    baseline = runs.get("baseline", [])
    compared = [_selected(run, folder) | {"objective": run["objective"]} for run in runs.get("compared", [])]
    rows = compare_objectives(compared, baseline)
    for row in rows:
        row["measured"] = _measured([run for run in runs["compared"] if run["objective"] == row["objective"]])
        row["cost"] = (costs or {}).get("compared")
    gain = paired_difference(runs.get("distilled", []), baseline)
    return {"data": data, "phases": phases, "gain": gain, "compared": rows}


def write_summary(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write ``summary.json`` into an experiment's folder, atomically."""
    path = folder / "summary.json"
    write_json(path, summary)
    return path


def read_summary(folder: Path) -> dict[str, Any]:
    """Read an experiment's ``summary.json``.

    Comparisons of objectives are computed anew from their runs, since earlier versions used another method.

    Raises:
        UserError: If it is missing or not the summary of an experiment.
    """
    path = folder / "summary.json"
    try:
        text = path.read_text(encoding="utf-8")
        for old, new in _OLD_KEYS.items():
            text = text.replace(old, new)
        summary = json.loads(text)
    except OSError:
        raise UserError(f"{folder}: no summary.json here; name the folder of an experiment") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not _is_summary(summary):
        raise UserError(f"{path}: not the summary of an experiment")
    stored = {row["objective"]: row for row in summary["compared"]}
    baseline = summary["phases"].get("baseline", {"runs": []})["runs"]
    rows = compare_objectives([run for row in summary["compared"] for run in row["runs"]], baseline)
    return dict(summary) | {"compared": [stored[row["objective"]] | row for row in rows]}


def title_of(phase: str, phases: Mapping[str, Any]) -> str:
    """Return a phase's name in tables and figures.

    Args:
        phase: The phase.
        phases: All phases of its summary.
    """
    kind, _, member = phase.partition("/")
    if kind == "assistant":
        return f"assistant {member.partition('-')[0]}"
    has_members = any(other.startswith("teacher/") for other in phases)
    return "teacher ensemble" if phase == "teacher" and has_members else _TITLES[kind]


def _is_summary(summary: Any) -> bool:  # noqa: ANN401 (any JSON value)
    if not isinstance(summary, dict) or not {"data", "phases", "gain", "compared"} <= summary.keys():
        return False
    phases, compared = summary["phases"], summary["compared"]
    if not isinstance(phases, dict) or not isinstance(compared, list) or not isinstance(summary["gain"], dict | None):
        return False
    return all(
        isinstance(facts, dict)
        and isinstance(facts.get("runs"), list)
        and all(isinstance(run, dict) for run in facts["runs"])
        for facts in [*phases.values(), *compared]
    )


def _position(phase: str) -> tuple[int, bool, str]:
    """Return a phase's sort key: the order of training, the members of an ensemble before the ensemble."""
    kind, slash, member = phase.partition("/")
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER), not slash, member


def _selected(run: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    files = {key: _relative(run.get(key), folder) for key in _FILE_KEYS}
    return {key: run.get(key) for key in _RUN_KEYS} | files


def _relative(path: str | None, folder: Path | None) -> str | None:
    """Return a path relative to the experiment's folder if it lies within it, so that the folder can be moved."""
    if path is None or folder is None:
        return path
    absolute, root = Path(path).absolute(), folder.absolute()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)


def _measured(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Measure the stored predictions of a phase's runs; ``None`` if any run has none."""
    # All seeds usually share one teacher: each file is read once.
    teachers = {path: Predictions.read(path) for path in {run.get("teacher_predictions") for run in runs}}
    facts = []
    for run in runs:
        predictions, teacher = Predictions.read(run.get("validation")), teachers[run.get("teacher_predictions")]
        if predictions is None:
            return None
        facts.append(measure(predictions) | ((compare(predictions, teacher) if teacher is not None else None) or {}))
    return aggregate(facts)
