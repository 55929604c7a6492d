"""The runs of an experiment on disk: which are finished, interrupted or comparable; reading and writing their records.

A run's folder holds ``started.json`` from before its first step, and ``metrics.json`` (its record) once it is finished.
Runs are compared by their recipe: the settings that affect the phase, and the teachers' checkpoints.
"""

import hashlib
import json
import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.files import write_json
from kd.models import Classifier, Compute
from kd.settings import CONFIG_FILE, Phase, Settings, settings_affecting, write_config

METRICS_FILE = "metrics.json"
STARTED_FILE = "started.json"
BEST_CHECKPOINT = Path("checkpoints") / "best.ckpt"

_LONGEST_SLUG = 100
# A single teacher, or one of several.
_TEACHER_FOLDERS = ("teacher/version_*", "teacher/*/version_*")

Record = dict[str, Any]
"""The results of one run: the fields of a :class:`kd.training.Run`, its data, and its recipe."""

Recipe = Mapping[str, Any]
"""The settings that a run's result depends on, by name; ``teacher``: the checkpoint or checkpoints it learned from."""


def recipe_of(
    settings: Settings,
    phase: str,
    *,
    devices: str,
    batch_size: int,
    compute: Compute,
    cached_side: int | None,
    teachers: Sequence[str] = (),
) -> Recipe:
    """Return the settings that a phase's result depends on, as each setting declares it.

    Args:
        settings: All settings.
        phase: ``teacher`` or ``teacher/...``, ``assistant/...``, ``baseline``, ``distilled`` or ``compared``.
        devices: The devices that ``auto`` resolved to; the global batch grows with their number.
        batch_size: The batch size that ``auto`` resolved to.
        compute: The precision and memory layout that ``auto`` resolved to.
        cached_side: Short side of images that are read from the decode cache, in pixels; ``None``: not cached.
        teachers: The checkpoints that are distilled, if they are known.
    """
    kind = kind_of(phase)
    flat = settings.flat() | {
        "devices": devices,
        "batch_size": batch_size,
        "precision": compute.precision,
        "channels_last": compute.channels_last,
        "image_cache": cached_side,
    }
    recipe = {name: flat[name] for name in settings_affecting(kind)}
    if kind == "distilled" and teachers:
        paths = [str(Path(path).resolve()) for path in teachers]
        recipe["teacher"] = paths[0] if len(paths) == 1 else paths
    return recipe


def kind_of(phase: str) -> Phase:
    """Return what a phase is for: ``assistant/...`` and ``compared`` are distillations."""
    first = phase.partition("/")[0]
    return "teacher" if first == "teacher" else "baseline" if first == "baseline" else "distilled"


def next_version(folder: Path) -> Path:
    """Return the folder of a new run: ``version_`` with the next number.

    Args:
        folder: The phase's folder in the experiment.
    """
    numbers = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return folder / f"version_{max(numbers, default=-1) + 1}"


def write_started(folder: Path, *, seed: int, recipe: Recipe) -> None:
    """Write what a run is, before its first step: ``--resume`` recognizes it by that."""
    write_json(folder / STARTED_FILE, {"seed": seed, "recipe": recipe})


def write_record(folder: Path, record: Record, settings: Settings) -> None:
    """Write ``metrics.json`` and ``config.yaml`` into the folder of a finished run."""
    write_config(settings, folder / CONFIG_FILE)
    write_json(folder / METRICS_FILE, record)


def read_record(path: Path) -> Record | None:
    """Read a ``metrics.json``; ``None`` if it is missing or damaged, as then the run doesn't count."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and {"seed", "model", "recipe", "val_acc"} <= record.keys() else None


def finished_runs(folder: Path, recipe: Recipe, seeds: Container[int]) -> list[Record]:
    """Return the newest finished run of each seed with the same recipe, by seed.

    Args:
        folder: The phase's folder in the experiment.
        recipe: As :func:`recipe_of` returned it; without ``teacher``, all must share the teacher of the newest.
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


def find_interrupted(folder: Path, recipe: Recipe, *, seed: int) -> Path | None:
    """Return the folder of the newest run of a seed that was started and not finished, or ``None``.

    Args:
        folder: The phase's folder in the experiment.
        recipe: As :func:`recipe_of` returned it.
        seed: The run's seed.

    Raises:
        UserError: If one was started with another recipe, and none with this one.
    """
    others: list[tuple[Path, Recipe]] = []
    for path in _newest_first(folder.glob(f"version_*/{STARTED_FILE}")):
        try:
            started = json.loads(path.read_text(encoding="utf-8"))
            its_recipe, its_seed = dict(started["recipe"]), started["seed"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
        if its_seed != seed or (path.parent / METRICS_FILE).is_file():
            continue
        if not changed_settings(its_recipe, recipe):
            return path.parent
        others.append((path.parent, its_recipe))
    if not others:
        return None
    run, started_with = others[0]
    changes = ", ".join(
        f"--{name} {started_with.get(name)} (now {recipe.get(name)})" for name in changed_settings(started_with, recipe)
    )
    raise UserError(
        f"--resume: {run} was started with {changes}; resume it with its own settings, or start anew without --resume"
    )


def changed_settings(earlier: Recipe, recipe: Recipe) -> list[str]:
    """Return the names in ``recipe`` whose value in an earlier recipe differs.

    A setting that an earlier version of this package didn't have had the value of its default. Other names in the
    earlier recipe are of no consequence, but for the teacher that it names, if ``recipe`` names one.
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
    """A teacher that an earlier run left.

    Args:
        checkpoint: Its best checkpoint.
        record: Its run's record; empty if there is none.
    """

    checkpoint: Path
    record: Record

    @property
    def seed(self) -> int:
        """Its seed; -1 if unknown."""
        seed = self.record.get("seed")
        return -1 if seed is None else int(seed)

    def record_here(self, teacher: Classifier, accuracy: float) -> Record:
        """Return its record with the accuracy that was measured on the present validation images.

        Args:
            teacher: The classifier in its checkpoint.
            accuracy: The measured accuracy, in [0, 1].
        """
        here = {
            "model": teacher.description.architecture,
            "parameters": teacher.count_parameters(),
            "val_acc": accuracy,
            "best_val_acc": accuracy,
            "checkpoint": str(self.checkpoint),
        }
        return {"seed": None} | self.record | here


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
        besides: Teachers found already; a further one of the same network must have another seed.

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
        is_new = (record.get("model"), record.get("seed")) not in taken
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
    """Return eight hexadecimal digits that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _newest_first(paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
