"""The cost of running each network of an experiment."""

from typing import Any

from kd.errors import UserError
from kd.models import load_classifier, measure_cost
from kd.pipeline.session import Experiment


def measure_costs(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Measure the network of each phase once: parameters, multiply-adds, latency and throughput on this machine.

    Args:
        experiment: A finished experiment.

    Returns:
        By phase, what :func:`kd.models.measure_cost` returns; phases without a checkpoint are left out.
    """
    by_network: dict[tuple[Any, ...], dict[str, Any]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for phase, runs in experiment.runs.items():
        first = runs[0]
        # The students of compared objectives are one network, which another phase may have too.
        if (phase == "compared" and {"baseline", "distilled"} & experiment.runs.keys()) or not first.get("checkpoint"):
            continue
        try:
            classifier = load_classifier(first["checkpoint"], architecture=first["model"])
        except UserError:
            # The checkpoint of an earlier run that was removed since.
            continue
        network = (first["model"], classifier.description.image_size)
        if network not in by_network:
            by_network[network] = measure_cost(classifier)
        costs[phase] = by_network[network]
    return costs
