"""What a training leaves beside its checkpoints, and what of it a later call may put into its table."""

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from kd.settings import Settings
from kd.sources import write_config

METRICS_FILE = "metrics.json"

Facts = dict[str, Any]
"""What one training came to: the fields of a :class:`kd.training.Run`, and what it was trained on and how."""

# What a phase's result does not depend on.
_IRRELEVANT = frozenset(
    (
        *("train_teacher", "baseline", "distill", "name", "seed", "seeds", "allow_weak_teacher"),
        *("num_workers", "download", "num_classes"),
        *("accelerator", "devices", "num_nodes", "strategy", "default_root_dir", "fast_dev_run"),
    )
)


def relevant_settings(settings: Settings, phase: str, *, teacher: str | None = None) -> dict[str, Any]:
    """Return the settings that a phase's result depends on: two runs with the same ones may be compared.

    Args:
        settings: All settings.
        phase: ``teacher``, ``baseline`` or ``distilled``.
        teacher: The checkpoint that is distilled.
    """
    flat = {name: value for name, value in settings.flat().items() if name not in _IRRELEVANT}
    if phase == "teacher":
        return flat
    own = {name: value for name, value in flat.items() if not name.startswith("teacher_")}
    if phase == "baseline":
        return {name: value for name, value in own.items() if name not in ("loss", "temperature")}
    return own | {"teacher": None if teacher is None else str(Path(teacher).resolve())}


def write_facts(folder: Path, facts: Mapping[str, Any], settings: Settings) -> None:
    """Write ``metrics.json`` and ``config.yaml`` into a training's folder."""
    write_config(settings, folder / "config.yaml")
    beside = folder / "metrics.part"
    beside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    beside.replace(folder / METRICS_FILE)


def earlier_runs(folder: Path, relevant: Mapping[str, Any], seeds: Container[int]) -> list[Facts]:
    """Read the newest training of each seed that was made with the same relevant settings.

    Args:
        folder: The phase's folder in an experiment.
        relevant: As :func:`relevant_settings` returned them.
        seeds: The seeds to look for.
    """
    by_seed: dict[int, Facts] = {}
    for path in sorted(folder.glob(f"version_*/{METRICS_FILE}"), key=lambda one: one.stat().st_mtime):
        facts: Facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["recipe"] == relevant and facts["seed"] in seeds:
            by_seed[facts["seed"]] = facts
    return [by_seed[seed] for seed in sorted(by_seed)]
