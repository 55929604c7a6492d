"""Runs on disk: which are finished, interrupted or comparable; their records; and the teachers among them.

A run's folder holds ``started.json`` from before its first step, and ``metrics.json``, its record, once it is finished.
Two runs are comparable if their provenances are equal, see :mod:`kd.provenance`.
"""

import hashlib
import json
import re
from collections.abc import Collection, Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console

from kd.errors import UserError
from kd.files import write_json
from kd.provenance import ENVIRONMENT, Difference, Provenance, differences
from kd.settings import CONFIG_FILE, Phase, Settings, write_config
from kd.teachers import NONE
from kd.training import Run

METRICS_FILE = "metrics.json"
STARTED_FILE = "started.json"
BEST_CHECKPOINT = Path("checkpoints") / "best.ckpt"

_LONGEST_SLUG = 100
# A single teacher, or one of several.
_TEACHER_FOLDERS = ("teacher/version_*", "teacher/*/version_*")

Record = dict[str, Any]
"""The results of one run: the fields of a :class:`kd.training.Run`, its data, and its provenance."""


@dataclass
class _Started:
    seed: int
    provenance: Provenance


@dataclass
class _Results(_Started):
    data: str
    image_size: int
    objective: str | None
    teacher_checkpoints: list[str]
    teacher_predictions: str | None


def kind_of(phase: str) -> Phase:
    """Return the kind of a phase, such as ``distilled`` for ``assistant/...`` and ``compared``."""
    first = phase.partition("/")[0]
    return "teacher" if first == "teacher" else "baseline" if first == "baseline" else "distilled"


def next_version(folder: Path) -> Path:
    """Return the folder of a new run in a phase's folder: ``version_`` with the next number."""
    numbers = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return folder / f"version_{max(numbers, default=-1) + 1}"


def write_started(folder: Path, *, seed: int, provenance: Provenance) -> None:
    """Write ``started.json``, by which ``--resume`` recognizes an interrupted run."""
    write_json(folder / STARTED_FILE, {"seed": seed, "provenance": provenance})


def write_record(folder: Path, record: Record, settings: Settings) -> None:
    """Write ``metrics.json`` and ``config.yaml`` into the folder of a finished run."""
    write_config(settings, folder / CONFIG_FILE)
    write_json(folder / METRICS_FILE, record)


def read_record(path: Path) -> Record | None:
    """Read a ``metrics.json``; ``None`` if it is missing or damaged, as then the run doesn't count as finished."""
    return _read(path, _Results, Run)


def read_provenance(place: Path) -> tuple[int, Provenance]:
    """Return the seed of a run, finished or not, and what it depends on, given its folder or a file in it.

    Raises:
        UserError: If there is no run.
    """
    for folder in (place, *list(place.parents)[:2]):
        found = read_record(folder / METRICS_FILE) or _read(folder / STARTED_FILE, _Started)
        if found is not None:
            return int(found["seed"]), Provenance(found["provenance"])
    inside = sorted(str(path.parent) for path in place.rglob(STARTED_FILE))
    hint = f"; runs in it: {', '.join(inside)}" if inside else ""
    raise UserError(f"{place}: not the folder of a run, such as logs/NAME/distilled/version_0{hint}")


def finished_runs(folder: Path, provenance: Provenance, seeds: Container[int]) -> list[Record]:
    """Return the newest comparable finished run of each seed, by seed.

    Args:
        folder: The phase's folder in the experiment.
        provenance: What a run must depend on; if it names no ``teacher``, all runs must share that of the newest.
        seeds: The seeds to look for.
    """
    by_seed: dict[int, Record] = {}
    for path in _newest_first(folder.glob(f"version_*/{METRICS_FILE}")):
        record = read_record(path)
        if record is None or record["seed"] not in seeds or differences(record["provenance"], provenance):
            continue
        if "teacher" in record["provenance"]:
            provenance = {**provenance, "teacher": record["provenance"]["teacher"]}
        by_seed.setdefault(record["seed"], record)
    return [by_seed[seed] for seed in sorted(by_seed)]


def find_interrupted(folder: Path, provenance: Provenance, *, seed: int, console: Console) -> Path | None:
    """Return the folder of the newest run of a seed that was started and not finished, or ``None``.

    Without one, it is that of the newest finished run that differs in a smaller number of epochs alone.

    Args:
        folder: The phase's folder in the experiment.
        provenance: What the run depends on now.
        seed: The run's seed.
        console: Where it is noted that versions or hardware have changed, or why a finished run is repeated.

    Raises:
        UserError: If what the newest run depends on has changed: for an interrupted run, anything but the number of
            processes at the same number of images per step; for a finished run, images or code.
    """
    newest: tuple[Path, list[Difference]] | None = None
    extensible: Path | None = None
    for path in _newest_first(folder.glob(f"version_*/{STARTED_FILE}")):
        run, started = path.parent, _read(path, _Started)
        if started is None or started["seed"] != seed:
            continue
        earlier = started["provenance"]
        found, is_finished = differences(earlier, provenance), read_record(run / METRICS_FILE) is not None
        if not is_finished and (not found or _is_other_world(earlier, provenance, found)):
            changes = [*found, *differences(earlier, provenance, [ENVIRONMENT])]
            if changes:
                console.print(f"note: {run} was started with {_in_words(changes)}")
            return run
        if is_finished and _is_longer(found):
            extensible = extensible or run
            found = []
        if newest is None:
            newest = run, [each for each in found if not is_finished or each.section in ("data", "code")]
            if is_finished and found and not newest[1]:
                console.print(f"note: {run} was trained with {_in_words(found)}; training another version")
    if newest is None or not newest[1]:
        return extensible
    hint = ""
    if any(difference.name == "processes" for difference in newest[1]):
        hint = " (another number of processes resumes it if --batch_size keeps the number of images per step)"
    raise UserError(
        f"--resume: {newest[0]} was started with {_in_words(newest[1])}; restore what it was started with{hint}, or "
        "start anew without --resume"
    )


def _is_longer(found: Sequence[Difference]) -> bool:
    """Return whether only the number of epochs differs, and is larger now."""
    return [each.name for each in found] == ["max_epochs"] and int(found[0].now) > int(found[0].earlier)


def reopen(folder: Path) -> Record | None:
    """Make a finished run an interrupted one, whose record is kept as ``metrics-N-epochs.json``; return this record.

    ``None`` if the run isn't finished.
    """
    record = read_record(folder / METRICS_FILE)
    if record is not None:
        (folder / METRICS_FILE).replace(folder / f"metrics-{record['epochs']}-epochs.json")
    return record


def _is_other_world(earlier: Provenance, now: Provenance, found: Iterable[Difference]) -> bool:
    """Return whether only the number of processes differs, and each step has the same images nevertheless."""
    if not {each.name for each in found} <= {"processes", "batch_size"}:
        return False
    sizes = [each["settings"].get("processes", 0) * each["settings"].get("batch_size", 0) for each in (earlier, now)]
    return bool(sizes[0] == sizes[1])


def _in_words(found: Iterable[Difference]) -> str:
    return "; ".join(map(str, found))


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher that was trained before.

    Args:
        checkpoint: Its file; ``None``: its code loads its weights, or they are published.
        record: Its run's record; empty if there is none.
    """

    checkpoint: Path | None
    record: Record = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its file as ``--teacher_checkpoint`` names it."""
        return NONE if self.checkpoint is None else str(self.checkpoint)


def find_teacher(
    root: Path,
    folder: Path,
    *,
    data: str,
    contents: dict[str, Any],
    model: str,
    image_size: int,
    besides: Collection[FoundTeacher] = (),
    pretrained: object = None,
    fallback: FoundTeacher | None = None,
) -> FoundTeacher:
    """Return the newest finished teacher for the same data set, network and image size.

    Those that were trained on the same images come first, then those of this experiment.

    Args:
        root: The folder of all experiments.
        folder: This experiment's folder.
        data: Name of the data set.
        contents: Its training and validation images, as a provenance records them; they may have changed since.
        model: The teacher's network.
        image_size: Side of the images, in pixels.
        besides: Teachers found already; another one of the same network must have another seed.
        pretrained: What it must have been fine-tuned from, as a provenance records it; ``None``: anything.
        fallback: The teacher if there is none.

    Raises:
        UserError: If there is none and no ``fallback``; the message lists those that there are.
    """
    taken = [(teacher.record.get("model"), teacher.record.get("seed")) for teacher in besides]
    paths = _newest_first(path for pattern in _TEACHER_FOLDERS for path in root.glob(f"*/{pattern}/{METRICS_FILE}"))
    others: list[str] = []
    records = [(path, record) for path in paths if (record := read_record(path)) is not None]

    def is_farther(found: tuple[Path, Record]) -> tuple[bool, bool]:
        path, record = found
        return bool(differences(record["provenance"], {"data": contents})), folder not in path.parents

    for path, record in sorted(records, key=is_farther):
        kind = tuple(record.get(key) for key in ("data", "model", "image_size"))
        checkpoint = path.parent / BEST_CHECKPOINT
        is_new = (record["model"], record["seed"]) not in taken
        settings = record["provenance"].get("settings") or {}
        is_tuned = pretrained is None or settings.get("teacher_pretrained") == pretrained
        if kind == (data, model, image_size) and checkpoint.is_file() and is_new and is_tuned:
            return FoundTeacher(checkpoint, record)
        others.append(f"{kind[1]} for {kind[0]} at {kind[2]} px ({path.parent})")
    if fallback is not None:
        return fallback
    found = f"\n  Found: {'; '.join(others)}." if others else ""
    another = " with another seed" if any(model == name for name, _ in taken) else ""
    raise UserError(
        f"--distill: no teacher found: no finished {model}{another} for {data} at {image_size} px under {root}; train "
        f"one with --train_teacher or name one with --teacher_checkpoint.{found}"
    )


def given_teacher(checkpoint: str) -> FoundTeacher:
    """Return the teacher that ``--teacher_checkpoint`` names, with its run's record if that lies beside the file."""
    if checkpoint == NONE:
        return FoundTeacher(None)
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


def _read(path: Path, *types: type) -> Record | None:
    """Read a run's JSON file, which must have the fields of the types; ``None`` if it is missing or damaged."""
    try:
        content: Record = json.loads(path.read_text(encoding="utf-8"))
        # Earlier versions recorded only the settings.
        content.setdefault("provenance", {"settings": content.get("recipe")})
        content.setdefault("teacher_checkpoints", [])
        for each in types:
            TypeAdapter(each).validate_python(content)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return None
    return content
