"""The results of a sweep: a table, ``sweep.json``, ``best.yaml`` and a page."""

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from kd.files import write_json
from kd.report import print_sweep, write_sweep
from kd.settings import write_config
from kd.sweep.plan import Plan
from kd.sweep.trials import METRIC, REASON, trial_settings

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.FAIL: "interrupted",
}
_ORDER = ("finished", "pruned", "failed", "running", "waiting", "interrupted")


def write_results(plan: Plan, study: optuna.Study, console: Console) -> None:
    """Print the table of a sweep's trials, and write its files."""
    # A trial without parameters was dropped, or its worker was killed, before it started.
    trials = [_facts(trial) for trial in study.get_trials(deepcopy=False) if trial.params]
    trials.sort(key=lambda trial: (_ORDER.index(trial["state"]), -(trial["val_acc"] or 0.0), trial["number"]))
    best = next((trial for trial in trials if trial["state"] == "finished"), None)
    config, results = plan.folder / "best.yaml", plan.folder / "sweep.json"
    if best is not None:
        folder = plan.folder.with_name(f"{plan.folder.name}-best")
        write_config(trial_settings(plan, study, best["parameters"], folder), config)
    sweep: dict[str, Any] = {
        "name": plan.folder.name,
        "data": plan.settings().data.dataset,
        "metric": next((each.user_attrs[METRIC] for each in study.trials if METRIC in each.user_attrs), "accuracy"),
        "best": best and best["number"],
        "searched": list(plan.spaces),
        "trials": trials,
    }
    write_json(results, sweep)
    page = write_sweep(sweep, plan.folder, config=config.read_text(encoding="utf-8") if best else "")
    print_sweep(sweep, console)
    console.print(f"\n  {page}\n  {results}")
    if best is not None:
        command = f"experiment.py --baseline --config {config}"
        console.print(f"  {config}\nTo train the best again, with a baseline: {command}")


def _facts(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's entry in ``sweep.json``."""
    epochs = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
    start, end = trial.datetime_start, trial.datetime_complete
    reason = trial.user_attrs.get(REASON, "")
    return {
        "number": trial.number,
        "state": "failed" if reason.startswith("failed") else _STATES[trial.state],
        "reason": reason,
        "val_acc": trial.value if trial.state == TrialState.COMPLETE else epochs[-1] if epochs else None,
        "epochs": epochs,
        "seconds": (end - start).total_seconds() if start and end else None,
        "parameters": dict(trial.params),
        "folder": f"trials/{trial.number}",
    }
