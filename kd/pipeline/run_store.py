"""Runs on disk: which are finished, interrupted or comparable; their records; and the teachers among them.

A run's folder holds ``started.json`` from before its first step, and ``metrics.json``, its record, once it is finished.
Two runs are comparable if their recipes are equal: the settings that affect their phase, and the teachers' checkpoints.
"""

import hashlib
import json
import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.files import write_json
from kd.settings import CONFIG_FILE, Phase, Settings, write_config

METRICS_FILE = "metrics.json"
STARTED_FILE = "started.json"
BEST_CHECKPOINT = Path("checkpoints") / "best.ckpt"

_LONGEST_SLUG = 100
# A single teacher, or one of several.
_TEACHER_FOLDERS = ("teacher/version_*", "teacher/*/version_*")

Record = dict[str, Any]
"""The results of one run: the fields of a :class:`kd.training.Run`, its data, and its recipe."""


def kind_of(phase: str) -> Phase:
    """Return the kind of a phase, such as ``distilled`` for ``assistant/...`` and ``compared``."""
    first = phase.partition("/")[0]
    return "teacher" if first == "teacher" else "baseline" if first == "baseline" else "distilled"


def next_version(folder: Path) -> Path:
    """Return the folder of a new run in a phase's folder: ``version_`` with the next number."""
    numbers = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return folder / f"version_{max(numbers, default=-1) + 1}"


def write_started(folder: Path, *, seed: int, recipe: Mapping[str, Any]) -> None:
    """Write ``started.json``, by which ``--resume`` recognizes an interrupted run."""
    write_json(folder / STARTED_FILE, {"seed": seed, "recipe": recipe})


def write_record(folder: Path, record: Record, settings: Settings) -> None:
    """Write ``metrics.json`` and ``config.yaml`` into the folder of a finished run."""
    write_config(settings, folder / CONFIG_FILE)
    write_json(folder / METRICS_FILE, record)


def read_record(path: Path) -> Record | None:
    """Read a ``metrics.json``; ``None`` if it is missing or damaged."""
    record = _read_json(path)
    return record if {"seed", "model", "recipe", "val_acc"} <= record.keys() else None


def finished_runs(folder: Path, recipe: Mapping[str, Any], seeds: Container[int]) -> list[Record]:
    """Return the newest finished run of each seed with the same recipe, by seed.

    Args:
        folder: The phase's folder in the experiment.
        recipe: The recipe; if it names no ``teacher``, all runs must share the teacher of the newest.
        seeds: The seeds to look for.
    """
    by_seed: dict[int, Record] = {}
    for path in _newest_first(folder.glob(f"version_*/{METRICS_FILE}")):
        record = read_record(path)
        if record is None or record["seed"] not in seeds or changed_settings(record["recipe"], recipe):
            continue
        if "teacher" in record["recipe"]:
            recipe = {**recipe, "teacher": record["recipe"]["teacher"]}
        by_seed.setdefault(record["seed"], record)
    return [by_seed[seed] for seed in sorted(by_seed)]


def find_interrupted(folder: Path, recipe: Mapping[str, Any], *, seed: int) -> Path | None:
    """Return the folder of the newest run of a seed that was started and not finished, or ``None``.

    Args:
        folder: The phase's folder in the experiment.
        recipe: The recipe.
        seed: The run's seed.

    Raises:
        UserError: If one was started with another recipe, and none with this one.
    """
    others: list[tuple[Path, Mapping[str, Any]]] = []
    for path in _newest_first(folder.glob(f"version_*/{STARTED_FILE}")):
        started = _read_json(path)
        if started.get("seed") != seed or (path.parent / METRICS_FILE).is_file():
            continue
        if not changed_settings(started["recipe"], recipe):
            return path.parent
        others.append((path.parent, started["recipe"]))
    if not others:
        return None
    run, earlier = others[0]
    names = changed_settings(earlier, recipe)
    changes = ", ".join(f"--{name} {earlier.get(name)} (now {recipe.get(name)})" for name in names)
    raise UserError(
        f"--resume: {run} was started with {changes}; resume it with its own settings, or start anew without --resume"
    )


def changed_settings(earlier: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Return the names in ``recipe`` whose value in an earlier recipe differs.

    A setting that didn't exist yet had the value of its default. Names that only the earlier recipe has are ignored.
    """
    defaults = Settings().flat()
    return [
        name
        for name, value in recipe.items()
        # As text: 1 (one batch) and 1.0 (all of them) differ.
        if json.dumps(earlier.get(name, defaults.get(name))) != json.dumps(value)
    ]


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher that was trained before.

    Args:
        checkpoint: Its best checkpoint.
        record: Its run's record; empty if there is none.
    """

    checkpoint: Path
    record: Record


def find_teacher(
    root: Path, folder: Path, *, data: str, model: str, image_size: int, besides: Collection[FoundTeacher] = ()
) -> FoundTeacher:
    """Return the newest finished teacher for the same data, network and image size; this experiment's come first.

    Args:
        root: The folder of all experiments.
        folder: This experiment's folder.
        data: Name of the data set.
        model: The teacher's network.
        image_size: Side of the images, in pixels.
        besides: Teachers found already; another one of the same network must have another seed.

    Raises:
        UserError: If there is none; the message lists those that there are.
    """
    taken = [(teacher.record.get("model"), teacher.record.get("seed")) for teacher in besides]
    paths = _newest_first(path for pattern in _TEACHER_FOLDERS for path in root.glob(f"*/{pattern}/{METRICS_FILE}"))
    others: list[str] = []
    for path in sorted(paths, key=lambda path: folder not in path.parents):
        record = read_record(path)
        if record is None:
            continue
        kind = tuple(record.get(key) for key in ("data", "model", "image_size"))
        checkpoint = path.parent / BEST_CHECKPOINT
        is_new = (record["model"], record["seed"]) not in taken
        if kind == (data, model, image_size) and checkpoint.is_file() and is_new:
            return FoundTeacher(checkpoint, record)
        others.append(f"{kind[1]} for {kind[0]} at {kind[2]} px ({path.parent})")
    found = f"\n  Found: {'; '.join(others)}." if others else ""
    another = " with another seed" if any(model == name for name, _ in taken) else ""
    raise UserError(
        f"--distill: no teacher found: no finished {model}{another} for {data} at {image_size} px under {root}; train "
        f"one with --train_teacher or name one with --teacher_checkpoint.{found}"
    )


def given_teacher(checkpoint: str) -> FoundTeacher:
    """Return the teacher in a checkpoint, with its run's record if that lies beside it."""
    path = Path(checkpoint).expanduser()
    return FoundTeacher(path, read_record(path.parent.parent / METRICS_FILE) or {})


def slug(text: str) -> str:
    """Return a text as a folder name.

    Example:
        >>> slug("convnet(widths=[16, 32])")
        'convnet_widths_16_32'
    """
    name = re.sub(r"[^\w.+]+", "_", text).strip("_.")
    return name if len(name) <= _LONGEST_SLUG else f"{name[:_LONGEST_SLUG]}-{short_digest(name)}"


def short_digest(text: str) -> str:
    """Return a hash of a text as eight hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def _read_json(path: Path) -> Record:
    """Read a run's JSON file; empty if it is missing, or damaged or without a recipe, as then the run doesn't count."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("recipe"), dict) else {}
