"""What a sweep leaves: a table, ``sweep.json``, ``best.yaml`` and a page."""

import json
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from kd.report import print_sweep, write_sweep
from kd.settings import write_config
from kd.sweep.study import Study
from kd.sweep.work import BEST, FOLDER, VALUES, locked

BEST_FILE = "best.yaml"
RESULTS_FILE = "sweep.json"
_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.FAIL: "lost",
}
_PLACES = list(_STATES.values())


def write_results(study: Study, console: Console) -> dict[str, Any]:
    """Print the table of a sweep's trials, and write its files.

    Args:
        study: The trials.
        console: Where to print.

    Returns:
        What ``sweep.json`` holds.
    """
    plan = study.plan
    trials = [_facts(one) for one in study.trials()]
    trials.sort(key=lambda one: (_PLACES.index(one["state"]), -(one["val_acc"] or 0.0), one["number"]))
    best = trials[0] if trials and trials[0]["state"] == "finished" else None
    sweep: dict[str, Any] = {
        "name": plan.name,
        "data": plan.settings().data.dataset,
        "wanted": plan.trials,
        "best": None if best is None else best["number"],
        "searched": list(dict.fromkeys(name for one in trials for name in one["parameters"])),
        "teachers": list(study.teachers),
        "trials": trials,
    }
    with locked(plan, console):
        if best is not None:
            settings = plan.settings(
                best["values"],
                name=f"{plan.name}-best",
                default_root_dir=str(plan.root),
                train_teacher=False,
                teacher_checkpoint=list(study.teachers),
            )
            write_config(settings, plan.folder / BEST_FILE)
        path = plan.folder / RESULTS_FILE
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(sweep, indent=2), encoding="utf-8")
        beside.replace(path)
        config = plan.folder / BEST_FILE
        page = write_sweep(sweep | {"config": "" if best is None else config.read_text(encoding="utf-8")}, plan.folder)
    print_sweep(sweep, console)
    console.print()
    for file in (page, path, *([] if best is None else [config])):
        _say(console, f"  {file}")
    if best is not None:
        _say(console, f"The best once more, beside the student alone: experiment.py --baseline --config {config}")
    return sweep


def _facts(trial: FrozenTrial) -> dict[str, Any]:
    """Return what is known of a trial."""
    epochs = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    ends = trial.datetime_complete
    return {
        "number": trial.number,
        "state": _STATES[trial.state],
        "val_acc": trial.value if trial.state == TrialState.COMPLETE else epochs[-1] if epochs else None,
        "best_val_acc": trial.user_attrs.get(BEST, max(epochs, default=None)),
        "epochs": epochs,
        "seconds": (ends - trial.datetime_start).total_seconds() if ends and trial.datetime_start else None,
        "parameters": dict(trial.params),
        "values": trial.user_attrs.get(VALUES, {}),
        "folder": trial.user_attrs.get(FOLDER),
    }


def _say(console: Console, text: str | Path) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
