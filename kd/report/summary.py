"""``summary.json``: the results of every phase, by seed and aggregated, from which tables and page are built."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kd.errors import UserError
from kd.files import write_json
from kd.metrics import metric_title
from kd.report.measures import Predictions, aggregate, compare, measure
from kd.report.verdict import compare_objectives, mean_and_std, paired_difference

_RUN_KEYS = (
    *("seed", "epochs", "steps", "val_acc", "best_val_acc", "val_loss", "agreement", "seconds", "images_per_second"),
    *("test_acc", "checkpoint", "history"),
)
_TITLES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "baseline": "student, labels only",
    "distilled": "student, distilled",
}
_OLD_KEYS = {'"price":': '"cost":', '"teacher_answers":': '"teacher_predictions":'}


@dataclass
class _Results:
    """The run of a summary, as far as tables and figures need it to be valid."""

    val_acc: float
    seed: int | None = None
    seconds: float | None = None
    history: list[dict[str, float | None]] | None = None


@dataclass
class _Group:
    val_acc_mean: float
    val_acc_std: float | None
    runs: list[_Results]
    measured: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    provenance: dict[str, dict[str, Any]] | None = None


@dataclass
class _Summary:
    data: str
    phases: dict[str, _Group]
    gain: dict[str, Any] | None
    compared: list[_Group]


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
        costs: By phase, its network's result of :func:`kd.models.measure_cost`.

    Returns:
        - ``phases``: ``teacher`` (or ``teacher/NAME`` for each of several, and ``teacher`` for their ensemble),
          ``assistant/NUMBER-NAME``, ``baseline`` and ``distilled``, each with its ``runs``, ``val_acc_mean`` and
          ``val_acc_std`` (over n - 1; ``None`` for one run), ``score_mean`` and ``score_std``, likewise of the
          ``metric`` (``None`` if it wasn't measured), ``measured`` (see :func:`kd.report.measures.aggregate`; ``None``
          without stored predictions), ``cost``, ``provenance``, and ``kept``, the student's score and parameters as
          fractions of the teacher's.
        - ``metric``: what verdict and scores are about: its ``name``, its ``title`` in words, and ``split``, ``test``
          if there are test images, else ``validation``.
        - ``gain``: the gain of the distilled student over the baseline, paired by seed, see
          :func:`kd.report.paired_difference`.
        - ``compared``: the compared objectives, best first, see :func:`kd.report.compare_objectives`, each with
          ``measured``, ``cost`` and ``provenance``.
    """
    costs, metric = costs or {}, _metric_of(runs)
    runs = {phase: [_scored(run, metric) for run in group] for phase, group in runs.items()}
    phases: dict[str, Any] = {}
    for phase in sorted(runs.keys() - {"compared"}, key=_position):
        mean, std = mean_and_std([run["val_acc"] for run in runs[phase]])
        scores = [run["score"] for run in runs[phase]]
        score = (None, None) if None in scores else mean_and_std(scores)
        phases[phase] = {
            "model": runs[phase][0]["model"],
            "parameters": runs[phase][0]["parameters"],
            "runs": [_selected(run, folder) for run in runs[phase]],
            "val_acc_mean": mean,
            "val_acc_std": std,
            "score_mean": score[0],
            "score_std": score[1],
            "measured": _measure_runs(runs[phase]),
            "cost": costs.get(phase),
            "provenance": runs[phase][-1].get("provenance"),
        }
    if "teacher" in phases:
        for facts in phases.values():
            facts["kept"] = {
                name: facts[name] / phases["teacher"][name] if facts[name] and phases["teacher"][name] else None
                for name in ("score_mean", "parameters")
            }
    baseline, compared = runs.get("baseline", []), runs.get("compared", [])
    rows = compare_objectives([_selected(run, folder) | {"objective": run["objective"]} for run in compared], baseline)
    for row in rows:
        measured = [run for run in compared if run["objective"] == row["objective"]]
        row["measured"] = _measure_runs(measured)
        row["provenance"] = measured[-1].get("provenance")
        row["cost"] = costs.get("compared")
    gain = paired_difference(runs.get("distilled", []), baseline)
    return {"data": data, "metric": metric, "phases": phases, "gain": gain, "compared": rows}


def _metric_of(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Return what the verdict is about: the metric that chose the checkpoints, on the test images if there are any."""
    every = [run for group in runs.values() for run in group]
    name = next((run["metric"] for run in every if run.get("metric")), "accuracy")
    trained = [run for phase, group in runs.items() if not phase.startswith("teacher") for run in group] or every
    is_tested = bool(trained) and all(run.get("test_score") is not None for run in trained)
    title = metric_title(name)
    return {
        "name": name,
        "title": f"test {title}" if is_tested else title,
        "split": "test" if is_tested else "validation",
    }


def _scored(run: Mapping[str, Any], metric: Mapping[str, str]) -> dict[str, Any]:
    """Return a run's results with its score; that of an earlier version is its validation accuracy."""
    score = run.get("test_score") if metric["split"] == "test" else run.get("score", run["val_acc"])
    return {**run, "score": score}


def write_summary(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write ``summary.json`` into an experiment's folder, atomically."""
    path = folder / "summary.json"
    write_json(path, summary)
    return path


def read_summary(folder: Path) -> dict[str, Any]:
    """Read an experiment's ``summary.json``, and compute its comparison of objectives anew from their runs.

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
    try:
        TypeAdapter(_Summary).validate_python(summary)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: not the summary of an experiment: {place}: {error.errors()[0]['msg']}") from None
    stored = {row["objective"]: row for row in summary["compared"]}
    baseline = summary["phases"].get("baseline", {"runs": []})["runs"]
    summary.setdefault("metric", {"name": "accuracy", "title": "accuracy", "split": "validation"})
    for group in [*summary["phases"].values(), *summary["compared"]]:
        # Earlier versions had no other metrics.
        for name in ("mean", "std"):
            group.setdefault(f"score_{name}", group[f"val_acc_{name}"])
        if (kept := group.get("kept")) is not None:
            kept.setdefault("score_mean", kept.get("val_acc_mean"))
    # Earlier versions computed the intervals by another method.
    rows = compare_objectives([run for row in summary["compared"] for run in row["runs"]], baseline)
    return dict(summary) | {"compared": [stored[row["objective"]] | row for row in rows]}


def validation_images(summary: Mapping[str, Any]) -> str | None:
    """Return the number and the content hash of the validation images in words; ``None`` if they weren't recorded."""
    for facts in [*summary["phases"].values(), *summary["compared"]]:
        data = (facts.get("provenance") or {}).get("data") or {}
        if "validation images" in data:
            return str(data["validation images"])
    return None


def comparison_note(validation: Sequence[str | None]) -> str:
    """Return a warning for experiments that were measured on different validation images, or an empty string."""
    known = {text for text in validation if text is not None}
    if len(known) > 1:
        return "Measured on different validation images: the accuracies of these experiments are not comparable."
    if len(validation) > 1 and None in validation:
        return "Not all experiments recorded their validation images: their accuracies may not be comparable."
    return ""


def title_of(phase: str, phases: Mapping[str, Any]) -> str:
    """Return the name of one of a summary's phases in tables and figures."""
    kind, _, member = phase.partition("/")
    if kind == "assistant":
        return f"assistant {member.partition('-')[0]}"
    is_ensemble = phase == "teacher" and any(other.startswith("teacher/") for other in phases)
    return "teacher ensemble" if is_ensemble else _TITLES[kind]


def _position(phase: str) -> tuple[int, bool, str]:
    """Return a phase's sort key: the order of training, the members of an ensemble before the ensemble."""
    kind, slash, member = phase.partition("/")
    return list(_TITLES).index(kind), not slash, member


def _selected(run: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the part of a run's results that the summary holds."""
    files = {key: _relative(run.get(key), folder) for key in ("validation", "test", "teacher_predictions")}
    return {key: run.get(key) for key in (*_RUN_KEYS, "score")} | files


def _relative(path: str | None, folder: Path | None) -> str | None:
    """Return a path relative to the experiment's folder if it lies within it, so that the folder can be moved."""
    if path is None or folder is None:
        return path
    absolute, root = Path(path).absolute(), folder.absolute()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)


def _measure_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
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
