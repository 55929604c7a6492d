"""What each network of an experiment costs to run."""

from typing import Any

from kd.errors import UserError
from kd.models import load_classifier, measure_cost
from kd.pipeline.journal import Experiment


def measure_costs(done: Experiment) -> dict[str, dict[str, Any]]:
    """Measure the network of each phase once, by its checkpoint: size, arithmetic, speed on this machine.

    Args:
        done: What was trained.

    Returns:
        By phase, what :func:`kd.models.measure_cost` says; a phase without a checkpoint of its own is left out.
    """
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for phase, runs in done.runs.items():
        first = runs[0]
        # The students of the objectives that are compared are one network; another phase may have it, too.
        if (phase == "compared" and {"baseline", "distilled"} & done.runs.keys()) or not first.get("checkpoint"):
            continue
        try:
            classifier = load_classifier(first["checkpoint"], architecture=first["model"])
        except UserError:
            # A checkpoint of an earlier call that is gone since.
            continue
        kind = (first["model"], classifier.description.image_size)
        if kind not in known:
            known[kind] = measure_cost(classifier)
        costs[phase] = known[kind]
    return costs
