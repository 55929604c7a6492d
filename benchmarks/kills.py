"""Kill an experiment again and again, resume it each time, and compare its end with that of one left in peace.

``uv run python -m benchmarks.kills --kills 30 --seed 0`` trains a teacher, a student alone and a distilled one on the
digits twice: once undisturbed, and once with so many SIGKILLs at random moments. Weights, optimizer states, figures,
answers and TensorBoard's curves must be the same to the last bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]

EXPERIMENT = (
    *("--train_teacher", "--baseline", "--distill", "--dataset", "digits", "--image_size", "16", "--batch_size", "32"),
    *("--teacher_model", "convnet(widths=[16,32])", "--student_model", "convnet(widths=[8,8])", "--ema", "0.99"),
    *("--augment", "rotate", "--loss", "ce=0.5", "kl(temperature=linear(4, 2))=0.5", "--name", "digits"),
    *("--accelerator", "cpu", "--checkpoint_every", "7"),
)

# What hangs on the clock, or on where the files lie.
_OF_THE_CLOCK = frozenset(("seconds", "images_per_second", "checkpoint", "folder", "validation", "teacher_predictions"))


@dataclass(frozen=True)
class Settings:
    """How often to kill.

    Args:
        kills: SIGKILLs.
        seed: What their moments hang on.
        epochs: Epochs of each training: enough that it is not over before the last kill.
        most: The most checkpoints that are written between two kills.
        workers: Processes that load images.
    """

    kills: int = 30
    seed: int = 0
    epochs: int = 12
    most: int = 14
    workers: int = 0


def run_to_the_end(root: Path, *more: str) -> None:
    """Run the experiment undisturbed, or resume it for the last time."""
    subprocess.run(_command(root, *more), check=True, stdout=subprocess.DEVNULL, env=_surroundings(root), cwd=root)  # noqa: S603 (its own)


def run_and_kill(root: Path, *more: str, checkpoints: int, seconds: float) -> str:
    """Resume the experiment, and kill it; say in which phase that was.

    Args:
        root: Its folder.
        more: Flags besides.
        checkpoints: How many checkpoints it may write first, so that it goes on at any speed.
        seconds: How long it may go on after that.

    Returns:
        The folder that was written to last, such as ``teacher``, or ``the end`` where it was faster.
    """
    command, surroundings = _command(root, "--resume", *more), _surroundings(root)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=surroundings, cwd=root) as process:  # noqa: S603 (its own)
        if process.stdout is not None:
            process.stdout.readline()
        written, seen = -1, 0
        while process.poll() is None and written < checkpoints:
            now = _last_checkpoint(root)
            written, seen = (written, seen) if now == seen and written >= 0 else (written + 1, now)
            time.sleep(0.002)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    if process.returncode == 0:
        return "the end"
    phases = ("distilled", "baseline", "teacher")
    return next((phase for phase in phases if (root / "logs" / "digits" / phase).is_dir()), "the start")


def _last_checkpoint(root: Path) -> int:
    """Return when any phase wrote one last, in nanoseconds; 0 where none did."""
    files = (root / "logs").glob("*/*/version_0/checkpoints/last.ckpt")
    return max((path.stat().st_mtime_ns for path in files), default=0)


def differences(one: Path, other: Path) -> list[str]:
    """Compare what two experiments left: all but what hangs on the clock must be the same to the last bit."""
    found: list[str] = []
    first, second = (root / "logs" / "digits" for root in (one, other))
    for phase in ("teacher", "baseline", "distilled"):
        places = [folder / phase / "version_0" for folder in (first, second)]
        versions = [len(list((folder / phase).iterdir())) for folder in (first, second)]
        if versions != [1, 1]:
            found.append(f"{phase}: versions {versions}")
        for name in ("best", "last"):
            states = [torch.load(place / "checkpoints" / f"{name}.ckpt", weights_only=True) for place in places]
            found += [f"{phase}/{name}.ckpt: {where}" for where in _unequal(*map(_timeless, states))]
        facts = [json.loads((place / "metrics.json").read_text(encoding="utf-8")) for place in places]
        found += [f"{phase}/metrics.json: {where}" for where in _unequal(*map(_timeless, facts))]
        one_said, other_said = (dict(np.load(place / "validation.npz")) for place in places)
        found += [f"{phase}/validation.npz: {where}" for where in _unequal(one_said, other_said)]
        one_curves, other_curves = map(_curves, places)
        found += [f"{phase}, TensorBoard: {where}" for where in _unequal(one_curves, other_curves)]
    return found


def _command(root: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "experiment.py"), *EXPERIMENT, "--default_root_dir", str(root / "logs"), *more]


def _surroundings(root: Path) -> dict[str, str]:
    return os.environ | {"KD_CACHE": str(root / "cache"), "PYTHONPATH": str(ROOT)}


def _timeless(value: Any) -> Any:  # noqa: ANN401 (a checkpoint or a file of facts)
    """Leave out what hangs on the clock, and how often something was looked at."""
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if _hangs_on_nothing(str(key))}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _hangs_on_nothing(key: str) -> bool:
    # ModelCheckpoint keeps the paths of its files; a teacher is named by its path; loops count their restarts.
    parts = ("path", "kth_", "best_k", "current_score", "Throughput")
    return key not in _OF_THE_CLOCK and key not in ("teacher", "loops") and not any(part in key for part in parts)


def _unequal(one: Any, other: Any, where: str = "") -> list[str]:  # noqa: ANN401 (likewise)
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [line for key in one for line in _unequal(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for index, pair in pairs for line in _unequal(*pair, f"{where}/{index}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, other) else [where]
    return [] if one == other else [f"{where}: {one} and {other}"]


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = (tag for tag in events.Tags()["scalars"] if tag != "images_per_second")
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def main() -> int:
    """Do it; return the exit status."""
    settings = tyro.cli(Settings, prog="python -m benchmarks.kills", use_underscores=True)
    console = Console()
    moments = random.Random(settings.seed)  # noqa: S311 (no secret)
    more = ("--max_epochs", str(settings.epochs), "--num_workers", str(settings.workers))
    with tempfile.TemporaryDirectory() as folder:
        peaceful, killed = Path(folder) / "peaceful", Path(folder) / "killed"
        for root in (peaceful, killed):
            root.mkdir()
        start = time.perf_counter()
        run_to_the_end(peaceful, *more)
        console.print(f"undisturbed: {time.perf_counter() - start:.0f} s", highlight=False)
        phases = Counter(
            run_and_kill(killed, *more, checkpoints=moments.randint(0, settings.most), seconds=moments.uniform(0, 0.1))
            for _ in range(settings.kills)
        )
        console.print(f"killed in: {dict(phases)}", highlight=False)
        run_to_the_end(killed, "--resume", *more)
        found = differences(peaceful, killed)
    for line in found:
        console.print(line, highlight=False, markup=False)
    console.print("the same to the last bit" if not found else f"{len(found)} differences", highlight=False)
    return int(bool(found) or "the end" in phases)


if __name__ == "__main__":
    sys.exit(main())
