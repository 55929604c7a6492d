"""What is measured: each function returns rows of the table."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import comparison, peer, start
from benchmarks.images import linked
from benchmarks.processes import Taken, Way, ratio, take_turns

Row = dict[str, Any]

PAIRS = {
    "resnet50 to resnet18": ("resnet50", "resnet18"),
    "densenet121 to simple": ("densenet121", "simple"),
    "densenet121 to mobilenet_v3_small": ("densenet121", "mobilenet_v3_small"),
}
# Whether the student of the limit trains in bfloat16 on a CPU: it is the slower way for depthwise networks.
BFLOAT16 = {"resnet18": True, "simple": True, "mobilenet_v3_small": False}


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Args:
        folder: Folder of class folders.
        temporary: Folder for what is made on the way.
        image_size: Side of the views, in pixels.
        batch_size: Images in a batch.
        rounds: Turns that each way takes.
        steps: Steps of a turn, of those that compute the teacher's outputs.
        images: Fewer and more images, between which time and memory are compared.
        small_size: Side of the views that this is compared with, in pixels.
        compared: Images to train on and to validate on, side in pixels, the teacher's epochs and a student's, of the
            ten runs.
    """

    folder: Path
    temporary: Path
    image_size: int
    batch_size: int
    rounds: int
    steps: int
    images: tuple[int, int]
    small_size: int
    compared: tuple[int, int, int, int, int]

    @property
    def sizes(self) -> dict[str, int]:
        """What all ways take alike."""
        return {"image_size": self.image_size, "batch_size": self.batch_size}


def input_alone(effort: Effort) -> list[Row]:
    """Measure the input pipeline without a network."""
    ways = {name: Way(f"{name} input", effort.folder, **effort.sizes) for name in ("plain", "our")}
    steps = {"plain": 2 * effort.steps, "our": 8 * effort.steps}
    taken = take_turns(ways, effort.rounds, steps=steps, warm_up={"plain": 1, "our": 8})
    return [_row("input alone", None, taken["our"], effort, against_plain=ratio(taken["plain"], taken["our"]))]


def pair(name: str, effort: Effort, *, device: str = "cpu") -> list[Row]:
    """Measure a pair of networks, the teacher asked and read from the store."""
    teacher, student = PAIRS[name]
    both: dict[str, Any] = {"teacher_name": teacher, "student_name": student, "device": device} | effort.sizes
    bfloat16 = BFLOAT16[student] or device != "cpu"
    store = effort.temporary / "logits"
    ways = {
        "plain": Way("plain", effort.folder, **both),
        "control": Way("plain", effort.folder, **both),
        "limit": Way("limit", effort.folder, **both, bfloat16=bfloat16, stored=False),
        "live": Way("ours", effort.folder, **both, stored=False),
        "limit stored": Way("limit", effort.folder, **both, bfloat16=bfloat16, stored=True),
        "stored": Way("ours", effort.folder, **both, stored=True, store=store),
    }
    if peer.is_there():
        ways["torchdistill"] = Way("torchdistill", effort.folder, **both)
    steps = dict.fromkeys(ways, effort.steps) | {"stored": 4 * effort.steps, "limit stored": 4 * effort.steps}
    # The store is full after an epoch.
    warm_up = dict.fromkeys(ways, 2) | {"stored": _batches(effort.folder, effort.batch_size) + 3}
    taken = take_turns(ways, effort.rounds, steps=steps, warm_up=warm_up)
    where = "" if device == "cpu" else ", GPU"
    rows = [
        _row(
            ours + where,
            name,
            taken[ours],
            effort,
            against_plain=ratio(taken["plain"], taken[ours]),
            against_limit=ratio(taken[limit], taken[ours]),
            against_torchdistill=ratio(taken["torchdistill"], taken[ours]) if "torchdistill" in taken else None,
            peak_mb={one: round(ways[one].peak_mb) for one in ("plain", limit, ours)},
        )
        for ours, limit in (("live", "limit"), ("stored", "limit stored"))
    ]
    control = ratio(taken["plain"], taken["control"])
    return [*rows, _row(f"control: plain against plain{where}", name, None, effort, against_plain=control)]


def images_and_workers(effort: Effort) -> list[Row]:
    """Measure an epoch of fewer and of more images without and with processes that load them, and the memory's peak."""
    rows = []
    both: dict[str, Any] = {"teacher_name": "resnet18", "student_name": "simple", "batch_size": effort.batch_size}
    both |= {"image_size": effort.small_size}
    for count in effort.images:
        folder = linked(effort.folder, effort.temporary / f"{count}", count)
        store = effort.temporary / "logits"
        for workers in (0, 2):
            more: dict[str, Any] = both | {"num_workers": workers}
            ways = {
                "plain": Way("plain", folder, **more),
                "ours": Way("ours", folder, **more, stored=True, store=store),
            }
            epoch = _batches(folder, effort.batch_size)
            # In the plain loop an epoch is known from a part of it.
            steps = {"plain": min(8, epoch), "ours": epoch}
            taken = take_turns(ways, 1, steps=steps, warm_up={"plain": 1, "ours": epoch})
            seconds = {one: round(taken[one][0] * epoch, 1) for one in taken}
            words = f"epoch of {count:,} images, {workers} workers"
            rows.append(
                _row(
                    words,
                    "resnet18 to simple",
                    taken["ours"],
                    effort,
                    against_plain=ratio(taken["plain"], taken["ours"]),
                    epoch_seconds=seconds,
                    peak_mb={one: round(way.peak_mb) for one, way in ways.items()},
                )
            )
    return rows


def ten_runs(effort: Effort) -> list[Row]:
    """Measure a teacher, a baseline and eight objectives from start to end."""
    train, val, size, *epochs = effort.compared
    folder = effort.temporary / "compared"
    linked(effort.folder, folder / "train", train)
    linked(effort.folder, folder / "val", val)
    lengths = dict(zip(("teacher_epochs", "epochs"), epochs, strict=True))
    given = {"image_size": size, "batch_size": effort.batch_size} | lengths
    # Ours before and after the plain loop, which takes long: a machine may be slower now than then.
    turns = [(kind, comparison.seconds(kind, folder, **given)) for kind in ("ours", "plain", "ours")]
    taken = {kind: [seconds for one, seconds in turns if one == kind] for kind in ("ours", "plain")}
    taken["plain"] *= 2
    networks = f"{comparison.TEACHER} to {comparison.STUDENT}"
    row = _row("ten runs", networks, None, effort, against_plain=ratio(taken["plain"], taken["ours"]))
    row |= {"seconds": {kind: round(statistics.fmean(one), 1) for kind, one in taken.items()}}
    return [row | {"images": train, "val_images": val, "image_size": size} | lengths]


def overhead(effort: Effort) -> list[Row]:
    """Measure what a step costs around the networks, and what comes before the first."""
    ways = {name: Way(name, effort.folder, **effort.sizes) for name in ("tiny", "tiny by hand")}
    taken = take_turns(ways, effort.rounds, steps=dict.fromkeys(ways, 400), warm_up=dict.fromkeys(ways, 100))
    step = {name: round(1000 * statistics.median(one), 3) for name, one in taken.items()}
    rows = [_row("step of a tiny network", None, None, effort, milliseconds=step)]
    commands: Taken = {command: [] for command in start.COMMANDS}
    for _ in range(min(3, effort.rounds)):
        for command, one in commands.items():
            one.append(start.seconds(command))
    started = {command: round(statistics.median(one), 2) for command, one in commands.items()}
    return [*rows, _row("start", None, None, effort, seconds=started)]


def _row(words: str, networks: str | None, ours: list[float] | None, effort: Effort, **more: Any) -> Row:
    known = dict.fromkeys(("against_plain", "against_limit", "against_torchdistill"))
    speed = None if ours is None else round(effort.batch_size / statistics.median(ours), 1)
    return {"row": words, "pair": networks, "ours_images_per_second": speed} | known | more


def _batches(folder: Path, batch_size: int) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file()) // batch_size
