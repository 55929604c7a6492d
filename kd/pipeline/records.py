"""What a training leaves beside its checkpoints, and what of it a later call may put into its table."""

import json
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.models import Compute
from kd.settings import CONFIG_FILE, Settings, write_config

METRICS_FILE = "metrics.json"
_BEGUN_FILE = "begun.json"

# How the teachers' answers come about, and what else only a distilled student depends on.
_OF_ANSWERS = frozenset(("teacher_weights", "teacher_average", "teacher_image_size", "teacher_top"))
_OF_DISTILLATION = _OF_ANSWERS | {"loss", "temperature", "unlabeled_data", "unlabeled_rest"}
_OF_STUDENT = frozenset(
    (
        "loss",
        "temperature",
        "unlabeled_data",
        "unlabeled_rest",
        "views",
        "mixup",
        "cutmix",
        "ema",
        "teacher_weights",
        "teacher_average",
        "teacher_top",
    )
)

Facts = dict[str, Any]
"""What one training came to: the fields of a :class:`kd.training.Run`, and what it was trained on and how."""

# What a phase's result does not depend on.
_IRRELEVANT = frozenset(
    (
        *("train_teacher", "baseline", "distill", "name", "seed", "seeds", "allow_weak_teacher"),
        *("num_workers", "download", "num_classes", "teacher_cache", "assistants", "assistant_pretrained"),
        *("accelerator", "strategy", "default_root_dir", "fast_dev_run", "resume", "checkpoint_every"),
        *("strict", "on_bad_image"),
    )
)


def relevant_settings(
    settings: Settings,
    phase: str,
    *,
    devices: str,
    batch_size: int,
    compute: Compute,
    decoded: int | None,
    teachers: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the settings that a phase's result depends on: two runs with the same ones may be compared.

    Args:
        settings: All settings.
        phase: ``teacher`` or ``teacher/...``, ``assistant/...``, ``baseline``, ``distilled``.
        devices: The devices that ``auto`` came to; the batch grows with their number.
        batch_size: What ``auto`` came to.
        compute: What ``auto`` came to for the network that is trained.
        decoded: The longest short side of images that are read from a store of decoded ones.
        teachers: The checkpoints that are distilled, if they are known.
    """
    flat = {name: value for name, value in settings.flat().items() if name not in _IRRELEVANT}
    flat |= {
        "devices": devices,
        "batch_size": batch_size,
        "precision": compute.precision,
        "channels_last": compute.channels_last,
        "image_cache": decoded,
    }
    # What is compared besides changes nothing about the one that is distilled.
    flat.pop("compare_losses")
    if is_teacher(phase):
        return {name: value for name, value in flat.items() if name not in _OF_STUDENT}
    own = {name: value for name, value in flat.items() if name in _OF_ANSWERS or not name.startswith("teacher_")}
    if phase == "baseline":
        return {name: value for name, value in own.items() if name not in _OF_DISTILLATION}
    paths = [str(Path(one).resolve()) for one in teachers]
    return own | ({"teacher": paths[0] if len(paths) == 1 else paths} if paths else {})


def is_teacher(phase: str) -> bool:
    """Say whether a phase trains a teacher: the one, or one of several."""
    return phase.partition("/")[0] == "teacher"


def write_facts(folder: Path, facts: Mapping[str, Any], settings: Settings) -> None:
    """Write ``metrics.json`` and ``config.yaml`` into a training's folder."""
    write_config(settings, folder / CONFIG_FILE)
    _write(facts, folder / METRICS_FILE)


def write_begun(folder: Path, *, seed: int, relevant: Mapping[str, Any]) -> None:
    """Write down what a training is, before its first step: a call that resumes it knows it again."""
    folder.mkdir(parents=True, exist_ok=True)
    _write({"seed": seed, "recipe": relevant}, folder / _BEGUN_FILE)


def _write(values: Mapping[str, Any], path: Path) -> None:
    beside = path.with_suffix(".part")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.flush()
        # On the disk before it has its name: a machine may die at any moment.
        os.fsync(file.fileno())
    beside.replace(path)


def find_begun(folder: Path, relevant: Mapping[str, Any], *, seed: int) -> Path | None:
    """Find the newest training of a seed that was begun and not finished.

    Args:
        folder: The phase's folder in an experiment.
        relevant: As :func:`relevant_settings` returned them.
        seed: Its seed.

    Returns:
        The version's folder, or ``None``.

    Raises:
        UserError: If one was begun with other settings, and none with these.
    """
    others: list[tuple[Path, dict[str, Any]]] = []
    for path in sorted(folder.glob(f"version_*/{_BEGUN_FILE}"), key=lambda one: one.stat().st_mtime, reverse=True):
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            recipe, its_seed = dict(begun["recipe"]), begun["seed"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
        if its_seed != seed or (path.parent / METRICS_FILE).is_file():
            continue
        if _as_text(recipe) == _as_text(relevant):
            return path.parent
        others.append((path.parent, recipe))
    if not others:
        return None
    place, recipe = others[0]
    wanted = json.loads(_as_text(relevant))
    changed = sorted(name for name in recipe.keys() | wanted.keys() if recipe.get(name) != wanted.get(name))
    how = ", ".join(f"--{name} {recipe.get(name)} (and now {wanted.get(name)})" for name in changed)
    raise UserError(
        f"--resume: {place} was begun with {how}; resume it with the settings that it had, or leave --resume out to "
        "begin anew"
    )


def read_facts(path: Path) -> Facts | None:
    """Read a ``metrics.json``; ``None`` where there is none, or none that is whole: it is another run's affair."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) and {"seed", "model", "recipe", "val_acc"} <= facts.keys() else None


def earlier_runs(folder: Path, relevant: Mapping[str, Any], seeds: Container[int]) -> list[Facts]:
    """Read the newest training of each seed that was made with the same relevant settings.

    Args:
        folder: The phase's folder in an experiment.
        relevant: As :func:`relevant_settings` returned them; without ``teacher``, the newest one's teacher counts.
        seeds: The seeds to look for.
    """
    by_seed: dict[int, Facts] = {}
    wanted = _as_text(relevant)
    for path in sorted(folder.glob(f"version_*/{METRICS_FILE}"), key=lambda one: one.stat().st_mtime, reverse=True):
        facts = read_facts(path)
        if facts is None or facts["seed"] not in seeds:
            continue
        recipe = facts["recipe"]
        if "teacher" in recipe and _as_text({key: recipe[key] for key in recipe if key != "teacher"}) == wanted:
            wanted = _as_text(recipe)
        if _as_text(recipe) == wanted:
            by_seed.setdefault(facts["seed"], facts)
    return [by_seed[seed] for seed in sorted(by_seed)]


def _as_text(recipe: Mapping[str, Any]) -> str:
    # As text 1 (one batch) and 1.0 (all of them) differ.
    return json.dumps(recipe, sort_keys=True)
