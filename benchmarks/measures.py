"""The individual benchmarks; each function returns rows of the table."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import comparison, peer, start
from benchmarks.images import link_images
from benchmarks.plain import Task
from benchmarks.processes import Method, Timings, measure_alternately, speedup

Row = dict[str, Any]
PEER = "torchdistill"

PAIRS = {
    "resnet50 to resnet18": ("resnet50", "resnet18"),
    "densenet121 to simple": ("densenet121", "simple"),
    "densenet121 to mobilenet_v3_small": ("densenet121", "mobilenet_v3_small"),
}
# Whether the limit's student is trained in bfloat16 on a CPU; depthwise convolutions are slower in bfloat16.
BFLOAT16 = {"resnet18": True, "simple": True, "mobilenet_v3_small": False}


@dataclass(frozen=True)
class Effort:
    """Size of the benchmarks.

    Args:
        task: Images, image size and batch size.
        temporary: Folder for temporary files.
        rounds: Measurements per method.
        steps: Timed steps per measurement; four times as many with stored logits.
        images: Numbers of images for which time and memory of an epoch are compared.
        small_size: Side of the views in that comparison, in pixels.
        compared: Of the ten runs: training images, validation images, image size, teacher epochs, student epochs.
    """

    task: Task
    temporary: Path
    rounds: int
    steps: int
    images: tuple[int, int]
    small_size: int
    compared: tuple[int, int, int, int, int]


def input_alone(effort: Effort) -> list[Row]:
    """Measure the input pipeline without a network."""
    methods = {name: Method(f"{name} input", effort.task) for name in ("plain", "kd")}
    steps = {"plain": 2 * effort.steps, "kd": 8 * effort.steps}
    timings = measure_alternately(methods, effort.rounds, steps=steps, warm_up={"plain": 1, "kd": 8})
    return [_row("input alone", None, timings["kd"], effort, against_plain=speedup(timings["plain"], timings["kd"]))]


def pair(name: str, effort: Effort, *, device: str = "cpu") -> list[Row]:
    """Measure distillation with the teacher's logits computed in each step, and with stored logits."""
    teacher, student = PAIRS[name]
    task = replace(effort.task, teacher_name=teacher, student_name=student, device=device)
    bfloat16 = BFLOAT16[student] or device != "cpu"
    store = effort.temporary / "logits"
    methods = {
        "plain": Method("plain", task),
        "control": Method("plain", task),
        "limit": Method("limit", task, bfloat16=bfloat16, stored=False),
        "live": Method("kd", task, stored=False),
        "limit stored": Method("limit", task, bfloat16=bfloat16, stored=True),
        "stored": Method("kd", task, stored=True, store=store),
    }
    if peer.is_installed():
        methods[PEER] = Method(PEER, task)
    steps = dict.fromkeys(methods, effort.steps) | {"stored": 4 * effort.steps, "limit stored": 4 * effort.steps}
    # The store is filled in the first epoch.
    warm_up = dict.fromkeys(methods, 2) | {"stored": _batches(effort.task.folder, effort.task.batch_size) + 3}
    timings = measure_alternately(methods, effort.rounds, steps=steps, warm_up=warm_up)
    where = "" if device == "cpu" else ", GPU"
    rows = [
        _row(
            stage + where,
            name,
            timings[stage],
            effort,
            against_plain=speedup(timings["plain"], timings[stage]),
            against_limit=speedup(timings[limit], timings[stage]),
            against_torchdistill=speedup(timings[PEER], timings[stage]) if PEER in timings else None,
            peak_mb={method: round(methods[method].peak_mb) for method in ("plain", limit, stage)},
        )
        for stage, limit in (("live", "limit"), ("stored", "limit stored"))
    ]
    control = speedup(timings["plain"], timings["control"])
    return [*rows, _row(f"control: plain over plain{where}", name, None, effort, against_plain=control)]


def images_and_workers(effort: Effort) -> list[Row]:
    """Measure time and peak memory of an epoch for several numbers of images, with and without data-loading workers."""
    rows = []
    for count in effort.images:
        folder = link_images(effort.task.folder, effort.temporary / f"{count}", count)
        store = effort.temporary / "logits"
        for workers in (0, 2):
            task = replace(
                effort.task, folder=folder, image_size=effort.small_size, teacher_name="resnet18", num_workers=workers
            )
            methods = {"plain": Method("plain", task), "kd": Method("kd", task, stored=True, store=store)}
            epoch = _batches(folder, effort.task.batch_size)
            # Extrapolated to an epoch for the plain loop.
            steps = {"plain": min(8, epoch), "kd": epoch}
            timings = measure_alternately(methods, 1, steps=steps, warm_up={"plain": 1, "kd": epoch})
            seconds = {name: round(timings[name][0] * epoch, 1) for name in timings}
            title = f"epoch of {count:,} images, {workers} workers"
            rows.append(
                _row(
                    title,
                    "resnet18 to simple",
                    timings["kd"],
                    effort,
                    against_plain=speedup(timings["plain"], timings["kd"]),
                    epoch_seconds=seconds,
                    peak_mb={name: round(method.peak_mb) for name, method in methods.items()},
                )
            )
    return rows


def ten_runs(effort: Effort) -> list[Row]:
    """Measure the end-to-end duration of an experiment with a teacher, a baseline and eight objectives."""
    train, val, size, *epochs = effort.compared
    folder = effort.temporary / "compared"
    link_images(effort.task.folder, folder / "train", train)
    link_images(effort.task.folder, folder / "val", val)
    lengths = dict(zip(("teacher_epochs", "epochs"), epochs, strict=True))
    options = {"image_size": size, "batch_size": effort.task.batch_size} | lengths
    # kd runs before and after the slow plain loop, to detect changes in the speed of the machine.
    turns = [(kind, comparison.seconds(kind, folder, **options)) for kind in ("kd", "plain", "kd")]
    timings = {kind: [seconds for name, seconds in turns if name == kind] for kind in ("kd", "plain")}
    timings["plain"] *= 2
    networks = f"{comparison.TEACHER} to {comparison.STUDENT}"
    row = _row("ten runs", networks, None, effort, against_plain=speedup(timings["plain"], timings["kd"]))
    row |= {"seconds": {kind: round(statistics.fmean(seconds), 1) for kind, seconds in timings.items()}}
    return [row | {"images": train, "val_images": val, "image_size": size} | lengths]


def overhead(effort: Effort) -> list[Row]:
    """Measure the overhead per step, and the time from the command to the first step."""
    methods = {name: Method(name, effort.task) for name in ("tiny", "tiny by hand")}
    timings = measure_alternately(
        methods, effort.rounds, steps=dict.fromkeys(methods, 400), warm_up=dict.fromkeys(methods, 100)
    )
    step = {name: round(1000 * statistics.median(seconds), 3) for name, seconds in timings.items()}
    rows = [_row("step of a tiny network", None, None, effort, milliseconds=step)]
    commands: Timings = {command: [] for command in start.COMMANDS}
    for _ in range(min(3, effort.rounds)):
        for command, seconds in commands.items():
            seconds.append(start.seconds(command))
    started = {command: round(statistics.median(seconds), 2) for command, seconds in commands.items()}
    return [*rows, _row("start", None, None, effort) | {"seconds": started}]


def _row(title: str, networks: str | None, seconds: list[float] | None, effort: Effort, **more: Any) -> Row:
    ratios = dict.fromkeys(("against_plain", "against_limit", "against_torchdistill"))
    speed = None if seconds is None else round(effort.task.batch_size / statistics.median(seconds), 1)
    return {"row": title, "pair": networks, "images_per_second": speed} | ratios | more


def _batches(folder: Path, batch_size: int) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file()) // batch_size
